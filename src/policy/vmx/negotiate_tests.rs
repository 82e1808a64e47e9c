// SPDX-License-Identifier: GPL-2.0
//! Tests of the negotiation: real CPUs, and CPUs that lack or force one thing.
#![forbid(unsafe_code)]

use std::string::ToString;

use super::{
    cpus::*,
    negotiate::{enabled_by_firmware, Word, CR3_EXITING},
    *,
};
use crate::arch::{
    cr::{cr0, cr4},
    msr,
    vmcs::{
        caps::{ept_vpid, Basic, InveptType, InvvpidType},
        control::{entry, exit, pin, primary, secondary},
    },
};

fn config(cpu: &Cpu) -> Config {
    negotiate(&cpu.msrs, Options::ALL).unwrap_or_else(|refusal| panic!("{}: {refusal}", cpu.name))
}

#[test]
fn old_cpus_are_refused_for_what_they_lack() {
    assert_eq!(negotiate(&VIA_L4700.msrs, Options::ALL), Err(Refusal::NoSecondaryControls));
}

const GOOD: [Cpu; 12] = [
    NEHALEM,
    WESTMERE,
    SANDY_BRIDGE,
    HASWELL,
    BROADWELL,
    SKYLAKE_CLIENT,
    SKYLAKE_SP,
    ICE_LAKE_SP,
    SAPPHIRE_RAPIDS,
    YONGFENG,
    BOCHS_SKYLAKE_X,
    BOCHS_TIGERLAKE,
];

/// The rule of the manual: a bit that must be 1 is, and one that may not be is not.
fn legal(value: u32, msr: u64) -> bool {
    value & msr as u32 == msr as u32 && value & !(msr >> 32) as u32 == 0
}

#[test]
fn chosen_controls_are_legal() {
    for cpu in &GOOD {
        for apicv in [false, true] {
            let controls = negotiate(&cpu.msrs, Options { apicv, ..Options::ALL }).unwrap().controls;
            for (value, msr) in [
                (controls.pin, cpu.msrs.true_pin),
                (controls.primary, cpu.msrs.true_primary),
                (controls.secondary, cpu.msrs.secondary),
                (controls.exit, cpu.msrs.true_exit),
                (controls.entry, cpu.msrs.true_entry),
            ] {
                assert!(legal(value, msr), "{}: {value:#x} {msr:#x}", cpu.name);
            }
            assert_eq!(controls.primary & (primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING), 0);
            assert_eq!(controls.pin & (pin::PREEMPTION_TIMER | pin::POSTED_INTERRUPTS), 0, "comes later");
            assert_eq!(controls.entry & entry::IA32E_MODE_GUEST, 0, "comes with the guest's mode");
        }
    }
}

#[test]
fn exact_words_of_two_cpus() {
    let haswell = config(&HASWELL);
    assert_eq!(haswell.revision, 0x12);
    assert_eq!(
        haswell.controls,
        Controls { pin: 0x3F, primary: 0xB580_6DFA, secondary: 0x10EA, exit: 0x002B_6FFF, entry: 0x0000_D1FF },
        "{:#x?}",
        haswell.controls
    );
    let bochs = config(&BOCHS_SKYLAKE_X);
    assert_eq!(bochs.controls.secondary, 0x10_10EA);
    assert_eq!(bochs.controls.pin, haswell.controls.pin);
}

#[test]
fn features_of_real_cpus() {
    let haswell = config(&HASWELL).features;
    assert_eq!((haswell.preemption_timer, haswell.invept), (Some(5), InveptType::Single));
    assert_eq!(haswell.vpid, Some(InvvpidType::Single));
    assert!(haswell.virtual_interrupts && haswell.posted_interrupts && haswell.page_1g);
    assert!(!haswell.pml && !haswell.tsc_scaling && !haswell.xsaves && !haswell.zero_length_injection);
    let client = config(&SKYLAKE_CLIENT).features;
    assert!(client.pml && client.mode_based_execute && client.encls_exiting && client.advanced_exit_info);
    assert!(!client.virtual_interrupts && !client.apic_registers && !client.posted_interrupts);
    assert!(client.apic_access && client.x2apic_mode && client.tpr_shadow);
    assert!(config(&ICE_LAKE_SP).features.five_levels);
    let bochs = config(&BOCHS_SKYLAKE_X).features;
    assert_eq!(bochs.preemption_timer, Some(0));
    assert!(bochs.tsc_scaling && bochs.posted_interrupts && bochs.pause_loop_exiting && !bochs.any_error_code);
    assert!(config(&BOCHS_TIGERLAKE).features.any_error_code);
}

