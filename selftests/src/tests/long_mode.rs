// SPDX-License-Identifier: GPL-2.0
//! A guest in long mode: CPUID, MSRs, control registers, TSC, user mode, nested faults.

use krabtest::guest::*;
use krabtest::harness::tcg;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, skip, tests};

tests! { "long_mode";
    cpuid_from_table;
    cpuid_mirrors_control_registers;
    rdmsr_wrmsr;
    msr_general_protection;
    svm_instructions_are_undefined;
    control_registers;
    control_register_faults;
    cr3_switch_and_invlpg;
    accessed_and_dirty;
    xsetbv;
    tsc;
    rdtscp;
    cache_and_hint_instructions;
    user_mode_and_syscall;
    compatibility_mode;
    nested_faults_whole_slot;
    string_io_long;
    guest_debug_breakpoint;
    pae_paging;
}

payload! { lm_cpuid, 64,
    "2: mov eax, esi",
    "mov ecx, edi",
    "cpuid",
    "mov [0x100000], eax",
    "mov [0x100004], ebx",
    "mov [0x100008], ecx",
    "mov [0x10000c], edx",
    "out 0xed, al",
    "jmp 2b",
}

fn cpuid(g: &Guest, leaf: u32, index: u32) -> [u32; 4] {
    let mut r = g.cpu.regs();
    (r.rsi, r.rdi) = (leaf as u64, index as u64 | 0xffff_ffff_0000_0000);
    g.cpu.set_regs(&r);
    g.expect_done();
    [0, 4, 8, 12].map(|i| g.ram.read_u32(DATA + i))
}

fn cpuid_from_table() {
    let g = Guest::long(lm_cpuid());
    let mut c = g.cpuid.clone();
    c.set(0x4000_0000, [0x4000_0010, 0x11, 0x22, 0x33]);
    c.set(0x4000_0010, [0xdead_beef, 0xffff_ffff, 0, 0x1234_5678]);
    for i in 0..3 {
        let n = c.nent as usize;
        c.entries[n] = kvm_cpuid_entry2 {
            function: 0x4000_0008,
            index: i * 2,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: 100 + i,
            ..Default::default()
        };
        c.nent += 1;
    }
    assert_ok!(g.cpu.set_cpuid(&c));
    assert_eq!(cpuid(&g, 0x4000_0000, 0), [0x4000_0010, 0x11, 0x22, 0x33]);
    assert_eq!(cpuid(&g, 0x4000_0010, 7), [0xdead_beef, 0xffff_ffff, 0, 0x1234_5678]);
    assert_eq!(cpuid(&g, 0x4000_0008, 2)[0], 101);
    assert_eq!(cpuid(&g, 0x4000_0008, 4)[0], 102);
    // An index that is not there
    assert_eq!(cpuid(&g, 0x4000_0008, 3), [0; 4]);
    // A leaf that is not there reads as zeros on AMD
    let leaf0 = cpuid(&g, 0, 0);
    let want = c.find(0, 0).expect("leaf 0");
    assert_eq!(leaf0, [want.eax, want.ebx, want.ecx, want.edx]);
    if leaf0[1] == 0x6874_7541 {
        assert_eq!(cpuid(&g, 0x1234_5678, 0), [0; 4]);
        assert_eq!(cpuid(&g, leaf0[0] + 1, 0), [0; 4]);
        assert_eq!(cpuid(&g, 0xffff_ffff, 0xffff_ffff), [0; 4]);
    }
}

payload! { lm_osxsave, 64,
    "mov eax, 1",
    "cpuid",
    "mov eax, ecx",
    "out 0xef, eax",
    "mov rax, cr4",
    "or eax, 0x40000",
    "mov cr4, rax",
    "mov eax, 1",
    "cpuid",
    "mov eax, ecx",
    "out 0xef, eax",
    "out 0xed, al",
}

fn cpuid_mirrors_control_registers() {
    let g = Guest::long(lm_osxsave());
    if g.cpuid.find(1, 0).expect("leaf 1").ecx >> 26 & 1 == 0 {
        skip!("no XSAVE");
    }
    assert_eq!(g.report() >> 27 & 1, 0, "OSXSAVE while CR4.OSXSAVE is clear");
    assert_eq!(g.report() >> 27 & 1, 1, "OSXSAVE while CR4.OSXSAVE is set");
    g.expect_done();
}

