// SPDX-License-Identifier: GPL-2.0
//! The virtual machine control block of SVM. APM Vol. 2, Appendix B "VMCB Layout".
//!
//! Not modelled: the encrypted save area of SEV-ES, AVIC's fields beyond their place.
#![forbid(unsafe_code)]

use core::mem::{offset_of, size_of};

/// Intercepts in `Control::intercept_misc1`.
pub mod misc1 {
    pub const INTR: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    pub const VINTR: u32 = 1 << 4;
    pub const CR0_SELECTIVE: u32 = 1 << 5;
    pub const RDPMC: u32 = 1 << 15;
    pub const CPUID: u32 = 1 << 18;
    pub const RSM: u32 = 1 << 19;
    pub const IRET: u32 = 1 << 20;
    pub const INVD: u32 = 1 << 22;
    pub const PAUSE: u32 = 1 << 23;
    pub const HLT: u32 = 1 << 24;
    pub const INVLPGA: u32 = 1 << 26;
    pub const IOIO: u32 = 1 << 27;
    pub const MSR: u32 = 1 << 28;
    pub const TASK_SWITCH: u32 = 1 << 29;
    pub const FERR_FREEZE: u32 = 1 << 30;
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Intercepts in `Control::intercept_misc2`.
pub mod misc2 {
    pub const VMRUN: u32 = 1 << 0;
    pub const VMMCALL: u32 = 1 << 1;
    pub const VMLOAD: u32 = 1 << 2;
    pub const VMSAVE: u32 = 1 << 3;
    pub const STGI: u32 = 1 << 4;
    pub const CLGI: u32 = 1 << 5;
    pub const SKINIT: u32 = 1 << 6;
    pub const WBINVD: u32 = 1 << 9;
    pub const MONITOR: u32 = 1 << 10;
    pub const MWAIT: u32 = 1 << 11;
    pub const MWAIT_ARMED: u32 = 1 << 12;
    pub const XSETBV: u32 = 1 << 13;
    pub const RDPRU: u32 = 1 << 14;
}

/// Intercepts in `Control::intercept_misc3`.
pub mod misc3 {
    pub const INVLPGB: u32 = 1 << 0;
    pub const INVLPGB_ILLEGAL: u32 = 1 << 1;
    pub const MCOMMIT: u32 = 1 << 3;
    pub const TLBSYNC: u32 = 1 << 4;
}

/// Bits of `Control::int_ctl`.
pub mod int_ctl {
    pub const V_TPR_MASK: u32 = 0xFF;
    pub const V_IRQ: u32 = 1 << 8;
    /// Priority of the virtual interrupt; the highest opens the window whatever the TPR.
    pub const V_INTR_PRIO_MASK: u32 = 0xF << 16;
    pub const V_IGN_TPR: u32 = 1 << 20;
    pub const V_INTR_MASKING: u32 = 1 << 24;
}

/// Bits of `Control::int_state`.
pub mod int_state {
    /// The guest is in an interrupt shadow (after STI or MOV SS).
    pub const SHADOW: u32 = 1 << 0;
}

/// Values of `Control::tlb_ctl`.
pub mod tlb_ctl {
    pub const NOTHING: u8 = 0;
    /// Every ASID's entries on this CPU, the host's too.
    pub const FLUSH_ALL: u8 = 1;
    /// This ASID's entries; needs the flush-by-ASID feature.
    pub const FLUSH_ASID: u8 = 3;
}

/// Fields of `event_inj` and `exit_int_info`.
pub mod event {
    pub const TYPE_SHIFT: u32 = 8;
    pub const TYPE_INTERRUPT: u32 = 0;
    pub const TYPE_NMI: u32 = 2;
    pub const TYPE_EXCEPTION: u32 = 3;
    pub const TYPE_SOFTWARE: u32 = 4;
    pub const ERROR_CODE_VALID: u32 = 1 << 11;
    pub const VALID: u32 = 1 << 31;
}

/// Exit codes. APM Vol. 2, Appendix C "SVM Intercept Exit Codes".
pub mod exit_code {
    pub const CR_READ: u64 = 0x00;
    pub const CR_WRITE: u64 = 0x10;
    pub const DR_READ: u64 = 0x20;
    pub const DR_WRITE: u64 = 0x30;
    pub const EXCEPTION: u64 = 0x40;
    pub const INTR: u64 = 0x60;
    pub const NMI: u64 = 0x61;
    pub const SMI: u64 = 0x62;
    pub const INIT: u64 = 0x63;
    pub const VINTR: u64 = 0x64;
    pub const CR0_SELECTIVE: u64 = 0x65;
    pub const RDTSC: u64 = 0x6E;
    pub const RDPMC: u64 = 0x6F;
    pub const CPUID: u64 = 0x72;
    pub const RSM: u64 = 0x73;
    pub const IRET: u64 = 0x74;
    pub const INVD: u64 = 0x76;
    pub const PAUSE: u64 = 0x77;
    pub const HLT: u64 = 0x78;
    pub const INVLPGA: u64 = 0x7A;
    pub const IOIO: u64 = 0x7B;
    pub const MSR: u64 = 0x7C;
    pub const TASK_SWITCH: u64 = 0x7D;
    pub const FERR_FREEZE: u64 = 0x7E;
    pub const SHUTDOWN: u64 = 0x7F;
    pub const VMRUN: u64 = 0x80;
    pub const VMMCALL: u64 = 0x81;
    pub const VMLOAD: u64 = 0x82;
    pub const VMSAVE: u64 = 0x83;
    pub const STGI: u64 = 0x84;
    pub const CLGI: u64 = 0x85;
    pub const SKINIT: u64 = 0x86;
    pub const RDTSCP: u64 = 0x87;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8A;
    pub const MWAIT: u64 = 0x8B;
    pub const MWAIT_ARMED: u64 = 0x8C;
    pub const XSETBV: u64 = 0x8D;
    pub const RDPRU: u64 = 0x8E;
    pub const INVLPGB: u64 = 0xA0;
    pub const INVLPGB_ILLEGAL: u64 = 0xA1;
    pub const MCOMMIT: u64 = 0xA3;
    pub const TLBSYNC: u64 = 0xA4;
    pub const NPF: u64 = 0x400;
    /// The VMCB's state was refused.
    pub const INVALID: u64 = u64::MAX;
}

/// One segment register of the save area. LDTR, TR, GDTR and IDTR have the same shape.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VmcbSegment {
    pub selector: u16,   // 00
    pub attributes: u16, // 02
    pub limit: u32,      // 04
    pub base: u64,       // 08
}

