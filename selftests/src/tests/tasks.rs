// SPDX-License-Identifier: GPL-2.0
//! Task switches of 32-bit protected mode: on Intel each one is an exit, on AMD the CPU does them.

use std::cell::Cell;

use super::unpaged::{restricted, slot_at_table};
use krabtest::guest::*;
use krabtest::harness::{on_kvm, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, skip, tests};

tests! { "tasks";
    jump_call_and_return;
    gates_of_the_idt;
    refused_in_the_old_task;
    refused_in_the_new_task;
    registers_are_userspaces_too;
    emulated;
}

/// A stack segment of 16 bits.
const STACK16: u16 = 0x28;
const FIRST: u16 = 0x40;
const SECOND: u16 = 0x48;
/// Of 16 bits, but not on KVM, which saves the old task in the new one's format.
const THIRD: u16 = 0x50;
/// For events without error code, and with one.
const FOURTH: u16 = 0x58;
const FIFTH: u16 = 0x60;
const ABSENT: u16 = 0x68;
const SHORT: u16 = 0x70;
/// Its FS cannot be loaded.
const SIXTH: u16 = 0x78;

/// Of the task state segments, by selector.
const fn tss(selector: u16) -> u64 {
    0x2_0000 + (selector as u64 - FIRST as u64) * 0x20
}

/// The flag of a nested task.
const NT: u32 = 1 << 14;

// The first task at 0, the second one at 0x100 and so on; handlers of #TS and #NP at 0x600.
payload! { task_payload, 32,
    "mov ax, 0x40",
    "ltr ax",
    "mov ebx, 0x12345678",
    ".byte 0xea, 0, 0, 0, 0, 0x48, 0", // jmp to the second task
    "2: hlt",
    "jmp 2b",

    ".balign 256",
    "out 0xef, eax",
    "str eax",
    "out 0xef, eax",
    "pushfd",
    "pop eax",
    "out 0xef, eax",
    "mov esi, 0x5151",
    ".byte 0x9a, 0, 0, 0, 0, 0x50, 0", // call the third task
    "mov eax, esi",
    "out 0xef, eax",
    "str eax",
    "out 0xef, eax",
    // What the host asks for: EDI is where, ECX how long the instruction there is.
    "2: mov eax, 0x600d",
    "out 0xef, eax",
    "jmp edi",
    "nop",

    ".balign 256",
    "2: pushfd",
    "pop eax",
    "and eax, 0xffff",
    "out 0xef, eax",
    "iretd",
    "jmp 2b",

    ".balign 256",
    "2: mov eax, 0x40000",
    "str ax",
    "out 0xef, eax",
    "iretd",
    "jmp 2b",

    ".balign 256",
    "2: pop eax",
    "out 0xef, eax",
    "mov eax, [0x20120]",
    "out 0xef, eax",
    "mov eax, [0x2012c]",
    "add [0x20120], eax",
    "iretd",
    "jmp 2b",

    ".balign 256",
    "hlt",

    ".balign 256",
    "pop eax",
    "out 0xef, eax",
    "str eax",
    "out 0xef, eax",
    "cmp eax, 0x78",
    "je 3f",
    "add [esp], ecx",
    "iretd",
    "3: .byte 0xea, 0, 0, 0, 0, 0x48, 0", // jmp to the second task

    // Pieces for the second task, each 32 bytes from 0x700 on; they end in its loop.
    ".balign 256",
    "int 0x20",
    "jmp 4f",
    ".balign 32",
    "mov eax, 0xfff8",
    "mov ds, eax", // at 0x725
    "jmp 4f",
    ".balign 32",
    ".byte 0xea, 0, 0, 0, 0, 0x48, 0", // itself, which is busy
    "jmp 4f",
    ".balign 32",
    ".byte 0xea, 0, 0, 0, 0, 0x68, 0", // not present
    "jmp 4f",
    ".balign 32",
    ".byte 0x9a, 0, 0, 0, 0, 0x70, 0", // too short
    "jmp 4f",
    ".balign 32",
    ".byte 0xea, 0, 0, 0, 0, 0x78, 0", // with a bad segment
    "jmp 4f",
    ".balign 32",
    "sti",
    "nop",
    "5: jmp 5b",
    ".balign 32",
    "int3",
    "jmp 4f",
    ".balign 32",
    "4: mov eax, 0x600d",
    "out 0xef, eax",
    "jmp edi",
}

/// The pieces.
const INT: u64 = CODE + 0x700;
const BAD_SEGMENT: u64 = CODE + 0x720;
const BUSY: u64 = CODE + 0x740;
const NOT_PRESENT: u64 = CODE + 0x760;
const TOO_SHORT: u64 = CODE + 0x780;
const BAD_TASK: u64 = CODE + 0x7a0;
const OPEN: u64 = CODE + 0x7c0;
const BREAKPOINT: u64 = CODE + 0x7e0;

