// SPDX-License-Identifier: GPL-2.0
//! Accesses that a hypervisor makes for the guest obey the guest's page rights as the CPU's own do: user and supervisor pages, SMAP and AC,
//! SMEP, read-only pages and CR0.WP, no-execute, protection keys. SDM "Determination of Access Rights". Each instruction touches a device
//! first or as well, so that it is emulated; what a CPU checks before that is the same by definition.

use krabtest::guest::*;
use krabtest::vm::Exit;
use krabtest::{skip, tests};

tests! { "protection";
    supervisor_and_user_pages;
    fetches;
    write_protection;
    user_mode;
    protection_keys;
}

// Pages of the first 2 MiB. All others are for the supervisor.
const USER: u64 = 0x15_0000;
const READ_ONLY: u64 = 0x15_1000;
/// A device, and the user's memory behind it.
const DEVICE: u64 = 0x15_2000;
const BEHIND_DEVICE: u64 = 0x15_3000;
/// The same device for the user, and the supervisor's memory behind it.
const USER_DEVICE: u64 = 0x15_4000;
const BEHIND_USER_DEVICE: u64 = 0x15_5000;
/// The code again, for the user.
const USER_CODE: u64 = 0x15_6000;
const NO_EXECUTE: u64 = 0x15_7000;
/// The user's, with protection key 1.
const KEYED: u64 = 0x15_8000;
const SUPERVISOR: u64 = 0x15_9000;
/// The stack of the page-fault handler.
const FAULT_STACK: u64 = 0x15_b000;

const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const WP: u64 = 1 << 16;
const AC: u64 = 1 << 18;

const MOVSQ: &[u8] = &[0x48, 0xa5];
const LOAD: &[u8] = &[0x48, 0x8b, 0x06]; // mov rax, [rsi]
const STORE: &[u8] = &[0x48, 0x89, 0x07]; // mov [rdi], rax
const PUSH: &[u8] = &[0xff, 0x36]; // push qword ptr [rsi]
const POP: &[u8] = &[0x8f, 0x07]; // pop qword ptr [rdi]
const JUMP: &[u8] = &[0xff, 0x26]; // jmp qword ptr [rsi]
const CALL: &[u8] = &[0xff, 0x16]; // call qword ptr [rsi]
const WRPKRU: &[u8] = &[0x0f, 0x01, 0xef];
const OUT_DONE: &[u8] = &[0xe6, PORT_DONE as u8];

/// What the device answers.
const ANSWER: u64 = 0x1122_3344_5566_7788;

struct Case {
    code: &'static [u8],
    rsi: u64,
    rdi: u64,
    rsp: u64,
    answer: u64,
    cr4: u64,
    write_protect: bool,
    ac: bool,
    user: bool,
    /// With protection keys: PKRU.
    pkru: Option<u32>,
}

/// One instruction at CPL 0, with write protection.
fn case(code: &'static [u8], rsi: u64, rdi: u64) -> Case {
    Case { code, rsi, rdi, rsp: STACK, answer: ANSWER, cr4: 0, write_protect: true, ac: false, user: false, pkru: None }
}

fn guest() -> Guest {
    let g = Guest::long(OUT_DONE);
    let entry = split_first_2m(g.ram);
    for page in 0..512u64 {
        g.ram.write_u64(entry(page << 12), page << 12 | 0x63);
    }
    for (page, bits) in [
        (USER, USER | 0x67),
        (READ_ONLY, READ_ONLY | 0x61),
        (DEVICE, MMIO | 0x63),
        (BEHIND_DEVICE, BEHIND_DEVICE | 0x67),
        (USER_DEVICE, MMIO | 0x67),
        (USER_CODE, USER_CODE | 0x67),
        (NO_EXECUTE, NO_EXECUTE | 0x63 | 1 << 63),
        (KEYED, KEYED | 0x67 | 1 << 59),
    ] {
        g.ram.write_u64(entry(page), bits);
    }
    // Page faults come on a stack of their own.
    g.ram.write_u64(IDT + 14 * 16, g.ram.read_u64(IDT + 14 * 16) | 1 << 32);
    g.ram.write_u64(TSS + 0x24, FAULT_STACK);
    for page in [USER, NO_EXECUTE] {
        g.ram.write(page, OUT_DONE);
    }
    g
}

/// Features of CPUID leaf 7: EBX, ECX.
fn has(g: &Guest, ebx: u32, ecx: u32) -> bool {
    g.cpuid.find(7, 0).is_some_and(|leaf| leaf.ebx & ebx == ebx && leaf.ecx & ecx == ecx)
}

