// SPDX-License-Identifier: GPL-2.0
//! Deadlines of the local APIC's timer that come while the guest runs, is halted, or is not there at all: each interrupt comes once, and not
//! before its time.

use krabtest::guest::*;
use krabtest::harness::tcg;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::*;
use krabtest::{assert_ok, payload, skip, tests};

tests! { "deadline";
    while_running;
    moved_and_taken_back;
    while_outside;
    woken_before_it(40);
    one_shot_and_periodic_while_running;
    with_another_frequency;
}

// R10: interrupts so far. R9: the deadline. R15: by how much everything takes longer.
macro_rules! deadline_payload {
    ($name:ident, $($line:literal,)*) => {
        payload! { $name, 64,
            "mov rbx, 0xfee00000",
            "mov dword ptr [rbx + 0xf0], 0x1ff",
            "mov dword ptr [rbx + 0x320], 0x40042",     // TSC deadline, vector 0x42
            "mfence",
            "xor r10d, r10d",
            "sti",
            "jmp 99f",
            // Sets a deadline in RAX ticks.
            "91: imul rax, r15",
            "mov r9, rax",
            "call 90f",
            "add rax, r9",
            "mov r9, rax",
            "92: mov rax, r9",
            "mov rdx, rax",
            "shr rdx, 32",
            "mov ecx, 0x6e0",
            "wrmsr",
            "ret",
            // RAX: the TSC.
            "90: lfence",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "ret",
            // Waits for the interrupt: one, and not before the deadline.
            "93: mov r11, [0x7000 + 0x42 * 8]",
            "call 90b",
            "cmp r11, r10",
            "je 93b",
            "cmp rax, r9",
            "jb 98f",
            "inc r10",
            "cmp r11, r10",
            "jne 98f",
            "ret",
            // Nothing comes in RAX ticks.
            "94: imul rax, r15",
            "mov r12, rax",
            "call 90b",
            "add r12, rax",
            "95: call 90b",
            "cmp rax, r12",
            "jb 95b",
            "cmp r10, [0x7000 + 0x42 * 8]",
            "jne 98f",
            "ret",
            "98: mov rsi, [0x7000 + 0x42 * 8]",
            "ud2",
            "99:",
            $($line,)*
        }
    };
}

deadline_payload! { dl_running,
    "mov r8d, 20",
    "2: mov eax, 300000",
    "call 91b",
    "call 93b",
    "dec r8d",
    "jnz 2b",
    // So near that it is there before anybody looks
    "mov r8d, 50",
    "3: mov eax, r8d",
    "shl eax, 5",
    "call 91b",
    "call 93b",
    "dec r8d",
    "jnz 3b",
    "mov eax, 400000",
    "call 94b",
    "out 0xed, al",
}

deadline_payload! { dl_moved,
    // A later one in the place of a near one
    "mov eax, 100000",
    "call 91b",
    "mov eax, 1000000",
    "call 91b",
    "mov eax, 400000",
    "call 94b",
    "call 93b",
    // An earlier one in the place of one that never comes
    "mov rax, 1 << 50",
    "call 91b",
    "mov eax, 100000",
    "call 91b",
    "call 93b",
    // The last value that there is
    "mov r9, -1",
    "call 92b",
    "mov eax, 300000",
    "call 94b",
    // None at all
    "mov eax, 100000",
    "call 91b",
    "xor r9d, r9d",
    "call 92b",
    "mov eax, 400000",
    "call 94b",
    // Held back by the guest: it waits
    "cli",
    "mov eax, 50000",
    "call 91b",
    "mov eax, 400000",
    "call 94b",
    "sti",
    "nop",
    "call 93b",
    // Comes to a halted CPU
    "cli",
    "mov eax, 400000",
    "call 91b",
    "sti",
    "hlt",
    "call 93b",
    // Moved into the past
    "mov rax, 1 << 50",
    "call 91b",
    "mov r9, 1",
    "call 92b",
    "call 93b",
    "mov eax, 400000",
    "call 94b",
    "out 0xed, al",
}

deadline_payload! { dl_outside,
    "2: mov eax, 200000",
    "call 91b",
    "out 0xed, al",
    "nop",
    "call 93b",
    "jmp 2b",
}

