// SPDX-License-Identifier: GPL-2.0
//! Instructions that access MMIO, in many forms, in long mode.
//!
//! Every payload runs twice with the same registers: once with RBX at plain memory, where the CPU itself executes it,
//! and once with RBX at a hole in guest memory, where the hypervisor emulates every access and the host answers from a
//! buffer. Memory and registers must come out the same.

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::rng::Rng;
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, tests};

tests! { "mmio";
    moves;
    extending_moves;
    string_moves;
    string_compares;
    arithmetic_to_memory;
    arithmetic_from_memory;
    arithmetic_immediate;
    unary;
    bits;
    shifts;
    exchanges;
    multiply_divide;
    stack;
    indirect_branches;
    conditional;
    sse_moves;
    exit_sizes;
    rep_movs_overlapping;
    stack_in_mmio;
    write_then_code_continues;
    single_step_over_mmio;
    page_table_in_mmio;
}

const LEN: usize = 0x3000;
/// Where the run on plain memory has its buffer.
const PLAIN: u64 = 0x20_0000;

struct Outcome {
    regs: kvm_regs,
    xmm: [[u8; 16]; 16],
    memory: Vec<u8>,
    exits: u32,
}

fn run(code: &[u8], base: u64, seed: u64) -> Outcome {
    let g = Guest::long(code);
    let mut rng = Rng::new(seed);
    let mut memory = vec![0; LEN];
    rng.fill(&mut memory);
    g.ram.write(PLAIN, &memory);
    let mut r = g.cpu.regs();
    for reg in [&mut r.rax, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.r8, &mut r.r9] {
        *reg = rng.word();
    }
    for reg in [&mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15] {
        *reg = rng.word();
    }
    r.rbx = base;
    g.cpu.set_regs(&r);
    let mut xmm = [[0; 16]; 16];
    rng.fill(xmm.as_flattened_mut());
    set_xmm(&g.cpu, &xmm);
    let mut exits = 0;
    loop {
        match g.event() {
            Event::Done => break,
            Event::Exit(Exit::Mmio { write, gpa, len, data }) => {
                exits += 1;
                let at = gpa.wrapping_sub(MMIO) as usize;
                assert!(at < LEN && at + len as usize <= LEN, "MMIO at {gpa:#x}");
                if write {
                    memory[at..at + len as usize].copy_from_slice(&data);
                } else {
                    g.cpu.reply(&memory[at..at + len as usize]);
                }
            }
            other => panic!("{other:x?} at {:#x}, base {base:#x}", g.cpu.regs().rip),
        }
    }
    if base == PLAIN {
        memory = g.ram.read(PLAIN, LEN);
    }
    let fpu: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    let mut regs = g.cpu.regs();
    // RBX differs, and registers that were computed from it differ by the same amount.
    for reg in [&mut regs.rbx, &mut regs.rsi, &mut regs.rdi] {
        if *reg >= base && *reg < base + LEN as u64 {
            *reg -= base;
        }
    }
    // Flags that an instruction leaves undefined are no matter; payloads keep the defined ones in registers.
    regs.rflags &= !0x8d5;
    Outcome { regs, xmm: fpu.xmm, memory, exits }
}

#[track_caller]
fn same(code: &[u8], least_exits: u32) {
    for seed in 1..4 {
        let plain = run(code, PLAIN, seed);
        let mmio = run(code, MMIO, seed);
        assert_eq!(plain.exits, 0);
        assert!(mmio.exits >= least_exits, "{} exits, wanted {least_exits} at least", mmio.exits);
        assert!(plain.regs == mmio.regs, "registers: CPU {:x?}\nhypervisor {:x?}", plain.regs, mmio.regs);
        assert!(plain.xmm == mmio.xmm, "XMM: CPU {:x?}\nhypervisor {:x?}", plain.xmm, mmio.xmm);
        for (i, (a, b)) in plain.memory.iter().zip(&mmio.memory).enumerate() {
            assert!(a == b, "offset {i:#x}: CPU {a:#x}, hypervisor {b:#x}");
        }
    }
}