payload! { lm_msr, 64,
    "2: mov ecx, esi",
    "mov rax, rdi",
    "mov rdx, rdi",
    "shr rdx, 32",
    "wrmsr",
    "xor eax, eax",
    "xor edx, edx",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [0x100000], rax",
    "out 0xed, al",
    "jmp 2b",
}

/// WRMSR then RDMSR in the guest: the value, or the exception.
fn wrmsr(g: &Guest, index: u32, value: u64) -> std::result::Result<u64, (u8, u32)> {
    let mut r = g.cpu.regs();
    (r.rsi, r.rdi) = (index as u64, value);
    g.cpu.set_regs(&r);
    match g.event() {
        Event::Done => Ok(g.ram.read_u64(DATA)),
        Event::Exception { vector, error, .. } => {
            // Back to the start, with the frame dropped.
            let rsp = g.cpu.regs().rsp;
            let mut r = g.cpu.regs();
            (r.rip, r.rsp) = (CODE, g.ram.read_u64(rsp + 40));
            g.cpu.set_regs(&r);
            Err((vector, error))
        }
        other => panic!("MSR {index:#x} = {value:#x}: {other:x?}"),
    }
}

fn rdmsr_wrmsr() {
    let g = Guest::long(lm_msr());
    let all = [
        (0x174, 0x1234, "SYSENTER_CS"),
        (0x175, 0x1234_5678, "SYSENTER_ESP"),
        (0x176, 0x8765_4321, "SYSENTER_EIP"),
        (0x277, 0x0007_0406_0007_0406, "PAT"),
        (0xc000_0081, 0x0023_0010_0000_0000, "STAR"),
        (0xc000_0082, 0xffff_ffff_8123_4567, "LSTAR"),
        (0xc000_0083, 0xffff_ffff_8123_4568, "CSTAR"),
        (0xc000_0084, 0x4_7700, "SF_MASK"),
        (0xc000_0100, 0x7fff_1234_5000, "FS_BASE"),
        (0xc000_0101, 0xffff_8888_1234_5000, "GS_BASE"),
        (0xc000_0102, 0x1234_5678_9000, "KERNEL_GS_BASE"),
        (0x200, 0x8000_0006, "MTRR physical base 0"),
        (0x201, 0xff_8000_0800, "MTRR physical mask 0"),
        (0x250, 0x0606_0606_0606_0606, "MTRR fixed 64K"),
        (0x2ff, 0xc06, "MTRR default type"),
        (0xc000_0080, 0xd01, "EFER with NXE"),
    ];
    for (index, value, name) in all {
        assert_eq!(wrmsr(&g, index, value), Ok(value), "{name}");
        assert_eq!(g.cpu.msr(index), Some(value), "{name} as the host reads it");
    }
    let s = g.cpu.sregs();
    assert_eq!((s.fs.base, s.gs.base), (0x7fff_1234_5000, 0xffff_8888_1234_5000));
    // And the other way: what the host sets is what the guest reads.
    assert!(g.cpu.set_msr(0xc000_0082, 0xffff_ffff_9000_0000));
    assert_eq!(g.cpu.msr(0xc000_0082), Some(0xffff_ffff_9000_0000));
}

fn msr_general_protection() {
    let g = Guest::long(lm_msr());
    let noncanonical = 0x8000_0000_0000_0000u64;
    let all = [
        (0x1234_5678, 0, "an MSR that does not exist"),
        (0xc001_5555, 0, "an AMD MSR that does not exist"),
        (0xc000_0082, noncanonical, "LSTAR, not canonical"),
        (0xc000_0083, noncanonical, "CSTAR, not canonical"),
        (0xc000_0100, noncanonical, "FS_BASE, not canonical"),
        (0xc000_0101, 0x1000_0000_0000_0000, "GS_BASE, not canonical"),
        (0xc000_0102, noncanonical, "KERNEL_GS_BASE, not canonical"),
        (0xc000_0080, 0xd01 | 1 << 40, "EFER, reserved bit"),
        (0xc000_0080, 1, "EFER, LME cleared under paging"),
        (0x277, 0x0007_0406_0007_0402, "PAT, reserved type 2"),
        (0x277, 0xff, "PAT, reserved type 255"),
        (0x200, 0x8000_0002, "MTRR, reserved type"),
        (0x1b, 0xfee0_0001, "APIC_BASE, reserved bit"),
    ];
    for (index, value, name) in all {
        // These are the CPU's to check where the MSR is passed through, and QEMU's TCG does not check them.
        if tcg() && name.ends_with("not canonical") {
            continue;
        }
        assert_eq!(wrmsr(&g, index, value), Err((13, 0)), "{name}");
    }
    // Still alive
    assert_eq!(wrmsr(&g, 0x174, 1), Ok(1));
}

