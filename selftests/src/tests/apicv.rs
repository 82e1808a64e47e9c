// SPDX-License-Identifier: GPL-2.0
//! Interrupts that the CPU delivers and ends itself (Intel's APICv), counted in exits where it does so; what the guest sees is the same
//! without it, so these tests run everywhere.

use super::irqchip::APIC;
use super::lapic::beside;
use krabtest::guest::*;
use krabtest::harness::options;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::*;
use krabtest::vm::{Exit, Vcpu};
use krabtest::{assert_ok, ioapic_pin_10_level, payload, skip, tests};
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

tests! { "apicv";
    xapic_without_exits;
    x2apic_without_exits;
    x2apic_refuses;
    priority_in_memory;
    pending_and_in_service_are_seen;
    set_state_is_delivered;
    mode_changes_with_interrupts;
    interrupt_command_halves;
    running_guest_gets_all;
    ipis_to_a_running_cpu;
    level_triggered_x2apic;
    level_rerouted_in_service;
    split_irqchip_hears_of_ends;
    window_is_not_memory;
    moved_window;
    init_forgets_interrupts;
}

/// Whether interrupts are expected to come and go without exits.
pub(super) fn without_exits() -> bool {
    options().bed.contains("intel") && options().apicv
}

/// The vCPU's statistic "exits", by KVM_GET_STATS_FD.
struct Exits {
    file: File,
    at: u64,
}

impl Exits {
    fn of(cpu: &Vcpu) -> Exits {
        let fd = assert_ok!(cpu.ioctl(KVM_GET_STATS_FD, 0));
        // SAFETY: the descriptor is new, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut bytes = vec![0u8; 16384];
        let len = file.read_at(&mut bytes, 0).expect("statistics");
        assert!(len > 24, "statistics: {len}");
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (name_size, count, descriptors, data) = (word(4), word(8), word(16), word(20));
        let mut all = (0..count).map(|n| descriptors + n * (16 + name_size));
        let found = all.find(|at| bytes[at + 16..].starts_with(b"exits\0")).expect("a statistic \"exits\"");
        Exits { file, at: (data + word(found + 8)) as u64 }
    }

    /// So far.
    fn count(&self) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.at).expect("statistics");
        u64::from_le_bytes(bytes)
    }
}

/// Runs from one event to the next, and tells how many exits that took.
#[track_caller]
fn exits_to_done(g: &Guest) -> u64 {
    let exits = Exits::of(&g.cpu);
    let before = exits.count();
    g.expect_done();
    exits.count() - before
}

/// 100 rounds of something were `count` exits, where it took at least one each without the CPU's help. Host interrupts are exits, too.
#[track_caller]
fn check(what: &str, count: u64) {
    println!("# {what}: {count} exits");
    if without_exits() {
        assert!(count < 60, "{what}: {count} exits");
    } else {
        assert!(count >= 100, "{what}: {count} exits");
    }
}

payload! { apicv_xapic, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x80], 0",
    "sti",
    "out 0xed, al",
    "mov r8d, 100",
    "2: mov dword ptr [rbx + 0x300], 0x40050",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
    "mov r8d, 100",
    "2: mov dword ptr [rbx + 0x80], 0x30",
    "mov dword ptr [rbx + 0x80], 0",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
    "mov r8d, 100",
    "2: mov eax, [rbx + 0x20]",
    "mov eax, [rbx + 0x100]",
    "mov eax, [rbx + 0x320]",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

fn xapic_without_exits() {
    let g = Guest::long_irqchip(apicv_xapic());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    check("self-IPI and EOI", exits_to_done(&g));
    assert_eq!(g.count(0x50), 100);
    check("task priority", exits_to_done(&g));
    check("reads", exits_to_done(&g));
}

// MSR accesses: RDMSR of ECX, and WRMSR of EDX:EAX = R9.
macro_rules! x2apic_on {
    () => {
        "mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr; mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr"
    };
}

