// SPDX-License-Identifier: GPL-2.0
//! Guests that do one operation over and over, and take the time.

use krabtest::payload;

/// A payload of the form: `setup`; round: exit, count down R15D over `op`, ticks to DATA.
macro_rules! op_loop {
    ($name:ident, $n:literal, [$($setup:expr),*], [$($op:expr),*]) => {
        payload! { $name, 64,
            $($setup,)*
            "4: out 0xed, al",
            concat!("mov r15d, ", $n),
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "mov r8, rax",
            "5:",
            $($op,)*
            "dec r15d",
            "jnz 5b",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "sub rax, r8",
            "mov [0x100000], rax",
            concat!("mov qword ptr [0x100008], ", $n),
            "jmp 4b",
        }
    };
}

op_loop!(b_cpuid, 200, [], ["xor eax, eax", "cpuid"]);
op_loop!(b_vmcall, 200, [], ["mov eax, 0x7777", "vmcall"]);
op_loop!(b_vmmcall, 200, [], ["mov eax, 0x7777", "vmmcall"]);
op_loop!(b_rdmsr, 200, [], ["mov ecx, 0x1a0", "rdmsr"]);
op_loop!(
    b_wrmsr,
    200,
    ["mov ecx, 0x1a0", "rdmsr", "mov r9d, eax", "mov r10d, edx"],
    ["mov ecx, 0x1a0", "mov eax, r9d", "mov edx, r10d", "wrmsr"]
);
op_loop!(b_invd, 200, [], ["invd"]);
op_loop!(b_wbinvd, 200, [], ["wbinvd"]);
op_loop!(b_cr8, 200, [], ["mov rax, cr8"]);
op_loop!(b_port, 200, [], ["mov dx, 0x4d0", "in al, dx"]);
op_loop!(b_ioeventfd_pio, 200, [], ["mov dx, 0x600", "out dx, al"]);
op_loop!(b_ioeventfd_mmio, 200, ["mov ebx, 0xd0000000"], ["mov [rbx], eax"]);
op_loop!(b_out, 200, [], ["mov dx, 0x700", "out dx, al"]);
op_loop!(b_in, 200, [], ["mov dx, 0x700", "in al, dx"]);
op_loop!(b_mmio_write, 200, ["mov ebx, 0xd0000000"], ["mov [rbx], eax"]);
op_loop!(b_mmio_read, 200, ["mov ebx, 0xd0000000"], ["mov eax, [rbx]"]);
op_loop!(b_eoi, 200, [], ["mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr"]);
op_loop!(b_icr, 200, ["cli"], ["mov ecx, 0x830", "mov eax, 0x40050", "xor edx, edx", "wrmsr"]);
op_loop!(b_self_ipi, 200, ["sti"], ["mov ecx, 0x83f", "mov eax, 0x51", "xor edx, edx", "wrmsr"]);
op_loop!(
    b_xapic_eoi,
    200,
    ["mov ebx, 0xfee00000", "mov dword ptr [rbx + 0xf0], 0x1ff"],
    ["mov dword ptr [rbx + 0xb0], 0"]
);
op_loop!(
    b_deadline,
    200,
    [
        "cli",
        "mov ebx, 0xfee00000",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x320], 0x40042",
        "mfence",
        "rdtsc",
        "add edx, 16",
        "mov r9d, edx"
    ],
    ["mov ecx, 0x6e0", "xor eax, eax", "mov edx, r9d", "wrmsr"]
);
