// SPDX-License-Identifier: GPL-2.0
//! The frequency of a guest's TSC, and what depends on it: KVM_SET_TSC_KHZ on a VM and on a vCPU, the offset, the paravirtual clock.

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Vcpu, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "tsc";
    frequencies;
    frequency_of_a_vm;
    scaled;
    scaled_clock;
    too_slow_without_scaling;
    later_vcpus_follow;
}

payload! { ts_read, 64,
    "2: lfence",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rbx, rax",
    "out 0xed, al",
    "jmp 2b",
}

fn khz(g: &Guest) -> i64 {
    assert_ok!(g.cpu.ioctl(KVM_GET_TSC_KHZ, 0)).into()
}

/// What the guest reads.
fn guest_tsc(g: &Guest) -> u64 {
    g.expect_done();
    g.cpu.regs().rbx
}

fn host_tsc() -> u64 {
    // SAFETY: it is on every CPU that a hypervisor runs on.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Guest ticks for a thousand of the host's, over `ms` milliseconds.
fn rate(g: &Guest, ms: u64) -> u64 {
    guest_tsc(g);
    let (host, guest) = (host_tsc(), guest_tsc(g));
    sleep_ms(ms);
    let (later, guest_later) = (host_tsc(), guest_tsc(g));
    (guest_later - guest) * 1000 / (later - host)
}

/// KVM_VCPU_TSC_OFFSET.
fn attribute(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr { group: 0, attr: 0, addr: offset as *mut u64 as u64, flags: 0 }
}

fn offset(cpu: &Vcpu) -> u64 {
    let mut offset = 0;
    assert_ok!(cpu.set(KVM_GET_DEVICE_ATTR, &attribute(&mut offset)));
    offset
}

fn set_offset(cpu: &Vcpu, mut offset: u64) {
    assert_ok!(cpu.set(KVM_SET_DEVICE_ATTR, &attribute(&mut offset)));
}

fn has_scaling(vm: &Vm) -> bool {
    assert_eq!(vm.cap(KVM_CAP_TSC_CONTROL), vm.cap(KVM_CAP_VM_TSC_CONTROL));
    vm.cap(KVM_CAP_TSC_CONTROL) > 0
}

fn frequencies() {
    let g = Guest::long(ts_read());
    if g.vm.cap(KVM_CAP_GET_TSC_KHZ) <= 0 {
        skip!("KVM_CAP_GET_TSC_KHZ is 0");
    }
    let host = khz(&g);
    assert!((50_000..20_000_000).contains(&host), "{host}");
    assert_eq!(i64::from(assert_ok!(g.vm.ioctl(KVM_GET_TSC_KHZ, 0))), host);
    let set = |khz: i64| g.cpu.ioctl(KVM_SET_TSC_KHZ, khz as usize);
    // Its own, all but its own, and the word for its own.
    for (wanted, seen) in
        [(host, host), (host + host / 5000, host + host / 5000), (host - host / 5000, host - host / 5000), (0, host)]
    {
        assert_ok!(set(wanted));
        assert_eq!(khz(&g), seen);
        assert!((900..1100).contains(&rate(&g, 20)));
    }
    if has_scaling(&g.vm) {
        assert_err!(set(0x7fff_ffff), EINVAL, "more than there can be");
        assert_err!(set(0xffff_ffff), EINVAL, "more than there can be");
    } else {
        assert_err!(set(host / 2), EINVAL, "slower than the host's, without scaling");
    }
}

fn frequency_of_a_vm() {
    let host = khz(&Guest::long(ts_read()));
    let set = |vm: &Vm, khz: i64| vm.ioctl(KVM_SET_TSC_KHZ, khz as usize);
    let mut scales = false;
    let g = Guest::long_with(ts_read(), |vm| {
        scales = has_scaling(vm);
        if scales {
            assert_err!(set(vm, 0x7fff_ffff), EINVAL, "more than there can be");
        }
        assert_ok!(set(vm, host * 2));
        assert_eq!(i64::from(assert_ok!(vm.ioctl(KVM_GET_TSC_KHZ, 0))), host * 2);
    });
    assert_eq!(khz(&g), host * 2);
    assert_err!(set(&g.vm, host), EINVAL, "there is a vCPU");
    assert_eq!(i64::from(assert_ok!(g.vm.ioctl(KVM_GET_TSC_KHZ, 0))), host * 2);
    // It began at 0 with the vCPU.
    let first = guest_tsc(&g);
    // KVM's does so only where the CPU scales.
    assert!(first < host as u64 * 2 * 5000 || on_kvm() && !scales, "{first}");
    if scales {
        assert!((1900..2100).contains(&rate(&g, 20)));
    }
    // A second vCPU shows the same.
    let second = g.add_long_vcpu(1, ts_read());
    let before = guest_tsc(&g);
    assert_eq!(event_of(&second, g.ram), Event::Done);
    let between = second.regs().rbx;
    let after = guest_tsc(&g);
    assert!((before..=after).contains(&between), "{before} {between} {after}");
}

fn scaled() {
    let g = Guest::long(ts_read());
    if !has_scaling(&g.vm) {
        skip!("the CPU does not scale the TSC");
    }
    let host = khz(&g);
    for (times, wanted) in [(2, 2000), (5, 5000), (1, 1000)] {
        assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, (host * times) as usize));
        assert_eq!(khz(&g), host * times);
        let rate = rate(&g, 20);
        assert!((wanted * 19 / 20..wanted * 21 / 20).contains(&rate), "{rate} for {wanted}");
    }
    assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, (host / 4) as usize));
    assert!((230..270).contains(&rate(&g, 20)));
    // What userspace writes and reads are the guest's ticks, and what the guest reads goes on from there.
    assert!(g.cpu.set_msr(0x10, 1 << 50));
    let (read, seen) = (g.cpu.msr(0x10).expect("IA32_TSC"), guest_tsc(&g));
    assert!(read >= 1 << 50 && seen >= read && seen - (1 << 50) < 1 << 30, "{read:#x}, then {seen:#x}");
    // The offset comes after scaling.
    let offset = offset(&g.cpu);
    let (low, seen, high) = (host_tsc() / 4, guest_tsc(&g), host_tsc() / 4 + 1);
    let since = seen.wrapping_sub(offset);
    assert!(since >= low - low / 1000 && since <= high + high / 1000, "{low} {since} {high}");
    set_offset(&g.cpu, offset.wrapping_add(1 << 52));
    assert!(guest_tsc(&g) - seen > 1 << 52);
}