#[test]
fn accessed_and_dirty_bits_came_with_haswell() {
    for cpu in &GOOD {
        let old = ["Nehalem", "Westmere", "Sandy Bridge"].contains(&cpu.name);
        assert_eq!(config(cpu).features.accessed_dirty, !old, "{}", cpu.name);
        let without = negotiate(&cpu.msrs, Options { accessed_dirty: false, ..Options::ALL }).unwrap();
        assert!(!without.features.accessed_dirty, "{}", cpu.name);
    }
}

#[test]
fn guests_of_nehalem_are_emulated_at_times() {
    for cpu in &GOOD {
        let free = cr0::PE | cr0::PG;
        let able = config(cpu);
        assert_eq!(able.features.unrestricted_guest, cpu.name != "Nehalem", "{}", cpu.name);
        assert_eq!(able.cr0.ones & free, if cpu.name == "Nehalem" { free } else { 0 });
        let unable = negotiate(&cpu.msrs, Options { unrestricted_guest: false, ..Options::ALL }).unwrap();
        assert_eq!(unable.controls.secondary & secondary::UNRESTRICTED_GUEST, 0, "{}", cpu.name);
        assert_eq!(unable.cr0.ones & free, free);
        assert_eq!(unable.controls.primary & CR3_EXITING, 0, "{}: only while it has no paging", cpu.name);
        let msrs = without(cpu, Word::Primary, CR3_EXITING);
        assert!(negotiate(&msrs, Options { unrestricted_guest: false, ..Options::ALL }).is_err(), "{}", cpu.name);
        assert!(!unable.features.virtual_interrupts && !unable.features.apic_access, "{}", cpu.name);
    }
}

#[test]
fn the_administrator_turns_features_off() {
    for cpu in &GOOD {
        let off = Options { apicv: false, pml: false, preemption_timer: None, ..Options::ALL };
        let features = negotiate(&cpu.msrs, off).unwrap().features;
        let off = [
            features.apic_access,
            features.apic_registers,
            features.virtual_interrupts,
            features.x2apic_mode,
            features.posted_interrupts,
            features.pml,
            features.preemption_timer.is_some(),
        ];
        assert_eq!(off, [false; 7], "{}", cpu.name);
        assert!(features.tpr_shadow);
    }
}

#[test]
fn errata_take_features_away() {
    let with_signature = |signature| {
        let msrs = CapabilityMsrs { signature, ..HASWELL.msrs };
        negotiate(&msrs, Options::ALL).unwrap().features
    };
    assert_eq!(with_signature(0x206E6).preemption_timer, None);
    assert!(!with_signature(0x206E6).saves_preemption_timer && !with_signature(0x206E6).perf_global_ctrl);
    assert!(!with_signature(0x20652).perf_global_ctrl);
    assert!(with_signature(0x306C3).perf_global_ctrl);
    assert_eq!(with_signature(0x306C3).preemption_timer, Some(5));
}

/// Takes allowed-1 bits away from a word and its TRUE twin.
fn without(cpu: &Cpu, word: Word, bits: u32) -> CapabilityMsrs {
    change(cpu, word, |msr| msr & !(u64::from(bits) << 32))
}

/// Makes bits of a word and its TRUE twin always 1.
fn forcing(cpu: &Cpu, word: Word, bits: u32) -> CapabilityMsrs {
    change(cpu, word, |msr| msr | u64::from(bits))
}

