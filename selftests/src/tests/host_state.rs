// SPDX-License-Identifier: GPL-2.0
//! What a vCPU and its host must not see of each other: vector registers, segment bases, debug registers, flags.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::Exit;
use krabtest::{assert_ok, payload, skip, tests};
use std::arch::asm;

tests! { "host_state";
    guest_vectors_survive_exits;
    host_vectors_survive_runs;
    vectors_of_many_vcpus(60);
    x87_and_mxcsr;
    xcr0_of_the_host;
    segment_bases_and_selectors;
    host_hardware_breakpoint;
    guest_hardware_breakpoint_is_not_the_hosts;
    signal_mask_and_flags;
    guest_time;
}

/// 16 YMM registers (or XMM in the lower halves when there is no AVX).
type Vectors = [[u64; 4]; 16];

fn pattern(seed: u64) -> Vectors {
    let mut v = [[0; 4]; 16];
    for (i, r) in v.iter_mut().enumerate() {
        for (j, w) in r.iter_mut().enumerate() {
            *w = (seed << 32 | (i as u64) << 8 | j as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    v
}

fn have_avx() -> bool {
    std::is_x86_feature_detected!("avx")
}

// Loads YMM0-15 from 0x100000, then for ever: exit, compare with 0x100000, report a difference.
payload! { hs_vectors, 64,
    "mov rax, cr4",
    "or eax, 0x40000",
    "mov cr4, rax",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 7",
    "xsetbv",
    "mov esi, 0x100000",
    "vmovdqu ymm0, [rsi]",
    "vmovdqu ymm1, [rsi + 0x20]",
    "vmovdqu ymm2, [rsi + 0x40]",
    "vmovdqu ymm3, [rsi + 0x60]",
    "vmovdqu ymm4, [rsi + 0x80]",
    "vmovdqu ymm5, [rsi + 0xa0]",
    "vmovdqu ymm6, [rsi + 0xc0]",
    "vmovdqu ymm7, [rsi + 0xe0]",
    "vmovdqu ymm8, [rsi + 0x100]",
    "vmovdqu ymm9, [rsi + 0x120]",
    "vmovdqu ymm10, [rsi + 0x140]",
    "vmovdqu ymm11, [rsi + 0x160]",
    "vmovdqu ymm12, [rsi + 0x180]",
    "vmovdqu ymm13, [rsi + 0x1a0]",
    "vmovdqu ymm14, [rsi + 0x1c0]",
    "vmovdqu ymm15, [rsi + 0x1e0]",
    "2: out 0xed, al",
    "mov edi, 0x101000",
    "vmovdqu [rdi], ymm0",
    "vmovdqu [rdi + 0x20], ymm1",
    "vmovdqu [rdi + 0x40], ymm2",
    "vmovdqu [rdi + 0x60], ymm3",
    "vmovdqu [rdi + 0x80], ymm4",
    "vmovdqu [rdi + 0xa0], ymm5",
    "vmovdqu [rdi + 0xc0], ymm6",
    "vmovdqu [rdi + 0xe0], ymm7",
    "vmovdqu [rdi + 0x100], ymm8",
    "vmovdqu [rdi + 0x120], ymm9",
    "vmovdqu [rdi + 0x140], ymm10",
    "vmovdqu [rdi + 0x160], ymm11",
    "vmovdqu [rdi + 0x180], ymm12",
    "vmovdqu [rdi + 0x1a0], ymm13",
    "vmovdqu [rdi + 0x1c0], ymm14",
    "vmovdqu [rdi + 0x1e0], ymm15",
    "mov esi, 0x100000",
    "mov ecx, 64",
    "cld",
    "repe cmpsq",
    "jne 3f",
    "cpuid",
    "jmp 2b",
    "3: mov eax, ecx",
    "out 0xef, eax",
    "jmp 3b",
}

fn vector_guest(seed: u64) -> Guest {
    let g = Guest::long(hs_vectors());
    if !have_avx() || g.cpuid.find(0xd, 0).is_none_or(|e| e.eax & 4 == 0) {
        skip!("no AVX");
    }
    for (i, w) in pattern(seed).iter().flatten().enumerate() {
        g.ram.write_u64(DATA + i as u64 * 8, *w);
    }
    g
}

/// A KVM_RUN with all vector registers of the host loaded just before and stored just after the system call.
#[target_feature(enable = "avx")]
unsafe fn run_with_vectors(fd: i32, load: &Vectors, store: &mut Vectors) -> i64 {
    let mut ret = libc::SYS_ioctl;
    asm!(
        "vmovdqu ymm0, [r8]", "vmovdqu ymm1, [r8 + 0x20]", "vmovdqu ymm2, [r8 + 0x40]", "vmovdqu ymm3, [r8 + 0x60]",
        "vmovdqu ymm4, [r8 + 0x80]", "vmovdqu ymm5, [r8 + 0xa0]", "vmovdqu ymm6, [r8 + 0xc0]",
        "vmovdqu ymm7, [r8 + 0xe0]", "vmovdqu ymm8, [r8 + 0x100]", "vmovdqu ymm9, [r8 + 0x120]",
        "vmovdqu ymm10, [r8 + 0x140]", "vmovdqu ymm11, [r8 + 0x160]", "vmovdqu ymm12, [r8 + 0x180]",
        "vmovdqu ymm13, [r8 + 0x1a0]", "vmovdqu ymm14, [r8 + 0x1c0]", "vmovdqu ymm15, [r8 + 0x1e0]",
        "syscall",
        "vmovdqu [r9], ymm0", "vmovdqu [r9 + 0x20], ymm1", "vmovdqu [r9 + 0x40], ymm2", "vmovdqu [r9 + 0x60], ymm3",
        "vmovdqu [r9 + 0x80], ymm4", "vmovdqu [r9 + 0xa0], ymm5", "vmovdqu [r9 + 0xc0], ymm6",
        "vmovdqu [r9 + 0xe0], ymm7", "vmovdqu [r9 + 0x100], ymm8", "vmovdqu [r9 + 0x120], ymm9",
        "vmovdqu [r9 + 0x140], ymm10", "vmovdqu [r9 + 0x160], ymm11", "vmovdqu [r9 + 0x180], ymm12",
        "vmovdqu [r9 + 0x1a0], ymm13", "vmovdqu [r9 + 0x1c0], ymm14", "vmovdqu [r9 + 0x1e0], ymm15",
        inout("rax") ret,
        in("rdi") fd, in("rsi") KVM_RUN, in("rdx") 0, in("r8") load, in("r9") store,
        out("rcx") _, out("r11") _,
        out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
        out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
        out("ymm14") _, out("ymm15") _,
    );
    ret
}

fn check_vectors(g: &Guest, seed: u64, rounds: u64) {
    for i in 0..rounds {
        let load = pattern(seed + 1000 + i);
        let mut store = [[0; 4]; 16];
        // SAFETY: AVX was checked by `vector_guest`; the buffers live through the call.
        let ret = unsafe { run_with_vectors(g.cpu.fd, &load, &mut store) };
        if ret == -(libc::EINTR as i64) {
            continue;
        }
        assert_eq!(ret, 0, "KVM_RUN");
        assert!(store == load, "round {i}: the host's registers changed: {store:x?}");
        match g.cpu.exit() {
            Exit::Io { out: true, port: PORT_DONE, .. } => {}
            other => panic!("round {i}: the guest's registers changed, {other:?}: {:x?}", g.ram.read(0x10_1000, 512)),
        }
    }
}

fn guest_vectors_survive_exits() {
    let g = vector_guest(1);
    check_vectors(&g, 1, 300);
}

payload! { hs_spin, 64,
    "sti",
    "2: movaps xmm0, xmm15",
    "pxor xmm7, xmm7",
    "pxor xmm15, xmm15",
    "jmp 2b",
}

fn host_vectors_survive_runs() {
    // Kicks in the middle of guest code, which never exits by itself here.
    let g = Guest::long(hs_spin());
    if !have_avx() {
        skip!("no AVX");
    }
    for i in 0..30 {
        let load = pattern(500 + i);
        let mut store = [[0; 4]; 16];
        let _kicks = sys::Kicks::after_us(3000);
        // SAFETY: AVX was checked just now.
        let ret = unsafe { run_with_vectors(g.cpu.fd, &load, &mut store) };
        assert_eq!(ret, -(libc::EINTR as i64));
        assert!(store == load, "round {i}");
    }
}

/// Four vCPUs of four VMs on fewer CPUs, each thread and each guest with a pattern of its own.
fn vectors_of_many_vcpus() {
    drop(vector_guest(0));
    let threads: Vec<_> = (0..4)
        .map(|t| {
            std::thread::spawn(move || {
                let g = vector_guest(t * 10 + 7);
                check_vectors(&g, t * 100_000 + 7, 1500);
            })
        })
        .collect();
    for t in threads {
        assert!(t.join().is_ok(), "a thread failed");
    }
}

payload! { hs_x87, 64,
    "fninit",
    "fldpi",
    "fld1",
    "mov dword ptr [0x100000], 0x7f80", // MXCSR: round to zero
    "ldmxcsr [0x100000]",
    "mov word ptr [0x100008], 0x0f7f",
    "fldcw [0x100008]",
    "out 0xed, al",
    "fstp qword ptr [0x100010]",
    "fstp qword ptr [0x100018]",
    "stmxcsr [0x100020]",
    "fnstcw [0x100028]",
    "out 0xed, al",
}

fn mxcsr() -> u32 {
    let mut v = 0u32;
    // SAFETY: stores to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut v) };
    v
}

fn x87_and_mxcsr() {
    let g = Guest::long(hs_x87());
    let before = mxcsr();
    g.expect_done();
    assert_eq!(mxcsr(), before, "the host's MXCSR");
    let x = std::hint::black_box(1.5f64) * std::hint::black_box(2.25f64);
    assert_eq!(x, 3.375);
    let fpu: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    // (KVM leaves `mxcsr` of KVM_GET_FPU at 0, so look into the XSAVE area.)
    let xsave: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
    assert_eq!((xsave.region[6], fpu.fcw), (0x7f80, 0x0f7f));
    g.expect_done();
    assert_eq!(g.ram.read_u64(0x10_0010), 1.0f64.to_bits());
    assert_eq!(g.ram.read_u64(0x10_0018), std::f64::consts::PI.to_bits());
    assert_eq!((g.ram.read_u32(0x10_0020), g.ram.read_u32(0x10_0028) & 0xffff), (0x7f80, 0x0f7f));
    assert_eq!(mxcsr(), before, "the host's MXCSR");
}

payload! { hs_xcr0, 64,
    "mov rax, cr4",
    "or eax, 0x40000",
    "mov cr4, rax",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 1",
    "xsetbv",
    "2: out 0xed, al",
    "jmp 2b",
}

/// A guest with less than the host's XCR0 does not take AVX from its host.
fn xcr0_of_the_host() {
    if !std::is_x86_feature_detected!("xsave") {
        skip!("no XSAVE");
    }
    let host = || {
        let (lo, hi): (u32, u32);
        // SAFETY: OSXSAVE is set when the feature is detected.
        unsafe { asm!("xgetbv", in("ecx") 0, out("eax") lo, out("edx") hi) };
        (hi as u64) << 32 | lo as u64
    };
    let before = host();
    let g = Guest::long(hs_xcr0());
    if g.cpuid.find(0xd, 0).is_none() {
        skip!("no XSAVE for guests");
    }
    for _ in 0..10 {
        g.expect_done();
        assert_eq!(host(), before);
    }
}

payload! { hs_bases, 64,
    "mov ecx, 0xc0000100",
    "mov eax, 0x11111000",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0xc0000101",
    "mov eax, 0x22222000",
    "wrmsr",
    "mov ecx, 0xc0000102",
    "mov eax, 0x33333000",
    "wrmsr",
    "mov ecx, 0xc0000082",
    "mov eax, 0x44444000",
    "wrmsr",
    "mov ecx, 0xc0000081",
    "mov edx, 0x00180008",
    "wrmsr",
    "mov ecx, 0xc0000084",
    "mov eax, 0x5555",
    "xor edx, edx",
    "wrmsr",
    "2: out 0xed, al",
    "swapgs",
    "jmp 2b",
}

fn segment_bases_and_selectors() {
    const ARCH_SET_GS: i32 = 0x1001;
    const ARCH_GET_FS: i32 = 0x1003;
    const ARCH_GET_GS: i32 = 0x1004;
    let value = Box::new(0x1234_5678_9abc_def0u64);
    let read = |code: i32| {
        let mut v = 0u64;
        // SAFETY: stores to a local.
        unsafe { libc::syscall(libc::SYS_arch_prctl, code, &mut v) };
        v
    };
    let selectors = || {
        let (ds, es, fs, gs, ss, cs): (u16, u16, u16, u16, u16, u16);
        // SAFETY: reads selectors.
        unsafe {
            asm!("mov {0:x}, ds", "mov {1:x}, es", "mov {2:x}, fs", "mov {3:x}, gs", "mov {4:x}, ss", "mov {5:x}, cs",
                out(reg) ds, out(reg) es, out(reg) fs, out(reg) gs, out(reg) ss, out(reg) cs);
        }
        [ds, es, fs, gs, ss, cs]
    };
    // SAFETY: GS is free for applications on x86-64.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, &*value as *const u64) };
    let before = (read(ARCH_GET_FS), read(ARCH_GET_GS), selectors());
    let g = Guest::long(hs_bases());
    for i in 0..50 {
        g.expect_done();
        let gs0: u64;
        // SAFETY: the GS base points at `value`.
        unsafe { asm!("mov {}, gs:[0]", out(reg) gs0) };
        assert_eq!(gs0, *value, "run {i}");
        assert_eq!((read(ARCH_GET_FS), read(ARCH_GET_GS), selectors()), before, "run {i}");
    }
    // 32-bit system calls and others still work: SYSENTER, STAR and LSTAR are the host's again.
    assert!(sys::gettid() > 0);
}

/// `perf_event_open` of a write watchpoint on `at`; None where the kernel or its rights do not allow it.
fn watchpoint(at: *const u64) -> Option<i32> {
    // struct perf_event_attr, version 0 (64 bytes) with bp_addr and bp_len of version 1 (72 bytes)
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        kind: u32,
        size: u32,
        config: u64,
        sample_period: u64,
        sample_type: u64,
        read_format: u64,
        flags: u64,
        wakeup: u32,
        bp_type: u32,
        bp_addr: u64,
        bp_len: u64,
    }
    // PERF_TYPE_BREAKPOINT, HW_BREAKPOINT_W, exclude_kernel and exclude_hv
    let attr = Attr { kind: 5, size: 72, bp_type: 2, bp_addr: at as u64, bp_len: 8, flags: 0x60, ..Default::default() };
    // SAFETY: the structure lives through the call.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &attr, 0, -1, -1, 0) };
    (fd >= 0).then_some(fd as i32)
}

fn perf_count(fd: i32) -> u64 {
    let mut n = 0u64;
    // SAFETY: eight bytes into a local.
    assert_eq!(unsafe { libc::read(fd, &mut n as *mut u64 as *mut _, 8) }, 8);
    n
}

payload! { hs_dr, 64,
    "mov eax, 0x100100",
    "mov dr0, rax",
    "mov eax, 0xd0601", // armed: write of 4 bytes
    "mov dr7, rax",
    "2: out 0xed, al",
    "mov rax, dr7",
    "cpuid",
    "jmp 2b",
}

fn host_hardware_breakpoint() {
    let watched = Box::leak(Box::new(0u64)) as *mut u64;
    let Some(fd) = watchpoint(watched) else { skip!("no hardware breakpoint: {:?}", Errno::last()) };
    let g = Guest::long(hs_dr());
    for i in 0..20u64 {
        g.expect_done();
        // SAFETY: our own memory.
        unsafe { watched.write_volatile(i) };
        assert_eq!(perf_count(fd), i + 1, "after run {i}");
    }
    // The guest's own registers did not become the host's.
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((d.db[0], d.dr7 & 0xf_00ff), (0x10_0100, 0xd_0001));
}

payload! { hs_touch, 64,
    "2: mov dword ptr [rdi], 1",
    "out 0xed, al",
    "jmp 2b",
}

/// A watchpoint of the host on an address does not fire when a guest writes to the same linear address.
fn guest_hardware_breakpoint_is_not_the_hosts() {
    // Below 4 GiB, so that the kit's page tables map it
    let hint = 0x2000_0000usize as *mut _;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: refused when something is there.
    let p = unsafe { libc::mmap(hint, 0x20_0000, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if p != hint {
        skip!("the address is taken");
    }
    let Some(fd) = watchpoint(p as *const u64) else { skip!("no hardware breakpoint: {:?}", Errno::last()) };
    let g = Guest::long(hs_touch());
    assert_ok!(g.vm.set_slot(1, 0, 0x2000_0000, 0x20_0000, p as u64));
    let mut r = g.cpu.regs();
    r.rdi = 0x2000_0000;
    g.cpu.set_regs(&r);
    for _ in 0..10 {
        g.expect_done();
    }
    assert_eq!(perf_count(fd), 0);
    // SAFETY: mapped above.
    unsafe {
        assert_eq!((p as *const u32).read_volatile(), 1, "the guest's write");
        (p as *mut u64).write_volatile(2);
    }
    assert_eq!(perf_count(fd), 1);
}

payload! { hs_flags, 64,
    "std",
    "stc",
    "pushfq",
    "or dword ptr [rsp], 0x240000", // AC and ID
    "popfq",
    "2: out 0xed, al",
    "jmp 2b",
}

fn signal_mask_and_flags() {
    let g = Guest::long(hs_flags());
    for _ in 0..10 {
        g.expect_done();
        let flags: u64;
        // SAFETY: reads RFLAGS.
        unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
        assert_eq!(flags & 0x4_0500, 0, "AC, DF, TF of the host: {flags:#x}");
    }
    assert_eq!(g.cpu.regs().rflags & 0x24_0401, 0x24_0401);
    // KVM_SET_SIGNAL_MASK: a blocked signal ends KVM_RUN, because the mask lets it through there.
    #[repr(C)]
    struct Mask {
        len: u32,
        set: [u8; 8],
    }
    let all_open = Mask { len: 8, set: [0; 8] };
    match g.cpu.set(KVM_SET_SIGNAL_MASK, &all_open) {
        Err(ENOTTY) => return,
        r => assert_ok!(r),
    };
    let bad = Mask { len: 4, set: [0; 8] };
    assert_eq!(g.cpu.set(KVM_SET_SIGNAL_MASK, &bad), Err(EINVAL));
    // SAFETY: plain system calls on local structures.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
    sys::kick(sys::gettid());
    assert_eq!(g.cpu.run(), Err(EINTR));
    // SAFETY: as above.
    unsafe {
        let mut now: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut now);
        assert_eq!(libc::sigismember(&now, libc::SIGUSR1), 1, "the mask is back");
    }
}

/// CPU time of this thread in ticks of 10 ms: all of it, and what was spent in guests (proc_pid_stat(5)).
fn cpu_time() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("stat");
    // The command's name may have blanks; the third field is behind it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields[number - 3].parse::<u64>().expect("a number");
    (field(14) + field(15), field(43))
}

fn guest_time() {
    let g = Guest::long(hs_spin());
    let spend = |what: &dyn Fn()| {
        let before = cpu_time();
        loop {
            what();
            let now = cpu_time();
            if now.0 >= before.0 + 30 {
                return (now.0 - before.0, now.1 - before.1);
            }
        }
    };
    let (all, guest) = spend(&|| {
        let _kicks = sys::Kicks::after_us(50_000);
        assert_eq!(g.cpu.run(), Err(EINTR));
    });
    assert!(guest > all / 2, "{guest} of {all} ticks are the guest's");
    let (all, guest) = spend(&|| {
        for _ in 0..1000 {
            g.cpu.regs();
        }
    });
    assert!(guest <= 1, "{guest} of {all} ticks are the guest's, and it did not run");
}
