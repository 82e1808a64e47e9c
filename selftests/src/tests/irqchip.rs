// SPDX-License-Identifier: GPL-2.0
//! The interrupt controllers that a VM has once: IOAPIC, PIC, PIT, MSI, irqfd, ioeventfd, routing; and KVM_INTERRUPT
//! with the interrupt window, which works without them.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Vm};
use krabtest::{assert_err, assert_ok, ioapic_pin_10_level, payload, pic_with_timer, tests};

use super::lapic::{beside, ic_halt};
use std::sync::atomic::{AtomicU64, Ordering};

tests! { "irqchip";
    create_errors;
    interrupt_window;
    interrupt_errors;
    signal_msi;
    msi_wakes_halted;
    irqfd_wakes_halted;
    irqfd_errors;
    irqfd_resample;
    ioapic_edge_and_level;
    ioapic_masked_and_remote;
    irq_line_errors;
    pic_real_mode;
    pit_tick;
    pit_speaker_port;
    ioeventfd_pio_mmio;
    ioeventfd_errors;
    gsi_routing;
    gsi_routing_errors;
    irqchip_round_trip;
    pit_round_trip;
    interrupts_under_load(40);
}

/// The kit enables the LAPIC by its spurious-interrupt register here, in xAPIC mode.
pub const APIC: u64 = 0xfee0_0000;

fn create_errors() {
    let vm = Vm::new();
    assert_err!(vm.irq_line(1, 1), ENXIO, "IRQ_LINE without irqchip");
    let config = kvm_pit_config::default();
    assert_err!(vm.set(KVM_CREATE_PIT2, &config), ENOENT, "PIT without irqchip");
    let mut chip = kvm_irqchip::default();
    assert_err!(sys::ioctl_out(vm.fd, KVM_GET_IRQCHIP, &mut chip), ENXIO);
    vm.create_irqchip();
    assert_err!(vm.ioctl(KVM_CREATE_IRQCHIP, 0), EEXIST, "a second irqchip");
    let bad = kvm_pit_config { flags: 0x8000_0000, ..Default::default() };
    let r = vm.set(KVM_CREATE_PIT2, &bad);
    assert!(r.is_ok() || r == Err(EINVAL));
    if r.is_err() {
        vm.create_pit();
    }
    assert_err!(vm.set(KVM_CREATE_PIT2, &config), EEXIST, "a second PIT");
    chip.chip_id = 3;
    assert_err!(sys::ioctl_out(vm.fd, KVM_GET_IRQCHIP, &mut chip), EINVAL, "chip 3");
    // After a vCPU it is too late.
    let vm = Vm::new();
    let _cpu = vm.create_vcpu(0);
    assert_err!(vm.ioctl(KVM_CREATE_IRQCHIP, 0), EINVAL, "after a vCPU");
}

payload! { ic_window, 64,
    "2: inc rbx",
    "sti",
    "nop",
    "cli",
    "out 0xed, al",
    "jmp 2b",
}

/// Without irqchip: userspace asks for the window, gets the exit, and injects.
fn interrupt_window() {
    let g = Guest::long(ic_window());
    g.cpu.page().request_interrupt_window = 1;
    let e = assert_ok!(g.cpu.run());
    assert_eq!(e, Exit::IrqWindow);
    assert_eq!((g.cpu.page().ready_for_interrupt_injection, g.cpu.page().if_flag), (1, 1));
    assert_ok!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x45 }));
    g.cpu.page().request_interrupt_window = 0;
    g.expect_done();
    assert_eq!(g.count(0x45), 1);
    g.expect_done();
    assert_eq!(g.count(0x45), 1);
    assert_eq!(g.cpu.page().if_flag, 0, "after CLI");
    // Injected while interrupts are disabled, it waits: for userspace should have looked at the flag first. With the
    // window the guest gets each exactly once.
    for i in 0..100 {
        g.cpu.page().request_interrupt_window = 1;
        while assert_ok!(g.cpu.run()) != Exit::IrqWindow {}
        assert_ok!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x46 }));
        g.cpu.page().request_interrupt_window = 0;
        g.expect_done();
        assert_eq!(g.count(0x46), i + 1);
    }
}

