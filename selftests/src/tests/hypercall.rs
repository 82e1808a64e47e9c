// SPDX-License-Identifier: GPL-2.0
//! Hypercalls, by either vendor's instruction. Linux "Documentation/virt/kvm/x86/hypercalls.rst".

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{ioctl_out, EINVAL};
use krabtest::vm::{Exit, Vm};
use krabtest::{assert_err, assert_ok, payload, tests};

tests! { "hypercall";
    unknown;
    of_the_other_vendor_undefined;
    clock_pairing;
    map_gpa_range;
    map_gpa_range_refused;
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

// One hypercall with what is in the registers, by the instruction that is not the CPU's own first: that becomes the CPU's own.
payload! { lm_one_hypercall, 64,
    "vmcall",
    "mov [0x100000], rax",
    "out 0xed, al",
}

/// The answer to a hypercall by 64-bit code.
fn call(g: &Guest, number: u64, [rbx, rcx, rdx]: [u64; 3]) -> i64 {
    g.cpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, rax: number, rbx, rcx, rdx, ..Default::default() });
    g.expect_done();
    g.ram.read_u64(DATA) as i64
}

const CLOCK_PAIRING: u64 = 9;
const MAP_GPA_RANGE: u64 = 12;

/// The host's real time and the guest's TSC at one moment, where the host keeps time by the TSC. Without that there is no answer.
fn clock_pairing() {
    let g = Guest::long(lm_one_hypercall());
    let at = DATA + 0x1000;
    g.ram.write(at, &[0xaa; 64]);
    assert_eq!(call(&g, CLOCK_PAIRING, [at, 1, 0]), -95, "another clock");
    let mut clock = kvm_clock_data::default();
    assert_ok!(ioctl_out(g.vm.fd, KVM_GET_CLOCK, &mut clock));
    let real_ns = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos();
    let (tsc, real) = (g.cpu.msr(0x10), real_ns());
    let answer = call(&g, CLOCK_PAIRING, [at, 0, 0]);
    if clock.flags & KVM_CLOCK_HOST_TSC == 0 {
        assert!(matches!(answer, 0 | -95), "{answer}");
    } else {
        assert_eq!(answer, 0);
    }
    if answer != 0 {
        assert!(g.ram.read(at, 64).iter().all(|byte| *byte == 0xaa));
        return;
    }
    let [sec, nsec, guest_tsc] = [at, at + 8, at + 16].map(|at| g.ram.read_u64(at));
    let then = u128::from(sec) * 1_000_000_000 + u128::from(nsec);
    assert!(nsec < 1_000_000_000 && real <= then && then <= real_ns(), "{sec} s {nsec} ns");
    assert!(tsc.is_some_and(|tsc| tsc < guest_tsc) && Some(guest_tsc) < g.cpu.msr(0x10));
    assert!(g.ram.read(at + 24, 40).iter().all(|byte| *byte == 0));
    // Where there is no memory.
    assert_eq!(call(&g, CLOCK_PAIRING, [0xd000_0000, 0, 0]), -14);
    assert_eq!(call(&g, CLOCK_PAIRING, [u64::MAX - 7, 0, 0]), -14);
}

fn exit_hypercalls(mask: u64) -> kvm_enable_cap {
    kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, args: [mask, 0, 0, 0], ..Default::default() }
}

/// KVM_CAP_EXIT_HYPERCALL: userspace answers.
fn map_gpa_range() {
    let g = Guest::long_with(lm_one_hypercall(), |vm| {
        assert_eq!(vm.cap(KVM_CAP_EXIT_HYPERCALL), 1 << MAP_GPA_RANGE);
        assert_ok!(vm.set(KVM_ENABLE_CAP, &exit_hypercalls(1 << MAP_GPA_RANGE)));
    });
    for (answer, seen) in [(0u64, 0i64), (-22i64 as u64, -22), (0x1_2345_6789, 0x1_2345_6789)] {
        let r = kvm_regs { rax: MAP_GPA_RANGE, rbx: 0x20_0000, rcx: 0x200, rdx: 0x11, ..Default::default() };
        g.cpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..r });
        assert_eq!(g.event(), Event::Exit(Exit::Other(KVM_EXIT_HYPERCALL)));
        // SAFETY: the exit's arm of the union, plain data.
        let hypercall = unsafe { &mut g.cpu.page().__bindgen_anon_1.hypercall };
        assert_eq!((hypercall.nr, hypercall.args[..3].to_vec()), (MAP_GPA_RANGE, vec![0x20_0000, 0x200, 0x11]));
        // SAFETY: likewise.
        assert_eq!((hypercall.ret, unsafe { hypercall.__bindgen_anon_1.flags } & 1), (0, 1));
        hypercall.ret = answer;
        g.expect_done();
        assert_eq!(g.ram.read_u64(DATA) as i64, seen);
    }
    // What is no range is answered in the kernel.
    for bad in
        [[0x20_0001, 1, 0], [0x20_0000, 0, 0], [0x20_0000, u64::MAX, 0], [0xffff_ffff_ffff_f000, u64::MAX - 1, 0]]
    {
        assert_eq!(call(&g, MAP_GPA_RANGE, bad), -22, "{bad:x?}");
    }
}

fn map_gpa_range_refused() {
    let g = Guest::long(lm_one_hypercall());
    for mask in [1, 1 << 11, 1 << 13, u64::MAX] {
        assert_err!(g.vm.set(KVM_ENABLE_CAP, &exit_hypercalls(mask)), EINVAL, "{mask:#x}");
    }
    assert_eq!(call(&g, MAP_GPA_RANGE, [0, 1, 0]), -1000, "nobody asked for it");
    // It may be turned on and off while there are vCPUs.
    assert_ok!(g.vm.set(KVM_ENABLE_CAP, &exit_hypercalls(1 << MAP_GPA_RANGE)));
    assert_eq!(call(&g, MAP_GPA_RANGE, [1, 1, 0]), -22);
    assert_ok!(g.vm.set(KVM_ENABLE_CAP, &exit_hypercalls(0)));
    assert_eq!(call(&g, MAP_GPA_RANGE, [1, 1, 0]), -1000);
    assert_eq!(Vm::new().cap(KVM_CAP_EXIT_HYPERCALL), 1 << MAP_GPA_RANGE);
}