payload! { apicv_x2apic, 64,
    x2apic_on!(),
    "sti",
    "out 0xed, al",
    "xor edx, edx",
    "mov r8d, 100",
    "2: mov ecx, 0x83f",
    "mov eax, 0x51",
    "wrmsr",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
    "mov r8d, 100",
    "2: mov ecx, 0x808",
    "mov eax, 0x40",
    "xor edx, edx",
    "wrmsr",
    "rdmsr",
    "cmp eax, 0x40",
    "jne 9f",
    "mov ecx, 0x80a",               // PPR
    "rdmsr",
    "cmp eax, 0x40",
    "jne 9f",
    "mov rax, cr8",
    "cmp eax, 4",
    "jne 9f",
    "xor eax, eax",
    "mov cr8, rax",
    "mov ecx, 0x812",               // ISR
    "rdmsr",
    "mov ecx, 0x822",               // IRR
    "rdmsr",
    "test eax, eax",
    "jnz 9f",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
    "9: ud2",
}

fn x2apic_without_exits() {
    let g = Guest::long_irqchip(apicv_x2apic());
    g.set_eoi(Eoi::X2apic);
    g.expect_done();
    check("self-IPI and EOI", exits_to_done(&g));
    assert_eq!(g.count(0x51), 100);
    check("priorities", exits_to_done(&g));
}

payload! { apicv_refused, 64,
    x2apic_on!(),
    "xor edx, edx",
    "mov eax, 1",
    "mov ecx, 0x80b",
    "wrmsr",                        // EOI takes 0 only
    "mov eax, 0x100",
    "mov ecx, 0x808",
    "wrmsr",
    "mov ecx, 0x83f",
    "wrmsr",
    "mov ecx, 0x80a",
    "wrmsr",                        // PPR is read-only
    "mov ecx, 0x80b",
    "rdmsr",                        // EOI is write-only
    "mov ecx, 0x83f",
    "rdmsr",
    "mov ecx, 0x83f",               // an illegal vector is an error
    "mov eax, 5",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x828",
    "xor eax, eax",
    "wrmsr",
    "rdmsr",
    "out 0xef, eax",
    "out 0xed, al",
}

fn x2apic_refuses() {
    let g = Guest::long_irqchip(apicv_refused());
    for what in ["EOI", "TPR", "SELF IPI", "PPR", "read of EOI", "read of SELF IPI"] {
        // KVM's software looks at neither what is written to EOI nor the reserved bits of TPR.
        if !kvm_on_amd() || !matches!(what, "EOI" | "TPR") {
            assert_eq!(g.exception(2), (13, 0), "{what}");
        }
    }
    let errors = g.report();
    assert!(on_kvm_or(errors == 0x20), "ESR {errors:#x}");
    g.expect_done();
}

/// KVM, where no CPU does the local APIC's work.
fn kvm_on_amd() -> bool {
    krabtest::harness::on_kvm() && !options().bed.contains("intel")
}

/// KVM leaves illegal vectors of SELF IPI out of the ESR.
fn on_kvm_or(right: bool) -> bool {
    krabtest::harness::on_kvm() || right
}

payload! { apicv_priority, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov dword ptr [rbx + 0x80], 0x5f",
    "mov dword ptr [rbx + 0x300], 0x40055",     // held back
    "mov dword ptr [rbx + 0x300], 0x40065",     // not
    "mov eax, [rbx + 0x220]",                   // IRR, vectors 40h to 5Fh
    "out 0xef, eax",
    "mov eax, [rbx + 0xa0]",                    // PPR
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x80], 0x40",
    "nop",
    "out 0xed, al",
    "mov eax, 7",
    "mov cr8, rax",
    "mov dword ptr [rbx + 0x300], 0x40066",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "mov eax, 5",
    "mov cr8, rax",
    "nop",
    "out 0xed, al",
}

fn priority_in_memory() {
    if kvm_on_amd() {
        skip!("KVM on AMD keeps the class of a task priority alone");
    }
    let g = Guest::long_irqchip(apicv_priority());
    g.set_eoi(Eoi::Xapic);
    assert_eq!(g.report(), 1 << 0x15, "IRR");
    assert_eq!((g.count(0x55), g.count(0x65)), (0, 1));
    assert_eq!(g.report(), 0x5f, "PPR");
    g.expect_done();
    assert_eq!(g.count(0x55), 1, "when the priority fell");
    assert_eq!(g.report(), 0x70, "TPR follows CR8");
    assert_eq!(g.count(0x66), 0);
    g.expect_done();
    assert_eq!(g.count(0x66), 1);
}