fn interrupt_errors() {
    let g = Guest::long(ic_window());
    assert_err!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 256 }), EINVAL);
    assert_err!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: u32::MAX }), EINVAL);
    let g = Guest::long_irqchip(ic_window());
    assert_err!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x40 }), ENXIO, "with the irqchip");
}

payload! { ic_spin, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0xd0], 0x01000000",   // logical ID 1
    "mov dword ptr [rbx + 0xe0], 0xffffffff",   // flat
    "sti",
    "out 0xed, al",
    "2: nop",
    "out 0xed, al",
    "jmp 2b",
}

fn signal_msi() {
    let g = Guest::long_irqchip(ic_spin());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_eq!(assert_ok!(g.vm.signal_msi(APIC, 0x70)), 1);
    g.expect_done();
    g.expect_done();
    assert_eq!(g.count(0x70), 1);
    // Logical destination 1, then one that nobody has
    assert_eq!(assert_ok!(g.vm.signal_msi(APIC | 1 << 12 | 1 << 2, 0x71)), 1);
    let r = g.vm.signal_msi(APIC | 0x80 << 12 | 1 << 2, 0x72);
    assert!(r != Ok(1), "an MSI to nobody: {r:?}");
    let r = g.vm.signal_msi(APIC | 7 << 12, 0x73);
    assert!(r != Ok(1), "an MSI to nobody: {r:?}");
    // Broadcast
    assert_eq!(assert_ok!(g.vm.signal_msi(APIC | 0xff << 12, 0x74)), 1);
    g.expect_done();
    g.expect_done();
    assert_eq!([0x71, 0x72, 0x73, 0x74].map(|v| g.count(v)), [1, 0, 0, 1]);
    let mut m = kvm_msi { address_lo: APIC as u32, data: 0x75, flags: 0x8000_0000, ..Default::default() };
    assert_err!(g.vm.set(KVM_SIGNAL_MSI, &m), EINVAL, "unknown flags");
    m.flags = 0;
    m.address_hi = 0xff;
    let _ = g.vm.set(KVM_SIGNAL_MSI, &m);
    let bare = Vm::new();
    assert!(bare.signal_msi(APIC, 0x70).is_err(), "without irqchip");
}

fn msi_wakes_halted() {
    let g = Guest::long_irqchip(ic_halt());
    g.set_eoi(Eoi::Xapic);
    let done = AtomicU64::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            assert!(g.ram.wait_u64(DATA, 1, 5000), "the guest does not start");
            for i in 0..20 {
                // Only when the guest is out of the handler of the last one: before, it need not be halted.
                while done.load(Ordering::Acquire) < i {
                    sleep_ms(1);
                }
                sleep_ms(1);
                assert!(g.vm.signal_msi(APIC, 0x77).is_ok());
                assert!(g.ram.wait_u64(COUNTS + 0x77 * 8, i + 1, 5000));
            }
        });
        for _ in 0..20 {
            g.expect_done();
            done.fetch_add(1, Ordering::Release);
        }
    });
    assert_eq!(g.count(0x77), 20);
}

fn irqfd_wakes_halted() {
    let fd = eventfd();
    let g = Guest::long_irqchip(ic_halt());
    g.set_eoi(Eoi::Xapic);
    assert_ok!(Routing::new().msi(30, APIC, 0x77).set(&g.vm));
    assert_ok!(g.vm.irqfd(fd, 30, 0, 0));
    let done = AtomicU64::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            assert!(g.ram.wait_u64(DATA, 1, 5000), "the guest does not start");
            for i in 0..20 {
                while done.load(Ordering::Acquire) < i {
                    sleep_ms(1);
                }
                sleep_ms(1);
                eventfd_write(fd, 1);
                assert!(g.ram.wait_u64(COUNTS + 0x77 * 8, i + 1, 5000));
            }
        });
        for _ in 0..20 {
            g.expect_done();
            done.fetch_add(1, Ordering::Release);
        }
    });
    assert_eq!(g.count(0x77), 20);
    // After deassignment the eventfd is an eventfd and no more.
    assert_ok!(g.vm.irqfd(fd, 30, KVM_IRQFD_FLAG_DEASSIGN, 0));
    eventfd_write(fd, 1);
    assert_err!(g.cpu.run_for(20), EINTR);
    assert_eq!(g.count(0x77), 20);
    assert!(eventfd_read(fd) >= 1);
    // The eventfd closed first, then the VM; and the other way round.
    let other = eventfd();
    assert_ok!(g.vm.irqfd(other, 30, 0, 0));
    assert_ok!(close(other));
    assert_ok!(g.vm.irqfd(fd, 30, 0, 0));
    drop(g);
    eventfd_write(fd, 1);
}