fn change(cpu: &Cpu, word: Word, change: impl Fn(u64) -> u64) -> CapabilityMsrs {
    let mut msrs = cpu.msrs;
    let (plain, exact) = match word {
        Word::Pin => (&mut msrs.pin, Some(&mut msrs.true_pin)),
        Word::Primary => (&mut msrs.primary, Some(&mut msrs.true_primary)),
        Word::Secondary => (&mut msrs.secondary, None),
        Word::Exit => (&mut msrs.exit, Some(&mut msrs.true_exit)),
        Word::Entry => (&mut msrs.entry, Some(&mut msrs.true_entry)),
    };
    *plain = change(*plain);
    if let Some(exact) = exact {
        *exact = change(*exact);
    }
    msrs
}

#[test]
fn what_is_missing_is_named() {
    for (word, bits, refusal) in [
        (Word::Pin, pin::VIRTUAL_NMIS, Refusal::NoVirtualNmis),
        (Word::Primary, primary::USE_MSR_BITMAPS, Refusal::NoMsrBitmaps),
        (Word::Primary, primary::ACTIVATE_SECONDARY, Refusal::NoSecondaryControls),
        (Word::Secondary, secondary::EPT, Refusal::NoEpt),
        (Word::Exit, exit::LOAD_EFER, Refusal::NoEferSwitch),
        (Word::Entry, entry::LOAD_EFER, Refusal::NoEferSwitch),
        (Word::Exit, exit::LOAD_PAT, Refusal::NoPatSwitch),
        (Word::Entry, entry::LOAD_PAT, Refusal::NoPatSwitch),
        (Word::Primary, primary::HLT_EXITING, Refusal::Missing { word: Word::Primary, bits: primary::HLT_EXITING }),
        (
            Word::Primary,
            primary::INTERRUPT_WINDOW_EXITING,
            Refusal::Missing { word: Word::Primary, bits: primary::INTERRUPT_WINDOW_EXITING },
        ),
        (
            Word::Exit,
            exit::HOST_ADDRESS_SPACE_SIZE,
            Refusal::Missing { word: Word::Exit, bits: exit::HOST_ADDRESS_SPACE_SIZE },
        ),
        (Word::Entry, entry::IA32E_MODE_GUEST, Refusal::Missing { word: Word::Entry, bits: entry::IA32E_MODE_GUEST }),
    ] {
        assert_eq!(negotiate(&without(&BROADWELL, word, bits), Options::ALL), Err(refusal));
    }
    for (bits, refusal) in [
        (ept_vpid::WALK_4, Refusal::NoFourLevels),
        (ept_vpid::POINTER_WB, Refusal::NoWriteBackTables),
        (ept_vpid::INVEPT, Refusal::NoInvept),
        (ept_vpid::INVEPT_SINGLE | ept_vpid::INVEPT_ALL, Refusal::NoInvept),
    ] {
        let msrs = CapabilityMsrs { ept_vpid: BROADWELL.msrs.ept_vpid & !bits, ..BROADWELL.msrs };
        assert_eq!(negotiate(&msrs, Options::ALL), Err(refusal));
    }
    for (basic, refusal) in [
        (0x00DA_0000_0000_0012, Refusal::RegionSize),
        (0x00DA_1001_0000_0012, Refusal::RegionSize),
        (0x00DB_0400_0000_0012, Refusal::Addresses32),
        (0x00C2_0400_0000_0012, Refusal::NotWriteBack),
    ] {
        assert_eq!(negotiate(&CapabilityMsrs { basic, ..BROADWELL.msrs }, Options::ALL), Err(refusal));
    }
    assert_eq!(negotiate(&CapabilityMsrs::default(), Options::ALL), Err(Refusal::RegionSize));
}

#[test]
fn what_is_forced_is_named() {
    for (word, bits) in [
        (Word::Primary, primary::INVLPG_EXITING),
        (Word::Primary, primary::RDTSC_EXITING),
        (Word::Primary, primary::CR3_LOAD_EXITING),
        (Word::Primary, primary::INTERRUPT_WINDOW_EXITING),
        (Word::Primary, primary::NMI_WINDOW_EXITING),
        (Word::Pin, pin::PREEMPTION_TIMER),
        (Word::Secondary, secondary::RDRAND_EXITING),
        (Word::Exit, exit::ACKNOWLEDGE_INTERRUPT),
        (Word::Entry, entry::IA32E_MODE_GUEST),
    ] {
        assert_eq!(negotiate(&forcing(&BROADWELL, word, bits), Options::ALL), Err(Refusal::Forced { word, bits }));
    }
}