fn needs_smep_and_smap(g: &Guest) {
    if !has(g, 1 << 7 | 1 << 20, 0) {
        skip!("no SMEP or no SMAP");
    }
}

/// Runs the instruction. What comes, and how often it wrote to the device.
fn run(g: &Guest, case: &Case) -> (Event, u32) {
    let mut code = if case.pkru.is_some() { WRPKRU.to_vec() } else { Vec::new() };
    code.extend(case.code);
    code.extend(OUT_DONE);
    g.ram.write(CODE, &code);
    g.ram.write(USER_CODE, &code);
    enter_long(&g.cpu, start(case), case.rsp);
    let mut s = g.cpu.sregs();
    s.cr4 |= case.cr4;
    s.efer |= 0x800;
    if case.write_protect {
        s.cr0 |= WP;
    }
    if case.user {
        s.cs = segment(SEL_USER_CODE, 0xb, 1, 0);
        s.ss = segment(SEL_USER_DATA, 3, 0, 1);
    }
    g.cpu.set_sregs(&s);
    let mut r = g.cpu.regs();
    (r.rsi, r.rdi, r.rax) = (case.rsi, case.rdi, case.pkru.unwrap_or(0).into());
    (r.rcx, r.rdx, r.rflags) = (0, 0, 2 | if case.ac { AC } else { 0 });
    g.cpu.set_regs(&r);
    let mut writes = 0;
    loop {
        match g.event() {
            Event::Exit(Exit::Mmio { write: false, gpa, len, .. }) => {
                let at = (gpa - MMIO) as usize & 7;
                let answer = [case.answer.to_le_bytes(), case.answer.to_le_bytes()].concat();
                g.cpu.reply(&answer[at..at + len as usize]);
            }
            Event::Exit(Exit::Mmio { write: true, .. }) => writes += 1,
            other => return (other, writes),
        }
    }
}

fn start(case: &Case) -> u64 {
    if case.user {
        USER_CODE
    } else {
        CODE
    }
}

/// A page fault before anything has happened.
#[track_caller]
fn faults(g: &Guest, what: &str, case: &Case, error: u32, cr2: u64) {
    let (event, writes) = run(g, case);
    let rip = start(case) + if case.pkru.is_some() { WRPKRU.len() as u64 } else { 0 };
    assert_eq!(event, Event::Exception { vector: 14, error, rip, cr2 }, "{what}");
    let r = g.cpu.regs();
    assert_eq!((r.rsi, r.rdi, writes), (case.rsi, case.rdi, 0), "{what}");
}

/// The instruction is done, and the next one is reached.
#[track_caller]
fn works(g: &Guest, what: &str, case: &Case) {
    let (event, _) = run(g, case);
    match event {
        Event::Done if !case.user => {}
        // The user may not use ports.
        Event::Exception { vector: 13, .. } if case.user => {}
        other => panic!("{what}: {other:x?}"),
    }
}

/// A page fault of the fetch behind an emulated jump.
#[track_caller]
fn fetch_faults(g: &Guest, what: &str, case: &Case, error: u32) {
    let (event, _) = run(g, case);
    assert_eq!(event, Event::Exception { vector: 14, error, rip: case.answer, cr2: case.answer }, "{what}");
}

fn supervisor_and_user_pages() {
    let g = guest();
    needs_smep_and_smap(&g);
    let smap = |case: Case| Case { cr4: SMAP, ..case };
    faults(&g, "write", &smap(case(MOVSQ, DEVICE, USER)), 3, USER);
    faults(&g, "read", &smap(case(MOVSQ, USER, DEVICE)), 1, USER);
    faults(&g, "push", &smap(Case { rsp: USER + 0x800, ..case(PUSH, DEVICE, 0) }), 3, USER + 0x7f8);
    faults(&g, "call", &smap(Case { rsp: USER + 0x800, answer: CODE, ..case(CALL, DEVICE, 0) }), 3, USER + 0x7f8);
    faults(&g, "pop", &smap(Case { rsp: USER, ..case(POP, 0, DEVICE) }), 1, USER);
    faults(&g, "load across", &smap(case(LOAD, BEHIND_DEVICE - 4, 0)), 1, BEHIND_DEVICE);
    faults(&g, "store across", &smap(case(STORE, 0, BEHIND_DEVICE - 4)), 3, BEHIND_DEVICE);
    for (what, cr4, ac) in [("AC", SMAP, true), ("no SMAP", SMEP, false)] {
        let with = |case: Case| Case { cr4, ac, ..case };
        g.ram.write_u64(USER + 0x100, 0);
        works(&g, what, &with(case(MOVSQ, DEVICE, USER + 0x100)));
        assert_eq!(g.ram.read_u64(USER + 0x100), ANSWER, "{what}");
        works(&g, what, &with(case(MOVSQ, USER, DEVICE)));
        works(&g, what, &with(case(LOAD, BEHIND_DEVICE - 4, 0)));
        works(&g, what, &with(case(STORE, 0, BEHIND_DEVICE - 4)));
        works(&g, what, &with(Case { rsp: USER + 0x800, ..case(PUSH, DEVICE, 0) }));
        assert_eq!(g.ram.read_u64(USER + 0x7f8), ANSWER, "{what}");
    }
}