fn irqfd_errors() {
    let bare = Vm::new();
    let fd = eventfd();
    let r = bare.irqfd(fd, 0, 0, 0);
    assert!(r == Err(EINVAL) || r == Err(ENXIO) || r == Err(EAGAIN), "without irqchip: {r:?}");
    let vm = Vm::new();
    vm.create_irqchip();
    assert_err!(vm.irqfd(-1, 0, 0, 0), EBADF);
    assert_err!(vm.irqfd(0x7fff, 0, 0, 0), EBADF);
    assert_err!(vm.irqfd(vm.fd, 0, 0, 0), EINVAL, "no eventfd");
    assert_err!(vm.irqfd(fd, 0, 0x80, 0), EINVAL, "flags");
    assert_ok!(vm.irqfd(fd, 5, 0, 0));
    assert_err!(vm.irqfd(fd, 5, 0, 0), EBUSY, "the same eventfd twice");
    assert_err!(vm.irqfd(eventfd(), 5, KVM_IRQFD_FLAG_RESAMPLE, -1), EBADF, "resample descriptor");
    // Deassigning what is not assigned does no harm.
    let r = vm.irqfd(eventfd(), 5, KVM_IRQFD_FLAG_DEASSIGN, 0);
    assert!(r.is_ok() || r == Err(ENOENT) || r == Err(EINVAL), "{r:?}");
    assert_ok!(vm.irqfd(fd, 5, KVM_IRQFD_FLAG_DEASSIGN, 0));
    assert_ok!(vm.irqfd(fd, 5, 0, 0));
    // Many
    for _ in 0..100 {
        assert_ok!(vm.irqfd(eventfd(), 6, 0, 0));
    }
}

payload! { ic_ioapic_level, 64,
    ioapic_pin_10_level!(),
    // Pin 11: edge, vector 0x49
    "mov dword ptr [rdi], 0x26",
    "mov dword ptr [rdi + 0x10], 0x49",
    "mov dword ptr [rdi], 0x27",
    "mov dword ptr [rdi + 0x10], 0",
    "sti",
    "out 0xed, al",
    "2: nop",
    "nop",
    "out 0xed, al",
    "jmp 2b",
}

fn irqfd_resample() {
    let g = Guest::long_irqchip(ic_ioapic_level());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    let (fd, resample) = (eventfd(), eventfd());
    assert_ok!(g.vm.irqfd(fd, 10, KVM_IRQFD_FLAG_RESAMPLE, resample));
    for i in 0..5 {
        eventfd_write(fd, 1);
        // The injection is the kernel's work, at once or a little later.
        for _ in 0..200 {
            g.expect_done();
            if g.count(0x48) > i {
                break;
            }
            sleep_ms(1);
        }
        assert_eq!(g.count(0x48), i + 1, "one interrupt each: the line falls at the EOI");
        for _ in 0..200 {
            let n = eventfd_read(resample);
            if n > 0 {
                assert_eq!(n, 1, "one resample per EOI");
                break;
            }
            g.expect_done();
            sleep_ms(1);
        }
    }
    for _ in 0..5 {
        g.expect_done();
    }
    assert_eq!(g.count(0x48), 5);
}

fn ioapic_edge_and_level() {
    let g = Guest::long_irqchip(ic_ioapic_level());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    let settle = || {
        for _ in 0..4 {
            g.expect_done();
        }
    };
    // Edge: one interrupt per rise.
    for i in 0..3 {
        assert_ok!(g.vm.irq_line(11, 1));
        settle();
        assert_eq!(g.count(0x49), i + 1);
        assert_ok!(g.vm.irq_line(11, 1));
        settle();
        assert_eq!(g.count(0x49), i + 1, "no rise, no interrupt");
        assert_ok!(g.vm.irq_line(11, 0));
        settle();
    }
    // Level: again and again while the line is up.
    assert_ok!(g.vm.irq_line(10, 1));
    for _ in 0..100 {
        g.expect_done();
        if g.count(0x48) >= 3 {
            break;
        }
    }
    assert!(g.count(0x48) >= 3, "{}", g.count(0x48));
    assert_ok!(g.vm.irq_line(10, 0));
    settle();
    let n = g.count(0x48);
    settle();
    assert_eq!(g.count(0x48), n, "the line is down");
}