/// Control area, 1 KiB.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Control {
    pub intercept_cr: u32,            // 000: reads in the low half, writes in the high half
    pub intercept_dr: u32,            // 004
    pub intercept_exceptions: u32,    // 008: one bit a vector
    pub intercept_misc1: u32,         // 00C
    pub intercept_misc2: u32,         // 010
    pub intercept_misc3: u32,         // 014
    reserved_018: [u32; 9],           // 018
    pub pause_filter_threshold: u16,  // 03C
    pub pause_filter_count: u16,      // 03E
    pub iopm_base: u64,               // 040: host physical
    pub msrpm_base: u64,              // 048: host physical
    pub tsc_offset: u64,              // 050
    pub asid: u32,                    // 058: 0 is the host's
    pub tlb_ctl: u8,                  // 05C
    reserved_05d: [u8; 3],            // 05D
    pub int_ctl: u32,                 // 060
    pub int_vector: u32,              // 064
    pub int_state: u32,               // 068
    reserved_06c: u32,                // 06C
    pub exit_code: u64,               // 070
    pub exit_info_1: u64,             // 078
    pub exit_info_2: u64,             // 080
    pub exit_int_info: u32,           // 088
    pub exit_int_info_error: u32,     // 08C
    pub nested_ctl: u64,              // 090: bit 0 enables nested paging
    reserved_098: [u64; 2],           // 098
    pub event_inj: u32,               // 0A8
    pub event_inj_error: u32,         // 0AC
    pub nested_cr3: u64,              // 0B0: host physical
    pub virt_ext: u64,                // 0B8
    pub clean: u32,                   // 0C0
    reserved_0c4: u32,                // 0C4
    pub next_rip: u64,                // 0C8: needs the next-RIP save feature
    pub instruction_length: u8,       // 0D0: bytes fetched, needs decode assists
    pub instruction_bytes: [u8; 15],  // 0D1
    reserved_0e0: [u8; 0x400 - 0xE0], // 0E0
}

