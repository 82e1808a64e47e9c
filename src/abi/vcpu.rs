// SPDX-License-Identifier: GPL-2.0
//! Structures of the vCPU ioctls: registers, MSRs, CPUID, FPU state, pending events, debug registers.
//!
//! `kvm_lapic_state` (1,024 bytes), `kvm_xsave` (4,096) and `kvm_xcrs` are too large for a kernel stack in numbers:
//! handle them in the heap or copy them in parts.
#![forbid(unsafe_code)]

layout! {
    /// `struct kvm_regs`: KVM_GET_REGS, KVM_SET_REGS. Not in the order of instruction encodings.
    struct KvmRegs: 144 {
        0 rax: u64,
        8 rbx: u64,
        16 rcx: u64,
        24 rdx: u64,
        32 rsi: u64,
        40 rdi: u64,
        48 rsp: u64,
        56 rbp: u64,
        64 r8: u64,
        72 r9: u64,
        80 r10: u64,
        88 r11: u64,
        96 r12: u64,
        104 r13: u64,
        112 r14: u64,
        120 r15: u64,
        128 rip: u64,
        136 rflags: u64,
    }

    /// `struct kvm_segment`.
    struct KvmSegment: 24 {
        0 base: u64,
        /// In bytes, already scaled by the granularity bit.
        8 limit: u32,
        12 selector: u16,
        14 kind: u8,
        15 present: u8,
        16 dpl: u8,
        17 db: u8,
        18 s: u8,
        19 l: u8,
        20 g: u8,
        21 avl: u8,
        22 unusable: u8,
        23 padding: u8,
    }

    /// `struct kvm_dtable`.
    struct KvmDtable: 16 {
        0 base: u64,
        8 limit: u16,
        10 padding: [u16; 3],
    }

    /// `struct kvm_sregs`: KVM_GET_SREGS, KVM_SET_SREGS.
    struct KvmSregs: 312 {
        0 cs: KvmSegment,
        24 ds: KvmSegment,
        48 es: KvmSegment,
        72 fs: KvmSegment,
        96 gs: KvmSegment,
        120 ss: KvmSegment,
        144 tr: KvmSegment,
        168 ldt: KvmSegment,
        192 gdt: KvmDtable,
        208 idt: KvmDtable,
        224 cr0: u64,
        232 cr2: u64,
        240 cr3: u64,
        248 cr4: u64,
        256 cr8: u64,
        264 efer: u64,
        272 apic_base: u64,
        /// At most one bit: the external interrupt that was acknowledged and not yet delivered.
        280 interrupt_bitmap: [u64; 4],
    }

    /// `struct kvm_sregs2`: KVM_GET_SREGS2, KVM_SET_SREGS2.
    struct KvmSregs2: 320 {
        0 cs: KvmSegment,
        24 ds: KvmSegment,
        48 es: KvmSegment,
        72 fs: KvmSegment,
        96 gs: KvmSegment,
        120 ss: KvmSegment,
        144 tr: KvmSegment,
        168 ldt: KvmSegment,
        192 gdt: KvmDtable,
        208 idt: KvmDtable,
        224 cr0: u64,
        232 cr2: u64,
        240 cr3: u64,
        248 cr4: u64,
        256 cr8: u64,
        264 efer: u64,
        272 apic_base: u64,
        280 flags: u64,
        288 pdptrs: [u64; 4],
    }

    /// `struct kvm_fpu`: KVM_GET_FPU, KVM_SET_FPU.
    struct KvmFpu: 416 {
        0 fpr: [[u8; 16]; 8],
        128 fcw: u16,
        130 fsw: u16,
        /// Abridged tag word, as FXSAVE stores it.
        132 ftwx: u8,
        133 pad1: u8,
        134 last_opcode: u16,
        136 last_ip: u64,
        144 last_dp: u64,
        152 xmm: [[u8; 16]; 16],
        408 mxcsr: u32,
        412 pad2: u32,
    }

    /// `struct kvm_xsave`: KVM_GET_XSAVE, and the first part of KVM_SET_XSAVE and KVM_GET_XSAVE2.
    struct KvmXsave: 4096 {
        /// Standard (not compacted) XSAVE format.
        0 region: [u32; 1024],
    }

    /// `struct kvm_xcr`.
    struct KvmXcr: 16 {
        0 xcr: u32,
        4 reserved: u32,
        8 value: u64,
    }

    /// `struct kvm_xcrs`: KVM_GET_XCRS, KVM_SET_XCRS.
    struct KvmXcrs: 392 {
        0 nr_xcrs: u32,
        4 flags: u32,
        8 xcrs: [KvmXcr; 16],
        264 padding: [u64; 16],
    }

    /// `struct kvm_msr_entry`.
    struct KvmMsrEntry: 16 {
        0 index: u32,
        4 reserved: u32,
        8 data: u64,
    }

    /// Head of `struct kvm_msrs`; `nmsrs` entries of [`KvmMsrEntry`] follow.
    struct KvmMsrs: 8 {
        0 nmsrs: u32,
        4 pad: u32,
    }

    /// Head of `struct kvm_msr_list`; `nmsrs` MSR numbers (`u32`) follow.
    struct KvmMsrList: 4 {
        0 nmsrs: u32,
    }

    /// `struct kvm_cpuid_entry2`.
    struct KvmCpuidEntry2: 40 {
        0 function: u32,
        4 index: u32,
        8 flags: u32,
        12 eax: u32,
        16 ebx: u32,
        20 ecx: u32,
        24 edx: u32,
        28 padding: [u32; 3],
    }

    /// Head of `struct kvm_cpuid2`; `nent` entries of [`KvmCpuidEntry2`] follow.
    struct KvmCpuid2: 8 {
        0 nent: u32,
        4 padding: u32,
    }

    /// `struct kvm_lapic_state`: the APIC's register page, each register at its MMIO offset.
    struct KvmLapicState: 1024 {
        0 regs: [u8; 1024],
    }

    /// `struct kvm_mp_state`.
    struct KvmMpState: 4 {
        0 mp_state: u32,
    }

    /// Member `exception` of `struct kvm_vcpu_events`.
    struct KvmEventException: 8 {
        0 injected: u8,
        1 nr: u8,
        2 has_error_code: u8,
        3 pending: u8,
        4 error_code: u32,
    }

    /// Member `interrupt` of `struct kvm_vcpu_events`.
    struct KvmEventInterrupt: 4 {
        0 injected: u8,
        1 nr: u8,
        2 soft: u8,
        3 shadow: u8,
    }

    /// Member `nmi` of `struct kvm_vcpu_events`.
    struct KvmEventNmi: 4 {
        0 injected: u8,
        1 pending: u8,
        2 masked: u8,
        3 pad: u8,
    }

    /// Member `smi` of `struct kvm_vcpu_events`.
    struct KvmEventSmi: 4 {
        0 smm: u8,
        1 pending: u8,
        2 smm_inside_nmi: u8,
        3 latched_init: u8,
    }

    /// `struct kvm_vcpu_events`: KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS.
    struct KvmVcpuEvents: 64 {
        0 exception: KvmEventException,
        8 interrupt: KvmEventInterrupt,
        12 nmi: KvmEventNmi,
        16 sipi_vector: u32,
        20 flags: u32,
        24 smi: KvmEventSmi,
        28 triple_fault_pending: u8,
        29 reserved: [u8; 26],
        55 exception_has_payload: u8,
        56 exception_payload: u64,
    }

    /// `struct kvm_debugregs`: KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS.
    struct KvmDebugregs: 128 {
        0 db: [u64; 4],
        32 dr6: u64,
        40 dr7: u64,
        48 flags: u64,
        56 reserved: [u64; 9],
    }

    /// `struct kvm_guest_debug` with its x86 part.
    struct KvmGuestDebug: 72 {
        0 control: u32,
        4 pad: u32,
        8 debugreg: [u64; 8],
    }

    /// `struct kvm_interrupt`: KVM_INTERRUPT.
    struct KvmInterrupt: 4 {
        0 irq: u32,
    }

    /// `struct kvm_translation`: KVM_TRANSLATE.
    struct KvmTranslation: 24 {
        0 linear_address: u64,
        8 physical_address: u64,
        16 valid: u8,
        17 writeable: u8,
        18 usermode: u8,
        19 pad: [u8; 5],
    }

    /// Head of `struct kvm_signal_mask`; `len` bytes of signal set follow.
    struct KvmSignalMask: 4 {
        0 len: u32,
    }

    /// `struct kvm_tpr_access_ctl`: KVM_TPR_ACCESS_REPORTING.
    struct KvmTprAccessCtl: 40 {
        0 enabled: u32,
        4 flags: u32,
        8 reserved: [u32; 8],
    }

    /// `struct kvm_vapic_addr`: KVM_SET_VAPIC_ADDR.
    struct KvmVapicAddr: 8 {
        0 vapic_addr: u64,
    }

    /// `struct kvm_x86_mce`: KVM_X86_SET_MCE.
    struct KvmX86Mce: 64 {
        0 status: u64,
        8 addr: u64,
        16 misc: u64,
        24 mcg_status: u64,
        32 bank: u8,
        33 pad1: [u8; 7],
        40 pad2: [u64; 3],
    }

    /// `struct kvm_one_reg`: KVM_GET_ONE_REG, KVM_SET_ONE_REG.
    struct KvmOneReg: 16 {
        0 id: u64,
        8 addr: u64,
    }
}

