// SPDX-License-Identifier: GPL-2.0
//! What a client may not do to its host: leak, hang, outlive a SIGKILL, or stop the host from taking CPUs away.

use krabtest::guest::*;
use krabtest::harness::{on_kvm, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Ram, Vm};
use krabtest::{assert_err, assert_ok, ioapic_pin_10_level, payload, skip, tests};
use std::sync::atomic::{AtomicBool, Ordering};

tests! { "safety";
    ioeventfds_are_limited(60);
    refused_irqfd_leaves_no_resampler;
    refused_entry_keeps_interrupts;
    long_mode_enabled_without_paging;
    waiter_for_a_vcpu_is_killable;
    killed_while_running(60);
    vms_come_and_go(120);
    descriptors_close_in_any_order;
    cpu_unplugged_while_running(60);
    host_writes_cr4_while_running(120);
}

fn ioeventfds_are_limited() {
    if on_kvm() {
        skip!("KVM has no limit of its own");
    }
    let vm = Vm::new();
    let fd = eventfd();
    let full = (0..=4096u64).position(|n| match vm.ioeventfd(fd, n, 1, KVM_IOEVENTFD_FLAG_PIO, 0) {
        Ok(_) => false,
        Err(e) => {
            assert_eq!(e, ENOSPC);
            true
        }
    });
    assert_eq!(full, Some(4096));
    assert_ok!(vm.ioeventfd(fd, 7, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN, 0));
    assert_ok!(vm.ioeventfd(fd, 7, 1, KVM_IOEVENTFD_FLAG_PIO, 0));
}

payload! { sf_level, 64,
    ioapic_pin_10_level!(),
    "sti",
    "2: nop",
    "out 0xed, al",
    "jmp 2b",
}

/// An irqfd that is refused must not leave its resample eventfd behind.
fn refused_irqfd_leaves_no_resampler() {
    let g = Guest::long_irqchip(sf_level());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    let (fd, good, refused) = (eventfd(), eventfd(), eventfd());
    assert_ok!(g.vm.irqfd(fd, 10, KVM_IRQFD_FLAG_RESAMPLE, good));
    assert_err!(g.vm.irqfd(fd, 10, KVM_IRQFD_FLAG_RESAMPLE, refused), EBUSY, "an eventfd that is taken");
    eventfd_write(fd, 1);
    let end = now_ns() + 5_000_000_000;
    while eventfd_read(good) == 0 {
        g.expect_done();
        assert!(now_ns() < end, "the good resample eventfd is never told");
    }
    assert_eq!(eventfd_read(refused), 0, "a refused resample eventfd is told");
}

payload! { real_deaf, 16, "cli", "2: jmp 2b" }

/// A guest with interrupts off is interrupted also after an entry that the CPU refused: QEMU (10.0) then empties the VMCB's `int_ctl`,
/// V_INTR_MASKING with it.
fn refused_entry_keeps_interrupts() {
    if on_kvm() && tcg() {
        skip!("KVM does not set V_INTR_MASKING again, and the host's CPU is lost");
    }
    let g = Guest::real(real_deaf());
    let good = g.cpu.sregs();
    // Beyond every CPU's physical addresses, and of no use without paging.
    let bad = kvm_sregs { cr3: 1 << 60, ..good };
    let refused = g.cpu.set(KVM_SET_SREGS, &bad).is_ok() && matches!(g.cpu.run_for(20), Ok(Exit::FailEntry(_)));
    if !refused {
        skip!("this CPU enters with such a CR3");
    }
    enter_real(&g.cpu, 0x1000);
    for _ in 0..3 {
        assert_err!(g.cpu.run_for(20), EINTR);
    }
}

payload! { real_lme, 16,
    "mov ecx, 0xc0000080",
    "rdmsr",
    "mov ebx, eax",
    "hlt",
    "or ax, 0x100",
    "wrmsr",
    "rdmsr",
    "mov ebx, eax",
    "out 0x10, al",
    "hlt",
}

