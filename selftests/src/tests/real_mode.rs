// SPDX-License-Identifier: GPL-2.0
//! A guest in real mode: exits for port I/O, MMIO and HLT, kicks, shutdown, mode switches, and garbage as code.

use krabtest::guest::*;
use krabtest::harness::emulated;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::rng::Rng;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Vcpu};
use krabtest::{assert_err, assert_ok, payload, tests};

tests! { "real_mode";
    hlt;
    out_sizes;
    in_sizes;
    out_of_all_ports;
    rep_outs;
    rep_ins;
    rep_ins_backward;
    rep_count_zero;
    mmio_write_sizes;
    mmio_read_sizes;
    mmio_string_copy;
    mmio_across_end_of_slot;
    read_only_slot;
    fetch_from_mmio;
    interrupt_vector_table;
    triple_fault;
    run_after_shutdown;
    endless_loop_is_kicked;
    immediate_exit_completes_io;
    pending_io_dropped_by_new_state;
    to_protected_and_back;
    to_long_by_itself;
    registers_survive;
    garbage_real(60);
    garbage_protected(60);
    garbage_long(60);
}

payload! { real_hlt, 16, "hlt", "nop", "hlt" }

fn hlt() {
    let g = Guest::real(real_hlt());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.cpu.regs().rip, 0x1001);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.cpu.regs().rip, 0x1003);
}

#[track_caller]
fn expect_out(cpu: &Vcpu, port: u16, data: &[u8]) {
    let want = Exit::Io { out: true, port, size: data.len() as u8, count: 1, data: data.to_vec() };
    assert_eq!(assert_ok!(cpu.run()), want);
}

payload! { real_out, 16,
    "mov eax, 0x44332211",
    "out 0x10, al",
    "out 0x12, ax",
    "out 0x14, eax",
    "mov dx, 0xfffc",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "mov dx, 0xffff",
    "out dx, al",
    "hlt",
}

fn out_sizes() {
    let g = Guest::real(real_out());
    expect_out(&g.cpu, 0x10, &[0x11]);
    expect_out(&g.cpu, 0x12, &[0x11, 0x22]);
    expect_out(&g.cpu, 0x14, &[0x11, 0x22, 0x33, 0x44]);
    expect_out(&g.cpu, 0xfffc, &[0x11]);
    expect_out(&g.cpu, 0xfffc, &[0x11, 0x22]);
    expect_out(&g.cpu, 0xfffc, &[0x11, 0x22, 0x33, 0x44]);
    expect_out(&g.cpu, 0xffff, &[0x11]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { real_in, 16,
    "mov eax, 0xffffffff",
    "in al, 0x20",
    "mov ebx, eax",
    "mov eax, 0xffffffff",
    "in ax, 0x22",
    "mov ecx, eax",
    "mov eax, 0xffffffff",
    "mov dx, 0x1234",
    "in eax, dx",
    "hlt",
}

fn in_sizes() {
    let g = Guest::real(real_in());
    for (port, size) in [(0x20, 1), (0x22, 2), (0x1234, 4)] {
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Io { out: false, port, size, count: 1, data: vec![] });
        g.cpu.reply(&[0x81, 0x42, 0x24, 0x18]);
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rbx, r.rcx, r.rax), (0xffff_ff81, 0xffff_4281, 0x1824_4281));
}

payload! { real_all_ports, 16,
    "xor dx, dx",
    "2: mov ax, dx",
    "out dx, ax",
    "add dx, 0x101",
    "jnc 2b",
    "hlt",
}

