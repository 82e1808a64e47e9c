// SPDX-License-Identifier: GPL-2.0
//! KVM_FEATURE_PV_EOI: the guest ends an interrupt by clearing a bit in its memory, where the hypervisor has set it as a promise that this is
//! enough.

use super::apicv::without_exits;
use krabtest::guest::*;
use krabtest::harness::{on_kvm, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::vm::Device;
use krabtest::{assert_ok, ioapic_pin_10_level, payload, skip, tests};
use std::sync::atomic::{AtomicBool, Ordering};

tests! { "pv_eoi";
    ends_without_exits;
    waits_if_another_waits;
    each_interrupt_once(60);
    promise_and_end;
    level_triggered_is_ended_for_real;
    word_that_comes_and_goes(60);
    word_without_memory;
    bad_values;
    feature_enforced;
}

const MSR_KVM_PV_EOI_EN: u32 = 0x4B56_4D04;
const FEATURES: u32 = 0x4000_0001;
const FEATURE_PV_EOI: u32 = 1 << 6;
const VECTOR: u8 = 0x50;

/// Where the CPU ends interrupts itself, no promise is needed.
macro_rules! need_promises {
    () => {
        if without_exits() {
            skip!("the CPU ends interrupts without an exit");
        }
    };
}

fn promised(g: &Guest) -> bool {
    g.ram.read_u32(PV_EOI) & 1 != 0
}

/// The vectors in service, as userspace sees them.
fn in_service(g: &Guest) -> Vec<u8> {
    let state: kvm_lapic_state = assert_ok!(g.cpu.get(KVM_GET_LAPIC));
    let isr = |vector: u8| state.regs[0x100 + usize::from(vector / 32) * 16 + usize::from(vector / 8 % 4)] as u8;
    (0..=255).filter(|vector| isr(*vector) & 1 << (vector % 8) != 0).collect()
}

/// With a word for promises.
fn guest(code: &[u8], eoi: Eoi) -> Guest {
    let g = Guest::long_irqchip(code);
    g.set_eoi(eoi);
    assert!(g.cpu.set_msr(MSR_KVM_PV_EOI_EN, PV_EOI | 1));
    g
}

// RBX has the local APIC. 100 interrupts to itself, as often as it is asked to.
payload! { pv_eoi_hundred, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "3: mov r8d, 100",
    "2: mov dword ptr [rbx + 0x300], 0x40050",
    "dec r8d",
    "jnz 2b",
    "out 0xed, al",
    "jmp 3b",
}

fn ends_without_exits() {
    let g = guest(pv_eoi_hundred(), Eoi::Paravirtual);
    let real_ends = || g.ram.read_u64(REAL_ENDS);
    g.expect_done();
    assert_eq!(g.count(VECTOR), 100, "each lets the next one through");
    let real = real_ends();
    println!("# {real} of 100 ended for real");
    assert!(if without_exits() { real == 100 } else { real <= 20 }, "{real} of 100 ended for real");
    assert!(!promised(&g), "no promise outlives the guest's run");
    assert_eq!(in_service(&g), []);
    assert!(g.cpu.set_msr(MSR_KVM_PV_EOI_EN, 0));
    let before = real_ends();
    g.expect_done();
    assert_eq!((g.count(VECTOR), real_ends() - before), (200, 100), "turned off");
}

// Long work without an exit behind each interrupt: RDI rounds.
payload! { pv_eoi_work, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "2: mov dword ptr [rbx + 0x300], 0x40050",
    "mov ecx, 200000",
    "3: dec ecx",
    "jnz 3b",
    "dec edi",
    "jnz 2b",
    "out 0xed, al",
}

/// QEMU's SVM keeps an interrupt that was injected until the guest's next exit, and delivers it again when something stops the CPU before
/// that: where it counts instructions, any timer of the machine.
fn each_interrupt_once() {
    if on_kvm() && tcg() {
        skip!("QEMU delivers KVM's injected interrupts more than once");
    }
    let g = guest(pv_eoi_work(), Eoi::Paravirtual);
    let rounds = 400;
    let mut r = g.cpu.regs();
    r.rdi = rounds;
    g.cpu.set_regs(&r);
    g.expect_done();
    assert_eq!(g.count(VECTOR), rounds);
}

payload! { pv_eoi_two_at_once, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x300], 0x40050",
    "mov dword ptr [rbx + 0x300], 0x40060",
    "sti",
    "nop",
    "out 0xed, al",
}

