// SPDX-License-Identifier: GPL-2.0
//! A vCPU's CPUID table: what KVM_SET_CPUID2 gave, indexed so that an exit finds a leaf in a step or two.
//!
//! The answers are those of KVM: exact entry first; an unknown leaf of an AMD guest is all zeros; with other vendors
//! a leaf out of range is answered by the highest basic leaf. A few bits follow the vCPU's registers and are patched in
//! when asked for. SDM Vol. 2 "CPUID", APM Vol. 3 "CPUID Function ...".
#![forbid(unsafe_code)]

use super::cpuid::xsave_bytes;
use crate::abi::vcpu::{KvmCpuidEntry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use crate::arch::cpuid::*;
use crate::arch::cr::cr4;
use core::ops::Deref;

/// Twice the most entries, so that chains stay short.
const SLOTS: usize = 512;
const SLOT_BITS: u32 = 9;

/// Why a table is refused: EINVAL, or E2BIG for too many entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadTable {
    TooMany,
    /// Leaf 8000_0008h names a width of linear addresses that no CPU has.
    LinearAddressBits,
}

/// Registers that some CPUID bits follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    pub cr4: u64,
    /// IA32_APIC_BASE bit 11.
    pub apic_enabled: bool,
    pub xcr0: u64,
    pub xss: u64,
    /// MISC_ENABLE's word about MONITOR and MWAIT, where CPUID follows that.
    pub mwait: Option<bool>,
}

/// A guest whose HLT does not exit cannot be woken by another of its CPUs: takes the bit that promises it out of a table, if that has Linux'
/// paravirtual leaves.
pub fn withhold_unhalt(entries: &mut [KvmCpuidEntry2]) {
    let [ebx, ecx, edx] = KVM_SIGNATURE;
    let linux = |entry: &KvmCpuidEntry2| {
        entry.function == KVM_SIGNATURE_LEAF && [entry.ebx, entry.ecx, entry.edx] == [ebx, ecx, edx]
    };
    if entries.iter().any(linux) {
        for entry in entries.iter_mut().filter(|entry| entry.function == KVM_FEATURES_LEAF) {
            entry.eax &= !kvm_eax::PV_UNHALT;
        }
    }
}

/// Entries in the order userspace gave them, and an open-addressed index by leaf over them. `E` owns or borrows the
/// entries.
#[derive(Debug)]
pub struct CpuidTable<E> {
    entries: E,
    vendor: Vendor,
    /// Number of the entry plus 1; 0 is a free slot. Entries of one leaf lie on one probe sequence in their order.
    slots: [u16; SLOTS],
}

