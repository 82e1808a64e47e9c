// SPDX-License-Identifier: GPL-2.0
//! The local APIC and what a CPU does with it: timers, IPIs, HLT, TPR, INIT and SIPI, NMI.

use super::irqchip::APIC;
use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Vcpu};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "lapic";
    self_ipi_xapic;
    self_ipi_x2apic;
    registers;
    timer_one_shot;
    timer_periodic;
    timer_tsc_deadline;
    halt_and_wake_by_timer;
    halt_is_kicked;
    tpr_holds_interrupts_back;
    shadow_of_sti;
    ipi_between_vcpus_xapic;
    ipi_between_vcpus_x2apic;
    init_sipi;
    nmi;
    nmi_is_not_nested;
    round_trip;
}

payload! { ic_self_xapic, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov dword ptr [rbx + 0x310], 0",
    "mov dword ptr [rbx + 0x300], 0x40050",     // self, fixed, vector 0x50
    "mov dword ptr [rbx + 0x300], 0x80051",     // all including self
    "mov eax, [rbx + 0x20]",
    "shl eax, 24",
    "mov dword ptr [rbx + 0x310], 0",
    "mov dword ptr [rbx + 0x300], 0x52",        // physical destination 0
    "mov dword ptr [rbx + 0x300], 0xc0053",     // all excluding self
    "nop",
    "mov eax, [rbx + 0x300]",
    "out 0xef, eax",
    "mov eax, [rbx + 0x30]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn self_ipi_xapic() {
    let g = Guest::long_irqchip(ic_self_xapic());
    g.set_eoi(Eoi::Xapic);
    assert_eq!(g.report() & 0xfffff, 0xc0053, "ICR reads back, idle");
    let version = g.report();
    assert!(version & 0xff >= 0x10 && version >> 16 & 0xff >= 3, "version {version:#x}");
    g.expect_done();
    assert_eq!([g.count(0x50), g.count(0x51), g.count(0x52), g.count(0x53)], [1, 1, 1, 0]);
}

payload! { ic_self_x2apic, 64,
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "sti",
    "mov ecx, 0x83f",               // SELF IPI
    "mov eax, 0x60",
    "wrmsr",
    "mov ecx, 0x830",
    "mov eax, 0x40061",
    "wrmsr",
    "mov eax, 0x62",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x802",
    "rdmsr",
    "out 0xef, eax",
    "mov ecx, 0x80d",               // LDR
    "rdmsr",
    "out 0xef, eax",
    "xor eax, eax",
    "mov ecx, 0x802",
    "wrmsr",                        // ID is read-only: #GP
    "mov ecx, 0x80e",               // no DFR in x2APIC: #GP
    "rdmsr",
    "out 0xed, al",
}

fn self_ipi_x2apic() {
    let g = Guest::long_irqchip(ic_self_x2apic());
    g.set_eoi(Eoi::X2apic);
    assert_eq!((g.report(), g.report()), (0, 1), "ID and LDR");
    assert_eq!([g.count(0x60), g.count(0x61), g.count(0x62)], [1, 1, 1]);
    for what in ["ID", "DFR"] {
        assert_eq!(g.exception(2), (13, 0), "{what}");
    }
    g.expect_done();
    assert_eq!(g.cpu.sregs().apic_base & 0xfff, 0xd00);
}

payload! { ic_lapic_regs, 64,
    "mov rbx, 0xfee00000",
    "mov eax, [rbx + 0xf0]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov eax, [rbx + 0x350]",       // LVT0 after reset
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x320], 0xffffffff",
    "mov eax, [rbx + 0x320]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x80], 0x20",
    "mov rax, cr8",
    "out 0xef, eax",
    "mov eax, 5",
    "mov cr8, rax",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0xd0], 0xff000000",
    "mov eax, [rbx + 0xd0]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0xe0], 0",
    "mov eax, [rbx + 0xe0]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn registers() {
    let g = Guest::long_irqchip(ic_lapic_regs());
    assert_eq!(g.report(), 0xff, "SVR after reset");
    let lvt0 = g.report();
    assert!(lvt0 == 0x10000 || lvt0 == 0x700, "LVT0 {lvt0:#x}");
    let timer = g.report();
    // (KVM lets the delivery status be written, too.)
    assert_eq!(timer & !0x7_10ff, 0, "LVT timer keeps its own bits only: {timer:#x}");
    assert_eq!(timer & 0x1_00ff, 0x1_00ff);
    assert_eq!(g.report(), 2, "CR8 follows TPR");
    assert_eq!(g.report(), 0x50, "TPR follows CR8");
    assert_eq!(g.report(), 0xff00_0000, "LDR");
    assert_eq!(g.report(), 0x0fff_ffff, "DFR");
    g.expect_done();
    assert_eq!(g.cpu.page().cr8, 5);
}