payload! { ic_ioapic_regs, 64,
    "mov al, 0xff",                 // the PIC has the same lines
    "out 0x21, al",
    "out 0xa1, al",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov rdi, 0xfec00000",
    "mov dword ptr [rdi], 1",
    "mov eax, [rdi + 0x10]",        // version
    "out 0xef, eax",
    "mov dword ptr [rdi], 0x26",
    "mov eax, [rdi + 0x10]",        // pin 11 after reset: masked
    "out 0xef, eax",
    "mov dword ptr [rdi + 0x10], 0x10049",
    "sti",
    "out 0xed, al",
    "nop",
    "out 0xed, al",
    // Unmask: an edge that came while the pin was masked is lost or kept, a new one is not lost.
    "mov dword ptr [rdi + 0x10], 0x0049",
    "out 0xed, al",
    "nop",
    "out 0xed, al",
    // Level with Remote IRR: visible while in service. Interrupts are off here.
    "cli",
    "mov dword ptr [rdi], 0x24",
    "mov dword ptr [rdi + 0x10], 0x8048",
    "out 0xed, al",
    "mov eax, [rdi + 0x10]",
    "out 0xef, eax",
    "mov dword ptr [rdi], 0x1ff",   // a register that is not there
    "mov eax, [rdi + 0x10]",
    "sti",
    "nop",
    "nop",
    "out 0xed, al",
}

fn ioapic_masked_and_remote() {
    let g = Guest::long_irqchip(ic_ioapic_regs());
    g.set_eoi(Eoi::Xapic);
    let version = g.report();
    assert!(version >> 16 & 0xff == 23 && version & 0xff >= 0x11, "{version:#x}");
    assert_eq!(g.report() & 0x10000, 0x10000);
    g.expect_done();
    assert_ok!(g.vm.irq_line(11, 1));
    g.expect_done();
    assert_eq!(g.count(0x49), 0);
    assert_ok!(g.vm.irq_line(11, 0));
    g.expect_done();
    let n = g.count(0x49);
    assert_ok!(g.vm.irq_line(11, 1));
    g.expect_done();
    assert_eq!(g.count(0x49), n + 1);
    g.expect_done();
    assert_ok!(g.vm.irq_line(10, 1));
    assert_eq!(g.report() & 0x4000, 0x4000, "Remote IRR");
    assert_ok!(g.vm.irq_line(10, 0));
    g.expect_done();
    assert_eq!(g.count(0x48), 1);
}

fn irq_line_errors() {
    let vm = Vm::new();
    vm.create_irqchip();
    let _cpu = vm.create_vcpu(0);
    // GSIs without a route are accepted or refused, but nothing happens.
    for gsi in [24, 100, 4095, 4096, u32::MAX] {
        let r = vm.irq_line(gsi, 1);
        assert!(r.is_ok() || r == Err(EINVAL), "{gsi}: {r:?}");
    }
    if vm.cap(KVM_CAP_IRQ_INJECT_STATUS) > 0 {
        let mut l = kvm_irq_level { __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: 4 }, level: 1 };
        assert_ok!(sys::ioctl_out(vm.fd, KVM_IRQ_LINE_STATUS, &mut l));
    }
}

payload! { ic_pic, 16,
    "cli",
    "mov al, 0x11",
    "out 0x20, al",
    "mov al, 0x30",
    "out 0x21, al",         // vectors from 0x30
    "mov al, 4",
    "out 0x21, al",
    "mov al, 1",
    "out 0x21, al",
    "mov al, 0x11",
    "out 0xa0, al",
    "mov al, 0x38",
    "out 0xa1, al",
    "mov al, 2",
    "out 0xa1, al",
    "mov al, 1",
    "out 0xa1, al",
    "mov al, 0xeb",         // IRQ 2 and 4 open
    "out 0x21, al",
    "mov al, 0xfd",         // IRQ 9 open
    "out 0xa1, al",
    "in al, 0x21",
    "out 0xed, al",
    "2: sti",
    "hlt",
    "cli",
    "out 0xed, al",
    "jmp 2b",
    ".balign 0x80, 0x90",
    // 0x1080: IRQ 4
    "push ax",
    "inc word ptr [0x2000]",
    "mov al, 0x20",
    "out 0x20, al",
    "pop ax",
    "iret",
    ".balign 0x40, 0x90",
    // 0x10c0: IRQ 9
    "push ax",
    "inc word ptr [0x2002]",
    "mov al, 0x20",
    "out 0xa0, al",
    "out 0x20, al",
    "pop ax",
    "iret",
}

