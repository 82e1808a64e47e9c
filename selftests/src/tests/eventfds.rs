// SPDX-License-Identifier: GPL-2.0
//! Eventfds of a VM that lead back into it: resampling beside irqfds, and what a change of routes does to both.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::{self, *};
use krabtest::vm::Vm;
use krabtest::{assert_err, assert_ok, payload, tests};

use super::irqchip::{ic_ioapic_level, APIC};

tests! { "eventfds";
    acknowledged_interrupt_brings_another;
    interrupt_behind_one_taken_back;
    halted_behind_one_taken_back;
    resampling_follows_the_routes;
    resampling_needs_the_whole_irqchip;
    many_irqfds;
}

const PIC_VECTOR: u8 = 0x28;
const MSI_VECTOR: u8 = 0x71;

/// Reports the rounds until the message is there. Nothing in them exits, nor do the handlers.
macro_rules! count_rounds {
    () => {
        "mov rdi, [rsi]
        xor ebx, ebx
        sti
        3: inc ebx
        cmp rdi, [rsi]
        je 3b
        cli
        mov dword ptr [r8 + 0xb0], 0
        mov eax, ebx
        out 0xef, eax"
    };
}

/// Local APIC on, LINT0 for the 8259A; 8259A with vectors 0x20 and 0x28, cascade, automatic end, IRQ 5 by level, all open.
macro_rules! begin {
    () => {
        "mov r8, 0xfee00000
        mov dword ptr [r8 + 0xf0], 0x1ff
        mov dword ptr [r8 + 0x350], 0x700
        mov al, 0x11
        out 0x20, al
        out 0xa0, al
        mov al, 0x20
        out 0x21, al
        mov al, 0x28
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 3
        out 0x21, al
        out 0xa1, al
        mov al, 0x20
        mov dx, 0x4d0
        out dx, al
        xor eax, eax
        out 0x21, al
        out 0xa1, al
        mov rsi, 0x7000 + 8 * 0x71"
    };
}

payload! { ev_count, 64,
    begin!(),
    "2: out 0xed, al",
    count_rounds!(),
    "jmp 2b",
}

/// The end of one interrupt is an eventfd that sends the next. The vCPU's own thread sends it while it enters the guest, and must not take
/// it for sent: without another exit the guest would see it only when the host is interrupted.
fn acknowledged_interrupt_brings_another() {
    let g = Guest::long_irqchip(ev_count());
    let (line, end) = (eventfd(), eventfd());
    // GSI 8 is pin 0 of the second 8259A.
    assert_ok!(Routing::new().chip(8, 1, 0).msi(30, APIC, MSI_VECTOR.into()).set(&g.vm));
    assert_ok!(g.vm.irqfd(line, 8, KVM_IRQFD_FLAG_RESAMPLE, end));
    assert_ok!(g.vm.irqfd(end, 30, 0, 0));
    g.expect_done();
    let mut late = 0;
    for round in 1..=30 {
        eventfd_write(line, 1);
        let rounds = g.report();
        assert_eq!((g.count(PIC_VECTOR), g.count(MSI_VECTOR)), (round, round));
        late += u32::from(rounds > 1000);
        g.expect_done();
    }
    // The host has its interrupts, too.
    assert!(late <= 3, "{late} of 30 came late");
}

payload! { ev_taken_back, 64,
    begin!(),
    "2: out 0xed, al",
    "out 0xed, al",
    count_rounds!(),
    "jmp 2b",
}

/// Runs to where the vCPU has seen that the 8259A has something for it, which then is taken back.
fn take_back(g: &Guest) {
    g.expect_done();
    assert_ok!(g.vm.irq_line(5, 1));
    g.expect_done();
    assert_ok!(g.vm.irq_line(5, 0));
}