const fn registers(entry: &KvmCpuidEntry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// First slot of a leaf: the top bits of a multiplication spread leaves that differ in their low bits.
const fn home(function: u32) -> usize {
    (function.wrapping_mul(0x9E37_79B1) >> (32 - SLOT_BITS)) as usize
}

impl<E: Deref<Target = [KvmCpuidEntry2]>> CpuidTable<E> {
    /// Checks and indexes a table.
    pub fn new(entries: E) -> Result<Self, BadTable> {
        if entries.len() > KVM_MAX_CPUID_ENTRIES as usize {
            return Err(BadTable::TooMany);
        }
        let mut slots = [0u16; SLOTS];
        for (number, entry) in entries.iter().enumerate() {
            let mut at = home(entry.function);
            // Half the slots stay free, so this ends.
            while let Some(slot) = slots.get_mut(at) {
                if *slot == 0 {
                    *slot = (number as u16).wrapping_add(1);
                    break;
                }
                at = (at + 1) % SLOTS;
            }
        }
        let mut table = Self { entries, vendor: Vendor::Other, slots };
        table.vendor = table.find(0, 0).map_or(Vendor::Other, |entry| Vendor::from_leaf_0(registers(entry)));
        let sizes = table.find(0x8000_0008, 0).map_or(0, |entry| entry.eax);
        if !matches!(sizes >> 8 & 0xFF, 0 | 48 | 57) {
            return Err(BadTable::LinearAddressBits);
        }
        Ok(table)
    }

    /// As userspace gave them.
    pub fn entries(&self) -> &[KvmCpuidEntry2] {
        &self.entries
    }

    /// Whether `other` would give the same answers: KVM_SET_CPUID2 after the first KVM_RUN accepts nothing else. What follows the
    /// guest's state is no difference: userspace may have read the table back.
    pub fn same_as(&self, other: &[KvmCpuidEntry2], dynamic: &Dynamic) -> bool {
        let key = |entry: &KvmCpuidEntry2| {
            (entry.function, entry.index, entry.flags, self.patched(entry, entry.index, dynamic))
        };
        self.entries.iter().map(key).eq(other.iter().map(key))
    }

    /// The first entry for this leaf whose index fits, or does not matter.
    #[inline]
    pub fn find(&self, function: u32, index: u32) -> Option<&KvmCpuidEntry2> {
        let mut at = home(function);
        loop {
            let number = usize::from(*self.slots.get(at)?).checked_sub(1)?;
            let entry = self.entries.get(number)?;
            let any_index = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0;
            if entry.function == function && (any_index || entry.index == index) {
                return Some(entry);
            }
            at = (at + 1) % SLOTS;
        }
    }

    /// Registers of an exact entry as stored, zeros where there is none.
    pub fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        self.find(function, index).map_or([0; 4], registers)
    }

    /// What the CPUID instruction with this EAX and ECX answers: EAX, EBX, ECX, EDX.
    #[inline]
    pub fn query(&self, function: u32, index: u32, dynamic: &Dynamic) -> [u32; 4] {
        match self.find(function, index) {
            Some(entry) => self.patched(entry, index, dynamic),
            None => self.query_missing(function, index, dynamic),
        }
    }

    /// An entry as the guest sees it now: what KVM_GET_CPUID2 returns.
    pub fn current(&self, entry: &KvmCpuidEntry2, dynamic: &Dynamic) -> KvmCpuidEntry2 {
        let [eax, ebx, ecx, edx] = self.patched(entry, entry.index, dynamic);
        KvmCpuidEntry2 { eax, ebx, ecx, edx, ..*entry }
    }

    #[inline]
    fn patched(&self, entry: &KvmCpuidEntry2, index: u32, dynamic: &Dynamic) -> [u32; 4] {
        let mut values = registers(entry);
        let [_, ebx, ecx, edx] = &mut values;
        match (entry.function, index) {
            (1, _) => {
                assign(ecx, leaf1_ecx::OSXSAVE, dynamic.cr4 & cr4::OSXSAVE != 0);
                assign(edx, leaf1_edx::APIC, dynamic.apic_enabled);
                if let Some(mwait) = dynamic.mwait {
                    assign(ecx, leaf1_ecx::MONITOR, mwait);
                }
            }
            (7, 0) => assign(ecx, leaf7_ecx::OSPKE, dynamic.cr4 & cr4::PKE != 0),
            (0xD, 0) => *ebx = self.xsave_bytes(dynamic.xcr0, false),
            (0xD, 1) if entry.eax & (leaf_d_1_eax::XSAVEC | leaf_d_1_eax::XSAVES) != 0 => {
                *ebx = self.xsave_bytes(dynamic.xcr0 | dynamic.xss, true);
            }
            _ => {}
        }
        values
    }

    fn xsave_bytes(&self, mask: u64, compacted: bool) -> u32 {
        xsave_bytes(mask, compacted, |component| self.leaf(0xD, component))
    }

    #[cold]
    fn query_missing(&self, function: u32, index: u32, dynamic: &Dynamic) -> [u32; 4] {
        let mut function = function;
        if let Some(highest) = self.redirect(function) {
            function = highest;
            if let Some(entry) = self.find(function, index) {
                return self.patched(entry, index, dynamic);
            }
        }
        // Of an extended topology leaf every subleaf has the x2APIC id, and the low byte of ECX comes back.
        match (function, self.find(function, 1)) {
            (0xB | 0x1F, Some(entry)) => [0, 0, index & 0xFF, entry.edx],
            _ => [0; 4],
        }
    }

    /// The leaf that answers for one that is out of range; `None` where nothing does.
    fn redirect(&self, function: u32) -> Option<u32> {
        let highest_basic = self.find(0, 0)?.eax;
        if self.vendor == Vendor::Amd {
            return None;
        }
        let base = match function {
            0x4000_0000..=0x4FFF_FFFF => function & 0xFFFF_FF00,
            0xC000_0000.. => 0xC000_0000,
            _ => function & 0x8000_0000,
        };
        match self.find(base, 0) {
            Some(class) if function <= class.eax => None,
            _ => Some(highest_basic),
        }
    }
}

fn assign(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}