/// Without interrupt controllers no port is taken by the kernel.
fn out_of_all_ports() {
    let g = Guest::real(real_all_ports());
    for i in 0..256u32 {
        let port = (i * 0x101) as u16;
        expect_out(&g.cpu, port, &port.to_le_bytes());
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { real_outs, 16,
    "cld",
    "mov si, 0x2000",
    "mov dx, 0x80",
    "mov cx, 5",
    "rep outsb",
    "mov cx, 3",
    "rep outsw",
    "mov cx, 2",
    "rep outsd",
    "outsb",
    "hlt",
}

/// Collects the bytes that go out in however many exits, until something else comes.
fn collect_out(cpu: &Vcpu, port: u16, size: u8, total: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < total {
        match assert_ok!(cpu.run()) {
            Exit::Io { out: true, port: p, size: s, count, data } => {
                assert_eq!((p, s), (port, size));
                assert!(count >= 1);
                bytes.extend(data);
            }
            other => panic!("{other:?} after {} bytes of {total}", bytes.len()),
        }
    }
    bytes
}

fn rep_outs() {
    let g = Guest::real(real_outs());
    let text: Vec<u8> = (0..64).map(|i| i * 3 + 1).collect();
    g.ram.write(0x2000, &text);
    assert_eq!(collect_out(&g.cpu, 0x80, 1, 5), text[..5]);
    assert_eq!(collect_out(&g.cpu, 0x80, 2, 6), text[5..11]);
    assert_eq!(collect_out(&g.cpu, 0x80, 4, 8), text[11..19]);
    assert_eq!(collect_out(&g.cpu, 0x80, 1, 1), text[19..20]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rsi & 0xffff, r.rcx & 0xffff), (0x2014, 0));
}

payload! { real_ins, 16,
    "cld",
    "mov di, 0x1ffe",
    "mov dx, 0x81",
    "mov cx, 6",
    "rep insb",
    "mov cx, 3",
    "rep insw",
    "mov cx, 2",
    "rep insd",
    "hlt",
}

/// Answers `in` exits with a running byte counter until `total` bytes went in.
fn feed_in(cpu: &Vcpu, port: u16, size: u8, total: usize, next: &mut u8) {
    let mut fed = 0;
    while fed < total {
        match assert_ok!(cpu.run()) {
            Exit::Io { out: false, port: p, size: s, count, .. } => {
                assert_eq!((p, s), (port, size));
                let n = size as usize * count as usize;
                assert!(n >= 1 && fed + n <= total, "{n} bytes wanted, {} to come", total - fed);
                let bytes: Vec<u8> = (0..n).map(|i| next.wrapping_add(i as u8)).collect();
                cpu.reply(&bytes);
                *next = next.wrapping_add(n as u8);
                fed += n;
            }
            other => panic!("{other:?} after {fed} bytes of {total}"),
        }
    }
}

fn rep_ins() {
    let g = Guest::real(real_ins());
    let mut next = 1;
    feed_in(&g.cpu, 0x81, 1, 6, &mut next);
    feed_in(&g.cpu, 0x81, 2, 6, &mut next);
    feed_in(&g.cpu, 0x81, 4, 8, &mut next);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let want: Vec<u8> = (1..=20).collect();
    assert_eq!(g.ram.read(0x1ffe, 20), want);
    assert_eq!(g.cpu.regs().rdi & 0xffff, 0x1ffe + 20);
}

payload! { real_ins_backward, 16,
    "std",
    "mov di, 0x2001",
    "mov dx, 0x82",
    "mov cx, 4",
    "rep insb",
    "hlt",
}

fn rep_ins_backward() {
    let g = Guest::real(real_ins_backward());
    let mut next = 1;
    feed_in(&g.cpu, 0x82, 1, 4, &mut next);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.ram.read(0x1ffe, 4), [4, 3, 2, 1]);
    assert_eq!(g.cpu.regs().rdi & 0xffff, 0x1ffd);
}

payload! { real_rep_zero, 16,
    "cld",
    "xor cx, cx",
    "mov dx, 0x83",
    "rep outsb",
    "rep insw",
    "hlt",
}