/// The paravirtual clock of a guest with another frequency: what it computes from its own TSC is the VM's clock.
fn scaled_clock() {
    let g = Guest::long(ts_read());
    if !has_scaling(&g.vm) {
        skip!("the CPU does not scale the TSC");
    }
    let host = khz(&g);
    for khz in [host * 3, host / 3] {
        assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, khz as usize));
        assert!(g.cpu.set_msr(0x4b56_4d01, DATA | 1));
        guest_tsc(&g);
        let (stamp, base) = (g.ram.read_u64(DATA + 8), g.ram.read_u64(DATA + 16));
        let (multiplier, shift) = (g.ram.read_u32(DATA + 24), g.ram.read(DATA + 28, 1)[0] as i8);
        sleep_ms(20);
        let ticks = guest_tsc(&g) - stamp;
        let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
        let now = base + (u128::from(ticks) * u128::from(multiplier) >> 32) as u64;
        let mut clock = kvm_clock_data::default();
        assert_ok!(sys::ioctl_out(g.vm.fd, KVM_GET_CLOCK, &mut clock));
        let late = clock.clock.wrapping_sub(now) as i64;
        assert!((-1_000..5_000_000).contains(&late), "{khz} kHz: {now} ns, but the clock shows {}", clock.clock);
        assert!(g.cpu.set_msr(0x4b56_4d01, 0));
    }
}

/// A frequency above the host's, on a CPU that does not scale: the TSC is set forward now and then.
fn too_slow_without_scaling() {
    let g = Guest::long(ts_read());
    if has_scaling(&g.vm) {
        skip!("the CPU scales the TSC");
    }
    assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, (khz(&g) * 3) as usize));
    guest_tsc(&g);
    let rate = rate(&g, 200);
    assert!((2000..4000).contains(&rate) || on_kvm(), "{rate}");
}

/// An offset that userspace sets, or that comes of a TSC it sets, is that of vCPUs made later and of those set to about the same TSC.
fn later_vcpus_follow() {
    let g = Guest::long(ts_read());
    let first = offset(&g.cpu);
    let second = g.add_vcpu(1);
    assert_eq!(offset(&second), first, "made alike");
    let moved = first.wrapping_add(1 << 50);
    set_offset(&g.cpu, moved);
    assert_eq!((offset(&g.cpu), offset(&second)), (moved, first), "only one is set");
    let third = g.add_vcpu(2);
    assert_eq!(offset(&third), moved, "made later");
    assert!(second.set_msr(0x10, 0));
    assert_eq!(offset(&second), moved, "0 is the TSC of the others");
    assert!(second.set_msr(0x10, 1 << 40));
    let far = offset(&second);
    assert!(far != moved, "far from the others");
    set_offset(&second, moved);
    assert!(third.set_msr(0x10, host_tsc().wrapping_add(moved)));
    assert_eq!(offset(&third), moved, "set to about what the offset gives");

    // The first TSC that userspace sets is not taken for that of a VM that has just begun; the next one is like the first.
    let g = Guest::long(ts_read());
    let begun = offset(&g.cpu);
    assert!(g.cpu.set_msr(0x10, 1));
    let set = offset(&g.cpu);
    assert!(set != begun, "the first to be set");
    assert!(g.cpu.set_msr(0x10, 1000));
    assert_eq!(offset(&g.cpu), set, "the next");
}