payload! { ic_timer_once, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",         // divide by 1
    "mov dword ptr [rbx + 0x320], 0x40",        // one-shot, vector 0x40
    "sti",
    "mov dword ptr [rbx + 0x380], 1000000",
    "mov eax, [rbx + 0x390]",
    "out 0xef, eax",
    "2: cmp qword ptr [0x7200], 0",             // the counter of vector 0x40
    "je 2b",
    "mov eax, [rbx + 0x390]",
    "out 0xef, eax",
    "out 0xed, al",
    // Stopped by writing 0
    "mov dword ptr [rbx + 0x380], 100000000",
    "mov dword ptr [rbx + 0x380], 0",
    "mov eax, [rbx + 0x390]",
    "out 0xef, eax",
    // Masked
    "mov dword ptr [rbx + 0x320], 0x10040",
    "mov dword ptr [rbx + 0x380], 1000",
    "mov ecx, 100000",
    "3: dec ecx",
    "jnz 3b",
    "out 0xed, al",
}

fn timer_one_shot() {
    let g = Guest::long_irqchip(ic_timer_once());
    g.set_eoi(Eoi::Xapic);
    let current = g.report();
    assert!(current <= 1_000_000);
    assert_eq!(g.report(), 0, "the current count after the end");
    g.expect_done();
    assert_eq!(g.count(0x40), 1);
    assert_eq!(g.report(), 0, "stopped");
    g.expect_done();
    assert_eq!(g.count(0x40), 1, "a masked timer gives no interrupt");
}

payload! { ic_timer_periodic, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0x3",         // divide by 16
    "mov dword ptr [rbx + 0x320], 0x20041",     // periodic, vector 0x41
    "sti",
    "mov dword ptr [rbx + 0x380], 100000",
    "2: cmp qword ptr [0x7208], 10",
    "jb 2b",
    "out 0xed, al",
    "mov dword ptr [rbx + 0x380], 0",
    "cli",
    "out 0xed, al",
}

fn timer_periodic() {
    let g = Guest::long_irqchip(ic_timer_periodic());
    g.set_eoi(Eoi::Xapic);
    let start = now_ns();
    g.expect_done();
    let took = now_ns() - start;
    assert!(g.count(0x41) >= 10);
    // 10 periods of 1.6 million LAPIC clocks of 1 ns: 16 ms at least.
    assert!(took >= 14_000_000, "10 periods in {took} ns");
    g.expect_done();
}

payload! { ic_timer_deadline, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x320], 0x40042",     // TSC deadline, vector 0x42
    "mfence",
    "mov r8d, 5",
    "2: cli",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, 500000",
    "mov r9, rax",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, r9",
    "jb 3f",                                    // too early
    "mov ecx, 0x6e0",
    "rdmsr",
    "or eax, edx",
    "jnz 3f",                                   // the MSR reads 0 after the end
    "dec r8d",
    "jnz 2b",
    // A deadline in the past
    "mov eax, 1",
    "xor edx, edx",
    "wrmsr",
    "nop",
    "out 0xed, al",
    // Disarmed
    "rdtsc",
    "add edx, 1",
    "mov ecx, 0x6e0",
    "wrmsr",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "rdmsr",
    "or eax, edx",
    "out 0xef, eax",
    "out 0xed, al",
    "3: ud2",
}