/// What came meanwhile from elsewhere goes in as soon as the guest lets it.
fn interrupt_behind_one_taken_back() {
    let g = Guest::long_irqchip(ev_taken_back());
    assert_ok!(Routing::new().chip(5, 0, 5).set(&g.vm));
    let mut late = 0;
    for round in 1..=30 {
        take_back(&g);
        assert_eq!(assert_ok!(g.vm.signal_msi(APIC, MSI_VECTOR.into())), 1);
        late += u32::from(g.report() > 1000);
        assert_eq!(g.count(MSI_VECTOR), round);
    }
    assert!(late <= 3, "{late} of 30 came late");
    assert_eq!((g.count(0x25), g.count(0x27)), (0, 0), "of the 8259A");
}

payload! { ev_halts, 64,
    begin!(),
    "2: out 0xed, al",
    "out 0xed, al",
    "sti",
    "hlt",
    "cli",
    "mov dword ptr [r8 + 0xb0], 0",
    "mov eax, 0x600d",
    "out 0xef, eax",
    "jmp 2b",
}

/// A halted CPU does not go on for it.
fn halted_behind_one_taken_back() {
    let g = Guest::long_irqchip(ev_halts());
    assert_ok!(Routing::new().chip(5, 0, 5).set(&g.vm));
    for round in 1..=3 {
        take_back(&g);
        assert_err!(g.cpu.run_for(50), EINTR, "without an interrupt");
        assert_eq!(assert_ok!(g.vm.signal_msi(APIC, MSI_VECTOR.into())), 1);
        assert_eq!(g.report(), 0x600d);
        assert_eq!(g.count(MSI_VECTOR), round);
    }
}

/// A resampled line falls at the end of its interrupt, at the pin where the routes lead it now.
fn resampling_follows_the_routes() {
    let g = Guest::long_irqchip(ic_ioapic_level());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    let (line, end) = (eventfd(), eventfd());
    assert_ok!(g.vm.irqfd(line, 30, KVM_IRQFD_FLAG_RESAMPLE, end));
    // Pin 10 of the I/O APIC: vector 0x48, level.
    assert_ok!(Routing::new().chip(30, 2, 10).set(&g.vm));
    for round in 1..=5 {
        eventfd_write(line, 1);
        for _ in 0..200 {
            g.expect_done();
            if g.count(0x48) >= round {
                break;
            }
            sys::sleep_ms(1);
        }
        for _ in 0..5 {
            g.expect_done();
        }
        assert_eq!(g.count(0x48), round, "one interrupt each");
        assert_eq!(eventfd_read(end), 1, "one resample each");
    }
}

fn resampling_needs_the_whole_irqchip() {
    let vm = Vm::new();
    assert_ok!(vm.set(
        KVM_ENABLE_CAP,
        &kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() }
    ));
    assert_err!(vm.irqfd(eventfd(), 5, KVM_IRQFD_FLAG_RESAMPLE, eventfd()), EINVAL, "split irqchip");
    let fd = eventfd();
    assert_ok!(vm.irqfd(fd, 5, 0, 0));
    assert_ok!(vm.irqfd(fd, 5, KVM_IRQFD_FLAG_DEASSIGN, 0));
    let vm = Vm::new();
    vm.create_irqchip();
    assert_ok!(vm.irqfd(eventfd(), 5, KVM_IRQFD_FLAG_RESAMPLE, eventfd()));
}

fn many_irqfds() {
    let g = Guest::long_irqchip(ic_ioapic_level());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_ok!(Routing::new().msi(30, APIC, MSI_VECTOR.into()).set(&g.vm));
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let fds: Vec<_> = (0..3000).map(|_| eventfd()).collect();
    for fd in &fds {
        assert_ok!(g.vm.irqfd(*fd, 30, 0, 0));
    }
    for (fd, count) in [(fds[0], 1), (fds[2999], 2)] {
        eventfd_write(fd, 1);
        g.expect_done();
        g.expect_done();
        assert_eq!(g.count(MSI_VECTOR), count);
    }
}
