// SPDX-License-Identifier: GPL-2.0
//! Control registers that a CPU lets the guest change in parts. SDM "Guest/Host Masks and Read Shadows for CR0 and CR4".

use krabtest::guest::*;
use krabtest::kvm::*;
use krabtest::{assert_ok, payload, tests};

tests! { "control";
    bits_of_the_guests_own;
}

payload! { lm_own_bits, 64,
    // CR4: PGE, DE, PCE and OSXMMEXCPT come and go; CR0.TS as well
    "mov rax, cr4",
    "xor rax, 0x588",
    "mov cr4, rax",
    "mov rbx, cr0",
    "or rbx, 8",
    "mov cr0, rbx",
    "out 0xed, al",
    "mov rcx, cr4",
    "mov rdx, cr0",
    "out 0xed, al",
    "clts",
    "mov rdx, cr0",
    "out 0xed, al",
    // FSGSBASE, which this guest's CPUID does not show
    "mov rax, cr4",
    "or rax, 0x10000",
    "mov cr4, rax",
    "out 0xed, al",
}

/// Bits that a CPU may let the guest change without an exit: userspace sees what the guest sees, and the other way round.
fn bits_of_the_guests_own() {
    let mut g = Guest::bare(|_| ());
    drop(std::mem::replace(&mut g.cpu, {
        let cpu = g.vm.create_vcpu(1);
        let mut cpuid = g.cpuid.clone();
        set_apic_id(&mut cpuid, 1);
        if let Some(leaf) = cpuid.find(7, 0).copied() {
            cpuid.set(7, [leaf.eax, leaf.ebx & !1, leaf.ecx, leaf.edx]);
        }
        assert_ok!(cpu.set_cpuid(&cpuid));
        cpu
    }));
    write_kit(g.ram);
    g.ram.write(CODE, lm_own_bits());
    enter_long(&g.cpu, CODE, STACK);
    let before = g.cpu.sregs();
    g.expect_done();
    let now = g.cpu.sregs();
    // KVM on AMD shows the guest the host's CR4.MCE, which it writes back.
    assert_eq!((now.cr4 & !0x40, now.cr0), (before.cr4 ^ 0x588, before.cr0 | 8));
    // Userspace takes one back.
    g.cpu.set_sregs(&kvm_sregs { cr4: now.cr4 ^ 0x80, ..now });
    g.expect_done();
    let r = g.cpu.regs();
    assert_eq!((r.rcx & !0x40, r.rdx), (before.cr4 ^ 0x508, before.cr0 | 8));
    g.expect_done();
    assert_eq!((g.cpu.regs().rdx, g.cpu.sregs().cr0), (before.cr0, before.cr0));
    match g.event() {
        Event::Exception { vector: 13, error: 0, .. } => {}
        other => panic!("a bit that the guest does not have: {other:x?}"),
    }
    assert_eq!(g.cpu.sregs().cr4 & 0x10000, 0);
}
