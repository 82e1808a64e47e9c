// SPDX-License-Identifier: Apache-2.0 OR MIT
//! CPUID for each vCPU: what the hypervisor supports, with the machine's topology written in.
//!
//! The topology is one package of `cpus` cores with one thread each, APIC ids counted from 0. Sources: SDM Vol. 2
//! "CPUID", APM Vol. 3 "Obtaining Processor Information Via the CPUID Instruction", and Linux's "KVM CPUID bits".

use kvm_bindings::{kvm_cpuid_entry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

const HYPERVISOR: u32 = 1 << 31; // leaf 1 ECX
const TSC_DEADLINE: u32 = 1 << 24; // leaf 1 ECX
const HTT: u32 = 1 << 28; // leaf 1 EDX: the count of logical processors is valid
const CMP_LEGACY: u32 = 1 << 1; // leaf 0x8000_0001 ECX: those are cores

/// Leaves that only real hardware can fill, or that are written anew below.
const DROPPED: [u32; 3] = [0xB, 0x1F, 0x8000_0026];

/// The entries for the vCPU `id` of `cpus`. `tsc_deadline`: the in-kernel local APIC has that timer mode.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], id: u32, cpus: u32, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported.iter().filter(|entry| !DROPPED.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_FFFF | ((cpus & 0xFF) << 16) | (id << 24);
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                set(&mut entry.edx, HTT, cpus > 1);
            }
            // Cache leaves: every core has its own L1 and L2, all share the L3.
            0x4 if entry.eax & 0x1F != 0 => {
                entry.eax = entry.eax & 0x3FFF | (sharing(entry, cpus) << 14) | ((core_ids(cpus) - 1).min(63) << 26);
            }
            0x8000_001D if entry.eax & 0x1F != 0 => entry.eax = entry.eax & 0x3FFF | (sharing(entry, cpus) << 14),
            0x8000_0001 if cpus == 1 => entry.ecx &= !CMP_LEGACY,
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xF0FF | (cpus - 1) & 0xFF | (core_bits(cpus) << 12);
            }
            // Extended APIC id; core id with one thread per core; one node.
            0x8000_001E => {
                (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xFF, 0);
            }
            _ => {}
        }
    }
    if supported.iter().any(|entry| entry.function == 0 && entry.eax >= 0xB) {
        entries.extend([topology(0, 1, 0, 1, id), topology(1, 2, core_bits(cpus), cpus, id)]);
    }
    entries
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

/// Bits of an APIC id that tell the cores of a package apart.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

fn core_ids(cpus: u32) -> u32 {
    1 << core_bits(cpus)
}

/// How many APIC ids, less one, share the cache of this entry.
fn sharing(entry: &kvm_cpuid_entry2, cpus: u32) -> u32 {
    let level = (entry.eax >> 5) & 7;
    if level >= 3 {
        core_ids(cpus) - 1
    } else {
        0
    }
}

/// A sub-leaf of leaf 0xB: level `kind` 1 is threads, 2 is cores; `shift` bits of the APIC id lie below the next level.
fn topology(index: u32, kind: u32, shift: u32, count: u32, id: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: id,
        ..Default::default()
    }
}

/// Guest physical address bits that the entries allow.
pub fn physical_bits(supported: &[kvm_cpuid_entry2]) -> u32 {
    let leaf = supported.iter().find(|entry| entry.function == 0x8000_0008);
    // Without the leaf: what every x86-64 CPU has.
    leaf.map_or(36, |entry| entry.eax & 0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// An AMD-like list with values of the host's first CPU everywhere.
    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, 0xD, 0, 0, 0),
            entry(1, 0, 0x800F12, 0x0700_0800, 0x8020_0001, HTT | 1),
            entry(0xB, 0, 1, 2, 0x100, 7),
            entry(0x8000_0001, 0, 0, 0, CMP_LEGACY | (1 << 22), 0),
            entry(0x8000_0008, 0, 0x3030, 0, 0x7007, 0),
            entry(0x8000_001D, 0, 0x121 | (1 << 14), 0, 0, 0),
            entry(0x8000_001D, 3, 0x163 | (7 << 14), 0, 0, 0),
            entry(0x8000_001E, 0, 7, 0x103, 0x300, 0),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn apic_ids_differ_everywhere() {
        for id in 0..3 {
            let entries = for_vcpu(&supported(), id, 3, false);
            let one = find(&entries, 1, 0);
            assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xFF, one.ebx & 0xFFFF), (id, 3, 0x0800));
            assert_eq!(one.ecx & (HYPERVISOR | TSC_DEADLINE), HYPERVISOR);
            assert_ne!(one.edx & HTT, 0);
            let (threads, cores) = (find(&entries, 0xB, 0), find(&entries, 0xB, 1));
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, id));
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, id));
            let extended = find(&entries, 0x8000_001E, 0);
            assert_eq!((extended.eax, extended.ebx, extended.ecx), (id, id, 0));
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x2002);
        }
    }

    #[test]
    fn caches_are_shared_as_the_topology_says() {
        let entries = for_vcpu(&supported(), 1, 4, false);
        assert_eq!(find(&entries, 0x8000_001D, 0).eax, 0x121);
        assert_eq!(find(&entries, 0x8000_001D, 3).eax, 0x163 | (3 << 14));
    }

    #[test]
    fn one_cpu_has_no_siblings() {
        let entries = for_vcpu(&supported(), 0, 1, true);
        let one = find(&entries, 1, 0);
        assert_eq!((one.edx & HTT, one.ecx & TSC_DEADLINE), (0, TSC_DEADLINE));
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 1 << 22);
        assert_eq!(find(&entries, 0xB, 1).eax, 0);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx & 0xF0FF, 0);
    }

    #[test]
    fn no_topology_leaf_beyond_the_largest_leaf() {
        let entries = for_vcpu(&[entry(0, 0, 7, 0, 0, 0), entry(0xB, 0, 0, 0, 0, 0)], 0, 2, false);
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn physical_address_bits() {
        assert_eq!(physical_bits(&supported()), 48);
        assert_eq!(physical_bits(&[]), 36);
    }
}