fn timer_tsc_deadline() {
    let g = Guest::bare(|vm| vm.create_irqchip());
    if g.vm.cap(KVM_CAP_TSC_DEADLINE_TIMER) <= 0 {
        skip!("no TSC deadline");
    }
    drop(g);
    let g = Guest::long_irqchip(ic_timer_deadline());
    g.show_tsc_deadline();
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_eq!(g.count(0x42), 6);
    assert_eq!(g.report(), 0);
    g.expect_done();
}

payload! { ic_halt_timer, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",
    "mov dword ptr [rbx + 0x320], 0x43",
    "mov r8d, 10",
    "2: mov dword ptr [rbx + 0x380], 2000000",
    "sti",
    "hlt",
    "cli",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

fn halt_and_wake_by_timer() {
    let g = Guest::long_irqchip(ic_halt_timer());
    g.set_eoi(Eoi::Xapic);
    let start = now_ns();
    g.expect_done();
    assert_eq!(g.count(0x43), 10);
    assert!(now_ns() - start >= 18_000_000);
}

payload! { ic_halt, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov qword ptr [0x100000], 1",
    "2: sti",
    "hlt",
    "cli",
    "out 0xed, al",
    "jmp 2b",
}

/// With an irqchip HLT is the kernel's, and a signal ends the wait.
fn halt_is_kicked() {
    let g = Guest::long_irqchip(ic_halt());
    g.cpu.run_to_halt();
    g.cpu.set_immediate_exit(true);
    assert_err!(g.cpu.run(), EINTR);
    g.cpu.set_immediate_exit(false);
    // Userspace may end the halt as well.
    assert_ok!(g.cpu.set_mp_state(KVM_MP_STATE_RUNNABLE));
    g.expect_done();
}

payload! { ic_tpr, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov eax, 6",
    "mov cr8, rax",
    "mov dword ptr [rbx + 0x300], 0x40055",     // class 5: held back
    "nop",
    "out 0xed, al",
    "mov dword ptr [rbx + 0x300], 0x40075",     // class 7: passes
    "nop",
    "out 0xed, al",
    "mov eax, 5",
    "mov cr8, rax",
    "nop",
    "out 0xed, al",
    "mov dword ptr [rbx + 0x80], 0x40",
    "nop",
    "out 0xed, al",
}

fn tpr_holds_interrupts_back() {
    let g = Guest::long_irqchip(ic_tpr());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_eq!(g.count(0x55), 0);
    g.expect_done();
    assert_eq!((g.count(0x55), g.count(0x75)), (0, 1));
    g.expect_done();
    assert_eq!(g.count(0x55), 0, "TPR 5 still holds class 5");
    g.expect_done();
    assert_eq!(g.count(0x55), 1);
}

payload! { la_shadow, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "2: out 0xed, al",
    // Here the host makes it look as if STI had just been executed.
    "hlt",
    "cli",
    "jmp 2b",
}

/// An interrupt that is pending in the shadow of STI is taken behind the next instruction: when that is HLT, it wakes. If
/// it were taken before, HLT would have nothing to wait for.
fn shadow_of_sti() {
    let g = Guest::long_irqchip(la_shadow());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    for i in 0..20 {
        let mut r = g.cpu.regs();
        r.rflags |= 0x200;
        // Finish the `out` first: the shadow is for the instruction after it.
        g.cpu.set_immediate_exit(true);
        assert_err!(g.cpu.run(), EINTR);
        g.cpu.set_immediate_exit(false);
        r.rip = g.cpu.regs().rip;
        g.cpu.set_regs(&r);
        let mut e: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
        e.interrupt.shadow = 1;
        e.flags = KVM_VCPUEVENT_VALID_SHADOW;
        assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &e));
        assert_eq!(assert_ok!(g.vm.signal_msi(APIC, 0x66)), 1);
        let done = assert_ok!(g.cpu.run_for(3000));
        assert!(matches!(done, Exit::Io { port: PORT_DONE, .. }), "{done:?}");
        assert_eq!(g.count(0x66), i + 1);
    }
}