fn pic_real_mode() {
    let g = Guest::real_with(ic_pic(), |vm| vm.create_irqchip());
    g.ram.write_u32(0x34 * 4, 0x1080);
    g.ram.write_u32(0x39 * 4, 0x10c0);
    // The PIC's output reaches the CPU through LINT0 in its reset state.
    let done = |al: u8| {
        let e = loop {
            match g.cpu.run() {
                Err(EINTR) => continue,
                other => break assert_ok!(other),
            }
        };
        assert_eq!(e, Exit::Io { out: true, port: PORT_DONE, size: 1, count: 1, data: vec![al] });
    };
    done(0xeb);
    for i in 0..5 {
        assert_ok!(g.vm.irq_line(4, 1));
        done(0xeb);
        assert_ok!(g.vm.irq_line(4, 0));
        assert_eq!(g.ram.read_u32(0x2000) & 0xffff, i + 1);
        assert_ok!(g.vm.irq_line(9, 1));
        done(0xeb);
        assert_ok!(g.vm.irq_line(9, 0));
        assert_eq!(g.ram.read_u32(0x2000) >> 16, i + 1);
    }
    // Masked: the CPU stays halted.
    assert_ok!(g.vm.irq_line(5, 1));
    g.cpu.run_to_halt();
    assert_err!(g.cpu.run_for(20), EINTR);
}

payload! { ic_pit, 64,
    "cli",
    pic_with_timer!(),
    "mov al, 0x34",         // channel 0, both bytes, mode 2
    "out 0x43, al",
    "mov al, 0x54",
    "out 0x40, al",
    "mov al, 0x17",         // 0x1754: 5972 ticks, about 5 ms
    "out 0x40, al",
    "sti",
    "2: cmp qword ptr [0x7180], 5",
    "jae 3f",
    "hlt",
    "jmp 2b",
    "3: cli",
    // Latch and read the counter
    "xor eax, eax",
    "out 0x43, al",
    "in al, 0x40",
    "mov bl, al",
    "in al, 0x40",
    "mov bh, al",
    "movzx eax, bx",
    "out 0xef, eax",
    "out 0xed, al",
}

fn pit_tick() {
    let g = Guest::long_with(ic_pit(), |vm| {
        vm.create_irqchip();
        vm.create_pit();
    });
    g.set_eoi(Eoi::Pic);
    let start = now_ns();
    let count = g.report();
    let took = now_ns() - start;
    assert!((1..=0x1754).contains(&count), "{count:#x}");
    g.expect_done();
    assert!(g.count(0x30) >= 5);
    assert!(took >= 20_000_000, "5 ticks of 5 ms in {took} ns");
}

payload! { ic_speaker, 64,
    "mov al, 0xb0",         // channel 2, both bytes, mode 0
    "out 0x43, al",
    "mov al, 0x10",
    "out 0x42, al",
    "mov al, 0x01",
    "out 0x42, al",
    "mov al, 1",            // gate on
    "out 0x61, al",
    "2: in al, 0x61",
    "test al, 0x20",
    "jz 2b",                // until the output rises, as Linux calibrates its TSC
    "in al, 0x61",
    "and eax, 0x23",
    "out 0xef, eax",
    "out 0xed, al",
}

/// Channel 2 and port 0x61: taken by the kernel only when the PIT was made with the speaker dummy.
fn pit_speaker_port() {
    let g = Guest::long_with(ic_speaker(), |vm| {
        vm.create_irqchip();
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        assert_ok!(vm.set(KVM_CREATE_PIT2, &config));
    });
    assert_eq!(g.report(), 0x21);
    g.expect_done();
    let g = Guest::long_with(ic_speaker(), |vm| {
        vm.create_irqchip();
        vm.create_pit();
    });
    g.expect(Event::Exit(Exit::Io { out: true, port: 0x61, size: 1, count: 1, data: vec![1] }));
}