/// State save area.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Save {
    pub es: VmcbSegment,               // 000
    pub cs: VmcbSegment,               // 010
    pub ss: VmcbSegment,               // 020
    pub ds: VmcbSegment,               // 030
    pub fs: VmcbSegment,               // 040
    pub gs: VmcbSegment,               // 050
    pub gdtr: VmcbSegment,             // 060
    pub ldtr: VmcbSegment,             // 070
    pub idtr: VmcbSegment,             // 080
    pub tr: VmcbSegment,               // 090
    reserved_0a0: [u8; 43],            // 0A0
    pub cpl: u8,                       // 0CB
    reserved_0cc: u32,                 // 0CC
    pub efer: u64,                     // 0D0
    reserved_0d8: [u8; 112],           // 0D8
    pub cr4: u64,                      // 148
    pub cr3: u64,                      // 150
    pub cr0: u64,                      // 158
    pub dr7: u64,                      // 160
    pub dr6: u64,                      // 168
    pub rflags: u64,                   // 170
    pub rip: u64,                      // 178
    reserved_180: [u8; 88],            // 180
    pub rsp: u64,                      // 1D8
    reserved_1e0: [u64; 3],            // 1E0
    pub rax: u64,                      // 1F8
    pub star: u64,                     // 200
    pub lstar: u64,                    // 208
    pub cstar: u64,                    // 210
    pub sfmask: u64,                   // 218
    pub kernel_gs_base: u64,           // 220
    pub sysenter_cs: u64,              // 228
    pub sysenter_esp: u64,             // 230
    pub sysenter_eip: u64,             // 238
    pub cr2: u64,                      // 240
    reserved_248: [u64; 4],            // 248
    pub pat: u64,                      // 268
    pub debugctl: u64,                 // 270
    reserved_278: [u8; 0xC00 - 0x278], // 278
}

/// The whole page.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub struct Vmcb {
    pub control: Control,
    pub save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(size_of::<VmcbSegment>() == 16);
    assert!(offset_of!(Control, pause_filter_count) == 0x3E);
    assert!(offset_of!(Control, iopm_base) == 0x40);
    assert!(offset_of!(Control, asid) == 0x58);
    assert!(offset_of!(Control, tlb_ctl) == 0x5C);
    assert!(offset_of!(Control, int_ctl) == 0x60);
    assert!(offset_of!(Control, int_state) == 0x68);
    assert!(offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, exit_int_info) == 0x88);
    assert!(offset_of!(Control, nested_ctl) == 0x90);
    assert!(offset_of!(Control, event_inj) == 0xA8);
    assert!(offset_of!(Control, nested_cr3) == 0xB0);
    assert!(offset_of!(Control, clean) == 0xC0);
    assert!(offset_of!(Control, next_rip) == 0xC8);
    assert!(offset_of!(Control, instruction_bytes) == 0xD1);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Save, cpl) == 0xCB);
    assert!(offset_of!(Save, efer) == 0xD0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1D8);
    assert!(offset_of!(Save, rax) == 0x1F8);
    assert!(offset_of!(Save, star) == 0x200);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, pat) == 0x268);
    assert!(offset_of!(Save, debugctl) == 0x270);
};
