// SPDX-License-Identifier: GPL-2.0
//! Bits of the VMX control words. SDM "VM-Execution Control Fields", "VM-Exit Control Fields" and "VM-Entry Control Fields".
#![forbid(unsafe_code)]

/// Pin-based VM-execution controls.
pub mod pin {
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    pub const NMI_EXITING: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls.
pub mod primary {
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    pub const USE_TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT_EXITING: u32 = 1 << 7;
    pub const INVLPG_EXITING: u32 = 1 << 9;
    pub const MWAIT_EXITING: u32 = 1 << 10;
    pub const RDPMC_EXITING: u32 = 1 << 11;
    pub const RDTSC_EXITING: u32 = 1 << 12;
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    pub const ACTIVATE_TERTIARY: u32 = 1 << 17;
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    pub const USE_IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP_FLAG: u32 = 1 << 27;
    pub const USE_MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR_EXITING: u32 = 1 << 29;
    pub const PAUSE_EXITING: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
pub mod secondary {
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    pub const EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const VIRTUALIZE_X2APIC_MODE: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD_EXITING: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const APIC_REGISTER_VIRTUALIZATION: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    pub const RDRAND_EXITING: u32 = 1 << 11;
    pub const INVPCID: u32 = 1 << 12;
    pub const VM_FUNCTIONS: u32 = 1 << 13;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const ENCLS_EXITING: u32 = 1 << 15;
    pub const RDSEED_EXITING: u32 = 1 << 16;
    pub const PML: u32 = 1 << 17;
    pub const EPT_VIOLATION_VE: u32 = 1 << 18;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 19;
    pub const XSAVES: u32 = 1 << 20;
    pub const PASID_TRANSLATION: u32 = 1 << 21;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const SUB_PAGE_WRITE_PERMISSIONS: u32 = 1 << 23;
    pub const PT_USES_GUEST_PHYSICAL: u32 = 1 << 24;
    pub const TSC_SCALING: u32 = 1 << 25;
    pub const USER_WAIT_AND_PAUSE: u32 = 1 << 26;
    pub const PCONFIG: u32 = 1 << 27;
    pub const ENCLV_EXITING: u32 = 1 << 28;
    pub const BUS_LOCK_DETECTION: u32 = 1 << 30;
    pub const INSTRUCTION_TIMEOUT: u32 = 1 << 31;
}

/// Tertiary processor-based VM-execution controls.
pub mod tertiary {
    pub const LOADIWKEY_EXITING: u64 = 1 << 0;
    pub const HLAT: u64 = 1 << 1;
    pub const EPT_PAGING_WRITE: u64 = 1 << 2;
    pub const GUEST_PAGING_VERIFICATION: u64 = 1 << 3;
    pub const IPI_VIRTUALIZATION: u64 = 1 << 4;
    pub const VIRTUALIZE_SPEC_CTRL: u64 = 1 << 7;
}

/// Primary VM-exit controls.
pub mod exit {
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION_TIMER: u32 = 1 << 22;
    pub const CLEAR_BNDCFGS: u32 = 1 << 23;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 24;
    pub const CLEAR_RTIT_CTL: u32 = 1 << 25;
    pub const CLEAR_LBR_CTL: u32 = 1 << 26;
    pub const CLEAR_UINV: u32 = 1 << 27;
    pub const LOAD_CET: u32 = 1 << 28;
    pub const LOAD_PKRS: u32 = 1 << 29;
    pub const SAVE_PERF_GLOBAL_CTRL: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
}

/// VM-entry controls.
pub mod entry {
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    pub const ENTRY_TO_SMM: u32 = 1 << 10;
    pub const DEACTIVATE_DUAL_MONITOR: u32 = 1 << 11;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
    pub const LOAD_BNDCFGS: u32 = 1 << 16;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 17;
    pub const LOAD_RTIT_CTL: u32 = 1 << 18;
    pub const LOAD_UINV: u32 = 1 << 19;
    pub const LOAD_CET: u32 = 1 << 20;
    pub const LOAD_LBR_CTL: u32 = 1 << 21;
    pub const LOAD_PKRS: u32 = 1 << 22;
}

/// Bits of the EPT pointer. SDM "Extended-Page-Table Pointer (EPTP)".
pub mod eptp {
    pub const TYPE_WB: u64 = 6;
    /// Page-walk length less one: bits 5 to 3.
    pub const WALK_SHIFT: u32 = 3;
    pub const ACCESSED_DIRTY: u64 = 1 << 6;
}

/// Guest interruptibility state. SDM "Guest Non-Register State".
pub mod interruptibility {
    pub const STI: u32 = 1 << 0;
    pub const MOV_SS: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const ENCLAVE: u32 = 1 << 4;
}

/// Guest activity state. SDM "Guest Non-Register State".
pub mod activity {
    pub const ACTIVE: u32 = 0;
    pub const HLT: u32 = 1;
    pub const SHUTDOWN: u32 = 2;
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// Pending debug exceptions. SDM "Guest Non-Register State".
pub mod pending_debug {
    /// Breakpoints 0 to 3 were met.
    pub const BREAKPOINTS: u64 = 0xF;
    pub const BUS_LOCK: u64 = 1 << 11;
    /// At least one enabled breakpoint was met.
    pub const ENABLED_BREAKPOINT: u64 = 1 << 12;
    pub const BS: u64 = 1 << 14;
    pub const RTM: u64 = 1 << 16;
    pub const DEFINED: u64 = BREAKPOINTS | BUS_LOCK | ENABLED_BREAKPOINT | BS | RTM;
}

/// The VMCS link pointer when there is no shadow VMCS.
pub const NO_LINK: u64 = u64::MAX;