payload! { ic_ioeventfd, 64,
    "mov rbx, 0xd0000000",
    "mov eax, 0x11223344",
    "mov dx, 0x200",
    "out dx, al",           // any byte
    "out dx, ax",           // another size: to userspace
    "mov dx, 0x204",
    "mov eax, 7",
    "out dx, eax",          // matches
    "mov eax, 8",
    "out dx, eax",          // does not match: to userspace
    "mov dword ptr [rbx], 5",
    "mov dword ptr [rbx + 4], 6",   // not this address: to userspace
    "mov qword ptr [rbx + 8], 7",   // any length
    "mov byte ptr [rbx + 8], 7",
    "in al, dx",            // reading is never an event
    "out 0xed, al",
}

fn ioeventfd_pio_mmio() {
    let g = Guest::long(ic_ioeventfd());
    let fds = [eventfd(), eventfd(), eventfd(), eventfd()];
    let pio = KVM_IOEVENTFD_FLAG_PIO;
    assert_ok!(g.vm.ioeventfd(fds[0], 0x200, 1, pio, 0));
    assert_ok!(g.vm.ioeventfd(fds[1], 0x204, 4, pio | KVM_IOEVENTFD_FLAG_DATAMATCH, 7));
    assert_ok!(g.vm.ioeventfd(fds[2], MMIO, 4, 0, 0));
    let any_length = g.vm.cap(KVM_CAP_IOEVENTFD_ANY_LENGTH) > 0;
    if any_length {
        assert_ok!(g.vm.ioeventfd(fds[3], MMIO + 8, 0, 0, 0));
    }
    let out = |port, data: &[u8]| {
        Event::Exit(Exit::Io { out: true, port, size: data.len() as u8, count: 1, data: data.to_vec() })
    };
    g.expect(out(0x200, &[0x44, 0x33]));
    assert_eq!(eventfd_read(fds[0]), 1);
    g.expect(out(0x204, &[8, 0, 0, 0]));
    assert_eq!(eventfd_read(fds[1]), 1);
    g.expect(Event::Exit(Exit::Mmio { write: true, gpa: MMIO + 4, len: 4, data: vec![6, 0, 0, 0] }));
    assert_eq!(eventfd_read(fds[2]), 1);
    if !any_length {
        assert!(matches!(g.event(), Event::Exit(Exit::Mmio { .. })));
        assert!(matches!(g.event(), Event::Exit(Exit::Mmio { .. })));
    }
    assert!(matches!(g.event(), Event::Exit(Exit::Io { out: false, .. })));
    g.expect_done();
    assert_eq!(eventfd_read(fds[3]), if any_length { 2 } else { 0 });
    assert_eq!([fds[0], fds[1], fds[2]].map(eventfd_read), [0, 0, 0]);
    // Deassigned: the write goes to userspace again.
    assert_ok!(g.vm.ioeventfd(fds[0], 0x200, 1, pio | KVM_IOEVENTFD_FLAG_DEASSIGN, 0));
    let mut r = g.cpu.regs();
    r.rip = CODE;
    g.cpu.set_regs(&r);
    g.expect(out(0x200, &[0x44]));
    assert_eq!(eventfd_read(fds[0]), 0);
}

