// SPDX-License-Identifier: GPL-2.0
//! The filter and the table over CPUs made up for the purpose: one like AMD's Zen 4, one like Intel's Ice Lake.
#![forbid(unsafe_code)]

use super::cpuid::{is_indexed, supported, xsave_bytes, HostFeatures, TooSmall, PV_FEATURES};
use super::cpuid_table::{BadTable, CpuidTable, Dynamic};
use super::GuestCaps;
use crate::abi::vcpu::{KvmCpuidEntry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use crate::abi::FromZeros;
use crate::arch::cpuid::*;
use crate::arch::cr::{cr4, efer};
use crate::policy::pmu::PmuCaps;
use std::{collections::BTreeMap, vec, vec::Vec};

const fn name(text: &[u8; 12]) -> [u32; 3] {
    [
        u32::from_le_bytes([text[0], text[1], text[2], text[3]]),
        u32::from_le_bytes([text[4], text[5], text[6], text[7]]),
        u32::from_le_bytes([text[8], text[9], text[10], text[11]]),
    ]
}

/// XSAVE components 2 and 5 to 9 as every AVX-512 CPU with PKU lays them out.
fn xsave_component(index: u32) -> [u32; 4] {
    match index {
        2 => [256, 576, 0, 0],
        5 => [64, 832, 0, 0],
        6 => [512, 896, 0, 0],
        7 => [1024, 1408, 0, 0],
        9 => [8, 2432, 0, 0],
        _ => [0; 4],
    }
}

fn zen4(function: u32, index: u32) -> [u32; 4] {
    let [b, d, c] = name(b"AuthenticAMD");
    match (function, index) {
        (0, _) => [0x10, b, c, d],
        (1, _) => [0x00A1_0F11, 0x0520_0800, 0xFFFF_FFFF, 0xFFFF_FFFF],
        (5, _) => [0x40, 0x40, 3, 0x11],
        (6, _) => [0xFFFF_FFFF, 2, 1, 0],
        (7, 0) => [1, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF],
        (7, 1) => [0xFFFF_FFFF; 4],
        (0xB, 0) => [1, 2, 0x100, 5],
        (0xB, 1) => [5, 16, 0x201, 5],
        (0xD, 0) => [0x2E7, 2440, 2440, 0],
        (0xD, 1) => [0xF, 2440, 0x1800, 0],
        (0xD, index) => xsave_component(index),
        (0x8000_0000, _) => [0x8000_0028, b, c, d],
        (0x8000_0001, _) => [0x00A1_0F11, 0x4FFF_1234, 0xFFFF_FFFF, 0xFFFF_FFFF],
        (0x8000_0002..=0x8000_0006, _) => [function, 1, 2, 3],
        (0x8000_0007, _) => [1, 2, 3, 0xFFFF_FFFF],
        (0x8000_0008, _) => [0x0030_3934, 0xFFFF_FFFF, 0x700F, 0x1_0007],
        (0x8000_000A, _) => [1, 0x8000, 0, 0xFFFF_FFFF],
        (0x8000_001D, index) if index < 4 => [0x4000 + (index + 1) % 4, index, 3, 4],
        (0x8000_001D, _) => [0; 4],
        (0x8000_0021, _) => [0xFFFF_FFFF; 4],
        (0x8000_0009..=0x8000_0028, _) => [0xFFFF_FFFF; 4],
        _ => [0; 4],
    }
}

fn icelake(function: u32, index: u32) -> [u32; 4] {
    let [b, d, c] = name(b"GenuineIntel");
    match (function, index) {
        (0, _) => [0x1B, b, c, d],
        (1, _) => [0x0006_06A6, 0x0110_0800, 0xFFFF_FFFF, 0xFFFF_FFFF],
        (4, index) if index < 4 => [1 + index, 5, 6, 7],
        (4, _) => [0; 4],
        (7, 0) => [0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF],
        (0xD, 0) => [0x2E7, 2440, 2440, 0],
        (0xD, 1) => [0xF, 2440, 0x1800, 0],
        (0xD, index) => xsave_component(index),
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0001, _) => [0, 0, 0x121, 0x2C10_0800],
        (0x8000_0002..=0x8000_0006, _) => [function, 1, 2, 3],
        (0x8000_0007, _) => [0, 0, 0, 0x100],
        (0x8000_0008, _) => [0x392E, 0, 0, 0],
        // An Intel CPU answers what is out of range with its highest basic leaf.
        _ => [7, 7, 7, 7],
    }
}