fn waits_if_another_waits() {
    need_promises!();
    let g = guest(pv_eoi_two_at_once(), Eoi::Paravirtual);
    g.expect_done();
    assert_eq!((g.count(0x50), g.count(0x60)), (1, 1));
    assert!(g.ram.read_u64(REAL_ENDS) >= 1, "the end of the first one lets the second in");
}

// The handlers end nothing: what follows is with interrupts in service. The word is reported after each step.
payload! { pv_eoi_steps, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "mov dword ptr [rbx + 0x300], 0x40060",
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x300], 0x40050",     // waits for the end of 0x60
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0xb0], 0",
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "btr dword ptr [0x7808], 0",                // ends 0x50
    "mov dword ptr [rbx + 0x300], 0x40051",
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0x300], 0x40060",     // in the middle of 0x51
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "mov dword ptr [rbx + 0xb0], 0",            // the promise is not used
    "out 0xed, al",
    "btr dword ptr [0x7808], 0",
    "jc 2f",
    "mov dword ptr [rbx + 0xb0], 0",
    "2: out 0xed, al",
}

fn promise_and_end() {
    need_promises!();
    if on_kvm() {
        skip!("KVM makes fewer promises: only where its cache of the highest vector in service is valid");
    }
    let g = guest(pv_eoi_steps(), Eoi::None);
    assert_eq!(g.report(), 1);
    assert!(!promised(&g), "taken back outside of the guest");
    assert_eq!(in_service(&g), [0x60]);
    assert_eq!(g.report(), 1, "promised again");
    assert_eq!(g.report(), 0, "another one waits for the end");
    assert_eq!((g.count(0x50), g.report(), g.count(0x50)), (0, 1, 1));
    assert_eq!(in_service(&g), [0x50]);
    assert_eq!(g.report(), 1);
    assert_eq!((in_service(&g), g.count(0x51)), (vec![0x51], 1), "0x50 is over");
    assert_eq!(g.report(), 1);
    assert_eq!(in_service(&g), [0x51, 0x60]);
    g.expect_done();
    assert_eq!(in_service(&g), [0x51], "one end, one interrupt");
    g.expect_done();
    assert_eq!(in_service(&g), []);
}

payload! { pv_eoi_level, 64,
    ioapic_pin_10_level!(),
    "sti",
    "2: out 0xed, al",
    "mov eax, [0x7808]",
    "out 0xef, eax",
    "jmp 2b",
}

fn level_triggered_is_ended_for_real() {
    let g = guest(pv_eoi_level(), Eoi::None);
    g.expect_done();
    assert_ok!(g.vm.irq_line(10, 1));
    assert_eq!(g.report(), 0, "the I/O APIC must hear of the end");
    assert_eq!((in_service(&g), g.count(0x48)), (vec![0x48], 1));
}

payload! { pv_eoi_endless, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "2: mov dword ptr [rbx + 0x300], 0x40050",
    "nop",
    "inc qword ptr [0x100000]",
    "jmp 2b",
}