/// A task state segment of 32 bits.
fn write_tss(g: &Guest, selector: u16, code: u64, stack: u32) {
    let at = tss(selector);
    g.ram.write_u32(at + 0x20, code as u32);
    g.ram.write_u32(at + 0x24, 2);
    g.ram.write_u32(at + 0x28, 0xa000 | u32::from(selector));
    g.ram.write_u32(at + 0x38, stack);
    for n in 0..6 {
        g.ram.write_u32(at + 0x48 + 4 * n, u32::from(if n == 1 { SEL_CODE32 } else { SEL_DATA }));
    }
}

/// Type of the third task's segment, not busy.
fn third_kind() -> u8 {
    if on_kvm() {
        0x89
    } else {
        0x81
    }
}

thread_local! {
    /// The emulator is to have the guest.
    static IN_SOFTWARE: Cell<bool> = const { Cell::new(false) };
}

fn guest() -> Guest {
    let g = match IN_SOFTWARE.get() {
        true => Guest::protected_with(task_payload(), slot_at_table),
        false => Guest::protected(task_payload()),
    };
    let descriptor = |selector: u16, kind: u8, limit: u64| {
        g.ram.write_u64(0x1000 + u64::from(selector), limit | tss(selector) << 16 | u64::from(kind) << 40);
    };
    for (selector, kind, limit) in [
        (FIRST, 0x89, 0x67),
        (SECOND, 0x89, 0x67),
        (THIRD, third_kind(), if on_kvm() { 0x67 } else { 0x2b }),
        (FOURTH, 0x89, 0x67),
        (FIFTH, 0x89, 0x67),
        (ABSENT, 0x09, 0x67),
        (SHORT, 0x89, 0x66),
        (SIXTH, 0x89, 0x67),
    ] {
        descriptor(selector, kind, limit);
    }
    write_tss(&g, SECOND, CODE + 0x100, 0x7_0000);
    write_tss(&g, FOURTH, CODE + 0x300, 0x6_0000);
    write_tss(&g, FIFTH, CODE + 0x400, 0x5_0000);
    write_tss(&g, SIXTH, CODE + 0x500, 0x4_0000);
    g.ram.write_u32(tss(SIXTH) + 0x58, u32::from(ABSENT));
    // The kit's code lies above 64 KiB, where a task of 16 bits has no way to: its code segment begins there.
    g.ram.write_u64(0x1000 + u64::from(SEL_CODE16), 0x0040_9b00_0000_ffff | CODE << 16);
    // The upper half of its ESP is the CPU's choice.
    g.ram.write_u64(0x1000 + u64::from(STACK16), 0x0000_9300_0000_ffff);
    if on_kvm() {
        write_tss(&g, THIRD, CODE + 0x200, 0x3_0000);
    } else {
        for (at, value) in [
            (0x0e, 0x200),
            (0x10, 2),
            (0x1a, 0xf000),
            (0x22, SEL_DATA),
            (0x24, SEL_CODE16),
            (0x26, STACK16),
            (0x28, SEL_DATA),
        ] {
            g.ram.write(tss(THIRD) + at, &u16::to_le_bytes(value));
        }
    }
    let gate = |vector: u64, selector: u16, kind: u64, to: u64| {
        g.ram.write_u64(IDT + 8 * vector, to & 0xffff | u64::from(selector) << 16 | kind << 40 | to >> 16 << 48);
    };
    gate(3, FOURTH, 0x85, 0);
    gate(0x20, FOURTH, 0x85, 0);
    gate(0x21, FOURTH, 0x85, 0);
    gate(13, FIFTH, 0x85, 0);
    gate(10, SEL_CODE32, 0x8e, CODE + 0x600);
    gate(11, SEL_CODE32, 0x8e, CODE + 0x600);
    let mut s = g.cpu.sregs();
    s.idt = kvm_dtable { base: IDT, limit: 0x1ff, ..Default::default() };
    g.cpu.set_sregs(&s);
    g
}

/// Up to the second task's loop.
fn started() -> Guest {
    let g = guest();
    for _ in 0..6 {
        g.report();
    }
    assert_eq!(g.report(), 0x600d);
    g
}

/// Has the second task go to `piece`, whose instruction that faults has `length` bytes.
fn go(g: &Guest, piece: u64, length: u64) {
    let mut r = g.cpu.regs();
    (r.rdi, r.rcx) = (piece, length);
    g.cpu.set_regs(&r);
}

/// The second byte of a descriptor's upper half: its type.
fn kind(g: &Guest, selector: u16) -> u8 {
    g.ram.read(0x1000 + u64::from(selector) + 5, 1)[0]
}