const FULL: HostFeatures = HostFeatures {
    xcr0: 0x2E7,
    xsaves: true,
    tsc_aux: true,
    spec_ctrl: true,
    lfence_serializing: true,
    invariant_tsc: true,
    la57: true,
    nested_address_bits: 48,
    pv_features: PV_FEATURES,
    pmu: PmuCaps::NONE,
};

const POOR: HostFeatures = HostFeatures {
    xcr0: 0,
    xsaves: false,
    tsc_aux: false,
    spec_ctrl: false,
    lfence_serializing: false,
    invariant_tsc: false,
    la57: false,
    nested_address_bits: 40,
    pv_features: 0,
    pmu: PmuCaps::NONE,
};

fn table(host: impl Fn(u32, u32) -> [u32; 4], features: &HostFeatures) -> CpuidTable<Vec<KvmCpuidEntry2>> {
    let mut entries = vec![KvmCpuidEntry2::new_zeroed(); 256];
    let count = supported(host, features, &mut entries).unwrap();
    entries.truncate(count);
    CpuidTable::new(entries).unwrap()
}

fn entry(function: u32, index: Option<u32>, registers: [u32; 4]) -> KvmCpuidEntry2 {
    let [eax, ebx, ecx, edx] = registers;
    let flags = if index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    KvmCpuidEntry2 { function, index: index.unwrap_or(0), flags, eax, ebx, ecx, edx, padding: [0; 3] }
}

#[test]
fn what_is_not_virtualized_is_not_shown() {
    for features in [FULL, POOR] {
        for host in [zen4, icelake] {
            let table = table(host, &features);
            let [_, _, ecx, edx] = table.leaf(1, 0);
            // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, xTPR, PDCM, DCA, OSXSAVE.
            assert_eq!(ecx & (1 << 2 | 0x1F8 & !(1 << 9) | 1 << 10 | 1 << 14 | 1 << 15 | 1 << 18 | 1 << 27), 0);
            // PSN, DS, ACPI, HTT, TM, PBE.
            assert_eq!(edx & (1 << 18 | 1 << 21 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 31), 0);
            let [_, ebx, ecx, edx] = table.leaf(7, 0);
            // SGX, HLE, RTM, PQM, MPX, PQE, PT.
            assert_eq!(ebx & (1 << 2 | 1 << 4 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 25), 0);
            // OSPKE, WAITPKG, CET_SS, TME, KL, BUS_LOCK, ENQCMD, SGX_LC, PKS.
            assert_eq!(ecx & (1 << 4 | 1 << 5 | 1 << 7 | 1 << 13 | 1 << 23 | 1 << 24 | 7 << 29), 0);
            // UINTR, TSX_FORCE_ABORT, HYBRID, TSXLDTRK, PCONFIG, LBR, CET_IBT, AMX.
            assert_eq!(edx & (1 << 5 | 1 << 11 | 1 << 13 | 1 << 15 | 0x1F << 16 & !(1 << 17) | 1 << 22 | 3 << 24), 0);
            let [_, _, ecx, _] = table.leaf(0x8000_0001, 0);
            // SVM, ExtApicSpace, IBS, SKINIT, WDT, LWP, TCE, NodeId, the performance counters, MONITORX.
            assert_eq!(
                ecx & (1 << 2 | 1 << 3 | 1 << 10 | 7 << 12 | 1 << 15 | 1 << 17 | 1 << 19 | 3 << 23 | 0xF << 26),
                0
            );
            for dark in [5, 0xA, 0xB, 0xF, 0x10, 0x12, 0x14, 0x8000_000A, 0x8000_001B, 0x8000_001E, 0x8000_001F] {
                assert_eq!(table.leaf(dark, 0), [0; 4], "{dark:#x}");
            }
            assert_eq!(table.leaf(6, 0), [4, 0, 0, 0]);
            assert_eq!(table.leaf(0xD, 1)[0] & !0xF, 0, "XFD");
            assert_eq!(table.leaf(0xD, 1)[2..], [0; 2], "supervisor states");
            assert!(table.entries().iter().all(|entry| entry.function <= 0x8000_0021));
        }
    }
}

#[test]
fn what_is_emulated_is_always_shown() {
    let table = table(|function, _| if function == 0 { [7, 0, 0, 0] } else { [0; 4] }, &POOR);
    let [_, _, ecx, edx] = table.leaf(1, 0);
    assert_eq!(ecx, 1 << 21 | 1 << 24 | 1 << 31);
    assert_eq!(edx, 1 << 9 | 1 << 12 | 1 << 14 | 1 << 16);
    assert_eq!(table.leaf(7, 0), [0, 2, 0, 0]);
    assert_eq!(table.leaf(0x4000_0000, 0)[1..], KVM_SIGNATURE);
}

