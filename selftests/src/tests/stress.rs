// SPDX-License-Identifier: GPL-2.0
//! Many at once, many in a row, and the rough ends: kicks, kills, closes in the middle, CPUs that go away.

use krabtest::guest::*;
use krabtest::harness::{emulated, on_kvm, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Device, Exit, Vcpu, Vm};
use krabtest::{assert_err, assert_ok, payload, pic_with_timer, skip, tests};
use std::sync::atomic::{AtomicBool, Ordering};

tests! { "stress";
    fast_pit;
    kicks(60);
    each_interrupt_once(60);
    immediate_exit_race(60);
    two_vms_at_once(60);
    create_and_destroy(120);
    many_vcpus(60);
    vcpu_limit(60);
    killed_in_run(60);
    exits_with_threads_in_run(60);
    closed_while_running;
    two_threads_one_vcpu;
    migrating_thread(60);
    cpu_taken_offline(60);
    memory_limit;
    descriptor_limit;
}

payload! { ss_self_ipis, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "2: mov ecx, edi",
    "3: mov dword ptr [rbx + 0x300], 0x40050",  // self, fixed, vector 0x50
    "dec ecx",
    "jnz 3b",
    "out 0xed, al",
    "jmp 2b",
}

/// Interrupts come once each while another CPU makes this one stop and go on. QEMU's emulation does so for each misaligned atomic access:
/// it runs the CPU that wants it alone.
fn each_interrupt_once() {
    if on_kvm() && tcg() {
        skip!("QEMU delivers KVM's injected interrupts more than once");
    }
    let g = Guest::long_irqchip(ss_self_ipis());
    g.set_eoi(Eoi::Xapic);
    let rounds = 500;
    let mut r = g.cpu.regs();
    r.rdi = rounds;
    g.cpu.set_regs(&r);
    // Inside of one word, because hosts may punish atomic accesses across cache lines.
    let mut word = 0_u64;
    let misaligned = (&raw mut word).wrapping_byte_add(1).cast::<u32>();
    std::thread::scope(|s| {
        let runs = s.spawn(|| {
            for turn in 1..=4 {
                g.expect_done();
                assert_eq!(g.count(0x50), turn * rounds, "interrupts in turn {turn}");
            }
        });
        while !runs.is_finished() {
            // SAFETY: adds to four of the word's bytes.
            unsafe { std::arch::asm!("lock inc dword ptr [{}]", in(reg) misaligned) };
        }
        assert!(runs.join().is_ok(), "the vCPU's thread failed");
    });
}

payload! { ss_count, 64,
    "sti",
    "2: inc rbx",
    "mov [rsi], rbx",
    "cmp [rsi], rbx",
    "jne 3f",
    "jmp 2b",
    "3: ud2",
}

/// Runs until `stop`; kicks are all that may come.
fn spin(cpu: &Vcpu, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match cpu.run() {
            Err(EINTR) => {}
            other => panic!("{other:x?} at {:#x}", cpu.regs().rip),
        }
    }
}

fn stop_all(stop: &AtomicBool, threads: Vec<(std::thread::ScopedJoinHandle<()>, i32)>) {
    stop.store(true, Ordering::Relaxed);
    // All are kicked until all are gone: one may be waiting for another.
    while threads.iter().any(|(t, _)| !t.is_finished()) {
        for (_, tid) in threads.iter().filter(|(t, _)| !t.is_finished()) {
            sys::kick(*tid);
        }
        sleep_ms(1);
    }
    for (t, _) in threads {
        assert!(t.join().is_ok(), "a vCPU's thread failed");
    }
}

/// Spawns `f` and gives the thread's id with its handle.
fn with_tid<'s>(
    s: &'s std::thread::Scope<'s, '_>,
    f: impl FnOnce() + Send + 's,
) -> (std::thread::ScopedJoinHandle<'s, ()>, i32) {
    let (send, receive) = std::sync::mpsc::channel();
    let t = s.spawn(move || {
        send.send(sys::gettid()).expect("the test waits");
        f();
    });
    let tid = receive.recv().expect("the thread runs");
    (t, tid)
}