payload! { ic_ipi_send_xapic, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "3: cmp qword ptr [0x100000], 1",           // the other one is ready
    "jne 3b",
    "mov r8d, 200",
    "2: mov r9, [0x7000 + 0x56 * 8]",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x56",
    "4: pause",
    "cmp r9, [0x7000 + 0x56 * 8]",
    "je 4b",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

payload! { ic_ipi_send_x2apic, 64,
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "3: cmp qword ptr [0x100000], 1",
    "jne 3b",
    "mov r8d, 200",
    "2: mov r9, [0x7000 + 0x56 * 8]",
    "mov ecx, 0x830",
    "mov eax, 0x56",
    "mov edx, 1",
    "wrmsr",
    "4: pause",
    "cmp r9, [0x7000 + 0x56 * 8]",
    "je 4b",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

payload! { ic_ipi_receive_xapic, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov qword ptr [0x100000], 1",
    "2: sti",
    "hlt",
    "jmp 2b",
}

payload! { ic_ipi_receive_x2apic, 64,
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "mov qword ptr [0x100000], 1",
    "2: sti",
    "hlt",
    "jmp 2b",
}

/// Runs vCPU `cpu` in a thread until it is told to stop; `work` runs meanwhile.
pub fn beside(cpu: &Vcpu, work: impl FnOnce()) {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let (send, receive) = std::sync::mpsc::channel();
        let stop = &stop;
        let t = s.spawn(move || {
            send.send(sys::gettid()).expect("the test waits");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                match cpu.run() {
                    // EAGAIN: it waited for INIT and SIPI, and they came.
                    Err(EINTR) | Err(EAGAIN) => {}
                    other => panic!("{other:x?} at {:#x}", cpu.regs().rip),
                }
            }
        });
        let tid = receive.recv().expect("the thread runs");
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        while !t.is_finished() {
            cpu.set_immediate_exit(true);
            sys::kick(tid);
            sleep_ms(1);
        }
        assert!(t.join().is_ok());
        cpu.set_immediate_exit(false);
        if let Err(p) = result {
            std::panic::resume_unwind(p);
        }
    });
}

fn ipi(send: &[u8], receive: &[u8], eoi: Eoi) {
    let g = Guest::long_irqchip(send);
    g.set_eoi(eoi);
    let second = g.add_long_vcpu(1, receive);
    assert_ok!(second.set_mp_state(KVM_MP_STATE_RUNNABLE));
    beside(&second, || g.expect_done());
    assert_eq!(g.count(0x56), 200);
}

fn ipi_between_vcpus_xapic() {
    ipi(ic_ipi_send_xapic(), ic_ipi_receive_xapic(), Eoi::Xapic);
}

fn ipi_between_vcpus_x2apic() {
    ipi(ic_ipi_send_x2apic(), ic_ipi_receive_x2apic(), Eoi::X2apic);
}

payload! { ic_bsp, 64,
    "sti",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4500",      // INIT
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4603",      // SIPI, page 3
    "2: pause",
    "cmp dword ptr [0x100000], 0x600d",
    "jne 2b",
    "out 0xed, al",
    // A SIPI to a running CPU does nothing; INIT and SIPI start it again.
    "mov dword ptr [0x100000], 0",
    "mov dword ptr [rbx + 0x300], 0x4603",
    "mov ecx, 100000",
    "3: dec ecx",
    "jnz 3b",
    "mov eax, [0x100000]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x300], 0x4603",
    "4: pause",
    "cmp dword ptr [0x100000], 0x600d",
    "jne 4b",
    "out 0xed, al",
}

payload! { ic_ap, 16,
    "mov ax, cs",
    "cmp ax, 0x300",
    "jne 3f",
    "mov ax, 0xffff",
    "mov ds, ax",
    "mov dword ptr [0x10], 0x600d",     // 0xffff0 + 0x10 is 0x100000
    "2: jmp 2b",
    "3: hlt",
}