#[test]
fn features_need_what_the_module_switches() {
    let poor = table(zen4, &POOR);
    assert_eq!(poor.leaf(1, 0)[2] & (1 << 12 | 1 << 26 | 1 << 28 | 1 << 29), 0, "FMA XSAVE AVX F16C");
    assert_eq!(poor.leaf(7, 0)[1] & (1 << 5 | 0xD003 << 16), 0, "AVX2, AVX-512");
    assert_eq!(poor.leaf(7, 0)[2] & (1 << 3 | 1 << 16 | 1 << 22), 0, "PKU LA57 RDPID");
    assert_eq!(poor.leaf(7, 0)[3] & (3 << 26 | 1 << 28 | 1 << 31), 0, "SPEC_CTRL STIBP L1D_FLUSH SSBD");
    assert_eq!(poor.leaf(0xD, 0), [0; 4]);
    assert_eq!(poor.leaf(0x8000_0001, 0)[3] >> 27 & 1, 0, "RDTSCP");
    assert_eq!(poor.leaf(0x8000_0007, 0), [0; 4]);
    assert_eq!(poor.leaf(0x8000_0008, 0)[0], 0x0028_3034);
    assert_eq!(poor.leaf(0x8000_0008, 0)[1] & (1 << 12 | 3 << 14 | 1 << 24), 0, "IBPB IBRS STIBP SSBD");

    let full = table(zen4, &FULL);
    assert_eq!(full.leaf(0x8000_0008, 0)[0], 0x0030_3934);
    assert_eq!(full.leaf(0x8000_0007, 0), [0, 0, 0, 0x100]);
    assert_eq!(full.leaf(1, 0)[1], 0x0800, "the host's APIC id stays the host's");
    let avx_only = table(zen4, &HostFeatures { xcr0: 7, ..FULL });
    assert_eq!(avx_only.leaf(7, 0)[1] >> 5 & 1, 1);
    assert_eq!(avx_only.leaf(7, 0)[1] & 0xD003 << 16 & !(1 << 18 | 1 << 19), 0, "AVX-512");
    assert_eq!(avx_only.leaf(0xD, 0), [7, 832, 832, 0]);
}

#[test]
fn shape_of_the_table() {
    let amd = table(zen4, &FULL);
    // The clients' own arrays have 80 places.
    assert!(amd.entries().len() <= 80, "{}", amd.entries().len());
    assert_eq!(amd.leaf(0, 0)[0], 0x10);
    assert_eq!(amd.leaf(0x8000_0000, 0)[0], 0x8000_0021);
    assert_eq!(amd.leaf(0x8000_001D, 2), [0x4003, 2, 3, 4]);
    assert!(amd.find(0x8000_001D, 3).is_some_and(|last| last.eax & 0x1F == 0));
    assert!(amd.find(0x8000_001D, 4).is_none());
    assert_eq!(amd.leaf(0xD, 0), [0x2E7, 2440, 2440, 0]);
    assert_eq!(amd.leaf(0xD, 1), [0xF, 2440, 0, 0]);
    assert_eq!(amd.leaf(0xD, 7), [1024, 1408, 0, 0]);
    assert!(amd.find(0xD, 3).is_none());
    assert_eq!(amd.leaf(0x4000_0001, 0), [0x0100_28EB, 0, 0, 0]);
    for entry in amd.entries() {
        assert_eq!(entry.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX, is_indexed(entry.function));
    }

    let intel = table(icelake, &FULL);
    assert_eq!(intel.leaf(0x8000_0000, 0)[0], 0x8000_0008, "no leaf 8000_0021h on a CPU that ends before 8000_001Dh");
    assert_eq!(intel.leaf(0x8000_0001, 0)[3] & 0x3FF, 0, "Intel does not repeat leaf 1");
    assert_eq!(intel.leaf(4, 3), [4, 5, 6, 7]);

    // Leaf 8000_0021h is made up where the host has everything but it.
    let zen1 = |function, index| match function {
        0x8000_0000 => [0x8000_001F, 0, 0, 0],
        0x8000_0020.. => [0x55; 4],
        _ => zen4(function, index),
    };
    assert_eq!(table(zen1, &FULL).leaf(0x8000_0021, 0), [1 << 2 | 1 << 9, 0, 0, 0]);
}