/// XCRs that fit in `struct kvm_xcrs`.
pub const KVM_MAX_XCRS: u32 = 16;
/// Most entries KVM_SET_CPUID2 and KVM_GET_SUPPORTED_CPUID take, as in KVM.
pub const KVM_MAX_CPUID_ENTRIES: u32 = 256;
/// Most entries KVM_GET_MSRS and KVM_SET_MSRS take, as in KVM.
pub const MAX_IO_MSRS: u32 = 256;

/// The register that an ID of KVM_GET_ONE_REG names: an MSR. `None` for an ID of another architecture, kind or size.
pub const fn one_reg_msr(id: u64) -> Option<u32> {
    const X86_MSR_U64: u64 = 0x2030_0002;
    if id >> 32 == X86_MSR_U64 {
        Some(id as u32)
    } else {
        None
    }
}

/// Device attribute of the system: in group 0 the XCR0 bits that a guest may have.
pub const KVM_X86_XCOMP_GUEST_SUPP: u64 = 0;

/// Device attribute of a vCPU: the group and its one member, what the guest's TSC is ahead of the host's.
pub const KVM_VCPU_TSC_CTRL: u32 = 0;
pub const KVM_VCPU_TSC_OFFSET: u64 = 0;

pub const KVM_SREGS2_FLAGS_PDPTRS_VALID: u64 = 1;