/// EFER.LME without paging and without CR4.PAE is a state to be in, set by userspace or by the guest. Leaving such a guest is where
/// QEMU (10.0) loses the host's CR0.PG, and with it the host.
fn long_mode_enabled_without_paging() {
    if on_kvm() && tcg() {
        skip!("KVM gives LME to hardware, and QEMU's host is lost");
    }
    let g = Guest::real(real_lme());
    let mut s = g.cpu.sregs();
    s.efer |= 0x100;
    g.cpu.set_sregs(&s);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!((g.cpu.regs().rbx, g.cpu.sregs().efer, g.cpu.sregs().cr4 & 0x20), (0x100, 0x100, 0));
    s.efer = 0;
    g.cpu.set_sregs(&s);
    let out = Exit::Io { out: true, port: 0x10, size: 1, count: 1, data: vec![0] };
    assert_eq!(assert_ok!(g.cpu.run()), out);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!((g.cpu.regs().rbx, g.cpu.sregs().efer), (0x100, 0x100));
    assert!(g.cpu.set_msr(0xc000_0080, 0));
    assert_eq!(g.cpu.sregs().efer, 0);
}

payload! { sf_halt, 64, "2: cli", "hlt", "jmp 2b" }

/// A process that shares the address space, not the thread group, waits for a vCPU that blocks: SIGKILL must end it.
fn waiter_for_a_vcpu_is_killable() {
    extern "C" fn waiter(fd: *mut libc::c_void) -> i32 {
        let mut regs = kvm_regs::default();
        ioctl_out(fd as usize as i32, KVM_GET_REGS, &mut regs).is_ok() as i32
    }
    let g = Guest::long_irqchip(sf_halt());
    let fd = g.cpu.fd;
    let runner = std::thread::spawn(move || {
        let _kicks = sys::Kicks::after_us(4_000_000);
        ioctl(fd, KVM_RUN, 0)
    });
    sys::sleep_ms(300);
    let stack = sys::anon(1 << 20, 4096);
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: a stack of its own; the child makes one system call on memory that outlives it.
    let pid = unsafe { libc::clone(waiter, stack.wrapping_add(1 << 20) as *mut _, flags, fd as usize as *mut _) };
    assert!(pid > 0);
    sys::sleep_ms(300);
    let start = now_ns();
    let mut status = 0;
    // SAFETY: our own child.
    unsafe {
        assert_eq!(libc::waitpid(pid, &mut status, libc::WNOHANG), 0, "it does not wait");
        libc::kill(pid, libc::SIGKILL);
    }
    sys::wait(pid);
    assert!(now_ns() - start < 1_500_000_000, "killed only when the vCPU came back");
    let _ = runner.join();
}

payload! { sf_spin, 64, "2: lock inc qword ptr [0x100000]", "jmp 2b" }

fn killed_while_running() {
    for round in 0..20 {
        // SAFETY: the child only runs guests until it is killed.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let g = Guest::long(sf_spin());
            let other = g.add_long_vcpu(1, sf_spin());
            std::thread::spawn(move || other.run());
            let _ = g.cpu.run();
            // SAFETY: not reached in a good run.
            unsafe { libc::_exit(0) };
        }
        sys::sleep_ms(20 + round * 10);
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let start = now_ns();
        let status = sys::wait(pid);
        assert!(libc::WIFSIGNALED(status), "the child ended by itself");
        assert!(now_ns() - start < 5_000_000_000, "round {round}: slow to die");
    }
}

/// Kernel memory that is in use and that nobody can take back, in KiB.
fn kernel_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let lines = text.lines().filter_map(|l| l.split_once(':'));
    let wanted = ["SUnreclaim", "PageTables", "KernelStack", "VmallocUsed", "Percpu"];
    let number = |v: &str| v.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    lines.filter(|(name, _)| wanted.contains(name)).map(|(_, v)| number(v)).sum()
}

/// What the system has free, in KiB, caches included.
fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or("");
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
    };
    of("MemFree:") + of("Cached:") + of("SReclaimable:")
}

/// A thousand VMs with everything that one can have. A page lost with each would be 4 MiB.
fn vms_come_and_go() {
    let ram = Ram::new(0, 2 << 20);
    ram.write(0x1000, &[0xc6, 0x06, 0, 0x20, 1, 0xe6, 0xed, 0xf4]);
    let one = || {
        let vm = Vm::new();
        vm.create_irqchip();
        vm.create_pit();
        assert_ok!(vm.map(0, KVM_MEM_LOG_DIRTY_PAGES, ram));
        let fd = eventfd();
        let _ = vm.irqfd(fd, 5, 0, 0);
        let _ = vm.ioeventfd(fd, 0x60, 1, KVM_IOEVENTFD_FLAG_PIO, 0);
        let cpu = vm.create_vcpu(0);
        let _other = vm.create_vcpu(1);
        enter_real(&cpu, 0x1000);
        let _ = cpu.run();
        let _ = sys::close(fd);
    };
    (0..100).for_each(|_| one());
    sys::sleep_ms(500);
    let (kernel, free) = (kernel_memory(), free_memory());
    (0..1000).for_each(|_| one());
    sys::sleep_ms(500);
    let grown = kernel_memory().saturating_sub(kernel);
    let lost = free.saturating_sub(free_memory());
    println!("# 1000 VMs: kernel memory grew by {grown} KiB, free memory shrank by {lost} KiB");
    assert!(grown < 2048, "kernel memory grew by {grown} KiB");
    assert!(lost < 8192, "{lost} KiB are gone");
}

