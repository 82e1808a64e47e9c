// SPDX-License-Identifier: GPL-2.0
//! Hypercalls, by either vendor's instruction. Linux "Documentation/virt/kvm/x86/hypercalls.rst".

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::{assert_ok, payload, tests};

tests! { "hypercall";
    unknown;
    of_the_other_vendor_undefined;
}

payload! { lm_hypercall, 64,
    "mov eax, 0x7777",
    "vmcall",
    "mov [0x100000], rax",
    "mov eax, 0x7777",
    "vmmcall",
    "mov [0x100008], rax",
    "out 0xed, al",
}

/// Both vendors' instructions with an unknown number: the answers, and how many were undefined.
fn hypercalls(g: &Guest) -> ([i64; 2], u32) {
    let mut r = g.cpu.regs();
    (r.rbx, r.rcx, r.rdx, r.rsi) = (1, 2, 3, 4);
    g.cpu.set_regs(&r);
    let mut undefined = 0;
    loop {
        match g.event() {
            Event::Exception { vector: 6, rip, .. } => {
                undefined += 1;
                g.set_frame_rip(rip + 3);
            }
            Event::Done => break,
            other => panic!("{other:x?}"),
        }
    }
    let r = g.cpu.regs();
    assert_eq!((r.rbx, r.rcx, r.rdx, r.rsi), (1, 2, 3, 4));
    ([DATA, DATA + 8].map(|at| g.ram.read_u64(at) as i64), undefined)
}

/// An unknown hypercall is answered with -KVM_ENOSYS, and other registers stay. The other vendor's instruction becomes the CPU's own.
fn unknown() {
    assert_eq!(hypercalls(&Guest::long(lm_hypercall())), ([-1000, -1000], 0));
}

fn of_the_other_vendor_undefined() {
    let g = Guest::long(lm_hypercall());
    let quirk = kvm_enable_cap {
        cap: KVM_CAP_DISABLE_QUIRKS2,
        args: [KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into(), 0, 0, 0],
        ..Default::default()
    };
    assert_ok!(g.vm.set(KVM_ENABLE_CAP, &quirk));
    let (mut answers, undefined) = hypercalls(&g);
    answers.sort_unstable();
    assert_eq!((answers, undefined), ([-1000, 0x7777], 1));
}