fn fetches() {
    let g = guest();
    needs_smep_and_smap(&g);
    let jump = |code, answer, cr4| Case { answer, cr4, ..case(code, DEVICE, 0) };
    for (what, code) in [("jump", JUMP), ("call", CALL)] {
        fetch_faults(&g, what, &jump(code, USER, SMEP), 0x11);
        fetch_faults(&g, what, &jump(code, NO_EXECUTE, 0), 0x11);
        works(&g, what, &jump(code, USER, SMAP));
        let user = Case { user: true, rsi: USER_DEVICE, rsp: USER + 0x800, ..jump(code, SUPERVISOR, SMEP) };
        fetch_faults(&g, what, &user, 0x15);
    }
}

fn write_protection() {
    let g = guest();
    faults(&g, "write", &case(MOVSQ, DEVICE, READ_ONLY), 3, READ_ONLY);
    faults(&g, "push", &Case { rsp: READ_ONLY + 8, ..case(PUSH, DEVICE, 0) }, 3, READ_ONLY);
    works(&g, "read", &case(MOVSQ, READ_ONLY, DEVICE));
    works(&g, "write without WP", &Case { write_protect: false, ..case(MOVSQ, DEVICE, READ_ONLY) });
    assert_eq!(g.ram.read_u64(READ_ONLY), ANSWER);
}

fn user_mode() {
    let g = guest();
    let user = |case: Case| Case { user: true, rsp: USER + 0x800, ..case };
    faults(&g, "write", &user(case(MOVSQ, USER_DEVICE, SUPERVISOR)), 7, SUPERVISOR);
    faults(&g, "read", &user(case(MOVSQ, SUPERVISOR, USER_DEVICE)), 5, SUPERVISOR);
    faults(&g, "device", &user(case(LOAD, DEVICE, 0)), 5, DEVICE);
    faults(&g, "load across", &user(case(LOAD, BEHIND_USER_DEVICE - 4, 0)), 5, BEHIND_USER_DEVICE);
    faults(&g, "store across", &user(case(STORE, 0, BEHIND_USER_DEVICE - 4)), 7, BEHIND_USER_DEVICE);
    // WP and AC are the supervisor's.
    let free = Case { write_protect: false, ac: true, ..user(case(MOVSQ, USER_DEVICE, READ_ONLY)) };
    faults(&g, "without WP", &free, 7, READ_ONLY);
    works(&g, "its own", &user(case(MOVSQ, USER_DEVICE, USER + 0x100)));
    if has(&g, 1 << 7 | 1 << 20, 0) {
        works(&g, "its own, with SMAP", &Case { cr4: SMAP | SMEP, ..user(case(MOVSQ, USER_DEVICE, USER + 0x100)) });
    }
}

fn protection_keys() {
    let g = guest();
    if !has(&g, 0, 1 << 3) {
        skip!("no protection keys");
    }
    // Key 1: no access, no writes.
    let (none, no_writes) = (1 << 2, 1 << 3);
    let with = |pkru, case: Case| Case { cr4: PKE, pkru: Some(pkru), ..case };
    let user = |case: Case| Case { user: true, rsp: USER + 0x800, ..case };
    faults(&g, "write", &with(none, case(MOVSQ, DEVICE, KEYED)), 0x23, KEYED);
    faults(&g, "no write", &with(no_writes, case(MOVSQ, DEVICE, KEYED)), 0x23, KEYED);
    faults(&g, "user's write", &with(no_writes, user(case(MOVSQ, USER_DEVICE, KEYED))), 0x27, KEYED);
    faults(&g, "user's read", &with(none, user(case(MOVSQ, KEYED, USER_DEVICE))), 0x25, KEYED);
    works(&g, "without WP", &Case { write_protect: false, ..with(no_writes, case(MOVSQ, DEVICE, KEYED)) });
    works(&g, "read", &with(no_writes, case(MOVSQ, KEYED, DEVICE)));
    works(&g, "another key", &with(none | no_writes, case(MOVSQ, DEVICE, USER + 0x100)));
    works(&g, "no key", &Case { cr4: 0, pkru: None, ..case(MOVSQ, DEVICE, KEYED) });
}