fn rep_count_zero() {
    let g = Guest::real(real_rep_zero());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

/// Real mode with the DS base in a hole of guest memory.
fn real_with_mmio_ds(code: &[u8]) -> Guest {
    let g = Guest::real(code);
    let mut s = g.cpu.sregs();
    s.ds.base = MMIO;
    g.cpu.set_sregs(&s);
    g
}

#[track_caller]
fn expect_mmio_write(cpu: &Vcpu, gpa: u64, data: &[u8]) {
    let want = Exit::Mmio { write: true, gpa, len: data.len() as u32, data: data.to_vec() };
    assert_eq!(assert_ok!(cpu.run()), want);
}

#[track_caller]
fn expect_mmio_read(cpu: &Vcpu, gpa: u64, reply: &[u8]) {
    let want = Exit::Mmio { write: false, gpa, len: reply.len() as u32, data: vec![] };
    assert_eq!(assert_ok!(cpu.run()), want);
    cpu.reply(reply);
}

payload! { real_mmio_write, 16,
    "mov eax, 0x44332211",
    "mov byte ptr [0x10], al",
    "mov word ptr [0x12], ax",
    "mov dword ptr [0x14], eax",
    "mov byte ptr [0x20], 0x5a",
    "mov bx, 0x100",
    "mov si, 0x23",
    "mov dword ptr [bx + si + 0x7], 0x12345678",
    "hlt",
}

fn mmio_write_sizes() {
    let g = real_with_mmio_ds(real_mmio_write());
    expect_mmio_write(&g.cpu, MMIO + 0x10, &[0x11]);
    expect_mmio_write(&g.cpu, MMIO + 0x12, &[0x11, 0x22]);
    expect_mmio_write(&g.cpu, MMIO + 0x14, &[0x11, 0x22, 0x33, 0x44]);
    expect_mmio_write(&g.cpu, MMIO + 0x20, &[0x5a]);
    expect_mmio_write(&g.cpu, MMIO + 0x12a, &[0x78, 0x56, 0x34, 0x12]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { real_mmio_read, 16,
    "mov eax, 0xffffffff",
    "mov al, byte ptr [0x10]",
    "mov ecx, 0xffffffff",
    "mov cx, word ptr [0x12]",
    "mov edx, dword ptr [0x14]",
    "movzx ebx, byte ptr [0x18]",
    "movsx esi, byte ptr [0x19]",
    "hlt",
}

fn mmio_read_sizes() {
    let g = real_with_mmio_ds(real_mmio_read());
    expect_mmio_read(&g.cpu, MMIO + 0x10, &[0x91]);
    expect_mmio_read(&g.cpu, MMIO + 0x12, &[0x92, 0x81]);
    expect_mmio_read(&g.cpu, MMIO + 0x14, &[1, 2, 3, 4]);
    expect_mmio_read(&g.cpu, MMIO + 0x18, &[0xfe]);
    expect_mmio_read(&g.cpu, MMIO + 0x19, &[0xfd]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rax, r.rcx, r.rdx, r.rbx, r.rsi), (0xffff_ff91, 0xffff_8192, 0x0403_0201, 0xfe, 0xffff_fffd));
}

payload! { real_mmio_movs, 16,
    "cld",
    "mov si, 0x40",
    "mov di, 0x2000",
    "mov cx, 4",
    "rep movsw",
    "mov eax, 0xdeadbeef",
    "hlt",
}

/// MMIO to memory, word by word.
fn mmio_string_copy() {
    let g = real_with_mmio_ds(real_mmio_movs());
    let mut got = 0u64;
    while got < 8 {
        match assert_ok!(g.cpu.run()) {
            Exit::Mmio { write: false, gpa, len, .. } => {
                assert_eq!(gpa, MMIO + 0x40 + got);
                let bytes: Vec<u8> = (0..len as u8).map(|i| got as u8 + i + 1).collect();
                g.cpu.reply(&bytes);
                got += len as u64;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.ram.read(0x2000, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(g.cpu.regs().rax, 0xdead_beef);
}

payload! { real_cross_slot, 16,
    "mov dword ptr [0xfffe], 0x44332211",
    "mov eax, dword ptr [0xfffe]",
    "hlt",
}

/// An access of which one half is memory and the other is not.
fn mmio_across_end_of_slot() {
    let g = Guest::real(real_cross_slot());
    let mut s = g.cpu.sregs();
    s.ds.base = (4 << 20) - 0x10000;
    // Intel wants a granularity that fits the limit.
    (s.ds.limit, s.ds.g) = (0xffff_ffff, 1);
    g.cpu.set_sregs(&s);
    expect_mmio_write(&g.cpu, 4 << 20, &[0x33, 0x44]);
    expect_mmio_read(&g.cpu, 4 << 20, &[0x55, 0x66]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.ram.read((4 << 20) - 2, 2), [0x11, 0x22]);
    assert_eq!(g.cpu.regs().rax, 0x6655_2211);
}

payload! { real_rom, 16,
    "mov eax, dword ptr [0x100]",
    "mov byte ptr [0x100], 0xcc",
    "mov ebx, dword ptr [0x100]",
    "hlt",
}

fn read_only_slot() {
    let g = real_with_mmio_ds(real_rom());
    let rom = krabtest::vm::Ram::new(MMIO, 0x2000);
    rom.write_u32(MMIO + 0x100, 0x0bad_cafe);
    assert_ok!(g.vm.map(1, KVM_MEM_READONLY, rom));
    expect_mmio_write(&g.cpu, MMIO + 0x100, &[0xcc]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rax, r.rbx), (0x0bad_cafe, 0x0bad_cafe));
    assert_eq!(rom.read_u32(MMIO + 0x100), 0x0bad_cafe);
}

/// Code can only be fetched from memory.
fn fetch_from_mmio() {
    let g = Guest::real(real_hlt());
    let mut s = g.cpu.sregs();
    s.cs.base = MMIO;
    g.cpu.set_sregs(&s);
    let e = assert_ok!(g.cpu.run());
    assert!(matches!(e, Exit::Internal(1)), "{e:?}");
    // The vCPU is not lost: with CS back in memory it goes on.
    s.cs.base = 0;
    g.cpu.set_sregs(&s);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { real_ivt, 16,
    "xor ax, ax",
    "div al", // #DE: vector 0, RIP of the instruction
    "ud2",
    "int 0x42",
    "int3",
    "hlt",
    ".balign 0x100, 0x90",
    // 0x1100: every vector leads here: report it with the return address, and step over `div` and `ud2`.
    "push bp",
    "mov bp, sp",
    "mov ax, [bp + 2]",
    "out 0xef, ax",
    "add word ptr [bp + 2], cx",
    "pop bp",
    "iret",
}

fn interrupt_vector_table() {
    let g = Guest::real(real_ivt());
    for v in 0..256 {
        g.ram.write_u32(v * 4, 0x1100);
    }
    let mut r = g.cpu.regs();
    r.rcx = 2;
    g.cpu.set_regs(&r);
    // div al and ud2 report themselves, int and int3 what follows.
    for rip in [0x1002u16, 0x1004] {
        expect_out(&g.cpu, 0xef, &rip.to_le_bytes());
    }
    let mut r = g.cpu.regs();
    r.rcx = 2;
    g.cpu.set_regs(&r);
    let next = assert_ok!(g.cpu.run());
    // After `ud2` the guest stands at `int 0x42` (0x1006), which reports 0x1008; adding 2 would skip int3 and hlt.
    assert_eq!(next, Exit::Io { out: true, port: 0xef, size: 2, count: 1, data: vec![0x08, 0x10] });
    let mut r = g.cpu.regs();
    r.rcx = 0;
    g.cpu.set_regs(&r);
    expect_out(&g.cpu, 0xef, &0x1009u16.to_le_bytes());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rip, r.rsp & 0xffff), (0x100a, 0x8000));
}

payload! { real_triple, 16,
    "lidt [0x2000]",
    "int3",
    "hlt",
}

fn triple_fault() {
    let g = Guest::real(real_triple());
    g.ram.write(0x2000, &[0; 6]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Shutdown);
}

fn run_after_shutdown() {
    let g = Guest::real(real_triple());
    g.ram.write(0x2000, &[0; 6]);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Shutdown);
    let fresh = Guest::real(real_hlt());
    recover_from_shutdown(&g.cpu);
    g.cpu.set_sregs(&fresh.cpu.sregs());
    g.cpu.set_regs(&fresh.cpu.regs());
    g.ram.write(0x1000, real_hlt());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { real_loop, 16, "2: inc ebx", "jmp 2b" }

fn endless_loop_is_kicked() {
    let g = Guest::real(real_loop());
    let start = now_ns();
    assert_err!(g.cpu.run_for(20), EINTR);
    assert!(now_ns() - start < 5_000_000_000);
    assert_eq!(g.cpu.page().exit_reason, KVM_EXIT_INTR);
    let first = g.cpu.regs().rbx;
    assert!(first > 0);
    assert_err!(g.cpu.run_for(20), EINTR);
    assert!(g.cpu.regs().rbx > first, "the guest goes on where it was");
    // immediate_exit: not one instruction.
    g.cpu.set_immediate_exit(true);
    let before = g.cpu.regs();
    assert_err!(g.cpu.run(), EINTR);
    assert_eq!(g.cpu.regs().rbx, before.rbx);
}

payload! { real_in_out, 16,
    "in al, 0x30",
    "mov bl, al",
    "mov al, byte ptr [0x10]",
    "hlt",
}

/// A read that waits for its answer is finished by a KVM_RUN with immediate_exit, and nothing more.
fn immediate_exit_completes_io() {
    let g = real_with_mmio_ds(real_in_out());
    assert!(matches!(assert_ok!(g.cpu.run()), Exit::Io { out: false, port: 0x30, .. }));
    g.cpu.reply(&[0x77]);
    g.cpu.set_immediate_exit(true);
    assert_err!(g.cpu.run(), EINTR);
    let r = g.cpu.regs();
    assert_eq!((r.rip, r.rax & 0xff, r.rbx & 0xff), (0x1002, 0x77, 0));
    g.cpu.set_immediate_exit(false);
    expect_mmio_read(&g.cpu, MMIO + 0x10, &[0x66]);
    g.cpu.set_immediate_exit(true);
    assert_err!(g.cpu.run(), EINTR);
    assert_eq!(g.cpu.regs().rax & 0xff, 0x66);
    g.cpu.set_immediate_exit(false);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.cpu.regs().rbx & 0xff, 0x77);
}

payload! { real_out_then_other, 16,
    "out 0x31, al",
    "hlt",
    ".balign 0x40, 0x90",
    "inc cx",
    "hlt",
}

/// RIP set by the host after an OUT exit is where the guest goes on.
fn pending_io_dropped_by_new_state() {
    let g = Guest::real(real_out_then_other());
    expect_out(&g.cpu, 0x31, &[0]);
    let mut r = g.cpu.regs();
    r.rip = 0x1040;
    r.rcx = 7;
    g.cpu.set_regs(&r);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let r = g.cpu.regs();
    assert_eq!((r.rip, r.rcx), (0x1042, 8));
}

payload! { real_to_protected, 16,
    "cli",
    "lgdt [0x2000]",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // jmp 0x18:0x1020
    ".long 0x1020",
    ".word 0x18",
    ".balign 0x20, 0x90",
    ".code32",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov ss, ax",
    "mov es, ax",
    "mov eax, dword ptr [0x100000]",
    "out 0xef, eax",
    "mov esp, 0x9000",
    "push 0x12345678",
    "pop ebx",
    ".byte 0xea", // jmp 0x20:0x1060
    ".long 0x1060",
    ".word 0x20",
    ".balign 0x20, 0x90",
    ".code16",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea", // jmp 0:0x1080
    ".word 0x1080, 0",
    ".balign 0x20, 0x90",
    "xor ax, ax",
    "mov ds, ax",
    "mov ax, word ptr [0x3000]",
    "hlt",
}

fn write_real_gdt(g: &Guest) {
    for (i, d) in [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff, 0x000f_9b00_0000_ffff]
        .iter()
        .enumerate()
    {
        g.ram.write_u64(0x2100 + i as u64 * 8, *d);
    }
    g.ram.write(0x2000, &[0x27, 0, 0x00, 0x21, 0, 0]);
}

fn to_protected_and_back() {
    let g = Guest::real(real_to_protected());
    write_real_gdt(&g);
    g.ram.write_u32(0x10_0000, 0xfeed_f00d);
    g.ram.write_u32(0x3000, 0x4242);
    expect_out(&g.cpu, 0xef, &0xfeed_f00du32.to_le_bytes());
    assert_eq!(g.cpu.sregs().cr0 & 1, 1);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let (r, s) = (g.cpu.regs(), g.cpu.sregs());
    assert_eq!((r.rax & 0xffff, r.rbx, s.cr0 & 1, s.cs.selector), (0x4242, 0x1234_5678, 0, 0));
}

payload! { real_to_long, 16,
    "cli",
    "lgdt [0x2000]",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x4000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000001",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // jmp 0x08:0x1040
    ".long 0x1040",
    ".word 0x08",
    ".balign 0x40, 0x90",
    ".code64",
    "mov rax, 0x1122334455667788",
    "mov rbx, rax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "out 0xef, eax",
    "hlt",
}

fn to_long_by_itself() {
    let g = Guest::real(real_to_long());
    write_real_gdt(&g);
    g.ram.write_u64(0x4000, 0x5007);
    g.ram.write_u64(0x5000, 0x6007);
    g.ram.write_u64(0x6000, 0x87);
    // LMA and LME, read by the guest
    expect_out(&g.cpu, 0xef, &0x500u32.to_le_bytes());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let s = g.cpu.sregs();
    assert_eq!((s.efer & 0x500, s.cs.l, g.cpu.regs().rbx), (0x500, 1, 0x1122_3344_5566_7788));
}

payload! { real_exits_in_turn, 16,
    "2: out 0x40, al",
    "in al, 0x41",
    "mov byte ptr [0x50], dl",
    "mov dh, byte ptr [0x51]",
    "jmp 2b",
}

/// No exit may change a register that the instruction does not.
fn registers_survive() {
    let g = real_with_mmio_ds(real_exits_in_turn());
    let mut rng = Rng::new(1);
    let mut r = g.cpu.regs();
    let mut random = || rng.word();
    (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi) = (random(), random(), random(), random(), random(), random());
    (r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12) = (random(), random(), random(), random(), random(), random());
    (r.r13, r.r14, r.r15) = (random(), random(), random());
    r.rflags = 0x8d7;
    g.cpu.set_regs(&r);
    for i in 0..2000u32 {
        match assert_ok!(g.cpu.run()) {
            Exit::Io { out: false, .. } => {
                g.cpu.reply(&[i as u8]);
                r.rax = r.rax & !0xff | (i & 0xff) as u64;
            }
            Exit::Mmio { write: false, .. } => {
                g.cpu.reply(&[i as u8]);
                r.rdx = r.rdx & !0xff00 | ((i & 0xff) as u64) << 8;
            }
            Exit::Io { .. } => {
                let mut now = g.cpu.regs();
                now.rip = r.rip;
                assert_eq!(now, r, "after {i} exits");
            }
            Exit::Mmio { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Runs random bytes as code; every run ends in a defined exit or is kicked.
fn garbage(g: &Guest, at: u64, seed: u64) {
    let (sregs, regs) = (g.cpu.sregs(), g.cpu.regs());
    let events: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    let memory = g.ram.read(0, 0x10_0000);
    // Before the kicks begin: a signal would end the creation of a VM with EINTR.
    let fresh = Guest::real(real_hlt());
    let mut rng = Rng::new(seed);
    let rounds = if emulated() { 3000 } else { 30_000 };
    let end = now_ns() + 12_000_000_000;
    let mut ended = [0u32; 8];
    let mut code = [0u8; 256];
    let _kicks = sys::Kicks::after_us(3000);
    for round in 0..rounds {
        if now_ns() > end {
            break;
        }
        if round % 64 == 0 {
            g.ram.write(0, &memory);
        }
        rng.fill(&mut code);
        if rng.one_in(2) {
            // Plain bytes are mostly jumps into nowhere; two-byte opcodes and I/O make them more interesting.
            for _ in 0..24 {
                let i = rng.below(250) as usize;
                match rng.below(6) {
                    0 => code[i] = 0x0f,
                    1 => (code[i], code[i + 1]) = (0x0f, 0x01),
                    2 => (code[i], code[i + 1]) = (0x0f, *rng.pick(&[0x20, 0x22, 0x30, 0x32, 0xa2, 0xc7, 0xae])),
                    3 => code[i] = *rng.pick(&[0x6c, 0x6d, 0x6e, 0x6f, 0xa4, 0xa5, 0xab, 0xe4, 0xec, 0xed, 0xef]),
                    4 => code[i] = *rng.pick(&[0xf2, 0xf3, 0x66, 0x67, 0xf0, 0x26, 0x64, 0x48]),
                    _ => code[i] = *rng.pick(&[0xcd, 0xcf, 0x8e, 0xea, 0x9a, 0xcb, 0xf4, 0xfa, 0xfb]),
                }
            }
        }
        g.ram.write(at, &code);
        assert_ok!(g.cpu.set_mp_state(KVM_MP_STATE_RUNNABLE));
        assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &events));
        g.cpu.set_sregs(&sregs);
        let mut r = regs;
        for reg in [&mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.r8] {
            *reg = if rng.one_in(2) { rng.below(0x40_0000) } else { rng.edge() };
        }
        g.cpu.set_regs(&r);
        for _ in 0..40 {
            match g.cpu.run() {
                Err(EINTR) => {
                    ended[0] += 1;
                    break;
                }
                Err(e) => panic!("round {round}: KVM_RUN {e:?}, code {code:02x?}"),
                Ok(Exit::Io { .. }) => ended[1] += 1,
                Ok(Exit::Mmio { .. }) => ended[2] += 1,
                Ok(Exit::Hlt) => {
                    ended[3] += 1;
                    break;
                }
                Ok(Exit::Shutdown) => {
                    ended[4] += 1;
                    recover_from_shutdown(&g.cpu);
                    break;
                }
                Ok(Exit::Internal(_)) => {
                    ended[5] += 1;
                    break;
                }
                Ok(Exit::FailEntry(_)) => {
                    ended[6] += 1;
                    break;
                }
                Ok(other) => panic!("round {round}: {other:?}, code {code:02x?}"),
            }
        }
        ended[7] += 1;
    }
    println!(
        "# rounds {}: kicked {} io {} mmio {} hlt {} shutdown {} internal {} fail-entry {}",
        ended[7], ended[0], ended[1], ended[2], ended[3], ended[4], ended[5], ended[6]
    );
    assert!(ended[7] >= 50, "only {} rounds in the time", ended[7]);
    // The vCPU is as good as new.
    g.ram.write(0, &memory);
    assert_ok!(g.cpu.set_mp_state(KVM_MP_STATE_RUNNABLE));
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &events));
    g.cpu.set_sregs(&fresh.cpu.sregs());
    g.cpu.set_regs(&fresh.cpu.regs());
    g.ram.write(0x1000, real_hlt());
    let e = loop {
        match g.cpu.run() {
            Err(EINTR) => continue,
            other => break other,
        }
    };
    assert_eq!(e, Ok(Exit::Hlt));
}

fn garbage_real() {
    garbage(&Guest::real(&[]), 0x1000, 11);
}

fn garbage_protected() {
    garbage(&Guest::protected(&[]), CODE, 12);
}

fn garbage_long() {
    garbage(&Guest::long(&[]), CODE, 13);
}
