// SPDX-License-Identifier: GPL-2.0
//! KVM_SET_GUEST_DEBUG: steps, breakpoints and watchpoints of userspace, which the guest does not see. KVM's own test of this,
//! debug_regs, begins with INT3, which QEMU's EPYC does not let a hypervisor intercept.

use krabtest::guest::*;
use krabtest::harness::tcg;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::Errno;
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, skip, tests};

tests! { "debug";
    steps_over_everything;
    steps_out_of_an_interrupt_shadow;
    watchpoint_and_guests_registers;
    code_breakpoint;
    software_breakpoint;
    injected_breakpoint;
}

const VALUE: u64 = 0x100100;

payload! { lm_debugged, 64,
    "mov dword ptr [0x100100], 5",  // 11 bytes
    "nop",                          // 1
    "cpuid",                        // 2
    "xor eax, eax",                 // 2
    "mov rax, dr7",                 // 3
    "out 0xed, al",
}

fn debug(g: &Guest, control: u32, debugreg: [u64; 8]) {
    let request = kvm_guest_debug { control, pad: 0, arch: kvm_guest_debug_arch { debugreg } };
    assert_ok!(g.cpu.set(KVM_SET_GUEST_DEBUG, &request));
}

/// Exception, offset in the code, DR6.
#[track_caller]
fn debug_exit(g: &Guest) -> (u32, u64, u64) {
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Debug);
    // SAFETY: the exit says which member of the union it is.
    let arch = unsafe { g.cpu.page().__bindgen_anon_1.debug.arch };
    (arch.exception, arch.pc.wrapping_sub(CODE), arch.dr6)
}

fn steps_over_everything() {
    let g = Guest::long(lm_debugged());
    debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, [0; 8]);
    for offset in [11, 12, 14, 16, 19] {
        let (exception, pc, dr6) = debug_exit(&g);
        assert_eq!((exception, pc), (1, offset));
        assert!(dr6 & 0x4000 != 0, "DR6.BS: {dr6:#x}");
        assert_eq!(g.cpu.regs().rflags & 0x100, 0, "our trap flag is seen");
    }
    debug(&g, 0, [0; 8]);
    g.expect_done();
    assert_eq!(g.cpu.regs().rax, 0x400);
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((d.dr6, d.dr7), (0xffff_0ff0, 0x400), "traces in the guest's own registers");
}

payload! { lm_shadows, 64,
    "sti",            // 1
    "nop",            // 2
    "mov eax, ss",    // 4
    "mov ss, eax",    // 6
    "nop",            // 7
    "cli",            // 8
    "out 0xed, al",
}

/// The instruction after STI is stepped; that after MOV SS runs before the trap. VMX would take the step as done before it began.
fn steps_out_of_an_interrupt_shadow() {
    let g = Guest::long(lm_shadows());
    debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, [0; 8]);
    let stops: Vec<u64> = (0..5).map(|_| debug_exit(&g).1).collect();
    // An emulated CPU may trap after MOV SS, too.
    assert!(stops == [1, 2, 4, 7, 8] || stops == [1, 2, 4, 6, 7], "{stops:?}");
    debug(&g, 0, [0; 8]);
    g.expect_done();
}

fn watchpoint_and_guests_registers() {
    let g = Guest::long(lm_debugged());
    let mut d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    d.db = [1, 2, 3, 4];
    assert_ok!(g.cpu.set(KVM_SET_DEBUGREGS, &d));
    // DR2: four bytes, written.
    debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [0, 0, VALUE, 0, 0, 0, 0, 0xd00_0420]);
    let (exception, pc, dr6) = debug_exit(&g);
    assert_eq!((exception, pc, dr6 & 0xf), (1, 11, 4));
    assert_eq!(g.ram.read_u32(VALUE), 5);
    let seen: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((seen.db, seen.dr7), (d.db, d.dr7));
    g.expect_done();
    assert_eq!(g.cpu.regs().rax, 0x400, "the guest reads its own DR7");
}

fn code_breakpoint() {
    let g = Guest::long(lm_debugged());
    debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [0, CODE + 12, 0, 0, 0, 0, 0, 0x408]);
    let (exception, pc, dr6) = debug_exit(&g);
    assert_eq!((exception, pc), (1, 12));
    assert!(dr6 & 0xf == 2, "DR6 {dr6:#x}");
    // It is hit again until it is taken away.
    assert_eq!(debug_exit(&g).1, 12);
    debug(&g, KVM_GUESTDBG_ENABLE, [0; 8]);
    g.expect_done();
}

payload! { lm_int3, 64,
    "nop",
    "int3",
    "out 0xed, al",
}

fn software_breakpoint() {
    if tcg() {
        skip!("QEMU's EPYC does not let a hypervisor intercept INT3");
    }
    let g = Guest::long(lm_int3());
    debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, [0; 8]);
    let (exception, pc, _) = debug_exit(&g);
    assert_eq!((exception, pc), (3, 1));
    debug(&g, 0, [0; 8]);
    let Event::Exception { vector: 3, .. } = g.event() else { panic!("the guest's own breakpoint") };
    g.expect_done();
}

fn injected_breakpoint() {
    let g = Guest::long(lm_debugged());
    let inject = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB;
    debug(&g, inject, [0; 8]);
    let request = kvm_guest_debug { control: inject, ..Default::default() };
    assert_eq!(g.cpu.set(KVM_SET_GUEST_DEBUG, &request), Err(Errno(libc::EBUSY)), "one is pending");
    let Event::Exception { vector: 1, .. } = g.event() else { panic!("no #DB") };
    g.expect_done();
}
