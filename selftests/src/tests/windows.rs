// SPDX-License-Identifier: GPL-2.0
//! Moments at which an event may go in: behind interrupt shadows, behind what was injected just before, and what delivery changes.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::{assert_ok, payload, tests};

tests! { "windows";
    nmi_after_shadow;
    nmi_after_shadow_with_interrupts_on;
    nmi_behind_an_exception;
    general_detect;
    translate;
}

payload! { wi_loop, 64,
    "2: nop",
    "nop",
    "jmp 2b",
    ".balign 0x80, 0x90",
    // An NMI handler at 0x10080: where the NMI came, and the flags there
    "mov eax, [rsp]",
    "out 0xef, eax",
    "mov eax, [rsp + 16]",
    "out 0xef, eax",
    "mov rax, dr6",
    "out 0xef, eax",
    "iretq",
    ".balign 0x80, 0x90",
    // Another handler, at 0x10100, that never ends
    "2: jmp 2b",
}

fn gate(g: &Guest, vector: u64, at: u64) {
    g.ram.write_u64(IDT + 16 * vector, at & 0xffff | 8 << 16 | 0x8e << 40 | (at >> 16) << 48);
}

/// A guest before its first instruction, in an interrupt shadow, with an NMI pending.
fn in_shadow(interrupts: bool) -> Guest {
    let g = Guest::long(wi_loop());
    gate(&g, 2, CODE + 0x80);
    let mut regs = g.cpu.regs();
    regs.rflags = if interrupts { 0x202 } else { 2 };
    g.cpu.set_regs(&regs);
    let mut events: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    events.nmi.pending = 1;
    events.interrupt.shadow = 1;
    events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &events));
    g
}

/// The NMI comes behind exactly one instruction, not whenever the guest exits next.
fn nmi_after_shadow() {
    for _ in 0..20 {
        let g = in_shadow(false);
        assert_eq!(g.report(), CODE as u32 + 1);
        assert_eq!(g.report() & 0x300, 0, "TF is not left in the guest's flags");
        assert_eq!(g.report(), 0xffff_0ff0, "nor a trace in DR6");
    }
}

fn nmi_after_shadow_with_interrupts_on() {
    for _ in 0..20 {
        let g = in_shadow(true);
        assert_eq!(g.report(), CODE as u32 + 1);
        assert_eq!(g.report() & 0x300, 0x200);
    }
}

/// The exception goes in first, and the NMI before its handler's first instruction.
fn nmi_behind_an_exception() {
    for _ in 0..20 {
        let g = Guest::long(wi_loop());
        gate(&g, 2, CODE + 0x80);
        gate(&g, 6, CODE + 0x100);
        let mut events: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
        (events.exception.injected, events.exception.nr) = (1, 6);
        events.nmi.pending = 1;
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &events));
        assert_eq!(g.report(), CODE as u32 + 0x100);
    }
}

payload! { wi_general_detect, 64,
    "mov eax, 0x2400",
    "mov dr7, rax",
    "mov rbx, dr0",
    "out 0xed, al",
    ".balign 0x80, 0x90",
    // A #DB handler at 0x10080 that may touch the debug registers again
    "mov rax, dr6",
    "out 0xef, eax",
    "mov rax, dr7",
    "out 0xef, eax",
    "iretq",
}

/// DR7.GD makes an access to a debug register fault, says so in DR6.BD, and is off in the handler.
fn general_detect() {
    let g = Guest::long(wi_general_detect());
    gate(&g, 1, CODE + 0x80);
    assert_eq!(g.report() & 0x6000, 0x2000, "DR6.BD");
    assert_eq!(g.report() & 0x2000, 0, "DR7.GD");
    // The handler returned to the access, which goes through now.
    g.expect_done();
}

#[repr(C)]
#[derive(Default)]
struct Translation {
    linear_address: u64,
    physical_address: u64,
    valid: u8,
    writeable: u8,
    usermode: u8,
    pad: [u8; 5],
}

fn translate() {
    let g = Guest::long(wi_loop());
    let ask = |linear_address| {
        let mut t = Translation { linear_address, ..Default::default() };
        assert_ok!(g.cpu.ioctl(KVM_TRANSLATE, &raw mut t as usize));
        t
    };
    let found = ask(CODE + 5);
    assert_eq!((found.valid, found.physical_address, found.linear_address), (1, CODE + 5, CODE + 5));
    assert_eq!(ask(0x7fff_0000_0000).valid, 0, "not mapped");
    // Without paging every address is its own.
    let g = Guest::real(wi_loop());
    let mut t = Translation { linear_address: 0x12345, ..Default::default() };
    assert_ok!(g.cpu.ioctl(KVM_TRANSLATE, &raw mut t as usize));
    assert_eq!((t.valid, t.physical_address), (1, 0x12345));
}