pub const KVM_CPUID_FLAG_SIGNIFCANT_INDEX: u32 = 1 << 0;
pub const KVM_CPUID_FLAG_STATEFUL_FUNC: u32 = 1 << 1;
pub const KVM_CPUID_FLAG_STATE_READ_NEXT: u32 = 1 << 2;

pub const KVM_MP_STATE_RUNNABLE: u32 = 0;
pub const KVM_MP_STATE_UNINITIALIZED: u32 = 1;
pub const KVM_MP_STATE_INIT_RECEIVED: u32 = 2;
pub const KVM_MP_STATE_HALTED: u32 = 3;
pub const KVM_MP_STATE_SIPI_RECEIVED: u32 = 4;

pub const KVM_VCPUEVENT_VALID_NMI_PENDING: u32 = 1 << 0;
pub const KVM_VCPUEVENT_VALID_SIPI_VECTOR: u32 = 1 << 1;
pub const KVM_VCPUEVENT_VALID_SHADOW: u32 = 1 << 2;
pub const KVM_VCPUEVENT_VALID_SMM: u32 = 1 << 3;
pub const KVM_VCPUEVENT_VALID_PAYLOAD: u32 = 1 << 4;
pub const KVM_VCPUEVENT_VALID_TRIPLE_FAULT: u32 = 1 << 5;

pub const KVM_X86_SHADOW_INT_MOV_SS: u8 = 1;
pub const KVM_X86_SHADOW_INT_STI: u8 = 2;

pub const KVM_GUESTDBG_ENABLE: u32 = 1 << 0;
pub const KVM_GUESTDBG_SINGLESTEP: u32 = 1 << 1;
pub const KVM_GUESTDBG_USE_SW_BP: u32 = 1 << 16;
pub const KVM_GUESTDBG_USE_HW_BP: u32 = 1 << 17;
pub const KVM_GUESTDBG_INJECT_DB: u32 = 1 << 18;
pub const KVM_GUESTDBG_INJECT_BP: u32 = 1 << 19;
pub const KVM_GUESTDBG_BLOCKIRQ: u32 = 1 << 20;
pub const KVM_GUESTDBG_VALID_MASK: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;