fn lapic(cpu: &Vcpu) -> kvm_lapic_state {
    assert_ok!(cpu.get(KVM_GET_LAPIC))
}

fn register(state: &kvm_lapic_state, offset: usize) -> u32 {
    let byte = |n: usize| state.regs[offset + n] as u8;
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

payload! { apicv_masked, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov dword ptr [rbx + 0x300], 0x40050",     // taken, and not ended
    "nop",
    "cli",
    "mov dword ptr [rbx + 0x300], 0x40071",     // pending
    "mov dword ptr [rbx + 0x80], 0x23",
    "out 0xed, al",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "sti",
    "nop",
    "out 0xed, al",
}

fn pending_and_in_service_are_seen() {
    if kvm_on_amd() {
        skip!("KVM on AMD keeps the class of a task priority alone");
    }
    let g = Guest::long_irqchip(apicv_masked());
    g.set_eoi(Eoi::None);
    g.expect_done();
    let state = lapic(&g.cpu);
    assert_eq!(register(&state, 0x120), 1 << 0x10, "ISR");
    assert_eq!(register(&state, 0x230), 1 << 0x11, "IRR");
    assert_eq!((register(&state, 0x80), g.cpu.page().cr8), (0x23, 2), "priority");
    assert_eq!(register(&state, 0x300) & 0xfffff, 0x40071, "ICR");
    assert_eq!(g.report(), 0x23);
    g.expect_done();
    assert_eq!((g.count(0x50), g.count(0x71)), (1, 1));
    let state = lapic(&g.cpu);
    assert_eq!((register(&state, 0x120), register(&state, 0x130)), (1 << 0x10, 1 << 0x11), "ISR");
}

fn set_state_is_delivered() {
    if kvm_on_amd() {
        skip!("KVM on AMD keeps the class of a task priority alone");
    }
    let g = Guest::long_irqchip(apicv_masked());
    g.set_eoi(Eoi::None);
    g.expect_done();
    let mut state = lapic(&g.cpu);
    // 50h is ended, 82h pending in its place; the priority holds 71h back.
    state.regs[0x122] = 0;
    state.regs[0x240] = 1 << 2;
    state.regs[0x80] = 0x7a;
    assert_ok!(g.cpu.set(KVM_SET_LAPIC, &state));
    assert_eq!(g.report(), 0x7a, "TPR");
    g.expect_done();
    assert_eq!((g.count(0x71), g.count(0x82)), (0, 1));
    let state = lapic(&g.cpu);
    assert_eq!((register(&state, 0x120), register(&state, 0x140), register(&state, 0x230)), (0, 4, 1 << 0x11));
}

payload! { apicv_modes, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "cli",
    "mov dword ptr [rbx + 0x300], 0x40050",
    "mov dword ptr [rbx + 0x80], 0x60",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x822",               // IRR
    "rdmsr",
    "out 0xef, eax",
    "mov ecx, 0x808",
    "rdmsr",
    "out 0xef, eax",
    "sti",
    "nop",
    "out 0xed, al",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x808",
    "wrmsr",
    "nop",
    "out 0xed, al",
    // Back to xAPIC mode, through "disabled": nothing is left.
    "cli",
    "mov ecx, 0x83f",
    "mov eax, 0x61",
    "wrmsr",
    "mov ecx, 0x1b",
    "rdmsr",
    "and eax, 0xfffff3ff",
    "wrmsr",
    "or eax, 0x800",
    "wrmsr",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [0x7800], 1",    // the handler's EOI
    "sti",
    "mov dword ptr [rbx + 0x300], 0x40052",
    "nop",
    "out 0xed, al",
}

fn mode_changes_with_interrupts() {
    let g = Guest::long_irqchip(apicv_modes());
    g.set_eoi(Eoi::X2apic);
    assert_eq!(g.report(), 1 << 0x10, "IRR");
    assert_eq!(g.report(), 0x60, "TPR");
    g.expect_done();
    assert_eq!(g.count(0x50), 0);
    g.expect_done();
    assert_eq!(g.count(0x50), 1);
    g.expect_done();
    assert_eq!(g.count(0x52), 1);
}

payload! { apicv_icr, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "out 0xed, al",
    "mov eax, [rbx + 0x310]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x300], 0x4053",      // to CPU 1
    "mov eax, [rbx + 0x300]",
    "out 0xef, eax",
    "out 0xed, al",
}

payload! { apicv_receiver, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "out 0xed, al",
    "sti",
    "nop",
    "out 0xed, al",
}

fn interrupt_command_halves() {
    let g = Guest::long_irqchip(apicv_icr());
    g.set_eoi(Eoi::Xapic);
    let other = g.add_long_vcpu(1, apicv_receiver());
    assert_ok!(other.set_mp_state(KVM_MP_STATE_RUNNABLE));
    assert_eq!(event_of(&other, g.ram), Event::Done);
    g.expect_done();
    assert_eq!(register(&lapic(&g.cpu), 0x310), 0x0100_0000, "ICR2, written without an exit");
    assert_eq!(g.report(), 0x0100_0000);
    assert_eq!(g.report() & !0x1000, 0x4053);
    g.expect_done();
    assert_eq!(event_of(&other, g.ram), Event::Done);
    assert_eq!(g.count(0x53), 1);
}

payload! { apicv_spin, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov qword ptr [0x100000], 1",
    "2: pause",
    "jmp 2b",
}

/// A guest that never leaves by itself takes every interrupt that others send.
fn running_guest_gets_all() {
    let g = Guest::long_irqchip(apicv_spin());
    g.set_eoi(Eoi::Xapic);
    let exits = Exits::of(&g.cpu);
    beside(&g.cpu, || {
        assert!(g.ram.wait_u64(DATA, 1, 10_000), "the guest runs");
        for n in 1..=20u64 {
            for vector in [0x31u8, 0x92, 0xE3] {
                assert_eq!(assert_ok!(g.vm.signal_msi(APIC, vector.into())), 1, "nothing pending");
            }
            for vector in [0x31u64, 0x92, 0xE3] {
                assert!(g.ram.wait_u64(COUNTS + 8 * vector, n, 10_000), "vector {vector:#x}, round {n}");
            }
        }
        let before = exits.count();
        for n in 1..=200u64 {
            assert_eq!(assert_ok!(g.vm.signal_msi(APIC, 0x44)), 1);
            while g.count(0x44) < n {
                std::hint::spin_loop();
            }
        }
        let count = exits.count() - before;
        println!("# 200 interrupts while the guest runs: {count} exits");
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2);
        assert!(!without_exits() || alone || count < 150, "{count} exits");
    });
}

