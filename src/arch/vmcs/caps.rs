// SPDX-License-Identifier: GPL-2.0
//! The capability MSRs' layouts. SDM appendix "VMX Capability Reporting Facility" and Vol. 4 "IA32_FEATURE_CONTROL".
#![forbid(unsafe_code)]

/// IA32_FEATURE_CONTROL.
pub mod feature_control {
    pub const LOCKED: u64 = 1 << 0;
    pub const VMX_IN_SMX: u64 = 1 << 1;
    pub const VMX_OUTSIDE_SMX: u64 = 1 << 2;
}

/// IA32_VMX_BASIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Basic(pub u64);

impl Basic {
    /// What the first word of a VMXON region and a VMCS must hold.
    pub const fn revision(self) -> u32 {
        (self.0 & 0x7FFF_FFFF) as u32
    }

    /// Size of a VMXON region and a VMCS in bytes, at most 4096.
    pub const fn region_bytes(self) -> u32 {
        (self.0 >> 32 & 0x1FFF) as u32
    }

    /// Addresses of VMX structures must be below 4 GiB. Only on CPUs without 64-bit mode.
    pub const fn addresses_32_bits(self) -> bool {
        self.0 & 1 << 48 != 0
    }

    /// Memory type for the CPU's own accesses to VMX structures: 6 is write-back.
    pub const fn memory_type(self) -> u8 {
        (self.0 >> 50 & 0xF) as u8
    }

    /// INS and OUTS exits report size and segment.
    pub const fn string_io_info(self) -> bool {
        self.0 & 1 << 54 != 0
    }

    /// The four TRUE control MSRs exist.
    pub const fn true_controls(self) -> bool {
        self.0 & 1 << 55 != 0
    }

    /// A hardware exception may be injected with or without an error code, whatever its vector.
    pub const fn any_error_code(self) -> bool {
        self.0 & 1 << 56 != 0
    }
}

/// A control MSR: what must be 1 and what may be 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Allowed(pub u64);

impl Allowed {
    /// Bits that must be 1 ("allowed-0 settings").
    pub const fn must(self) -> u32 {
        self.0 as u32
    }

    /// Bits that may be 1 ("allowed-1 settings").
    pub const fn may(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// IA32_VMX_MISC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Misc(pub u64);

impl Misc {
    /// The preemption timer counts down when this bit of the TSC changes: 0 to 31.
    pub const fn preemption_timer_shift(self) -> u32 {
        (self.0 & 0x1F) as u32
    }

    /// Exits store EFER.LMA into the "IA-32e mode guest" entry control. Always with unrestricted guest.
    pub const fn exit_stores_lma(self) -> bool {
        self.0 & 1 << 5 != 0
    }

    /// Activity state HLT may be entered.
    pub const fn activity_hlt(self) -> bool {
        self.0 & 1 << 6 != 0
    }

    pub const fn activity_shutdown(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    pub const fn activity_wait_for_sipi(self) -> bool {
        self.0 & 1 << 8 != 0
    }

    /// CR3-target values.
    pub const fn cr3_targets(self) -> u32 {
        (self.0 >> 16 & 0x1FF) as u32
    }

    /// MSRs that a list should hold at most.
    pub const fn msr_list_max(self) -> u32 {
        ((self.0 >> 25 & 7) as u32 + 1) * 512
    }

    /// VMWRITE may write exit information too.
    pub const fn vmwrite_any(self) -> bool {
        self.0 & 1 << 29 != 0
    }

    /// Software interrupts and exceptions may be injected with instruction length 0.
    pub const fn zero_length_injection(self) -> bool {
        self.0 & 1 << 30 != 0
    }
}

/// Bits of IA32_VMX_EPT_VPID_CAP.
pub mod ept_vpid {
    pub const EXECUTE_ONLY: u64 = 1 << 0;
    pub const WALK_4: u64 = 1 << 6;
    pub const WALK_5: u64 = 1 << 7;
    pub const POINTER_UC: u64 = 1 << 8;
    pub const POINTER_WB: u64 = 1 << 14;
    pub const PAGE_2M: u64 = 1 << 16;
    pub const PAGE_1G: u64 = 1 << 17;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    /// EPT violations tell about the guest's own translation.
    pub const ADVANCED_EXIT_INFO: u64 = 1 << 22;
    pub const SHADOW_STACK: u64 = 1 << 23;
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_ADDRESS: u64 = 1 << 40;
    pub const INVVPID_SINGLE: u64 = 1 << 41;
    pub const INVVPID_ALL: u64 = 1 << 42;
    pub const INVVPID_SINGLE_KEEP_GLOBAL: u64 = 1 << 43;
}

/// INVEPT's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum InveptType {
    /// What belongs to one EPT pointer.
    Single = 1,
    All = 2,
}

/// INVVPID's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum InvvpidType {
    /// One linear address of one VPID.
    Address = 0,
    /// One VPID.
    Single = 1,
    /// Every VPID but 0.
    All = 2,
    /// One VPID, but not what is global.
    SingleKeepGlobal = 3,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_of_a_real_cpu() {
        // As Skylake and many others report it.
        let basic = Basic(0x00DA_0400_0000_0004);
        assert_eq!((basic.revision(), basic.region_bytes(), basic.memory_type()), (4, 1024, 6));
        assert!(basic.true_controls() && basic.string_io_info() && !basic.addresses_32_bits());
        assert!(!basic.any_error_code());
    }

    #[test]
    fn misc_of_a_real_cpu() {
        let misc = Misc(0x7004_C1E7);
        assert_eq!((misc.preemption_timer_shift(), misc.cr3_targets(), misc.msr_list_max()), (7, 4, 512));
        assert!(misc.exit_stores_lma() && misc.activity_hlt() && misc.activity_shutdown());
        assert!(misc.activity_wait_for_sipi() && misc.vmwrite_any() && misc.zero_length_injection());
    }

    #[test]
    fn allowed_settings() {
        let allowed = Allowed(0x0000_007F_0000_0016);
        assert_eq!((allowed.must(), allowed.may()), (0x16, 0x7F));
    }
}