payload! { mmio_moves, 64,
    "mov [rbx], al",
    "mov [rbx + 2], ax",
    "mov [rbx + 4], eax",
    "mov [rbx + 8], rax",
    "mov byte ptr [rbx + 16], 0x5a",
    "mov word ptr [rbx + 18], 0x1234",
    "mov dword ptr [rbx + 20], 0x12345678",
    "mov qword ptr [rbx + 24], -2",
    "mov [rbx + 0x30], ah",
    "mov [rbx + 0x31], sil",
    "mov [rbx + 0x32], r9b",
    "mov cl, [rbx + 0x101]",
    "mov ch, [rbx + 0x102]",
    "mov dx, [rbx + 0x103]",
    "mov edi, [rbx + 0x105]",
    "mov r8, [rbx + 0x109]",
    "mov r9b, [rbx + 0x111]",
    "mov r10w, [rbx + 0x113]",
    "mov r11d, [rbx + 0x115]",
    // Unaligned, and across the end of a page
    "mov [rbx + 0x41], r12",
    "mov [rbx + 0xffc], r13",
    "mov [rbx + 0x1fff], bp",
    "mov r14, [rbx + 0xffd]",
    "mov r15d, [rbx + 0x1ffe]",
    // Address forms
    "mov esi, 3",
    "mov [rbx + rsi * 8 + 0x60], rax",
    "mov rax, [rbx + rsi * 4 + 0x200]",
    "mov r12, rbx",
    "mov rdx, [r12]",
    "mov r13, rbx",
    "mov rdx, [r13 + 0x10]",
    "mov [ebx + 0x90], ecx",
    "movnti [rbx + 0xa0], rdx",
    "sub r12, rbx",
    "sub r13, rbx",
    "out 0xed, al",
}

fn moves() {
    same(mmio_moves(), 30);
}

payload! { mmio_extend, 64,
    "movzx ax, byte ptr [rbx]",
    "movzx ecx, byte ptr [rbx + 1]",
    "movzx rdx, byte ptr [rbx + 2]",
    "movzx esi, word ptr [rbx + 3]",
    "movzx rdi, word ptr [rbx + 5]",
    "movsx bp, byte ptr [rbx + 7]",
    "movsx r8d, byte ptr [rbx + 8]",
    "movsx r9, byte ptr [rbx + 9]",
    "movsx r10d, word ptr [rbx + 10]",
    "movsx r11, word ptr [rbx + 12]",
    "movsxd r12, dword ptr [rbx + 14]",
    "movsxd r13, dword ptr [rbx + 0xffe]",
    "out 0xed, al",
}

fn extending_moves() {
    same(mmio_extend(), 12);
}

payload! { mmio_strings, 64,
    "cld",
    "lea rdi, [rbx + 0x100]",
    "mov ecx, 5",
    "rep stosb",
    "mov ecx, 3",
    "rep stosd",
    "mov ecx, 3",
    "rep stosq",
    "stosw",
    // MMIO to MMIO
    "lea rsi, [rbx + 0x800]",
    "mov ecx, 9",
    "rep movsb",
    "mov ecx, 3",
    "rep movsq",
    "movsd",
    // Across the end of a page
    "lea rsi, [rbx + 0xff5]",
    "lea rdi, [rbx + 0x1ff1]",
    "mov ecx, 5",
    "rep movsd",
    // Backward
    "std",
    "lea rdi, [rbx + 0x300]",
    "lea rsi, [rbx + 0x700]",
    "mov ecx, 4",
    "rep movsw",
    "cld",
    // Memory to MMIO, MMIO to memory
    "mov esi, 0x10000",
    "lea rdi, [rbx + 0x400]",
    "mov ecx, 4",
    "rep movsq",
    "lea rsi, [rbx + 0x410]",
    "mov edi, 0x101000",
    "mov ecx, 7",
    "rep movsw",
    "mov r8, [0x101000]",
    "mov r9d, [0x10100a]",
    "lea rsi, [rbx + 0x900]",
    "lodsb",
    "lodsw",
    "mov r10d, eax",
    "lodsd",
    "mov r11d, eax",
    "lodsq",
    // No step at all
    "xor ecx, ecx",
    "rep stosb",
    "out 0xed, al",
}