payload! { apicv_sender, 64,
    x2apic_on!(),
    "sti",
    "mov r8d, 20",
    "2: mov r9, [0x7000 + 8 * 0x54]",
    "mov ecx, 0x830",
    "mov eax, 0x4054",
    "mov edx, 1",
    "wrmsr",
    "3: pause",
    "cmp r9, [0x7000 + 8 * 0x54]",
    "je 3b",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
}

payload! { apicv_spin_x2apic, 64,
    x2apic_on!(),
    "sti",
    "out 0xed, al",
    "2: pause",
    "jmp 2b",
}

fn ipis_to_a_running_cpu() {
    let g = Guest::long_irqchip(apicv_sender());
    g.set_eoi(Eoi::X2apic);
    let other = g.add_long_vcpu(1, apicv_spin_x2apic());
    assert_ok!(other.set_mp_state(KVM_MP_STATE_RUNNABLE));
    assert_eq!(event_of(&other, g.ram), Event::Done);
    beside(&other, || g.expect_done());
    assert_eq!(g.count(0x54), 20);
}

payload! { apicv_level, 64,
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    x2apic_on!(),
    "mov rdi, 0xfec00000",
    "mov dword ptr [rdi], 0x24",
    "mov dword ptr [rdi + 0x10], 0x8048",       // pin 10: level
    "mov dword ptr [rdi], 0x25",
    "mov dword ptr [rdi + 0x10], 0",
    "sti",
    "2: out 0xed, al",
    "nop",
    "jmp 2b",
}

