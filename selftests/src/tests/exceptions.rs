// SPDX-License-Identifier: GPL-2.0
//! Exceptions in long mode: their vectors, error codes and CR2, faults in faults, debug traps.

use krabtest::guest::*;
use krabtest::harness::tcg;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, tests};

tests! { "exceptions";
    exceptions;
    selector_errors;
    page_faults;
    page_fault_user;
    double_fault;
    triple_fault_long;
    debug_registers;
    breakpoint_traps;
    single_step;
    single_step_over_intercepts;
}

payload! { lm_exceptions, 64,
    "xor ecx, ecx",
    "div ecx",                       // 2 bytes
    "ud2",                           // 2
    "int3",                          // reports the next instruction
    "int 0x81",
    "mov rax, 0x8000000000000000",
    "mov bl, [rax]",                 // 2
    "mov rbp, rax",
    "mov bl, [rbp + 0]",             // 3: through SS
    "mov rax, cr0",
    "or eax, 8",
    "mov cr0, rax",
    "movaps xmm0, xmm1",             // 3: TS
    "clts",
    "movaps xmm0, xmm1",
    "mov rax, -1",
    "push rax",
    "ldmxcsr [rsp]",                 // 4: reserved bits
    "movaps xmm0, [rsp + 4]",        // 5: not aligned
    "mov ecx, 0x80000000",
    "mov eax, ecx",
    "mov edx, ecx",
    "div ecx",                       // 2: overflow
    "out 0xed, al",
}

fn exceptions() {
    let g = Guest::long(lm_exceptions());
    assert_eq!(g.exception(2), (0, 0), "#DE");
    assert_eq!(g.exception(2), (6, 0), "#UD");
    assert_eq!(g.exception(0), (3, 0), "#BP");
    // Vector 0x81 goes through the interrupt handler, which only counts.
    assert_eq!(g.exception(2), (13, 0), "#GP");
    assert_eq!(g.count(0x81), 1);
    assert_eq!(g.exception(3), (if tcg() { 13 } else { 12 }, 0), "#SS");
    assert_eq!(g.exception(3), (7, 0), "#NM");
    if !tcg() {
        assert_eq!(g.exception(4), (13, 0), "LDMXCSR");
    }
    assert_eq!(g.exception(5), (13, 0), "MOVAPS");
    assert_eq!(g.exception(2), (0, 0), "#DE on overflow");
    g.expect_done();
}

payload! { lm_selectors, 64,
    "mov eax, 0x1238",
    "mov ds, eax",          // 2: beyond the GDT
    "mov eax, 0x40",
    "mov es, eax",          // 2: not a data segment (upper half of the TSS)
    "push 0x60",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",                // 2: not present
    "2: int 0x90",          // 2: not present gate
    "out 0xed, al",
}

fn selector_errors() {
    let g = Guest::long(lm_selectors());
    g.ram.write_u64(GDT + 0x60, 0x00af_1b00_0000_ffff);
    g.ram.write_u64(IDT + 0x90 * 16, 0);
    assert_eq!(g.exception(2), (13, 0x1238));
    assert_eq!(g.exception(2), (13, 0x40));
    assert_eq!(g.exception(2), (11, 0x60), "#NP");
    assert_eq!(g.exception(2), (13, 0x90 * 8 + 2), "gate in the IDT");
    g.expect_done();
}

payload! { lm_page_faults, 64,
    "mov rax, [0x140000]",          // not present
    "mov [0x140008], rax",          // not present, write
    "mov [0x141010], rax",          // read-only with CR0.WP
    "mov rax, [0x141010]",          // may be read
    "mov rax, 0x140000",
    "jmp rax",                      // fetch, not present
    ".balign 0x80, 0x90",
    "mov rax, 0x142000",
    "jmp rax",                      // fetch, no execute
    ".balign 0x80, 0x90",
    "mov rax, [0x143000]",          // reserved bit
    "movabs rax, [0x800000000000 - 0x1000]", // far away, not present
    "out 0xed, al",
}