/// RSI is where this vCPU counts.
fn counting(g: &Guest, id: u32) -> Option<Vcpu> {
    let cpu = (id > 0).then(|| g.add_long_vcpu(id, ss_count()));
    let c = cpu.as_ref().unwrap_or(&g.cpu);
    let mut r = c.regs();
    r.rsi = DATA + id as u64 * 64;
    c.set_regs(&r);
    cpu
}

fn kicks() {
    let g = Guest::long(ss_count());
    counting(&g, 0);
    let second = counting(&g, 1).expect("vCPU 1");
    let stop = AtomicBool::new(false);
    let rounds = if emulated() { 2000 } else { 20_000 };
    std::thread::scope(|s| {
        let threads = vec![with_tid(s, || spin(&g.cpu, &stop)), with_tid(s, || spin(&second, &stop))];
        for i in 0..rounds {
            sys::kick(threads[i % 2].1);
            if i % 64 == 0 {
                std::thread::yield_now();
            }
            if i % 500 == 0 {
                let (a, b) = (g.ram.read_u64(DATA), g.ram.read_u64(DATA + 64));
                assert!(g.ram.wait_u64(DATA, a + 1, 5000) && g.ram.wait_u64(DATA + 64, b + 1, 5000), "round {i}");
            }
        }
        stop_all(&stop, threads);
    });
}

/// immediate_exit set from another thread, and the signal after it, as VMMs do: never lost.
fn immediate_exit_race() {
    let g = Guest::long(ss_count());
    counting(&g, 0);
    let stop = AtomicBool::new(false);
    let left = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|s| {
        let thread = with_tid(s, || {
            while !stop.load(Ordering::Relaxed) {
                assert_err!(g.cpu.run(), EINTR);
                g.cpu.set_immediate_exit(false);
                left.fetch_add(1, Ordering::SeqCst);
            }
        });
        for i in 0..500u64 {
            let before = left.load(Ordering::SeqCst);
            g.cpu.set_immediate_exit(true);
            sys::kick(thread.1);
            let end = now_ns() + 5_000_000_000;
            while left.load(Ordering::SeqCst) == before {
                assert!(now_ns() < end, "kick {i} was lost");
                std::thread::yield_now();
            }
        }
        g.cpu.set_immediate_exit(true);
        stop_all(&stop, vec![thread]);
    });
}

payload! { ss_sum, 64,
    "xor eax, eax",
    "mov ecx, 200",
    "2: mov rsi, 0x100000",
    "mov edx, 256",
    "3: add rax, [rsi]",
    "add rsi, 0x1000",
    "dec edx",
    "jnz 3b",
    "push rax",
    "push rcx",
    "xor eax, eax",
    "cpuid",
    "pop rcx",
    "pop rax",
    "dec ecx",
    "jnz 2b",
    "out 0xed, al",
}

fn two_vms_at_once() {
    let threads: Vec<_> = (0..3u64)
        .map(|t| {
            std::thread::spawn(move || {
                for round in 0..10 {
                    let g = Guest::long(ss_sum());
                    let mut want = 0u64;
                    for p in 0..256 {
                        let v = (t + 1) << 40 | round << 20 | p;
                        g.ram.write_u64(DATA + p * 4096, v);
                        want = want.wrapping_add(v);
                    }
                    g.expect_done();
                    assert_eq!(g.cpu.regs().rax, want.wrapping_mul(200), "VM {t}, round {round}");
                    g.ram.unmap();
                }
            })
        })
        .collect();
    for t in threads {
        assert!(t.join().is_ok(), "a thread failed");
    }
}

fn meminfo(field: &str) -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Kernel memory that is in use, in KiB: slabs, page tables, stacks, vmalloc, per-CPU.
fn kernel_memory() -> i64 {
    ["SUnreclaim", "PageTables", "SecPageTables", "KernelStack", "VmallocUsed", "Percpu"].map(meminfo).iter().sum()
}

payload! { ss_hlt, 64, "mov [0x100000], rax", "hlt" }