#[test]
fn too_small_is_said_and_nothing_lies_outside() {
    let needed = table(zen4, &FULL).entries().len();
    for room in 0..needed {
        let mut out = vec![KvmCpuidEntry2::new_zeroed(); room];
        assert_eq!(supported(zen4, &FULL, &mut out), Err(TooSmall), "{room}");
    }
    let mut exact = vec![KvmCpuidEntry2::new_zeroed(); needed];
    assert_eq!(supported(zen4, &FULL, &mut exact), Ok(needed));
}

/// A host that claims everything, without end, must not make the filter loop or overflow.
#[test]
fn absurd_hosts() {
    let mut out = vec![KvmCpuidEntry2::new_zeroed(); 256];
    for value in [u32::MAX, 0x8000_0000, 0, 1] {
        let count = supported(|_, _| [value; 4], &HostFeatures { xcr0: u64::MAX, ..FULL }, &mut out);
        assert!(count.is_ok_and(|count| count > 0));
    }
    assert_eq!(xsave_bytes(u64::MAX, true, |_| [u32::MAX; 4]), u32::MAX);
}

#[test]
fn compacted_components_are_packed_and_aligned() {
    let component = |index| match index {
        2 => [256, 576, 0, 0],
        9 => [8, 2432, 0, 0],
        11 => [16, 0, 3, 0],
        12 => [24, 0, 1, 0],
        _ => [0; 4],
    };
    assert_eq!(xsave_bytes(3, true, component), 576);
    assert_eq!(xsave_bytes(0x207, true, component), 840);
    assert_eq!(xsave_bytes(0xA07, true, component), 896 + 16);
    assert_eq!(xsave_bytes(0x1A07, true, component), 896 + 16 + 24);
    assert_eq!(xsave_bytes(0x207, false, component), 2440);
}

#[test]
fn queries_follow_the_registers() {
    let table = table(zen4, &FULL);
    let off = Dynamic { cr4: 0, apic_enabled: false, xcr0: 1, xss: 0, mwait: None };
    let on = Dynamic { cr4: cr4::OSXSAVE | cr4::PKE, apic_enabled: true, xcr0: 0x2E7, xss: 0, mwait: None };
    let bits = |dynamic| {
        let [_, _, ecx, edx] = table.query(1, 0x1234, dynamic);
        (ecx >> 27 & 1, edx >> 9 & 1, table.query(7, 0, dynamic)[2] >> 4 & 1)
    };
    assert_eq!((bits(&off), bits(&on)), ((0, 0, 0), (1, 1, 1)));
    assert_eq!((table.query(0xD, 0, &off)[1], table.query(0xD, 0, &on)[1]), (576, 2440));
    assert_eq!((table.query(0xD, 1, &off)[1], table.query(0xD, 1, &on)[1]), (576, 2440));
    assert_eq!(table.leaf(1, 0)[3] >> 9 & 1, 1, "what is stored does not change");
}

#[test]
fn lookups_agree_with_a_linear_scan() {
    // Duplicates, mixed flags, colliding leaves, a full table.
    let mut state = 0x1234_5678_9ABC_DEF0u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..200 {
        let bases = [0u32, 0x4000_0000, 0x8000_0000, 0xC000_0000];
        let entries: Vec<_> = (0..if round % 2 == 0 { 256 } else { 20 })
            .map(|number| {
                let function = bases[random() as usize % 4] + random() as u32 % 40;
                let index = if random() % 2 == 0 { Some(random() as u32 % 4) } else { None };
                let function = if function == 0x8000_0008 { 1 } else { function };
                entry(function, index, [number, 0, 0, 0])
            })
            .collect();
        let table = CpuidTable::new(entries.clone()).unwrap();
        for base in bases {
            for function in base..base + 45 {
                for index in 0..5 {
                    let expected = entries
                        .iter()
                        .find(|entry| entry.function == function && (entry.flags == 0 || entry.index == index));
                    assert_eq!(table.find(function, index), expected);
                }
            }
        }
    }
}