#[test]
fn without_true_controls_cr3_exits_cannot_be_off() {
    let msrs = CapabilityMsrs { basic: BROADWELL.msrs.basic & !(1 << 55), ..BROADWELL.msrs };
    let bits = primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING;
    assert_eq!(negotiate(&msrs, Options::ALL), Err(Refusal::Forced { word: Word::Primary, bits }));
}

#[test]
fn optional_things_may_be_missing() {
    let msrs = without(&BROADWELL, Word::Primary, primary::TPR_SHADOW | primary::MONITOR_EXITING);
    let config = negotiate(&msrs, Options::ALL).unwrap();
    assert!(!config.features.tpr_shadow && !config.features.x2apic_mode);
    assert_eq!(
        config.controls.primary & (primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING | primary::MONITOR_EXITING),
        primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING
    );
    let msrs = without(&BROADWELL, Word::Secondary, secondary::VPID | secondary::RDTSCP | secondary::WBINVD_EXITING);
    let config = negotiate(&msrs, Options::ALL).unwrap();
    assert_eq!(config.features.vpid, None);
    assert!(!config.features.invvpid_address && !config.features.rdtscp);
    assert_eq!(config.controls.secondary & (secondary::VPID | secondary::RDTSCP | secondary::WBINVD_EXITING), 0);
    // VPIDs that cannot be invalidated are of no use.
    let ept_vpid = BROADWELL.msrs.ept_vpid & !(ept_vpid::INVVPID_SINGLE | ept_vpid::INVVPID_ALL);
    let config = negotiate(&CapabilityMsrs { ept_vpid, ..BROADWELL.msrs }, Options::ALL).unwrap();
    assert_eq!((config.features.vpid, config.controls.secondary & secondary::VPID), (None, 0));
    let ept_vpid = BROADWELL.msrs.ept_vpid & !(ept_vpid::INVVPID_SINGLE | ept_vpid::INVEPT_SINGLE);
    let features = negotiate(&CapabilityMsrs { ept_vpid, ..BROADWELL.msrs }, Options::ALL).unwrap().features;
    assert_eq!((features.vpid, features.invept), (Some(InvvpidType::All), InveptType::All));
}

#[test]
fn only_msrs_that_exist_are_read() {
    let read = |cpu: &Cpu| {
        CapabilityMsrs::read(cpu.msrs.signature, |number| {
            let value = match number {
                msr::VMX_BASIC => cpu.msrs.basic,
                msr::VMX_PINBASED_CTLS => cpu.msrs.pin,
                msr::VMX_PROCBASED_CTLS => cpu.msrs.primary,
                msr::VMX_EXIT_CTLS => cpu.msrs.exit,
                msr::VMX_ENTRY_CTLS => cpu.msrs.entry,
                msr::VMX_MISC => cpu.msrs.misc,
                msr::VMX_CR0_FIXED0 => cpu.msrs.cr0_fixed0,
                msr::VMX_CR0_FIXED1 => cpu.msrs.cr0_fixed1,
                msr::VMX_CR4_FIXED0 => cpu.msrs.cr4_fixed0,
                msr::VMX_CR4_FIXED1 => cpu.msrs.cr4_fixed1,
                msr::VMX_PROCBASED_CTLS2 => cpu.msrs.secondary,
                msr::VMX_EPT_VPID_CAP => cpu.msrs.ept_vpid,
                msr::VMX_TRUE_PINBASED_CTLS => cpu.msrs.true_pin,
                msr::VMX_TRUE_PROCBASED_CTLS => cpu.msrs.true_primary,
                msr::VMX_TRUE_EXIT_CTLS => cpu.msrs.true_exit,
                msr::VMX_TRUE_ENTRY_CTLS => cpu.msrs.true_entry,
                _ => 0,
            };
            assert_ne!(value, 0, "{}: #GP on MSR {number:#x}", cpu.name);
            value
        })
    };
    assert_eq!(read(&VIA_L4700), VIA_L4700.msrs);
    assert_eq!(read(&HASWELL), HASWELL.msrs);
}