fn create_and_destroy() {
    let rounds = if emulated() { 300 } else { 1000 };
    let one = |i: u64| {
        let g = Guest::long_with(ss_hlt(), |vm| {
            if i % 2 == 0 {
                vm.create_irqchip();
                vm.create_pit();
                assert_ok!(vm.irqfd(sys::eventfd(), 5, 0, 0));
                assert_ok!(vm.ioeventfd(sys::eventfd(), 0x1000, 4, 0, 0));
            }
        });
        if i % 2 == 1 {
            assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        }
        let ram = g.ram;
        drop(g);
        ram.unmap();
    };
    let closer = || {
        // The eventfds of the rounds
        for fd in 3..1000 {
            let _ = close(fd);
        }
    };
    let status = in_child(|| {
        for i in 0..20 {
            one(i);
        }
        0
    });
    assert_eq!(status, 0);
    sleep_ms(200);
    let before = kernel_memory();
    for i in 0..rounds / 20 {
        let status = in_child(|| {
            for k in 0..20 {
                one(i * 20 + k);
            }
            closer();
            0
        });
        assert_eq!(status, 0, "round {i}");
    }
    // Freeing may wait for grace periods.
    let mut after = kernel_memory();
    for _ in 0..50 {
        if after < before + 2048 {
            break;
        }
        sleep_ms(100);
        after = kernel_memory();
    }
    println!("# {rounds} VMs: kernel memory {before} KiB before, {after} KiB after");
    assert!(after < before + 4096, "{} KiB more than before", after - before);
}

fn many_vcpus() {
    let g = Guest::long(ss_hlt());
    let max = g.vm.cap(KVM_CAP_MAX_VCPUS);
    assert!(max >= 64, "{max}");
    let cpus: Vec<Vcpu> = (1..64).map(|id| g.vm.create_vcpu(id)).collect();
    // In turn, on one thread
    for (i, cpu) in cpus.iter().enumerate() {
        assert_ok!(cpu.set_cpuid(&g.cpuid));
        enter_long(cpu, CODE, STACK - 0x1000);
        let mut r = cpu.regs();
        r.rax = i as u64 + 100;
        cpu.set_regs(&r);
        assert_eq!(assert_ok!(cpu.run()), Exit::Hlt);
        assert_eq!(g.ram.read_u64(DATA), i as u64 + 100);
    }
    // And four of them at once
    std::thread::scope(|s| {
        for cpu in &cpus[..4] {
            s.spawn(|| {
                for _ in 0..20 {
                    let mut r = cpu.regs();
                    r.rip = CODE;
                    cpu.set_regs(&r);
                    assert_eq!(assert_ok!(cpu.run()), Exit::Hlt);
                }
            });
        }
    });
}

/// One more than the limit is refused, and the limit itself can be had (as far as descriptors go).
fn vcpu_limit() {
    let d = Device::open();
    let vm = d.create_vm();
    let max = d.cap(KVM_CAP_MAX_VCPUS) as u32;
    let want = if emulated() { 150 } else { 900 };
    let mut made = 0;
    for id in 0..max.min(want) {
        match vm.ioctl(KVM_CREATE_VCPU, id as usize) {
            Ok(_) => made += 1,
            Err(EMFILE) => break,
            Err(e) => panic!("vCPU {id}: {e:?}"),
        }
    }
    if made == max {
        assert!(vm.ioctl(KVM_CREATE_VCPU, made as usize).is_err());
    }
    assert!(made >= 64, "{made}");
}

payload! { ss_loop, 64, "2: jmp 2b" }

fn killed_in_run() {
    for round in 0..20 {
        // SAFETY: the child runs a guest until it is killed.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let g = Guest::long_with(ss_loop(), |vm| {
                if round % 2 == 0 {
                    vm.create_irqchip();
                }
            });
            let _ = g.cpu.run();
            // SAFETY: the end of this process.
            unsafe { libc::_exit(0) };
        }
        sleep_ms(10 + round * 7 % 30);
        let start = now_ns();
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let status = sys::wait(pid);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL, "{status:#x}");
        assert!(now_ns() - start < 5_000_000_000, "it took {} ms to die", (now_ns() - start) / 1_000_000);
    }
}