payload! { lm_svm, 64,
    "xor eax, eax",
    "xor ecx, ecx",
    ".byte 0x0f, 0x01, 0xd8", // vmrun
    ".byte 0x0f, 0x01, 0xda", // vmload
    ".byte 0x0f, 0x01, 0xdb", // vmsave
    ".byte 0x0f, 0x01, 0xdc", // stgi
    ".byte 0x0f, 0x01, 0xdd", // clgi
    ".byte 0x0f, 0x01, 0xdf", // invlpga
    ".byte 0x0f, 0x01, 0xc2", // vmlaunch
    ".byte 0x0f, 0x01, 0xc4", // vmxoff
    "out 0xed, al",
}

/// With EFER.SVME and CR4.VMXE clear these are undefined: a guest must not reach the host's own virtualization.
fn svm_instructions_are_undefined() {
    let g = Guest::long(lm_svm());
    for name in ["VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "INVLPGA", "VMLAUNCH", "VMXOFF"] {
        let got = g.exception(3);
        assert_eq!(got, (6, 0), "{name}");
    }
    g.expect_done();
}

payload! { lm_cr, 64,
    "mov rax, cr0",
    "or eax, 0x10000",
    "mov cr0, rax",
    "mov rax, cr0",
    "mov [0x100000], rax",
    "mov eax, 0x12345678",
    "mov cr2, rax",
    "mov rax, cr2",
    "mov [0x100008], rax",
    "mov rax, cr3",
    "mov cr3, rax",
    "mov [0x100010], rax",
    "mov rax, cr4",
    "or eax, 0x80", // PGE
    "mov cr4, rax",
    "mov rax, cr4",
    "mov [0x100018], rax",
    "mov eax, 9",
    "mov cr8, rax",
    "xor eax, eax",
    "mov rax, cr8",
    "mov [0x100020], rax",
    "smsw eax",
    "mov [0x100028], eax",
    "mov ax, 0xa", // TS MP through LMSW
    "lmsw ax",
    "mov rax, cr0",
    "mov [0x100030], rax",
    "clts",
    "mov rax, cr0",
    "mov [0x100038], rax",
    "mov r15, cr0",
    "out 0xed, al",
}

fn control_registers() {
    let g = Guest::long(lm_cr());
    let before = g.cpu.sregs();
    g.expect_done();
    let at = |i: u64| g.ram.read_u64(DATA + i * 8);
    let s = g.cpu.sregs();
    assert_eq!(at(0), before.cr0 | 0x10000);
    assert_eq!((at(1), s.cr2), (0x1234_5678, 0x1234_5678));
    assert_eq!(at(2), PML4);
    // Hosts with machine checks on may keep CR4.MCE set in the guest.
    let mce = 1 << 6;
    assert_eq!((at(3) & !mce, s.cr4 & !mce), (before.cr4 | 0x80, before.cr4 | 0x80));
    assert_eq!((at(4), s.cr8), (9, 9));
    assert_eq!(at(5) as u32, (before.cr0 | 0x10000) as u32);
    assert_eq!(at(6), before.cr0 | 0x10008, "LMSW cannot clear PE");
    assert_eq!((at(7), s.cr0), (before.cr0 | 0x10000, before.cr0 | 0x10000));
    assert_eq!(g.cpu.regs().r15, s.cr0);
    assert_eq!(g.cpu.page().cr8, 9, "CR8 in the run page");
}