deadline_payload! { dl_woken,
    "2: cli",
    "mov eax, 3000000",
    "call 91b",
    "sti",
    "hlt",
    // By another interrupt. The deadline is still to come.
    "inc qword ptr [0x100000]",
    "call 93b",
    "jmp 2b",
}

payload! { dl_counting, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",
    "mov dword ptr [rbx + 0x320], 0x43",        // one-shot
    "sti",
    "mov r8d, 10",
    "2: mov r10, [0x7000 + 0x43 * 8]",
    "mov dword ptr [rbx + 0x380], 2000000",
    "3: pause",
    "mov r11, [0x7000 + 0x43 * 8]",
    "cmp r11, r10",
    "je 3b",
    "cmp dword ptr [rbx + 0x390], 0",           // over
    "jne 9f",
    "dec r8d",
    "jnz 2b",
    "mov dword ptr [rbx + 0x320], 0x20044",     // periodic
    "mov dword ptr [rbx + 0x380], 1000000",
    "4: pause",
    "cmp qword ptr [0x7000 + 0x44 * 8], 20",
    "jb 4b",
    "mov dword ptr [rbx + 0x380], 0",
    "out 0xed, al",
    "9: ud2",
}

/// A guest with TSC deadlines.
fn guest(code: &[u8]) -> Guest {
    let g = Guest::long_irqchip(code);
    if g.vm.cap(KVM_CAP_TSC_DEADLINE_TIMER) <= 0 {
        skip!("no TSC deadline");
    }
    g.show_tsc_deadline();
    g.set_eoi(Eoi::Xapic);
    // Where time passes while the machine does something else, the guest must not be late.
    g.cpu.set_regs(&kvm_regs { r15: if tcg() { 50 } else { 1 }, ..g.cpu.regs() });
    g
}

fn while_running() {
    let g = guest(dl_running());
    g.expect_done();
    assert_eq!(g.count(0x42), 70);
}

fn moved_and_taken_back() {
    let g = guest(dl_moved());
    g.expect_done();
    assert_eq!(g.count(0x42), 5);
}

fn while_outside() {
    let g = guest(dl_outside());
    for round in 0..10 {
        g.expect_done();
        // One more where the machine was busy between the guest's two instructions.
        let r = g.cpu.regs();
        let over = u64::from(g.cpu.msr(0x10).expect("IA32_TSC") >= r.r9);
        let count = g.count(0x42);
        assert!((round..=round + over).contains(&count), "round {round}: {count} interrupts, {r:x?}");
        // With the deadline ahead, and long past
        sleep_ms(if round % 2 == 0 { 0 } else { 20 });
    }
}

fn woken_before_it() {
    let g = guest(dl_woken());
    g.while_running(|| {
        for round in 1..=5 {
            // Awake only by our interrupt, unless this machine is slow.
            while g.ram.read_u64(DATA) < round {
                sleep_ms(1);
                assert_ok!(g.vm.signal_msi(0xfee0_0000, 0x50));
            }
        }
    });
    assert!(g.count(0x42) >= 4 && g.count(0x50) > 0, "{} deadlines, {} others", g.count(0x42), g.count(0x50));
}

fn one_shot_and_periodic_while_running() {
    let g = Guest::long_irqchip(dl_counting());
    g.set_eoi(Eoi::Xapic);
    g.expect_done();
    assert_eq!(g.count(0x43), 10);
    assert!(g.count(0x44) >= 20);
}

/// The guest's ticks are not the host's.
fn with_another_frequency() {
    let host = assert_ok!(guest(dl_running()).cpu.ioctl(KVM_GET_TSC_KHZ, 0));
    for (code, khz, count) in [
        (dl_running(), host * 2, 70),
        (dl_moved(), host * 3, 5),
        (dl_running(), host / 2, 70),
        (dl_moved(), host / 3, 5),
    ] {
        let g = guest(code);
        if g.vm.cap(KVM_CAP_TSC_CONTROL) <= 0 {
            skip!("the CPU does not scale the TSC");
        }
        assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, khz as usize));
        // With the offset of another frequency it shows anything, and deadlines must not wrap around.
        assert!(g.cpu.set_msr(0x10, 1));
        let event = g.event();
        assert_eq!(event, Event::Done, "{khz} of {host} kHz: {:x?}", g.cpu.regs());
        assert_eq!(g.count(0x42), count, "{khz} kHz");
    }
}