fn exits_with_threads_in_run() {
    for _ in 0..10 {
        let status = in_child(|| {
            let g: &'static Guest = Box::leak(Box::new(Guest::long_irqchip(ss_loop())));
            let second: &'static Vcpu = Box::leak(Box::new(g.add_long_vcpu(1, ss_loop())));
            let _ = second.set_mp_state(KVM_MP_STATE_RUNNABLE);
            std::thread::spawn(|| g.cpu.run());
            std::thread::spawn(|| second.run());
            sleep_ms(20);
            7
        });
        assert_eq!(libc::WEXITSTATUS(status), 7);
    }
}

fn closed_while_running() {
    let g = Guest::long(ss_count());
    counting(&g, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let thread = with_tid(s, || spin_raw(&g.cpu, &stop));
        assert!(g.ram.wait_u64(DATA, 1, 5000));
        // The VM's descriptor goes first, then the vCPU's own, while KVM_RUN is on its way.
        assert_ok!(close(g.vm.fd));
        let n = g.ram.read_u64(DATA);
        assert!(g.ram.wait_u64(DATA, n + 1, 5000), "the guest goes on without the VM's descriptor");
        assert_ok!(close(g.cpu.fd));
        let n = g.ram.read_u64(DATA);
        assert!(g.ram.wait_u64(DATA, n + 1, 5000), "KVM_RUN holds the file");
        stop_all(&stop, vec![thread]);
    });
    std::mem::forget(g);
}

/// As `spin`, but the descriptor may be closed meanwhile.
fn spin_raw(cpu: &Vcpu, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match cpu.ioctl(KVM_RUN, 0) {
            Err(EINTR) => {}
            Err(EBADF) => return,
            other => panic!("{other:?}"),
        }
    }
}

/// The second thread waits for the first one (or is refused); both are kicked out, and calls from a third work then.
fn two_threads_one_vcpu() {
    let g = Guest::long(ss_count());
    counting(&g, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let threads = vec![with_tid(s, || spin(&g.cpu, &stop)), with_tid(s, || spin(&g.cpu, &stop))];
        for _ in 0..50 {
            for t in &threads {
                sys::kick(t.1);
            }
            sleep_ms(1);
        }
        assert!(g.ram.read_u64(DATA) > 0);
        stop_all(&stop, threads);
    });
    assert!(g.cpu.regs().rbx > 0);
}

payload! { ss_migrate, 64,
    "mov eax, 0x1234",
    "movd xmm3, eax",
    "mov dr1, rax",
    "2: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, r8",
    "jb 3f",
    "mov r8, rax",
    "movd eax, xmm3",
    "cmp eax, 0x1234",
    "jne 3f",
    "mov rax, dr1",
    "cmp eax, 0x1234",
    "jne 3f",
    "xor eax, eax",
    "cpuid",
    "inc qword ptr [0x100000]",
    "jmp 2b",
    "3: ud2",
}

/// The thread wanders between CPUs, between runs and (by its own affinity) in them; the guest's TSC never runs back.
fn migrating_thread() {
    if sys::pin(1).is_err() {
        skip!("one CPU only");
    }
    let g = Guest::long(ss_migrate());
    let end = now_ns() + 3_000_000_000;
    let mut i = 0;
    while now_ns() < end && i < 300 {
        assert_ok!(sys::pin(i % 2));
        assert_err!(g.cpu.run_for(3), EINTR);
        i += 1;
    }
    assert!(g.ram.read_u64(DATA) > 100);
    // From outside, in the middle of KVM_RUN
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let thread = with_tid(s, || spin(&g.cpu, &stop));
        for i in 0..100 {
            // SAFETY: a local set, our own thread.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(i % 2, &mut set);
                libc::sched_setaffinity(thread.1, size_of::<libc::cpu_set_t>(), &set);
            }
            sleep_ms(3);
        }
        let n = g.ram.read_u64(DATA);
        assert!(g.ram.wait_u64(DATA, n + 1, 5000));
        stop_all(&stop, vec![thread]);
    });
}