payload! { lm_cr_faults, 64,
    "mov rbx, cr0",
    "mov rax, rbx",
    "and eax, 0xfffffffe",
    "mov cr0, rax",             // PG without PE
    "mov rax, rbx",
    "or eax, 0x20000000",
    "mov cr0, rax",             // NW without CD
    "mov rax, rbx",
    "bts rax, 40",
    "mov cr0, rax",             // upper half
    "mov rbx, cr4",
    "mov rax, rbx",
    "and eax, 0xffffffdf",
    "mov cr4, rax",             // PAE in long mode
    "mov rax, rbx",
    "bts rax, 31",
    "mov cr4, rax",             // reserved
    "mov eax, 16",
    "mov cr8, rax",             // 4 bytes
    "mov rax, cr3",
    "bts rax, 60",
    "mov cr3, rax",             // reserved
    ".byte 0x0f, 0x20, 0xc8",   // mov rax, cr1: #UD
    "out 0xed, al",
}

fn control_register_faults() {
    let g = Guest::long(lm_cr_faults());
    for what in ["CR0 PG without PE", "CR0 NW without CD", "CR0 upper half", "CR4 PAE", "CR4 reserved"] {
        assert_eq!(g.exception(3), (13, 0), "{what}");
    }
    // Not intercepted, so the CPU's to check. QEMU's TCG takes CR8 and CR1, and leaves the guest by SVM_EXIT_ERR for CR3.
    if tcg() {
        return;
    }
    assert_eq!(g.exception(4), (13, 0), "CR8");
    assert_eq!(g.exception(3), (13, 0), "CR3");
    assert_eq!(g.exception(3), (6, 0), "CR1");
    g.expect_done();
}

payload! { lm_cr3_switch, 64,
    "mov eax, [0x140000]",
    "out 0xef, eax",
    "mov qword ptr [rdi], 0x151067", // another page behind the same address
    "invlpg [0x140000]",
    "mov eax, [0x140000]",
    "out 0xef, eax",
    "mov qword ptr [rdi], 0x152067",
    "mov rax, cr3",
    "mov cr3, rax",
    "mov eax, [0x140000]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn cr3_switch_and_invlpg() {
    let g = Guest::long(lm_cr3_switch());
    let pte = split_first_2m(g.ram);
    for i in 0..3 {
        g.ram.write_u32(0x15_0000 + i * 0x1000, 0x100 + i as u32);
    }
    g.ram.write_u64(pte(0x14_0000), 0x15_0067);
    let mut r = g.cpu.regs();
    r.rdi = pte(0x14_0000);
    g.cpu.set_regs(&r);
    assert_eq!([g.report(), g.report(), g.report()], [0x100, 0x101, 0x102]);
    g.expect_done();
}

payload! { lm_ad, 64,
    "mov rax, [0x140000]",
    "out 0xed, al",
    "mov [0x140000], rax",
    "out 0xed, al",
}

fn accessed_and_dirty() {
    let g = Guest::long(lm_ad());
    let pte = split_first_2m(g.ram);
    g.ram.write_u64(pte(0x14_0000), 0x14_0007);
    g.expect_done();
    assert_eq!(g.ram.read_u64(pte(0x14_0000)), 0x14_0027);
    g.expect_done();
    assert_eq!(g.ram.read_u64(pte(0x14_0000)), 0x14_0067);
}

payload! { lm_xsetbv, 64,
    "mov rax, cr4",
    "or eax, 0x40000",
    "mov cr4, rax",
    "xor ecx, ecx",
    "xgetbv",
    "out 0xef, eax",
    "xor edx, edx",
    "mov eax, esi",
    "xsetbv",
    "xgetbv",
    "out 0xef, eax",
    "xor eax, eax",
    "xsetbv",               // x87 bit clear
    "mov eax, 5",
    "xsetbv",               // AVX without SSE
    "mov eax, 3",
    "mov edx, 0x10000000",
    "xsetbv",               // bits that no CPU has
    "xor edx, edx",
    "mov ecx, 1",
    "xsetbv",               // XCR1
    "out 0xed, al",
}