fn string_moves() {
    same(mmio_strings(), 40);
}

payload! { mmio_compares, 64,
    "cld",
    "mov dword ptr [rbx + 0x100], 0x41414141",
    "mov dword ptr [rbx + 0x104], 0x41424141",
    "lea rdi, [rbx + 0x100]",
    "mov al, 0x41",
    "mov ecx, 20",
    "repe scasb",
    "pushfq",
    "pop r8",
    "and r8d, 0x8d5",
    "mov r9, rcx",
    "mov r10, rdi",
    "sub r10, rbx",
    "lea rdi, [rbx + 0x100]",
    "mov al, 0x42",
    "mov ecx, 20",
    "repne scasb",
    "pushfq",
    "pop r11",
    "and r11d, 0x8d5",
    "mov r12, rcx",
    "lea rsi, [rbx + 0x100]",
    "lea rdi, [rbx + 0x104]",
    "mov ecx, 8",
    "repe cmpsb",
    "pushfq",
    "pop r13",
    "and r13d, 0x8d5",
    "mov r14, rcx",
    "scasd",
    "pushfq",
    "pop r15",
    "and r15d, 0x8d5",
    "out 0xed, al",
}

fn string_compares() {
    same(mmio_compares(), 15);
}

payload! { mmio_alu_mr, 64,
    "add [rbx], al",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "adc [rbx + 1], cx",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "sbb [rbx + 3], edx",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "sub [rbx + 8], rsi",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "and [rbx + 16], rdi",
    "pushfq", "pop rbp", "and ebp, 0x8c5", "push rbp",
    "or [rbx + 24], r8d",
    "pushfq", "pop rbp", "and ebp, 0x8c5", "push rbp",
    "xor [rbx + 30], r9w",
    "pushfq", "pop rbp", "and ebp, 0x8c5", "push rbp",
    "cmp [rbx + 32], r10",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "test [rbx + 40], r11d",
    "pushfq", "pop rbp", "and ebp, 0x8c5", "push rbp",
    "lock add [rbx + 48], r12",
    "lock or [rbx + 56], r13d",
    "lock sub [rbx + 0xffe], r14d",
    "pop r8", "pop r9", "pop r10", "pop r11", "pop r12", "pop r13", "pop r14", "pop r15", "pop rdi",
    "out 0xed, al",
}

fn arithmetic_to_memory() {
    same(mmio_alu_mr(), 20);
}

payload! { mmio_alu_rm, 64,
    "add al, [rbx]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "adc cx, [rbx + 1]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "sbb edx, [rbx + 3]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "sub rsi, [rbx + 8]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "and rdi, [rbx + 16]",
    "or r8d, [rbx + 24]",
    "xor r9w, [rbx + 30]",
    "cmp r10, [rbx + 32]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "cmp r10b, [rbx + 32]",
    "pushfq", "pop rbp", "and ebp, 0x8d5", "push rbp",
    "pop r10", "pop r11", "pop r12", "pop r13", "pop r14", "pop r15",
    "out 0xed, al",
}

fn arithmetic_from_memory() {
    same(mmio_alu_rm(), 9);
}

payload! { mmio_alu_imm, 64,
    "add byte ptr [rbx], 0x7f",
    "pushfq", "pop rax", "and eax, 0x8d5",
    "or word ptr [rbx + 2], 0x1234",
    "adc dword ptr [rbx + 4], 0x12345678",
    "pushfq", "pop rcx", "and ecx, 0x8d5",
    "sbb qword ptr [rbx + 8], -5",
    "pushfq", "pop rdx", "and edx, 0x8d5",
    "and qword ptr [rbx + 16], 0x7fffffff",
    "sub dword ptr [rbx + 24], -1",
    "pushfq", "pop rsi", "and esi, 0x8d5",
    "xor byte ptr [rbx + 28], 0xff",
    "cmp word ptr [rbx + 30], -3",
    "pushfq", "pop rdi", "and edi, 0x8d5",
    "test byte ptr [rbx + 32], 0x40",
    "pushfq", "pop r8", "and r8d, 0x8c5",
    "test dword ptr [rbx + 36], 0x80000000",
    "pushfq", "pop r9", "and r9d, 0x8c5",
    "out 0xed, al",
}