fn level_triggered_x2apic() {
    let g = Guest::long_irqchip(apicv_level());
    g.set_eoi(Eoi::X2apic);
    g.expect_done();
    assert_ok!(g.vm.irq_line(10, 1));
    for _ in 0..100 {
        g.expect_done();
        if g.count(0x48) >= 3 {
            break;
        }
    }
    assert!(g.count(0x48) >= 3, "again after each EOI: {}", g.count(0x48));
    assert_ok!(g.vm.irq_line(10, 0));
    for _ in 0..4 {
        g.expect_done();
    }
    let n = g.count(0x48);
    for _ in 0..4 {
        g.expect_done();
    }
    assert_eq!(g.count(0x48), n, "the line is down");
}

payload! { apicv_reroute, 64,
    ioapic_pin_10_level!(),
    "sti",
    "out 0xed, al",
    "nop",
    "cli",
    "out 0xed, al",
    // In service: the pin gets another vector, and the EOI of the old one means nothing to it.
    "mov dword ptr [rdi + 0x10], 0x8059",
    "mov dword ptr [rbx + 0xb0], 0",
    "mov eax, [rdi + 0x10]",
    "out 0xef, eax",
    // To edge and back clears the remote IRR: the line is high.
    "mov dword ptr [rdi + 0x10], 0x10059",
    "mov dword ptr [rdi + 0x10], 0x8059",
    "sti",
    "nop",
    "cli",
    "out 0xed, al",
    "mov dword ptr [rbx + 0xb0], 0",
    "mov eax, [rdi + 0x10]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn level_rerouted_in_service() {
    let g = Guest::long_irqchip(apicv_reroute());
    g.set_eoi(Eoi::None);
    g.expect_done();
    assert_ok!(g.vm.irq_line(10, 1));
    g.expect_done();
    assert_eq!(g.count(0x48), 1);
    let entry = g.report();
    assert_eq!(entry & 0xff, 0x59);
    g.expect_done();
    assert_eq!(g.count(0x59), 1, "the new vector");
    assert_ok!(g.vm.irq_line(10, 0));
    assert_eq!(g.report() & 0x4000, 0, "its EOI was heard");
    g.expect_done();
    assert_eq!((g.count(0x48), g.count(0x59)), (1, 1));
}

payload! { apicv_split, 64,
    x2apic_on!(),
    "sti",
    "2: out 0xed, al",
    "nop",
    "jmp 2b",
}

/// With an I/O APIC in userspace the end of its level-triggered interrupts, and of no others, is an exit to userspace.
fn split_irqchip_hears_of_ends() {
    let g = Guest::long_with(apicv_split(), |vm| {
        let cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() };
        assert_ok!(vm.set(KVM_ENABLE_CAP, &cap));
    });
    g.set_eoi(Eoi::X2apic);
    g.expect_done();
    const LEVEL: u32 = 1 << 15;
    assert_ok!(Routing::new().msi(5, APIC, 0x66 | LEVEL).msi(6, APIC, 0x67).set(&g.vm));
    for (gsi, vector) in [(6, 0x67u8), (5, 0x66)] {
        assert_ok!(g.vm.irq_line(gsi, 1));
        if gsi == 5 {
            g.expect(Event::Exit(Exit::Eoi(vector)));
        }
        g.expect_done();
        g.expect_done();
        assert_eq!(g.count(vector), 1);
    }
    // Nobody hears of it any more.
    assert_ok!(Routing::new().msi(5, APIC, 0x68).set(&g.vm));
    assert_ok!(g.vm.irq_line(5, 1));
    g.expect_done();
    g.expect_done();
    assert_eq!(g.count(0x68), 1);
}

payload! { apicv_both_modes, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov eax, [rbx + 0xf0]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x80], 0x20",
    "out 0xed, al",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x80], 0",
    "sti",
    "mov dword ptr [rbx + 0x300], 0x40050",
    "nop",
    "out 0xed, al",
}