fn jump_call_and_return() {
    let g = guest();
    assert_eq!(g.report(), 0xa000 | u32::from(SECOND), "EAX of the new task");
    let s = g.cpu.sregs();
    assert_eq!((s.tr.selector, s.tr.base, s.tr.type_), (SECOND, tss(SECOND), 0xb));
    // QEMU does not know KVM's intercept, and KVM's CR0 nothing of the CPU's own switch.
    assert!(s.cr0 & 8 != 0 || on_kvm() && tcg());
    assert_eq!((kind(&g, FIRST), kind(&g, SECOND)), (0x89, 0x8b));
    assert_eq!(g.ram.read_u32(tss(FIRST) + 0x34), 0x1234_5678, "EBX of the old task");
    assert_eq!(g.report(), SECOND.into());
    assert_eq!(g.report() & NT, 0);
    // The task of 16 bits is nested.
    assert_eq!(g.report() & NT, NT);
    assert_eq!(g.cpu.sregs().tr.selector, THIRD);
    assert_eq!(
        (g.ram.read_u32(tss(THIRD)) as u16, kind(&g, SECOND), kind(&g, THIRD)),
        (SECOND, 0x8b, third_kind() | 2)
    );
    assert_eq!(g.report(), 0x5151, "ESI from before the call");
    assert_eq!((g.report(), kind(&g, THIRD)), (SECOND.into(), third_kind()));
    let flags = if on_kvm() { 0x24 } else { 0x10 };
    assert_eq!(g.ram.read_u32(tss(THIRD) + flags) & NT, 0, "not saved by IRET");
    assert_eq!(g.report(), 0x600d);
}

fn gates_of_the_idt() {
    let g = started();
    for (piece, length) in [(INT, 2), (BREAKPOINT, 1)] {
        go(&g, piece, 0);
        assert_eq!(g.report(), 0x4_0000 | u32::from(FOURTH));
        assert_eq!(u64::from(g.ram.read_u32(tss(SECOND) + 0x20)), piece + length, "behind the instruction");
        assert_eq!(g.ram.read_u32(tss(FOURTH)) as u16, SECOND);
        assert_eq!(g.report(), 0x600d);
    }
    // A fault with an error code: the old task is at the instruction.
    go(&g, BAD_SEGMENT, 2);
    assert_eq!(g.report(), 0xfff8);
    assert_eq!(g.cpu.regs().rsp, 0x5_0000, "popped");
    assert_eq!(u64::from(g.report()), BAD_SEGMENT + 5);
    assert_eq!(g.report(), 0x600d);
    // An interrupt.
    go(&g, OPEN, 0);
    let mut r = g.cpu.regs();
    r.rflags |= 0x200;
    r.rip = OPEN;
    g.cpu.set_regs(&r);
    let irq = kvm_interrupt { irq: 0x21 };
    assert_ok!(g.cpu.set(KVM_INTERRUPT, &irq));
    assert_eq!(g.report(), 0x4_0000 | u32::from(FOURTH));
    let at = u64::from(g.ram.read_u32(tss(SECOND) + 0x20));
    assert!((OPEN..OPEN + 4).contains(&at), "{at:#x}");
}

fn refused_in_the_old_task() {
    let g = started();
    for (piece, code) in [(NOT_PRESENT, ABSENT), (TOO_SHORT, SHORT)] {
        go(&g, piece, 7);
        assert_eq!((g.report(), g.report()), (code.into(), SECOND.into()));
        assert_eq!(g.report(), 0x600d);
    }
    // Itself: a task is busy until it is left.
    go(&g, BUSY, 7);
    assert_eq!(g.report(), SECOND.into());
    assert_eq!(u64::from(g.report()), BUSY);
    assert_eq!(g.report(), 0x600d);
}

/// A segment that cannot be loaded is the new task's fault.
fn refused_in_the_new_task() {
    if on_kvm() {
        skip!("KVM loses the exceptions of a new task");
    }
    let g = started();
    go(&g, BAD_TASK, 7);
    assert_eq!(g.report(), ABSENT.into());
    let s = g.cpu.sregs();
    assert!(s.ds.selector == SEL_DATA && g.cpu.regs().rsp < 0x4_0000, "the stack of the new task");
    assert_eq!(s.tr.selector, SIXTH);
    assert_eq!(g.report(), SIXTH.into());
    assert_eq!((g.report(), kind(&g, SIXTH), kind(&g, SECOND)), (0x600d, 0x89, 0x8b));
}

/// A task switch is told to userspace, and userspace's registers to the task.
fn registers_are_userspaces_too() {
    if on_kvm() {
        skip!("KVM goes on behind a task switch that it cannot do");
    }
    let g = started();
    let mut s = g.cpu.sregs();
    s.cr0 &= !8;
    g.cpu.set_sregs(&s);
    go(&g, INT, 0);
    assert_eq!(g.report(), 0x4_0000 | u32::from(FOURTH));
    assert_eq!(g.cpu.sregs().cr0 & 8, 8);
    assert_eq!(g.report(), 0x600d);
    // The state of a task in no memory.
    let mut s = g.cpu.sregs();
    s.tr.base = MMIO;
    g.cpu.set_sregs(&s);
    go(&g, INT, 0);
    match g.cpu.run() {
        Ok(Exit::Internal(_)) => {}
        other => panic!("{other:x?}"),
    }
}

/// The same once more, where software can be made to run the guest.
fn emulated() {
    if on_kvm() || !restricted() {
        skip!("the CPU runs every guest without paging");
    }
    IN_SOFTWARE.set(true);
    jump_call_and_return();
    gates_of_the_idt();
    refused_in_the_old_task();
    refused_in_the_new_task();
    registers_are_userspaces_too();
}