fn arithmetic_immediate() {
    same(mmio_alu_imm(), 15);
}

payload! { mmio_unary, 64,
    "inc byte ptr [rbx]",
    "dec word ptr [rbx + 2]",
    "pushfq", "pop rax", "and eax, 0x8d4",
    "neg dword ptr [rbx + 4]",
    "pushfq", "pop rcx", "and ecx, 0x8d5",
    "not qword ptr [rbx + 8]",
    "lock inc qword ptr [rbx + 16]",
    "lock dec dword ptr [rbx + 24]",
    "lock neg byte ptr [rbx + 28]",
    "lock not word ptr [rbx + 30]",
    "out 0xed, al",
}

fn unary() {
    same(mmio_unary(), 16);
}

payload! { mmio_bits, 64,
    "bt dword ptr [rbx], 5",
    "setc al",
    "bts dword ptr [rbx + 4], 31",
    "setc ah",
    "btr qword ptr [rbx + 8], 63",
    "setc cl",
    "btc word ptr [rbx + 16], 3",
    "setc ch",
    "lock bts qword ptr [rbx + 24], 40",
    "setc dl",
    // A register index reaches beyond the operand, in both directions.
    "mov esi, 1000",
    "bt dword ptr [rbx], esi",
    "setc dh",
    "bts qword ptr [rbx], rsi",
    "mov rdi, -70",
    "btc dword ptr [rbx + 0x200], edi",
    "setc r8b",
    "btr qword ptr [rbx + 0x300], rdi",
    "setc r9b",
    "out 0xed, al",
}

fn bits() {
    same(mmio_bits(), 14);
}

payload! { mmio_shifts, 64,
    "mov cl, 3",
    "shl byte ptr [rbx], 1",
    "setc al",
    "shr word ptr [rbx + 2], cl",
    "setc ah",
    "sar dword ptr [rbx + 4], 7",
    "setc dl",
    "rol qword ptr [rbx + 8], 13",
    "setc dh",
    "ror qword ptr [rbx + 16], cl",
    "setc sil",
    "stc",
    "rcl dword ptr [rbx + 24], 1",
    "setc dil",
    "rcr word ptr [rbx + 28], 2",
    "setc bpl",
    "shld dword ptr [rbx + 32], r8d, 5",
    "shrd qword ptr [rbx + 40], r9, cl",
    "out 0xed, al",
}

fn shifts() {
    same(mmio_shifts(), 18);
}

payload! { mmio_exchange, 64,
    "xchg [rbx], al",
    "xchg [rbx + 2], cx",
    "xchg [rbx + 4], edx",
    "xchg [rbx + 8], rsi",
    "xadd [rbx + 16], rdi",
    "lock xadd [rbx + 24], r8d",
    "xadd byte ptr [rbx + 30], r9b",
    // cmpxchg that fails, then one that succeeds
    "cmpxchg [rbx + 32], r10",
    "setz r11b",
    "cmpxchg [rbx + 32], r10",
    "setz r12b",
    "lock cmpxchg [rbx + 40], r13d",
    "setz r14b",
    "lock cmpxchg [rbx + 40], r13d",
    "cmpxchg byte ptr [rbx + 44], r15b",
    "cmpxchg8b [rbx + 48]",
    "setz bpl",
    "push rbx",
    "mov r8, rbx",
    "mov ebx, 0x1234567",
    "lock cmpxchg8b [r8 + 48]",
    "pop rbx",
    "xor r8d, r8d",
    "out 0xed, al",
}

fn exchanges() {
    same(mmio_exchange(), 28);
}