fn xsetbv() {
    let g = Guest::long(lm_xsetbv());
    let Some(x) = g.cpuid.find(0xd, 0) else { skip!("no XSAVE") };
    let mut r = g.cpu.regs();
    r.rsi = x.eax as u64 & 7;
    g.cpu.set_regs(&r);
    assert_eq!(g.report(), 1, "XCR0 after reset");
    assert_eq!(g.report(), x.eax & 7);
    for what in ["0", "AVX without SSE", "unknown bits", "XCR1"] {
        assert_eq!(g.exception(3), (13, 0), "{what}");
    }
    g.expect_done();
    let xcrs: kvm_xcrs = assert_ok!(g.cpu.get(KVM_GET_XCRS));
    assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value), (1, 0, x.eax as u64 & 7));
}

payload! { lm_tsc, 64,
    "xor r8d, r8d",
    "mov r9d, 2000",
    "2: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, r8",
    "jb 3f",
    "mov r8, rax",
    "dec r9d",
    "jnz 2b",
    "out 0xed, al",
    "jmp 2b",
    "3: ud2",
}

fn tsc() {
    let g = Guest::long(lm_tsc());
    g.expect_done();
    let before = g.cpu.regs().r8;
    // SAFETY: no memory is touched.
    let host = unsafe { core::arch::x86_64::_rdtsc() };
    assert!(g.cpu.set_msr(0x10, 1 << 50));
    let read = g.cpu.msr(0x10).expect("TSC");
    assert!(read >> 40 == 1 << 10, "{read:#x}");
    let mut r = g.cpu.regs();
    r.r9 = 2000;
    g.cpu.set_regs(&r);
    g.expect_done();
    let after = g.cpu.regs().r8;
    assert!(after >= 1 << 50, "{before:#x}, then {after:#x}; the host at {host:#x}");
    // And backward: the guest would see it run back, so its loop does not compare across.
    // (KVM takes a write of 0 for the start of a hotplugged vCPU, which is to follow the others.)
    assert!(g.cpu.set_msr(0x10, 1 << 30));
    let low = g.cpu.msr(0x10).expect("TSC");
    assert!((1 << 30..1 << 40).contains(&low), "{low:#x}");
}

payload! { lm_rdtscp, 64,
    "mov ecx, 0xc0000103",
    "mov eax, 0x1234",
    "xor edx, edx",
    "wrmsr",
    "xor ecx, ecx",
    "rdtscp",
    "mov eax, ecx",
    "out 0xef, eax",
    "out 0xed, al",
}

fn rdtscp() {
    let g = Guest::long(lm_rdtscp());
    if g.cpuid.find(0x8000_0001, 0).is_none_or(|e| e.edx >> 27 & 1 == 0) {
        skip!("no RDTSCP");
    }
    // The host's own TSC_AUX is what getcpu(2) reads through the vDSO.
    let host = || {
        let mut aux = 0;
        // SAFETY: writes one local word.
        unsafe { core::arch::x86_64::__rdtscp(&mut aux) };
        aux
    };
    let _ = krabtest::sys::pin(0);
    let before = host();
    assert_eq!(g.report(), 0x1234);
    g.expect_done();
    assert_eq!(host(), before, "the host's TSC_AUX");
    assert_eq!(g.cpu.msr(0xc000_0103), Some(0x1234));
}

payload! { lm_hints, 64,
    "wbinvd",
    "invd",
    "pause",
    "prefetcht0 [0x100000]",
    "clflush [0x100000]",
    "mfence",
    "lfence",
    "nop dword ptr [rax]",
    "xor ecx, ecx",
    "sti",
    "cli",
    "out 0xed, al",
}

fn cache_and_hint_instructions() {
    let g = Guest::long(lm_hints());
    g.ram.write_u64(DATA, 0x1234);
    g.expect_done();
    // INVD must never drop what the host has written.
    assert_eq!(g.ram.read_u64(DATA), 0x1234);
}