/// CPU 1 goes offline and comes back while vCPUs run, and both CPUs can run guests afterwards.
fn cpu_taken_offline() {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    if std::fs::write(ONLINE, "1").is_err() {
        skip!("{ONLINE} cannot be written");
    }
    let g = Guest::long(ss_count());
    counting(&g, 0);
    let second = counting(&g, 1).expect("vCPU 1");
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let threads = vec![with_tid(s, || spin(&g.cpu, &stop)), with_tid(s, || spin(&second, &stop))];
        for i in 0..3 {
            if let Err(e) = std::fs::write(ONLINE, "0") {
                println!("# offline: {e}");
                break;
            }
            sleep_ms(20);
            let online = std::fs::write(ONLINE, "1");
            assert!(online.is_ok(), "online again: {online:?}");
            let (a, b) = (g.ram.read_u64(DATA), g.ram.read_u64(DATA + 64));
            assert!(g.ram.wait_u64(DATA, a + 1, 10_000) && g.ram.wait_u64(DATA + 64, b + 1, 10_000), "round {i}");
        }
        stop_all(&stop, threads);
    });
    for cpu in [1, 0] {
        assert_ok!(sys::pin(cpu));
        let g = Guest::long(ss_hlt());
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt, "on CPU {cpu}");
    }
}

/// A slot larger than memory is no trouble until it is touched, and its dirty log is refused or small.
fn memory_limit() {
    let vm = Vm::new();
    let len = 64u64 << 30;
    let hva = {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: address space only.
        unsafe { libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_READ, flags, -1, 0) }
    };
    if hva == libc::MAP_FAILED {
        skip!("no address space");
    }
    match vm.set_slot(0, 0, 0, len, hva as u64) {
        Ok(_) => {}
        Err(e) => assert!(e == ENOMEM || e == EINVAL, "{e:?}"),
    }
    // The bitmap's size overflows in none of these.
    for size in [1u64 << 44, 1 << 52, 1 << 60, u64::MAX & !0xfff] {
        let r = vm.set_slot(1, KVM_MEM_LOG_DIRTY_PAGES, 1 << 40, size, hva as u64);
        assert!(matches!(r, Err(EINVAL) | Err(ENOMEM) | Err(EEXIST)), "{size:#x}: {r:?}");
    }
}

fn descriptor_limit() {
    let status = in_child(|| {
        let limit = |n| {
            let limit = libc::rlimit { rlim_cur: n, rlim_max: 16 };
            // SAFETY: a limit of the child itself.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
        };
        limit(8);
        let d = Device::open();
        let mut vms = Vec::new();
        let r = loop {
            match d.ioctl(KVM_CREATE_VM, 0) {
                Ok(fd) => vms.push(fd),
                Err(e) => break e,
            }
        };
        // No descriptor is left for a vCPU either, and the failed calls leave nothing behind.
        let vcpu = || vms.first().map(|vm| sys::ioctl(*vm, KVM_CREATE_VCPU, 0).map(drop));
        let refused = vcpu();
        limit(16);
        (r != EMFILE || refused != Some(Err(EMFILE)) || vcpu() != Some(Ok(()))) as i32
    });
    assert_eq!(status, 0);
}

payload! { ss_pit, 64,
    pic_with_timer!(),
    // Channel 0, both bytes, mode 2: 300 ticks, about 250 us
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x2c",
    "out 0x40, al",
    "mov al, 1",
    "out 0x40, al",
    "sti",
    "2: hlt",
    "jmp 2b",
}

/// Ticks come late and wait for one another; none of them is the last.
fn fast_pit() {
    let g = Guest::long_with(ss_pit(), |vm| {
        vm.create_irqchip();
        vm.create_pit();
    });
    g.set_eoi(Eoi::Pic);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let threads = vec![with_tid(s, || spin(&g.cpu, &stop))];
        let goes_on = (0..40).all(|_| g.ram.wait_u64(COUNTS + 8 * 0x30, g.count(0x30) + 200, 3000));
        stop_all(&stop, threads);
        assert!(goes_on, "it stopped after {} ticks", g.count(0x30));
    });
}