#[test]
fn control_register_bits() {
    let config = config(&HASWELL);
    // A guest out of reset: PE and PG are its own business, NE is not.
    assert_eq!(config.cr0.apply(cr0::ET), cr0::ET | cr0::NE);
    assert!(!config.cr0.allows(cr0::ET) && config.cr0.allows(cr0::NE | cr0::PE | cr0::PG));
    assert_eq!(config.cr4.apply(cr4::PAE), cr4::PAE | cr4::VMXE);
    assert_eq!(config.cr4.apply(cr4::PAE | cr4::LA57), cr4::PAE | cr4::VMXE, "Haswell has no LA57");
}

#[test]
fn firmware() {
    assert!(enabled_by_firmware(5));
    for bad in [0, 1, 2, 3, 4] {
        assert!(!enabled_by_firmware(bad), "{bad}");
    }
}

#[test]
fn every_refusal_has_its_line() {
    assert_eq!(Refusal::NoVirtualNmis.to_string(), "no virtual NMIs");
    let forced = Refusal::Forced { word: Word::Primary, bits: 0x8000 };
    assert_eq!(forced.to_string(), "primary execution controls 0x8000 cannot be off");
    let missing = Refusal::Missing { word: Word::Entry, bits: 0x200 };
    assert_eq!(missing.to_string(), "VM-entry controls 0x200 cannot be on");
}

#[test]
fn random_capabilities_are_refused_or_legal() {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut good, mut refused) = (0, 0);
    for round in 0..20_000 {
        let mut msrs = GOOD[round % GOOD.len()].msrs;
        for msr in [
            &mut msrs.basic,
            &mut msrs.true_pin,
            &mut msrs.true_primary,
            &mut msrs.secondary,
            &mut msrs.true_exit,
            &mut msrs.true_entry,
            &mut msrs.ept_vpid,
            &mut msrs.misc,
        ] {
            if next() & 7 == 0 {
                *msr ^= 1 << (next() & 63);
            }
        }
        let options = Options {
            apicv: next() & 1 != 0,
            posted: next() & 1 != 0,
            pml: next() & 1 != 0,
            accessed_dirty: next() & 1 != 0,
            preemption_timer: (next() & 1 != 0).then_some(100_000),
            ..Options::ALL
        };
        match negotiate(&msrs, options) {
            Ok(config) => {
                good += 1;
                assert!(Basic(msrs.basic).true_controls(), "without them CR3 exits are forced");
                let controls = config.controls;
                for (value, msr) in [
                    (controls.pin, msrs.true_pin),
                    (controls.primary, msrs.true_primary),
                    (controls.secondary, msrs.secondary),
                    (controls.exit, msrs.true_exit),
                    (controls.entry, msrs.true_entry),
                ] {
                    assert!(legal(value, msr), "{value:#x} {msr:#x}");
                }
            }
            Err(refusal) => {
                refused += 1;
                assert!(!refusal.to_string().is_empty());
            }
        }
    }
    assert!(good > 5_000 && refused > 500, "{good} {refused}");
}

#[test]
fn a_host_with_fred_acknowledges_its_interrupts_itself() {
    for cpu in &GOOD {
        let with = negotiate(&cpu.msrs, Options { fred: true, ..Options::ALL }).unwrap();
        let without = negotiate(&cpu.msrs, Options::ALL).unwrap();
        assert_eq!(with.controls.exit & exit::ACKNOWLEDGE_INTERRUPT, 0, "{}", cpu.name);
        // Nothing else changes.
        let posted_interrupts = false;
        assert_eq!(with.features, Features { posted_interrupts, ..without.features }, "{}", cpu.name);
        assert_eq!(with.controls, without.controls, "{}", cpu.name);
    }
}