/// The VM outlives its descriptor as long as a vCPU's is open or its run page is mapped.
fn descriptors_close_in_any_order() {
    for order in 0..6 {
        let g = Guest::long_irqchip(sf_spin());
        let fd = eventfd();
        assert_ok!(g.vm.irqfd(fd, 5, 0, 0));
        let (vm, cpu) = (g.vm.fd, g.cpu.fd);
        // SAFETY: plain system calls on our own descriptors.
        unsafe {
            let copy = libc::dup(cpu);
            let steps: [&[i32]; 6] =
                [&[vm, cpu, fd], &[cpu, vm, fd], &[fd, vm, cpu], &[fd, cpu, vm], &[vm, fd, cpu], &[cpu, fd, vm]];
            for &close in steps[order] {
                libc::close(close);
                if close == vm {
                    let _kicks = sys::Kicks::after_us(2000);
                    let _ = ioctl(copy, KVM_RUN, 0);
                }
                libc::eventfd_write(fd, 1);
            }
            libc::close(copy);
        }
        std::mem::forget((g.vm, g.cpu));
    }
}

fn cpu_unplugged_while_running() {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    if std::fs::write(ONLINE, "1").is_err() {
        skip!("no CPU can be unplugged here");
    }
    let g = Guest::long(sf_spin());
    let other = g.add_long_vcpu(1, sf_spin());
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for cpu in [&g.cpu, &other] {
            s.spawn(|| {
                let _kicks = sys::Kicks::after_us(5000);
                while !stop.load(Ordering::SeqCst) {
                    match cpu.run() {
                        Err(EINTR) => {}
                        e => panic!("KVM_RUN: {e:?}"),
                    }
                }
            });
        }
        for _ in 0..3 {
            for state in ["0", "1"] {
                let before = g.ram.read_u64(DATA);
                let done = std::fs::write(ONLINE, state);
                let ran = g.ram.wait_u64(DATA, before + 1000, 10_000);
                if done.is_err() || !ran {
                    stop.store(true, Ordering::SeqCst);
                }
                assert!(done.is_ok(), "online = {state}: {done:?}");
                assert!(ran, "the guests stand still with cpu1 at {state}");
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
}

payload! { sf_busy, 64,
    "2: mov ecx, 1000",
    "3: dec ecx",
    "jnz 3b",
    "xor eax, eax",
    "cpuid",
    "jmp 2b",
}

/// The kernel writes CR4 without knowing of ours: bits of it come and go with PR_SET_TSC, also at every switch between a task that has it and
/// one that has not, and with perf's permission to read counters. On a CPU that VMX was left on on, that faults.
fn host_writes_cr4_while_running() {
    const ROUNDS: u32 = 100_000;
    const RDPMC: &str = "/sys/bus/event_source/devices/cpu/rdpmc";
    let g = Guest::long(sf_busy());
    let over = AtomicBool::new(false);
    let set_tsc = |mode: libc::c_ulong| {
        // SAFETY: RDTSC faults in this thread while it is off, and nothing here uses it.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_TSC, mode, 0, 0, 0) }, 0);
    };
    std::thread::scope(|threads| {
        threads.spawn(|| {
            assert_ok!(sys::pin(0));
            for round in 0..ROUNDS {
                set_tsc(libc::PR_TSC_SIGSEGV as libc::c_ulong);
                if round % 64 == 0 {
                    // The guest's thread runs in between, without the bit.
                    std::thread::yield_now();
                }
                set_tsc(libc::PR_TSC_ENABLE as libc::c_ulong);
                if round % 1024 == 0 {
                    let _ = std::fs::write(RDPMC, if round % 2048 == 0 { "2" } else { "1" });
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        threads.spawn(|| {
            assert_ok!(sys::pin(0));
            while !over.load(Ordering::Relaxed) {
                assert_err!(g.cpu.run_for(5), EINTR);
            }
        });
    });
}