fn page_faults() {
    let g = Guest::long(lm_page_faults());
    let pte = split_first_2m(g.ram);
    g.ram.write_u64(pte(0x14_0000), 0);
    g.ram.write_u64(pte(0x14_1000), 0x14_1005);
    g.ram.write_u64(pte(0x14_2000), 0x14_2007 | 1 << 63);
    g.ram.write_u64(pte(0x14_3000), 0x14_3007 | 1 << 51);
    let mut s = g.cpu.sregs();
    s.cr0 |= 1 << 16;
    s.efer |= 1 << 11;
    g.cpu.set_sregs(&s);
    let fault = |want_error: u32, want_cr2: u64, next: u64| match g.event() {
        Event::Exception { vector: 14, error, cr2, rip } => {
            assert_eq!((error, cr2), (want_error, want_cr2), "at {rip:#x}");
            g.set_frame_rip(if next < 0x100 { rip + next } else { next });
        }
        other => panic!("wanted #PF({want_error}) at {want_cr2:#x}, got {other:x?}"),
    };
    fault(0, 0x14_0000, 8);
    fault(2, 0x14_0008, 8);
    fault(3, 0x14_1010, 8);
    fault(0x10, 0x14_0000, CODE + 0x80);
    fault(0x11, 0x14_2000, CODE + 0x100);
    // P and RSVD; QEMU's TCG leaves P out.
    fault(if tcg() { 8 } else { 9 }, 0x14_3000, 8);
    fault(0, 0x7fff_ffff_f000, 10);
    g.expect_done();
}

payload! { lm_user_fault, 64,
    "push 0x2b",
    "push 0x88000",
    "push 2",
    "push 0x33",
    "lea rax, [rip + 2f]",
    "push rax",
    "iretq",
    "2: mov rax, [0x140000]",       // supervisor page
    "mov [0x141000], rax",          // read-only for all
    "hlt",                          // privileged
    "mov rax, cr0",
    "in al, 0x60",
    "int 0x82",                     // gate of DPL 0
    "mov eax, 0x10",
    "mov ds, eax",                  // DPL 0 data
    "ud2",
    "int3",
    "ud2",
}

fn page_fault_user() {
    let g = Guest::long(lm_user_fault());
    let pte = split_first_2m(g.ram);
    g.ram.write_u64(pte(0x14_0000), 0x14_0003);
    g.ram.write_u64(pte(0x14_1000), 0x14_1005);
    assert_eq!(g.exception(8), (14, 5));
    assert_eq!(g.exception(8), (14, 7));
    assert_eq!(g.exception(1), (13, 0), "HLT");
    assert_eq!(g.exception(3), (13, 0), "MOV from CR0");
    assert_eq!(g.exception(2), (13, 0), "IN without permission");
    assert_eq!(g.exception(2), (13, 0x82 * 8 + 2), "INT through a gate of DPL 0");
    assert_eq!(g.exception(2), (13, 0x10), "MOV DS");
    assert_eq!(g.exception(2), (6, 0), "UD2");
    assert_eq!(g.exception(0), (3, 0), "INT3");
    assert_eq!(g.cpu.sregs().cs.selector, SEL_CODE64, "in the handler");
    let frame_cs = g.ram.read_u64(g.cpu.regs().rsp + 24);
    assert_eq!(frame_cs, SEL_USER_CODE as u64);
}

payload! { lm_double, 64,
    "mov rax, 0x8000000000000000",
    "mov rax, [rax]",
    "out 0xed, al",
}

/// #GP whose gate is not there becomes #DF with error code 0.
fn double_fault() {
    let g = Guest::long(lm_double());
    g.ram.write_u64(IDT + 13 * 16, 0);
    g.ram.write_u64(IDT + 11 * 16, 0);
    match g.event() {
        Event::Exception { vector: 8, error: 0, .. } => {}
        other => panic!("{other:x?}"),
    }
}

fn triple_fault_long() {
    let g = Guest::long(lm_double());
    let mut s = g.cpu.sregs();
    s.idt.limit = 0;
    g.cpu.set_sregs(&s);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Shutdown);
    // A stack that is not there does it as well.
    let g = Guest::long(lm_double());
    let mut r = g.cpu.regs();
    r.rsp = 0x1234_5678_0000;
    g.cpu.set_regs(&r);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Shutdown);
}

