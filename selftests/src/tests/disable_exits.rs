// SPDX-License-Identifier: GPL-2.0
//! KVM_CAP_X86_DISABLE_EXITS: a guest that halts, waits and reads the CPU's counters by itself. What still has to reach it does.

use krabtest::guest::*;
use krabtest::harness::{emulated, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::*;
use krabtest::vm::{Cpuid, Device, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "disable_exits";
    refused;
    halt_without_irqchip;
    halt_with_interrupts_off;
    halted_guest_takes_events;
    halted_guest_takes_timer(60);
    halted_guest_takes_messages(60);
    halted_guest_is_reset;
    pv_unhalt_is_withheld;
    mwait;
    frequency_counters;
}

const ALL: u32 = KVM_X86_DISABLE_EXITS_MWAIT
    | KVM_X86_DISABLE_EXITS_HLT
    | KVM_X86_DISABLE_EXITS_PAUSE
    | KVM_X86_DISABLE_EXITS_CSTATE
    | APERFMPERF;
const APERFMPERF: u32 = 1 << 4;

fn request(exits: u32) -> kvm_enable_cap {
    kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, args: [exits.into(), 0, 0, 0], ..Default::default() }
}

/// Turns these exits off, or skips the test where that is not to be had.
fn disable(vm: &Vm, exits: u32) {
    if vm.cap(KVM_CAP_X86_DISABLE_EXITS) as u32 & exits != exits {
        skip!("exits {exits:#x} cannot be turned off here");
    }
    assert_ok!(vm.set(KVM_ENABLE_CAP, &request(exits)));
}

fn refused() {
    let vm = Vm::new();
    let allowed = vm.cap(KVM_CAP_X86_DISABLE_EXITS) as u32;
    assert_eq!(allowed & KVM_X86_DISABLE_EXITS_PAUSE, KVM_X86_DISABLE_EXITS_PAUSE);
    assert_eq!(allowed & !ALL, 0);
    assert_eq!(Device::open().cap(KVM_CAP_X86_DISABLE_EXITS) as u32, allowed);
    for bit in 0..64 {
        let mut asked = request(0);
        asked.args[0] = 1 << bit;
        if bit < 32 && allowed & 1 << bit != 0 {
            assert_ok!(vm.set(KVM_ENABLE_CAP, &asked));
        } else {
            assert_err!(vm.set(KVM_ENABLE_CAP, &asked), EINVAL, "bit {bit}");
        }
    }
    let mut flagged = request(KVM_X86_DISABLE_EXITS_PAUSE);
    flagged.flags = 1;
    assert_err!(vm.set(KVM_ENABLE_CAP, &flagged), EINVAL);
    let cpu = vm.create_vcpu(0);
    assert_err!(cpu.set(KVM_ENABLE_CAP, &request(KVM_X86_DISABLE_EXITS_PAUSE)), EINVAL);
    // Not with a vCPU, and not even nothing.
    for exits in [KVM_X86_DISABLE_EXITS_PAUSE, 0] {
        assert_err!(vm.set(KVM_ENABLE_CAP, &request(exits)), EINVAL);
    }
}

// Sleeps until the word at 100000h is not 0, and counts how often it woke up.
payload! { de_sleep, 64,
    "xor ebx, ebx",
    "2: sti",
    "hlt",
    "cli",
    "inc rbx",
    "cmp qword ptr [0x100000], 0",
    "je 2b",
    "out 0xed, al",
}
const BEHIND_HLT: u64 = CODE + 4;

/// A vCPU that nobody wakes stays in KVM_RUN until a signal comes. An Intel CPU then still sleeps; on AMD, and in Bochs, every interrupt of
/// the host ends the sleep.
fn sleep_in_vain(g: &Guest, intel: bool) {
    assert_err!(g.cpu.run_for(if emulated() { 60 } else { 20 }), EINTR);
    let r = g.cpu.regs();
    if intel && !emulated() {
        assert_eq!((r.rip, r.rbx, r.rflags & 0x200), (BEHIND_HLT, 0, 0x200));
    }
}