fn ioeventfd_errors() {
    let vm = Vm::new();
    let fd = eventfd();
    for len in [3, 5, 6, 7, 9, 16, u32::MAX] {
        assert_err!(vm.ioeventfd(fd, 0x1000, len, 0, 0), EINVAL, "length {len}");
    }
    assert_err!(vm.ioeventfd(fd, 0x1000, 4, 0x8000_0000, 0), EINVAL, "flags");
    assert_err!(vm.ioeventfd(fd, u64::MAX - 1, 4, 0, 0), EINVAL, "the end wraps");
    assert_err!(vm.ioeventfd(-1, 0x1000, 4, 0, 0), EBADF);
    assert_err!(vm.ioeventfd(vm.fd, 0x1000, 4, 0, 0), EINVAL, "no eventfd");
    assert_err!(vm.ioeventfd(fd, 0x1000, 0, KVM_IOEVENTFD_FLAG_DATAMATCH, 5), EINVAL, "match without length");
    assert_ok!(vm.ioeventfd(fd, 0x1000, 4, 0, 0));
    assert_err!(vm.ioeventfd(fd, 0x1000, 4, 0, 0), EEXIST);
    assert_err!(vm.ioeventfd(fd, 0x1000, 4, KVM_IOEVENTFD_FLAG_DATAMATCH, 1), EEXIST, "under a wildcard");
    assert_ok!(vm.ioeventfd(fd, 0x2000, 4, KVM_IOEVENTFD_FLAG_DATAMATCH, 1));
    assert_ok!(vm.ioeventfd(fd, 0x2000, 4, KVM_IOEVENTFD_FLAG_DATAMATCH, 2));
    let deassign = KVM_IOEVENTFD_FLAG_DEASSIGN;
    assert_err!(vm.ioeventfd(fd, 0x3000, 4, deassign, 0), ENOENT);
    assert_err!(vm.ioeventfd(eventfd(), 0x1000, 4, deassign, 0), ENOENT, "another eventfd");
    assert_ok!(vm.ioeventfd(fd, 0x1000, 4, deassign, 0));
    assert_err!(vm.ioeventfd(fd, 0x1000, 4, deassign, 0), ENOENT, "twice");
}

fn gsi_routing() {
    let g = Guest::long_irqchip(ic_spin());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_ok!(Routing::new().msi(24, APIC, 0x78).msi(25, APIC, 0x79).chip(4, KVM_IRQCHIP_IOAPIC, 10).set(&g.vm));
    assert_ok!(g.vm.irq_line(24, 1));
    g.expect_done();
    g.expect_done();
    assert_eq!((g.count(0x78), g.count(0x79)), (1, 0));
    // Replaced as a whole
    assert_ok!(Routing::new().msi(24, APIC, 0x7a).set(&g.vm));
    assert_ok!(g.vm.irq_line(24, 1));
    let _ = g.vm.irq_line(25, 1);
    g.expect_done();
    g.expect_done();
    assert_eq!((g.count(0x78), g.count(0x79), g.count(0x7a)), (1, 0, 1));
    // Empty is allowed.
    assert_ok!(Routing::new().set(&g.vm));
}

fn gsi_routing_errors() {
    let vm = Vm::new();
    vm.create_irqchip();
    let good = Routing::new().msi(24, APIC, 0x78);
    let mut r = good.clone();
    r.flags = 1;
    assert_err!(r.set(&vm), EINVAL, "flags of the table");
    let mut r = good.clone();
    r.entries[0].flags = 0x8000_0000;
    assert_err!(r.set(&vm), EINVAL, "flags of an entry");
    let mut r = good.clone();
    r.entries[0].type_ = 77;
    assert_err!(r.set(&vm), EINVAL, "type");
    let mut r = good.clone();
    r.entries[0].gsi = 4096;
    assert_err!(r.set(&vm), EINVAL, "GSI");
    let mut r = good.clone();
    r.nr = 4097;
    assert!(r.set(&vm).is_err(), "number of entries");
    r.nr = u32::MAX;
    assert!(r.set(&vm).is_err(), "number of entries");
    assert_err!(Routing::new().chip(5, 7, 0).set(&vm), EINVAL, "chip");
    assert_err!(Routing::new().chip(5, KVM_IRQCHIP_IOAPIC, 24).set(&vm), EINVAL, "pin of the IOAPIC");
    assert_err!(Routing::new().chip(5, KVM_IRQCHIP_PIC_MASTER, 8).set(&vm), EINVAL, "pin of the PIC");
    // Two MSIs on one GSI, or the same chip twice on one
    assert_err!(Routing::new().msi(24, APIC, 1).msi(24, APIC, 2).set(&vm), EINVAL, "two MSIs");
    let twice = Routing::new().chip(5, KVM_IRQCHIP_IOAPIC, 5).chip(5, KVM_IRQCHIP_IOAPIC, 6);
    assert_err!(twice.set(&vm), EINVAL, "one chip twice");
    assert_ok!(Routing::new().chip(5, KVM_IRQCHIP_IOAPIC, 5).chip(5, KVM_IRQCHIP_PIC_MASTER, 5).set(&vm));
    assert_ok!(good.set(&vm));
}