payload! { lm_dr, 64,
    "mov eax, 0x11110000",
    "mov dr0, rax",
    "mov eax, 0x22220000",
    "mov dr1, rax",
    "mov eax, 0x33330000",
    "mov dr2, rax",
    "mov eax, 0x44440000",
    "mov dr3, rax",
    "mov eax, 0x700",           // DR7: exact bits only, nothing armed
    "mov dr7, rax",
    "out 0xed, al",
    "mov rax, dr0",
    "mov rbx, dr1",
    "mov rcx, dr2",
    "mov rdx, dr3",
    "mov rsi, dr6",
    "mov rdi, dr7",
    "out 0xed, al",
    "mov rax, 0x100000000",
    "mov dr7, rax",             // upper half: #GP
    "mov dr6, rax",             // #GP
    "out 0xed, al",
}

fn debug_registers() {
    let g = Guest::long(lm_dr());
    g.expect_done();
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!(d.db, [0x1111_0000, 0x2222_0000, 0x3333_0000, 0x4444_0000]);
    g.expect_done();
    let r = g.cpu.regs();
    assert_eq!((r.rax, r.rbx, r.rcx, r.rdx), (0x1111_0000, 0x2222_0000, 0x3333_0000, 0x4444_0000));
    assert_eq!((r.rsi, r.rdi), (0xffff_0ff0, 0x700));
    assert_eq!(g.exception(3), (13, 0), "DR7");
    assert_eq!(g.exception(3), (13, 0), "DR6");
    g.expect_done();
}

payload! { lm_watch, 64,
    "mov eax, 0x100100",
    "mov dr0, rax",
    "lea rax, [rip + 2f]",
    "mov dr1, rax",
    "mov eax, 0xd0705",         // DR0: write, 4 bytes, local; DR1: execute, local
    "mov dr7, rax",
    "mov dword ptr [0x100100], 5",
    "nop",
    "mov eax, [0x100100]",
    "2: nop",
    "xor eax, eax",
    "mov dr7, rax",
    "mov dword ptr [0x100100], 6",
    "out 0xed, al",
}

fn breakpoint_traps() {
    let g = Guest::long(lm_watch());
    let Event::Exception { vector: 1, .. } = g.event() else { panic!("no #DB for the write") };
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!(d.dr6 & 0xf, 1, "DR6 {:#x}", d.dr6);
    let Event::Exception { vector: 1, rip, .. } = g.event() else { panic!("no #DB for the code") };
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!(d.dr6 & 0xe, 2, "DR6 {:#x}", d.dr6);
    // A code breakpoint is a fault: RF lets the instruction pass.
    let flags = g.cpu.regs().rsp + 32;
    g.ram.write_u64(flags, g.ram.read_u64(flags) | 0x10000);
    assert_eq!(d.db[1], rip);
    g.expect_done();
}

payload! { lm_step, 64,
    "pushfq",
    "or dword ptr [rsp], 0x100",
    "popfq",
    "nop",
    "xor eax, eax",
    "inc eax",
    "pushfq",
    "and dword ptr [rsp], 0xfffffeff",
    "popfq",
    "nop",
    "out 0xed, al",
}

#[track_caller]
fn steps(g: &Guest) -> Vec<u64> {
    let mut seen = Vec::new();
    loop {
        match g.event() {
            Event::Exception { vector: 1, rip, .. } => seen.push(rip - CODE),
            Event::Done => return seen,
            Event::Exit(Exit::Io { .. }) => {}
            other => panic!("{other:x?}, steps {seen:x?}"),
        }
    }
}

fn single_step() {
    let g = Guest::long(lm_step());
    // After: nop, xor, inc, pushfq, and, popfq
    let start = 1 + 7 + 1;
    assert_eq!(steps(&g), [start + 1, start + 3, start + 5, start + 6, start + 13, start + 14]);
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert!(d.dr6 & 0x4000 != 0, "DR6.BS");
}

payload! { lm_step_exits, 64,
    "pushfq",
    "or dword ptr [rsp], 0x100",
    "popfq",
    "cpuid",
    "out 0x50, al",
    "rdtsc",
    "mov rax, cr0",
    "wbinvd",
    "nop",
    "pushfq",
    "and dword ptr [rsp], 0xfffffeff",
    "popfq",
    "out 0xed, al",
}

fn single_step_over_intercepts() {
    let g = Guest::long(lm_step_exits());
    let s = 9;
    // cpuid, out, rdtsc, mov, wbinvd, nop, pushfq, and, popfq
    let want = [s + 2, s + 4, s + 6, s + 9, s + 11, s + 12, s + 13, s + 20, s + 21];
    assert_eq!(steps(&g), want);
}