payload! { apicv_no_window, 64,
    x2apic_on!(),
    "mov rbx, 0xfee00000",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x80], 0x77",
    "out 0xed, al",
}

fn window_read() -> Exit {
    Exit::Mmio { write: false, gpa: APIC + 0x80, len: 4, data: vec![] }
}

/// A CPU in x2APIC mode has no registers in memory, whatever the others have there.
fn window_is_not_memory() {
    if krabtest::harness::on_kvm() {
        skip!("KVM shows such a CPU the page that stands for the others' registers");
    }
    let g = Guest::long_irqchip(apicv_both_modes());
    g.set_eoi(Eoi::Xapic);
    let other = g.add_long_vcpu(1, apicv_no_window());
    assert_ok!(other.set_mp_state(KVM_MP_STATE_RUNNABLE));
    assert_eq!(g.report(), 0x1ff);
    g.expect_done();
    assert_eq!(assert_ok!(other.run()), window_read());
    other.reply(&[1, 2, 3, 4]);
    assert_eq!(event_of(&other, g.ram), Event::Report(0x0403_0201));
    let write = assert_ok!(other.run());
    assert_eq!(write, Exit::Mmio { write: true, gpa: APIC + 0x80, len: 4, data: vec![0x77, 0, 0, 0] });
    assert_eq!(event_of(&other, g.ram), Event::Done);
    assert_eq!(g.report(), 0x20, "the other CPU's register");
    g.expect_done();
    assert_eq!(g.count(0x50), 1);
}

payload! { apicv_moved, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x80], 0x30",
    "mov ecx, 0x1b",
    "rdmsr",
    "mov esi, eax",
    "xor eax, 0x300000",            // FEE00000h to FED00000h
    "wrmsr",
    "mov rdi, 0xfed00000",
    "mov eax, [rdi + 0x80]",
    "out 0xef, eax",
    "mov eax, [rbx + 0x80]",        // nothing there now
    "out 0xef, eax",
    "mov eax, esi",
    "wrmsr",
    "mov eax, [rbx + 0x80]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn moved_window() {
    if krabtest::harness::on_kvm() {
        skip!("KVM leaves its page at the old place");
    }
    let g = Guest::long_irqchip(apicv_moved());
    assert_eq!(g.report(), 0x30, "at the new place");
    assert_eq!(assert_ok!(g.cpu.run()), window_read());
    g.cpu.reply(&[9, 0, 0, 0]);
    assert_eq!(g.report(), 9);
    assert_eq!(g.report(), 0x30, "back again");
    g.expect_done();
    // Memory hides the registers, as it would hide any device.
    let ram = g.vm.add_ram(5, APIC, 4096);
    ram.write_u32(APIC + 0x80, 0x1234_5678);
    let regs = kvm_regs { rip: CODE, ..g.cpu.regs() };
    g.cpu.set_regs(&regs);
    assert!(matches!(g.event(), Event::Report(_)));
    assert_eq!(ram.read_u32(APIC + 0x80), 0x30);
}

payload! { apicv_initialized, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "cli",
    "mov dword ptr [rbx + 0x300], 0x40050",
    "mov dword ptr [rbx + 0x80], 0x40",
    "mov qword ptr [0x100000], 1",
    "2: pause",
    "jmp 2b",
}

payload! { apicv_init_sender, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "2: pause",
    "cmp qword ptr [0x100000], 0",
    "je 2b",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4500",      // INIT to CPU 1
    "out 0xed, al",
}

fn init_forgets_interrupts() {
    let g = Guest::long_irqchip(apicv_init_sender());
    let other = g.add_long_vcpu(1, apicv_initialized());
    assert_ok!(other.set_mp_state(KVM_MP_STATE_RUNNABLE));
    beside(&other, || {
        g.expect_done();
        sleep_ms(20);
    });
    assert_eq!(other.mp_state(), KVM_MP_STATE_INIT_RECEIVED);
    let state = lapic(&other);
    assert_eq!([0x80, 0x100, 0x120, 0x200, 0x220].map(|at| register(&state, at)), [0; 5], "TPR, ISR, IRR");
}