fn init_sipi() {
    let g = Guest::long_irqchip(ic_bsp());
    g.ram.write(0x3000, ic_ap());
    // The TSS of the kit is there, too, and not used by this test.
    let ap = g.add_vcpu(1);
    assert_eq!(ap.mp_state(), KVM_MP_STATE_UNINITIALIZED);
    assert_eq!(g.cpu.mp_state(), KVM_MP_STATE_RUNNABLE);
    beside(&ap, || {
        g.expect_done();
        assert_eq!(g.report(), 0, "SIPI to a running CPU");
        g.expect_done();
    });
    assert_eq!(ap.mp_state(), KVM_MP_STATE_RUNNABLE);
    assert_eq!(ap.sregs().cs.base, 0x3000);
    assert_eq!(ap.sregs().cr0 & 1, 0);
}

payload! { ic_nmi, 64,
    "2: hlt",
    "out 0xed, al",
    "jmp 2b",
}

fn nmi() {
    let g = Guest::long_irqchip(ic_nmi());
    // After an NMI that came before HLT nothing would wake it.
    g.cpu.run_to_halt();
    assert_ok!(g.cpu.ioctl(KVM_NMI, 0));
    g.expect_done();
    assert_eq!(g.count(2), 1);
    // Without an irqchip as well
    let g = Guest::long(ic_nmi());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_ok!(g.cpu.ioctl(KVM_NMI, 0));
    g.expect_done();
    assert_eq!(g.count(2), 1);
}

payload! { ic_nmi_loop, 64,
    "2: out 0xed, al",
    "jmp 2b",
    ".balign 0x80, 0x90",
    // An NMI handler of the test's own, at 0x10080
    "lock inc qword ptr [0x100000]",
    "out 0xef, eax",
    "nop",
    "iretq",
}

/// A second NMI waits until the handler's IRET, a third one merges with it.
fn nmi_is_not_nested() {
    let g = Guest::long(ic_nmi_loop());
    let at = CODE + 0x80;
    g.ram.write_u64(IDT + 32, at & 0xffff | 8 << 16 | 0x8e << 40 | (at >> 16) << 48);
    g.expect_done();
    assert_ok!(g.cpu.ioctl(KVM_NMI, 0));
    g.report();
    assert_eq!(g.ram.read_u64(DATA), 1);
    let events: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    assert_eq!(events.nmi.masked, 1);
    for _ in 0..3 {
        assert_ok!(g.cpu.ioctl(KVM_NMI, 0));
    }
    // The handler goes on behind its `out`, returns, and is entered again, before the loop runs on.
    g.report();
    assert_eq!(g.ram.read_u64(DATA), 2);
    for _ in 0..5 {
        match g.event() {
            Event::Done => {}
            // KVM keeps one more pending while one is being handled.
            Event::Report(_) => {}
            other => panic!("{other:x?}"),
        }
    }
    assert!(g.ram.read_u64(DATA) <= 3, "{} NMIs", g.ram.read_u64(DATA));
    let events: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    assert_eq!((events.nmi.masked, events.nmi.pending), (0, 0));
}

payload! { la_round_trip, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0xd0], 0x01000000",
    "out 0xed, al",
    "2: jmp 2b",
}

fn round_trip() {
    let g = Guest::long_irqchip(la_round_trip());
    g.expect_done();
    let mut l: kvm_lapic_state = assert_ok!(g.cpu.get(KVM_GET_LAPIC));
    let reg = |l: &kvm_lapic_state, at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| l.regs[at + i] as u8));
    assert_eq!((reg(&l, 0xf0), reg(&l, 0xd0)), (0x1ff, 0x0100_0000));
    // LVT error vector and TPR
    l.regs[0x370] = 0x55;
    l.regs[0x80] = 0x30;
    assert_ok!(g.cpu.set(KVM_SET_LAPIC, &l));
    let again: kvm_lapic_state = assert_ok!(g.cpu.get(KVM_GET_LAPIC));
    for at in [0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x320, 0x350, 0x360, 0x370, 0x380, 0x3e0] {
        assert_eq!(reg(&again, at), reg(&l, at), "register {at:#x}");
    }
    assert_eq!(g.cpu.sregs().cr8, 3);
    let bare = Guest::long(la_round_trip());
    assert!(bare.cpu.get::<kvm_lapic_state>(KVM_GET_LAPIC).is_err(), "without irqchip");
}