payload! { lm_syscall, 64,
    "mov ecx, 0xc0000081",
    "xor eax, eax",
    "mov edx, 0x00200008",      // SYSRET: CS 0x30 | 3, SS 0x28 | 3; SYSCALL: CS 8, SS 0x10
    "wrmsr",
    "mov ecx, 0xc0000082",
    "lea rax, [rip + 3f]",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0xc0000084",
    "mov eax, 0x200",
    "wrmsr",
    "mov ecx, 0xc0000102",
    "mov eax, 0x100800",
    "wrmsr",
    "mov qword ptr [0x100800], 0x5555",
    "lea rcx, [rip + 2f]",
    "mov r11d, 0x202",
    "mov r15d, 1000",
    "sysretq",
    "2: mov rax, r15",
    "syscall",
    "dec r15",
    "jnz 2b",
    "mov eax, 0",
    "syscall",
    "3: swapgs",
    "mov rbx, gs:[0]",
    "swapgs",
    "add r14, rbx",
    "test eax, eax",
    "jz 4f",
    "sysretq",
    "4: pushfq",
    "pop r13",
    "out 0xed, al",
}

fn user_mode_and_syscall() {
    let g = Guest::long(lm_syscall());
    // STAR's user selector base 0x20 + 16 is the kit's user code segment.
    assert_eq!(SEL_USER_CODE, 0x33);
    g.expect_done();
    let r = g.cpu.regs();
    assert_eq!(r.r14, 0x5555 * 1001);
    assert_eq!(r.r13 & 0x200, 0, "SF_MASK clears IF");
    assert_eq!(g.cpu.sregs().cs.selector, SEL_CODE64);
}

payload! { lm_compat, 64,
    "push 0x18",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2: mov ax, 0x10",
    "mov ss, ax",
    "mov ds, ax",
    "mov esp, 0x70000",
    "mov eax, 0xffffffff",
    "inc eax",
    "out 0xef, eax",
    "mov ebx, 0xd0000000",
    "mov dword ptr [ebx + 4], 0x12345678",
    "inc byte ptr [ebx]",       // 0x40-0x4f are one-byte INC and DEC here
    "inc ecx",
    "push ecx",
    "pop edx",
    "out 0xed, al",
}

fn compatibility_mode() {
    let g = Guest::long(lm_compat());
    let mut r = g.cpu.regs();
    r.rcx = 0x41;
    g.cpu.set_regs(&r);
    assert_eq!(g.report(), 0);
    let write =
        |gpa, data: &[u8]| Event::Exit(Exit::Mmio { write: true, gpa, len: data.len() as u32, data: data.to_vec() });
    g.expect(write(MMIO + 4, &[0x78, 0x56, 0x34, 0x12]));
    g.expect(Event::Exit(Exit::Mmio { write: false, gpa: MMIO, len: 1, data: vec![] }));
    g.cpu.reply(&[0xff]);
    g.expect(write(MMIO, &[0]));
    g.expect_done();
    assert_eq!(g.cpu.regs().rdx, 0x42);
    assert_eq!(g.cpu.sregs().cs.l, 0);
}

payload! { lm_sum, 64,
    "mov rsi, 0x10000000",
    "mov rdi, 0x10000000 + 0x1800000",
    "xor eax, eax",
    "2: add rax, [rsi]",
    "add qword ptr [rsi + 8], 1",
    "add rsi, 0x1000",
    "cmp rsi, rdi",
    "jb 2b",
    "out 0xed, al",
}

/// Every page of 24 MiB is met for the first time by the guest: by reads that see the host's data, and by writes.
fn nested_faults_whole_slot() {
    let g = Guest::long(lm_sum());
    let ram = g.vm.add_ram(1, 0x1000_0000, 24 << 20);
    let pages = (24 << 20) / 4096;
    let mut want = 0u64;
    for i in 0..pages {
        // Every second page is left to be a demand zero page.
        if i % 2 == 0 {
            ram.write_u64(ram.gpa + i * 4096, i * 7);
            want += i * 7;
        }
    }
    g.expect_done();
    assert_eq!(g.cpu.regs().rax, want);
    for i in 0..pages {
        assert_eq!(ram.read_u64(ram.gpa + i * 4096 + 8), 1, "page {i}");
    }
}

payload! { lm_outs, 64,
    "cld",
    "mov esi, 0x100ff8",
    "mov edx, 0x77",
    "mov ecx, 5",
    "rep outsd",            // across the end of a page
    "mov edi, 0x102ffd",
    "mov ecx, 9",
    "rep insb",
    "out 0xed, al",
}