fn get_chip(vm: &Vm, id: u32) -> kvm_irqchip {
    let mut c = kvm_irqchip { chip_id: id, ..Default::default() };
    assert_ok!(sys::ioctl_out(vm.fd, KVM_GET_IRQCHIP, &mut c));
    c
}

fn irqchip_round_trip() {
    let g = Guest::long_irqchip(ic_ioapic_level());
    g.expect_done();
    let mut c = get_chip(&g.vm, KVM_IRQCHIP_IOAPIC);
    // SAFETY: the IOAPIC's view of the union, plain data.
    unsafe {
        assert_eq!(c.chip.ioapic.redirtbl[10].bits & 0xffff, 0x8048);
        assert_eq!(c.chip.ioapic.redirtbl[11].bits & 0xffff, 0x0049);
        c.chip.ioapic.redirtbl[12].bits = 0x0700_0000_0001_004a;
    }
    assert_ok!(g.vm.set(KVM_SET_IRQCHIP, &c));
    let again = get_chip(&g.vm, KVM_IRQCHIP_IOAPIC);
    // SAFETY: as above.
    unsafe { assert_eq!(again.chip.ioapic.redirtbl[12].bits, 0x0700_0000_0001_004a) };
    for id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut c = get_chip(&g.vm, id);
        c.chip.pic.imr = 0x5a;
        c.chip.pic.irq_base = 0x68;
        assert_ok!(g.vm.set(KVM_SET_IRQCHIP, &c));
        let again = get_chip(&g.vm, id);
        // SAFETY: the PIC's view of the union, plain data.
        unsafe { assert_eq!((again.chip.pic.imr, again.chip.pic.irq_base), (0x5a, 0x68)) };
    }
    let mut c = get_chip(&g.vm, 0);
    c.chip_id = 9;
    assert_err!(g.vm.set(KVM_SET_IRQCHIP, &c), EINVAL);
}

fn pit_round_trip() {
    let vm = Vm::new();
    vm.create_irqchip();
    let mut p = kvm_pit_state2::default();
    assert_err!(sys::ioctl_out(vm.fd, KVM_GET_PIT2, &mut p), ENXIO, "without a PIT");
    vm.create_pit();
    assert_ok!(sys::ioctl_out(vm.fd, KVM_GET_PIT2, &mut p));
    p.channels[2].count = 0x1234;
    p.channels[2].mode = 3;
    p.channels[1].rw_mode = 3;
    assert_ok!(vm.set(KVM_SET_PIT2, &p));
    let mut again = kvm_pit_state2::default();
    assert_ok!(sys::ioctl_out(vm.fd, KVM_GET_PIT2, &mut again));
    assert_eq!((again.channels[2].count, again.channels[2].mode, again.channels[1].rw_mode), (0x1234, 3, 3));
    // Nonsense is taken or refused, and does not crash.
    for c in &mut p.channels {
        c.mode = 0xff;
        c.count = u32::MAX;
        c.rw_mode = 0xff;
        c.gate = 0xff;
    }
    let _ = vm.set(KVM_SET_PIT2, &p);
    let _ = sys::ioctl_out(vm.fd, KVM_GET_PIT2, &mut again);
}

payload! { ic_load, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov qword ptr [0x100000], 1",
    "sti",
    "2: inc rax",
    "xor eax, eax",
    "cpuid",
    "jmp 2b",
}

/// MSIs from two threads while the guest runs in and out: every one that was taken (and not merged) is counted.
fn interrupts_under_load() {
    let g = Guest::long_irqchip(ic_load());
    g.set_eoi(Eoi::Xapic);
    beside(&g.cpu, || {
        assert!(g.ram.wait_u64(DATA, 1, 5000), "the guest does not start");
        std::thread::scope(|s| {
            for t in 0..2u8 {
                let g = &g;
                s.spawn(move || {
                    for i in 0..500 {
                        let before = g.count(0x90 + t);
                        assert!(g.vm.signal_msi(APIC, 0x90 + t as u32).is_ok());
                        assert!(
                            g.ram.wait_u64(COUNTS + (0x90 + t as u64) * 8, before + 1, 5000),
                            "thread {t}, message {i}"
                        );
                    }
                });
            }
        });
    });
    assert_eq!((g.count(0x90), g.count(0x91)), (500, 500));
}