payload! { mmio_muldiv, 64,
    "mul byte ptr [rbx]",
    "mov rcx, rax",
    "mul qword ptr [rbx + 8]",
    "mov rsi, rax",
    "imul dword ptr [rbx + 16]",
    "mov rdi, rax",
    "imul r8, [rbx + 24]",
    "imul r9d, [rbx + 32], 77",
    "imul r10, [rbx + 40], 0x123456",
    "xor edx, edx",
    "mov dword ptr [rbx + 48], 0x1357",
    "mov eax, 0x98765432",
    "div dword ptr [rbx + 48]",
    "mov r11, rax",
    "mov rax, -1000000007",
    "cqo",
    "mov qword ptr [rbx + 56], 12345",
    "idiv qword ptr [rbx + 56]",
    "out 0xed, al",
}

fn multiply_divide() {
    same(mmio_muldiv(), 10);
}

payload! { mmio_stack, 64,
    "push qword ptr [rbx]",
    "pop rax",
    "push word ptr [rbx + 8]",
    "pop cx",
    "push r8",
    "pop qword ptr [rbx + 16]",
    "push r9w",
    "pop word ptr [rbx + 24]",
    "out 0xed, al",
}

fn stack() {
    same(mmio_stack(), 4);
}

payload! { mmio_branches, 64,
    "lea rax, [rip + 2f]",
    "mov [rbx], rax",
    "jmp qword ptr [rbx]",
    "ud2",
    "2: lea rax, [rip + 3f]",
    "mov [rbx + 8], rax",
    "call qword ptr [rbx + 8]",
    "mov ecx, 1",
    "out 0xed, al",
    "3: mov edx, 2",
    "ret",
}

fn indirect_branches() {
    same(mmio_branches(), 4);
}

payload! { mmio_conditional, 64,
    "xor eax, eax",
    "setz byte ptr [rbx]",
    "setnz byte ptr [rbx + 1]",
    "cmovz rcx, [rbx + 8]",
    // The load takes place also when the condition is false, and clears the upper half.
    "cmovnz edx, [rbx + 16]",
    "cmovs r8w, [rbx + 20]",
    "out 0xed, al",
}

fn conditional() {
    same(mmio_conditional(), 5);
}

payload! { mmio_sse, 64,
    "movaps [rbx + 0x40], xmm0",
    "movups [rbx + 0x51], xmm1",
    "movdqa [rbx + 0x80], xmm2",
    "movdqu [rbx + 0x93], xmm9",
    "movaps xmm3, [rbx + 0x100]",
    "movups xmm4, [rbx + 0x111]",
    "movdqa xmm5, [rbx + 0x120]",
    "movdqu xmm10, [rbx + 0x133]",
    "movntps [rbx + 0x140], xmm6",
    "movntdq [rbx + 0x150], xmm7",
    "movupd [rbx + 0xff9], xmm8",
    "movdqu xmm11, [rbx + 0x1ffa]",
    "out 0xed, al",
}

fn sse_moves() {
    same(mmio_sse(), 24);
}

payload! { mmio_sizes, 64,
    "mov al, [rbx]",
    "mov ax, [rbx]",
    "mov eax, [rbx]",
    "mov rax, [rbx]",
    "mov [rbx], rax",
    "mov [rbx + 0xffe], eax",
    "add dword ptr [rbx + 8], 1",
    "out 0xed, al",
}

/// A device sees exactly one access of the instruction's size.
fn exit_sizes() {
    let g = Guest::long(mmio_sizes());
    let mut r = g.cpu.regs();
    r.rbx = MMIO;
    g.cpu.set_regs(&r);
    let mut seen = Vec::new();
    loop {
        match g.event() {
            Event::Exit(Exit::Mmio { write, gpa, len, .. }) => {
                seen.push((write, gpa - MMIO, len));
                if !write {
                    g.cpu.reply(&[0x10; 8]);
                }
            }
            Event::Done => break,
            other => panic!("{other:?}"),
        }
    }
    let want = [
        (false, 0, 1),
        (false, 0, 2),
        (false, 0, 4),
        (false, 0, 8),
        (true, 0, 8),
        (true, 0xffe, 2),
        (true, 0x1000, 2),
        (false, 8, 4),
        (true, 8, 4),
    ];
    assert_eq!(seen, want);
}