#[test]
fn missing_leaves_answer_as_the_vendor_does() {
    let [b, d, c] = name(b"GenuineIntel");
    let basic = |ebx, ecx, edx| entry(0, None, [0xB, ebx, ecx, edx]);
    let rest = [
        entry(1, None, [0x11; 4]),
        entry(0xB, Some(0), [1, 2, 3, 0x77]),
        entry(0xB, Some(1), [4, 5, 6, 0x77]),
        entry(0x8000_0000, None, [0x8000_0004, 0, 0, 0]),
        entry(0x4000_0000, None, [0x4000_0001, 0, 0, 0]),
    ];
    let dynamic = Dynamic::default();
    let intel: Vec<_> = [basic(b, c, d)].into_iter().chain(rest).collect();
    let intel = CpuidTable::new(intel).unwrap();
    assert_eq!(intel.query(5, 0, &dynamic), [0; 4], "in range, not there");
    assert_eq!(intel.query(0x33, 1, &dynamic), [4, 5, 6, 0x77], "the highest basic leaf, same index");
    assert_eq!(intel.query(0x33, 0x109, &dynamic), [0, 0, 9, 0x77], "its missing subleaf");
    assert_eq!(intel.query(0xB, 0x203, &dynamic), [0, 0, 3, 0x77]);
    assert_eq!(intel.query(0x8000_0003, 0, &dynamic), [0; 4]);
    assert_eq!(intel.query(0x8000_0005, 0, &dynamic), [1, 2, 3, 0x77]);
    assert_eq!(intel.query(0x4000_0002, 0, &dynamic), [1, 2, 3, 0x77]);
    assert_eq!(intel.query(0x4000_0100, 0, &dynamic), [1, 2, 3, 0x77], "a class of its own");
    assert_eq!(intel.query(0xC000_0000, 0, &dynamic), [1, 2, 3, 0x77]);

    let [b, d, c] = name(b"AuthenticAMD");
    let amd: Vec<_> = [basic(b, c, d)].into_iter().chain(rest).collect();
    let amd = CpuidTable::new(amd).unwrap();
    for function in [5, 0x33, 0x8000_0005, 0x4000_0100, 0xC000_0000, u32::MAX] {
        assert_eq!(amd.query(function, 0, &dynamic), [0; 4], "{function:#x}");
    }
    assert_eq!(amd.query(0xB, 7, &dynamic), [0, 0, 7, 0x77]);
    let empty = CpuidTable::new(Vec::new()).unwrap();
    assert_eq!(empty.query(0, 0, &dynamic), [0; 4]);
}

#[test]
fn bad_tables_are_refused() {
    let refused = |entries: Vec<KvmCpuidEntry2>| CpuidTable::new(entries).err();
    assert_eq!(refused(vec![entry(3, None, [0; 4]); 257]), Some(BadTable::TooMany));
    assert_eq!(refused(vec![entry(3, None, [0; 4]); 256]), None);
    for (bits, expected) in [(0, None), (48, None), (57, None), (49, Some(BadTable::LinearAddressBits))] {
        assert_eq!(refused(vec![entry(0x8000_0008, None, [bits << 8 | 40, 0, 0, 0])]), expected, "{bits}");
    }
}

#[test]
fn the_same_table_may_be_set_again() {
    let entries = vec![entry(1, None, [1, 2, 3, 4]), entry(7, Some(0), [5, 6, 7, 8])];
    let table = CpuidTable::new(entries.clone()).unwrap();
    let dynamic = Dynamic { cr4: cr4::OSXSAVE, apic_enabled: true, ..Dynamic::default() };
    assert!(table.same_as(&entries, &dynamic));
    assert!(!table.same_as(&entries[..1], &dynamic));
    let mut other = entries.clone();
    other[1].edx ^= 1;
    assert!(!table.same_as(&other, &dynamic));
    let mut padded = entries;
    padded[0].padding = [1, 2, 3];
    assert!(table.same_as(&padded, &dynamic), "padding means nothing");
    let read_back: Vec<_> = table.entries().iter().map(|entry| table.current(entry, &dynamic)).collect();
    assert_ne!(read_back[0].ecx, 3);
    assert!(table.same_as(&read_back, &dynamic), "what the guest's state decides is no difference");
}

#[test]
fn limits_that_follow() {
    let table = table(zen4, &FULL);
    let caps = GuestCaps::derive(|function, index| table.leaf(function, index));
    assert_eq!((caps.vendor, caps.family, caps.physical_bits), (Vendor::Amd, 0x19, 52));
    assert_eq!(caps.xcr0, 0x2E7);
    let expected = cr4::PCIDE | cr4::OSXSAVE | cr4::FSGSBASE | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::PKE | cr4::LA57;
    assert_eq!(caps.cr4 & !0x7FF, expected);
    assert_eq!(caps.cr4 & (cr4::VMXE | 1 << 14 | 1 << 23), 0, "VMXE SMXE CET");
    assert_eq!(caps.efer, efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::FFXSR | efer::AIBRSE);
    assert!(caps.rdtscp && caps.tsc_aux && caps.x2apic && caps.tsc_deadline && caps.long_mode && caps.page_1g);
    assert_eq!((caps.spec_ctrl, caps.pred_cmd), (0x87, 0x81));
    assert_eq!(caps.within(&caps), caps);
}