fn is_intel(cpuid: &Cpuid) -> bool {
    cpuid.find(0, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"))
}

fn halt_without_irqchip() {
    let g = Guest::long_with(de_sleep(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    let intel = is_intel(&g.cpuid);
    sleep_in_vain(&g, intel);
    // It sleeps on over another run.
    sleep_in_vain(&g, intel);
    assert_eq!(g.cpu.mp_state(), KVM_MP_STATE_RUNNABLE);
    // KVM_INTERRUPT needs room, and there is: the guest has interrupts on.
    g.ram.write_u64(DATA, 1);
    assert_ok!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x55 }));
    g.expect_done();
    assert_eq!(g.count(0x55), 1);
}

payload! { de_dead, 64, "cli", "2: hlt", "jmp 2b" }

/// A guest that nothing can wake does not keep the CPU: a signal ends KVM_RUN.
fn halt_with_interrupts_off() {
    let g = Guest::long_with(de_dead(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    if emulated() && !tcg() {
        skip!("in Bochs the host's interrupts do not end such a sleep");
    }
    for _ in 0..3 {
        assert_err!(g.cpu.run_for(20), EINTR);
    }
}

/// An exception and an NMI of userspace's wake it, too.
fn halted_guest_takes_events() {
    let g = Guest::long_with(de_sleep(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    let intel = is_intel(&g.cpuid);
    sleep_in_vain(&g, intel);
    let mut e: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    e.exception.injected = 1;
    e.exception.nr = 13;
    e.exception.has_error_code = 1;
    e.exception.error_code = 0x18;
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &e));
    match g.event() {
        Event::Exception { vector: 13, error: 0x18, rip, .. } if !intel || emulated() || rip == BEHIND_HLT => {}
        other => panic!("{other:x?}"),
    }
    g.ram.write_u64(DATA, 1);
    g.expect_done();

    let g = Guest::long_with(de_sleep(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    sleep_in_vain(&g, intel);
    g.ram.write_u64(DATA, 1);
    assert_ok!(g.cpu.ioctl(KVM_NMI, 0));
    g.expect_done();
    assert_eq!(g.count(2), 1);
}

payload! { de_timer, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",
    "mov dword ptr [rbx + 0x320], 0x43",
    "mov r8d, 10",
    "2: mov dword ptr [rbx + 0x380], 2000000",
    "3: sti",
    "hlt",
    "cli",
    "mov r9, [0x7218]",
    "cmp r9, r10",
    "je 3b",
    "mov r10, r9",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

fn halted_guest_takes_timer() {
    let g = Guest::long_with(de_timer(), |vm| {
        vm.create_irqchip();
        disable(vm, KVM_X86_DISABLE_EXITS_HLT);
    });
    g.set_eoi(Eoi::Xapic);
    let start = now_ns();
    g.expect_done();
    assert_eq!(g.count(0x43), 10);
    assert!(now_ns() - start >= 18_000_000);
}

payload! { de_messages, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "2: sti",
    "hlt",
    "cli",
    "inc qword ptr [0x100000]",
    "jmp 2b",
}

/// From another thread: messages and NMIs to a vCPU that may sleep in the CPU.
fn halted_guest_takes_messages() {
    let g = Guest::long_with(de_messages(), |vm| {
        vm.create_irqchip();
        disable(vm, KVM_X86_DISABLE_EXITS_HLT);
    });
    g.set_eoi(Eoi::Xapic);
    g.while_running(|| {
        // Until the guest has its local APIC on, they are lost.
        let mut sent = 0;
        while g.count(0x60) == 0 {
            assert_ok!(g.vm.signal_msi(0xfee0_0000, 0x60));
            sleep_ms(1);
            sent += 1;
            assert!(sent < 5000, "no message arrives");
        }
        let before = g.count(0x61);
        for n in 1..=20 {
            assert_ok!(g.vm.signal_msi(0xfee0_0000, 0x61));
            assert!(g.ram.wait_u64(COUNTS + 8 * 0x61, before + n, 5000), "message {n}");
            sleep_ms(1);
        }
        let nmi = kvm_msi { address_lo: 0xfee0_0000, data: 0x400, ..Default::default() };
        assert_ok!(g.vm.set(KVM_SIGNAL_MSI, &nmi));
        assert!(g.ram.wait_u64(COUNTS + 8 * 2, 1, 5000), "the NMI");
    });
    assert!(g.ram.read_u64(DATA) >= 20);
}

/// Registers that userspace sets count, whatever the vCPU was doing: it starts again in real mode.
fn halted_guest_is_reset() {
    let g = Guest::long_with(de_sleep(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    let fresh = Guest::bare(|_| ());
    sleep_in_vain(&g, is_intel(&g.cpuid));
    // KVM leaves an Intel vCPU asleep: an interrupt wakes it either way.
    let mut s = fresh.cpu.sregs();
    (s.cs.base, s.cs.selector) = (0, 0);
    g.cpu.set_sregs(&s);
    // STI; NOP; OUT EDh, AL
    g.ram.write(0x1000, &[0xfb, 0x90, 0xe6, 0xed]);
    g.ram.write(0x1080, &[0xcf]);
    g.ram.write(4 * 0x21, &[0x80, 0x10, 0, 0]);
    g.cpu.set_regs(&kvm_regs { rip: 0x1000, rsp: 0x8000, rflags: 0x202, ..Default::default() });
    assert_ok!(g.cpu.set(KVM_INTERRUPT, &kvm_interrupt { irq: 0x21 }));
    g.expect_done();
}

const PV_UNHALT: u32 = 1 << 7;

fn pv_unhalt_is_withheld() {
    let features = |g: &Guest| {
        let mut table = Cpuid::with_room(256);
        assert_ok!(ioctl_out(g.cpu.fd, KVM_GET_CPUID2, &mut table));
        table.find(0x4000_0001, 0).map_or(0, |leaf| leaf.eax)
    };
    let mut table = Device::open().supported_cpuid();
    set_apic_id(&mut table, 0);
    table.set(0x4000_0001, [PV_UNHALT, 0, 0, 0]);
    let usual = Guest::bare(|_| ());
    assert_ok!(usual.cpu.set_cpuid(&table));
    assert_eq!(features(&usual), PV_UNHALT);

    let g = Guest::bare(|vm| disable(vm, KVM_X86_DISABLE_EXITS_HLT));
    assert_ok!(g.cpu.set_cpuid(&table));
    assert_eq!(features(&g), 0);
    // Of another hypervisor's leaves it is none of KVM's business.
    let mut foreign = table.clone();
    foreign.set(0x4000_0000, [0x4000_0001, 1, 2, 3]);
    assert_ok!(g.cpu.set_cpuid(&foreign));
    assert_eq!(features(&g), PV_UNHALT);
    // After a run the same table is still the same.
    assert_ok!(g.cpu.set_cpuid(&table));
    enter_real(&g.cpu, 0x1000);
    g.ram.write(0x1000, &[0xe6, 0xed]);
    g.expect_done();
    assert_ok!(g.cpu.set_cpuid(&table));
}

// With interrupts on, because in Bochs only then an interrupt of the host ends MWAIT.
payload! { de_mwait, 64,
    "sti",
    "mov eax, 0x101000",
    "2: xor ecx, ecx",
    "xor edx, edx",
    "monitor",
    "cmp qword ptr [rax], 0",
    "jne 3f",
    "push rax",
    "xor eax, eax",
    "mwait",
    "pop rax",
    "inc rbx",
    "jmp 2b",
    "3: out 0xed, al",
}

fn mwait() {
    let g = Guest::long_with(de_mwait(), |vm| disable(vm, KVM_X86_DISABLE_EXITS_MWAIT));
    assert_err!(g.cpu.run_for(20), EINTR);
    g.ram.write_u64(0x10_1000, 1);
    g.expect_done();
}

payload! { de_counters, 64,
    "mov ecx, 0xe7",
    "rdmsr",
    "mov [0x100000], eax",
    "mov [0x100004], edx",
    "mov ecx, 0xe8",
    "rdmsr",
    "mov [0x100008], eax",
    "mov [0x10000c], edx",
    "out 0xed, al",
}

fn frequency_counters() {
    let g = Guest::long(de_counters());
    for _ in 0..2 {
        assert_eq!(g.exception(2), (13, 0), "by default there are none");
    }
    g.expect_done();
    let g = Guest::long_with(de_counters(), |vm| disable(vm, APERFMPERF));
    g.expect_done();
    let first = [DATA, DATA + 8].map(|at| g.ram.read_u64(at));
    g.cpu.set_regs(&kvm_regs { rip: CODE, ..g.cpu.regs() });
    g.expect_done();
    let second = [DATA, DATA + 8].map(|at| g.ram.read_u64(at));
    // In Bochs they stand still.
    let go_on = first[0] < second[0] && first[1] < second[1];
    assert!(go_on || emulated() && first == second, "{first:x?} {second:x?}");
}