/// The word's page is unmapped again and again, and is the same when it is back: between promise and end it may be out of reach.
fn word_that_comes_and_goes() {
    let g = guest(pv_eoi_endless(), Eoi::Paravirtual);
    let page = g.ram.at(PV_EOI & !0xFFF).cast();
    // SAFETY: a file of our own takes the place of one page of the guest's memory, with its contents.
    unsafe {
        let fd = libc::memfd_create(c"word".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        assert_eq!(libc::pwrite(fd, page, 4096, 0), 4096);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mmap(page, 4096, prot, libc::MAP_SHARED | libc::MAP_FIXED, fd, 0), page);
        libc::close(fd);
    }
    let sent = || g.ram.read_u64(DATA);
    let stop = AtomicBool::new(false);
    g.while_running(|| {
        std::thread::scope(|s| {
            let (stop, page) = (&stop, page as usize);
            s.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the file keeps what is in the page.
                    assert_eq!(unsafe { libc::madvise(page as *mut _, 4096, libc::MADV_DONTNEED) }, 0);
                }
            });
            let went_on = g.ram.wait_u64(DATA, 2000, 20_000);
            stop.store(true, Ordering::Relaxed);
            assert!(went_on, "the guest stands still after {} interrupts", sent());
        });
    });
    let (sent, taken, real_ends) = (sent(), g.count(VECTOR), g.ram.read_u64(REAL_ENDS));
    println!("# {sent} interrupts, {taken} taken, {real_ends} ended for real");
    assert!(taken == sent || taken == sent + 1, "{taken} of {sent}");
}

fn word_without_memory() {
    const WORD: u64 = 0x40_0000;
    // The handlers know of no promise: each interrupt is ended for real.
    let g = Guest::long_irqchip(pv_eoi_hundred());
    g.set_eoi(Eoi::Xapic);
    let ram = g.vm.add_ram(1, WORD, 0x1000);
    assert!(g.cpu.set_msr(MSR_KVM_PV_EOI_EN, WORD | 1));
    g.expect_done();
    assert_eq!((g.count(VECTOR), ram.read_u32(WORD)), (100, 0), "promises that nobody uses");
    assert_ok!(g.vm.set_slot(1, 0, WORD, 0, 0));
    g.expect_done();
    assert_eq!(g.count(VECTOR), 200, "no memory");
    ram.unmap();
}

fn bad_values() {
    let g = Guest::long_irqchip(pv_eoi_hundred());
    assert_eq!(g.cpu.msr(MSR_KVM_PV_EOI_EN), Some(0));
    for bad in [PV_EOI | 2, PV_EOI | 3] {
        assert!(!g.cpu.set_msr(MSR_KVM_PV_EOI_EN, bad), "{bad:#x}: not aligned to 4 bytes");
    }
    assert_eq!(g.cpu.msr(MSR_KVM_PV_EOI_EN), Some(0));
    assert!(g.cpu.set_msr(MSR_KVM_PV_EOI_EN, PV_EOI | 1));
    assert_eq!(g.cpu.msr(MSR_KVM_PV_EOI_EN), Some(PV_EOI | 1));
}

payload! { pv_eoi_write, 64,
    "mov ecx, 0x4b564d04",
    "mov eax, 0x7809",
    "xor edx, edx",
    "wrmsr",
    "out 0xed, al",
}

fn feature_enforced() {
    let supported = Device::open().supported_cpuid();
    let features = supported.find(FEATURES, 0).expect("the paravirtual features");
    assert!(features.eax & FEATURE_PV_EOI != 0, "{:#x}", features.eax);
    let enforce = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args: [1, 0, 0, 0], ..Default::default() };
    for shown in [true, false] {
        let mut g = Guest::long_irqchip(pv_eoi_write());
        assert_ok!(g.cpu.set(KVM_ENABLE_CAP, &enforce));
        let eax = if shown { features.eax } else { features.eax & !FEATURE_PV_EOI };
        g.cpuid.set(FEATURES, [eax, features.ebx, features.ecx, features.edx]);
        assert_ok!(g.cpu.set_cpuid(&g.cpuid));
        if !shown {
            assert_eq!(g.exception(2), (13, 0), "a feature that CPUID does not show");
        }
        g.expect_done();
        assert_eq!(g.cpu.msr(MSR_KVM_PV_EOI_EN), Some(if shown { PV_EOI | 1 } else { 0 }));
    }
}