fn string_io_long() {
    let g = Guest::long(lm_outs());
    let text: Vec<u8> = (1..=20).collect();
    g.ram.write(0x10_0ff8, &text);
    let (mut out, mut fed) = (Vec::new(), 0u8);
    loop {
        match g.event() {
            Event::Exit(Exit::Io { out: true, port: 0x77, size: 4, data, .. }) => out.extend(data),
            Event::Exit(Exit::Io { out: false, port: 0x77, size: 1, count, .. }) => {
                let bytes: Vec<u8> = (0..count as u8).map(|i| fed + i + 100).collect();
                fed += count as u8;
                g.cpu.reply(&bytes);
            }
            Event::Done => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(out, text);
    assert_eq!(g.ram.read(0x10_2ffd, 9), (100..109).collect::<Vec<u8>>());
}

payload! { lm_debug_target, 64, "nop", "int3", "nop", "out 0xed, al" }

/// KVM_SET_GUEST_DEBUG, where it is announced: breakpoints go to userspace, and single steps.
fn guest_debug_breakpoint() {
    let g = Guest::long(lm_debug_target());
    if g.vm.cap(KVM_CAP_SET_GUEST_DEBUG) <= 0 {
        skip!("KVM_CAP_SET_GUEST_DEBUG is 0");
    }
    let mut d = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
    assert_ok!(g.cpu.set(KVM_SET_GUEST_DEBUG, &d));
    // QEMU's TCG does not intercept INT3 as an exception.
    if !tcg() {
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Debug);
    } else {
        let r = kvm_regs { rip: CODE + 1, ..g.cpu.regs() };
        g.cpu.set_regs(&r);
    }
    assert_eq!(g.cpu.regs().rip, CODE + 1);
    let mut r = g.cpu.regs();
    r.rip += 1;
    g.cpu.set_regs(&r);
    d.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    assert_ok!(g.cpu.set(KVM_SET_GUEST_DEBUG, &d));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Debug);
    assert_eq!(g.cpu.regs().rip, CODE + 3);
    d.control = 0;
    assert_ok!(g.cpu.set(KVM_SET_GUEST_DEBUG, &d));
    g.expect_done();
}

// Reads one word through each of three sets of page-directory-pointer entries: the first comes with paging itself, the second with a MOV to
// CR3, the third with whatever the host does in between.
payload! { lm_pae, 32,
    "mov eax, 0x20000",
    "mov cr3, eax",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "mov eax, [0x40000000]",
    "out 0x10, eax",
    "mov eax, 0x20020",
    "mov cr3, eax",
    "mov eax, [0x40000000]",
    "out 0x10, eax",
    "mov eax, [0x40000000]",
    "out 0x10, eax",
    "hlt",
}

/// PAE paging outside long mode: the CPU keeps the four upper entries in registers, and must get them from wherever CR3 comes.
fn pae_paging() {
    let g = Guest::protected(lm_pae());
    for (n, word) in [(0, 0x1111_1111), (1, 0x2222_2222), (2, 0x3333_3333)] {
        let (table, low, high) = (0x20000 + n * 0x20, 0x21000 + n * 0x2000, 0x22000 + n * 0x2000);
        g.ram.write_u64(table, low | 1);
        g.ram.write_u64(table + 8, high | 1);
        // The code at its own address, 4 KiB pages from there on up to find the word behind 1 GiB.
        g.ram.write_u64(low, 0x83);
        g.ram.write_u64(high, (0x28000 + n * 0x1000) | 3);
        g.ram.write_u64(0x28000 + n * 0x1000, (0x30000 + n * 0x1000) | 3);
        g.ram.write(0x30000 + n * 0x1000, &u32::to_le_bytes(word));
    }
    let out = |want: u32| match assert_ok!(g.cpu.run()) {
        Exit::Io { out: true, port: 0x10, data, .. } => assert_eq!(data, want.to_le_bytes()),
        other => panic!("{other:?}"),
    };
    out(0x1111_1111);
    out(0x2222_2222);
    let mut s = g.cpu.sregs();
    s.cr3 = 0x20040;
    g.cpu.set_sregs(&s);
    out(0x3333_3333);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}