/// Where the filter departs from KVM's on purpose: leaf, subleaf, and per register the bits that may differ.
const DEPARTURES: &[(u32, u32, [u32; 4])] = &[
    // KVM shows ARCH_CAPABILITIES, which is Intel's, to everybody.
    (7, 0, [0, 0, 0, leaf7_edx::ARCH_CAPABILITIES]),
    (KVM_FEATURES_LEAF, 0, [u32::MAX, 0, 0, 0]),
    // Performance monitoring, version 2, would be in leaf 8000_0022h.
    (0x8000_0000, 0, [3, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, ext1_ecx::SVM, 0]),
    // KVM hides the brand string.
    (0x8000_0002, 0, [u32::MAX; 4]),
    (0x8000_0003, 0, [u32::MAX; 4]),
    (0x8000_0004, 0, [u32::MAX; 4]),
    // VIRT_SSBD: an MSR that is not emulated.
    (0x8000_0008, 0, [0, 1 << 25, 0, 0]),
    (0x8000_000A, 0, [u32::MAX; 4]),
    // #GP for CPUID outside the kernel.
    (0x8000_0021, 0, [1 << 17, 0, 0, 0]),
];

/// KVM on the same CPU is the oracle.
#[test]
fn agrees_with_kvm() {
    for text in [include_str!("oracle/epyc-v4.txt"), include_str!("oracle/epyc-genoa.txt")] {
        let mut host = BTreeMap::new();
        let mut kvm = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let numbers: Vec<u32> =
                line.split(' ').skip(1).map(|number| u32::from_str_radix(number, 16).unwrap()).collect();
            match (line.as_bytes()[0], &numbers[..]) {
                (b'H', &[f, i, a, b, c, d]) => _ = host.insert((f, i), [a, b, c, d]),
                (b'K', &[f, i, flags, a, b, c, d]) => _ = kvm.insert((f, i), (flags, [a, b, c, d])),
                _ => panic!("{line}"),
            }
        }
        let cpu = |function, index| host.get(&(function, index)).copied().unwrap_or([0; 4]);
        let ours = table(cpu, &HostFeatures { xcr0: cpu(0xD, 0)[0].into(), ..FULL });
        for entry in ours.entries() {
            let key = (entry.function, entry.index);
            let (flags, theirs) = kvm.remove(&key).unwrap_or_else(|| panic!("KVM has no {key:x?}"));
            let known = DEPARTURES.iter().find(|known| (known.0, known.1) == key).map_or([0; 4], |known| known.2);
            assert_eq!(entry.flags, flags, "{key:x?}");
            for (register, ours) in ours.leaf(key.0, key.1).into_iter().enumerate() {
                let differ = (ours ^ theirs[register]) & !known[register];
                assert_eq!(differ, 0, "{key:x?} register {register}: {ours:#x}, KVM {:#x}", theirs[register]);
            }
        }
        assert!(kvm.keys().all(|key| *key == (0x8000_0022, 0)), "only KVM has {kvm:x?}");
    }
}

#[test]
fn a_guest_that_sleeps_by_itself_is_not_promised_a_kick() {
    use crate::policy::cpuid_table::withhold_unhalt;
    let [ebx, ecx, edx] = KVM_SIGNATURE;
    let leaf = |function, eax, [ebx, ecx, edx]: [u32; 3]| KvmCpuidEntry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..KvmCpuidEntry2::default()
    };
    let features = leaf(KVM_FEATURES_LEAF, u32::MAX, [0; 3]);
    let mut table = [leaf(KVM_SIGNATURE_LEAF, KVM_FEATURES_LEAF, [ebx, ecx, edx]), features];
    withhold_unhalt(&mut table);
    assert_eq!(table[1].eax, !kvm_eax::PV_UNHALT);
    let mut foreign = [leaf(KVM_SIGNATURE_LEAF, KVM_FEATURES_LEAF, [ebx, ecx, !edx]), features];
    withhold_unhalt(&mut foreign);
    assert_eq!(foreign[1].eax, u32::MAX, "another hypervisor's");
}