payload! { mmio_overlap, 64,
    "cld",
    "lea rsi, [rbx + 0x100]",
    "lea rdi, [rbx + 0x103]",
    "mov ecx, 40",
    "rep movsb",
    "lea rsi, [rbx + 0x204]",
    "lea rdi, [rbx + 0x200]",
    "mov ecx, 10",
    "rep movsd",
    "out 0xed, al",
}

fn rep_movs_overlapping() {
    same(mmio_overlap(), 50);
}

payload! { mmio_stack_there, 64,
    "mov r8, rsp",
    "lea rsp, [rbx + 0x800]",
    "push rax",
    "push 0x1234",
    "pop rcx",
    "call 2f",
    "add rdx, 1",
    "pop rdi",
    "pushfq",
    "popfq",
    "mov rsp, r8",
    "xor r8d, r8d",
    "mov qword ptr [rbx + 0x7f8], 0",
    "mov qword ptr [rbx + 0x7f0], 0",
    "out 0xed, al",
    "2: mov edx, 7",
    "ret",
}

fn stack_in_mmio() {
    same(mmio_stack_there(), 10);
}

payload! { mmio_then_code, 64,
    "mov ecx, 1000",
    "2: mov [rbx + 0x10], rcx",
    "add rax, [rbx + 0x10]",
    "dec ecx",
    "jnz 2b",
    "out 0xed, al",
}

fn write_then_code_continues() {
    same(mmio_then_code(), 2000);
}

payload! { mmio_tf, 64,
    "pushfq",
    "or dword ptr [rsp], 0x100",
    "popfq",
    "mov [rbx], al",
    "mov al, [rbx]",
    "nop",
    "out 0xed, al",
}

/// Single-stepping sees the instructions that are emulated, too.
fn single_step_over_mmio() {
    let g = Guest::long(mmio_tf());
    let mut r = g.cpu.regs();
    r.rbx = MMIO;
    g.cpu.set_regs(&r);
    let mut traps = Vec::new();
    loop {
        match g.event() {
            Event::Exit(Exit::Mmio { write, .. }) => {
                if !write {
                    g.cpu.reply(&[0x10]);
                }
            }
            Event::Exception { vector: 1, rip, .. } => traps.push(rip - CODE),
            Event::Done => break,
            other => panic!("{other:?}"),
        }
    }
    // After popfq comes the first whole instruction: its end, and that of each one up to the last.
    let end = mmio_tf().len() as u64;
    let want = [end - 5, end - 3, end - 2];
    // KVM loses the trap of a write that goes to userspace.
    assert_eq!(traps, want[on_kvm() as usize..]);
}

payload! { mmio_walk, 64,
    "mov rax, [rbx]",
    "out 0xed, al",
}

/// Page tables that are not in memory: the VM ends or gets a page fault, the host does not.
fn page_table_in_mmio() {
    let g = Guest::long(mmio_walk());
    // 1 GiB up: through a page directory in a hole
    g.ram.write_u64(PDPT + 8, MMIO | 7);
    let mut r = g.cpu.regs();
    r.rbx = 0x4000_0000;
    g.cpu.set_regs(&r);
    let _kicks = krabtest::sys::Kicks::after_us(200_000);
    for _ in 0..20 {
        match g.cpu.run() {
            Err(krabtest::sys::EINTR) | Err(krabtest::sys::EFAULT) => return,
            Err(e) => panic!("{e:?}"),
            Ok(Exit::Internal(_)) | Ok(Exit::Shutdown) => return,
            Ok(Exit::Io { port: PORT_EXC, .. }) => return,
            Ok(Exit::Mmio { write: false, .. }) => g.cpu.reply(&[0; 8]),
            Ok(Exit::Io { port: PORT_DONE, .. }) => return,
            Ok(other) => panic!("{other:?}"),
        }
    }
}
