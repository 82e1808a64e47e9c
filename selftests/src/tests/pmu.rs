// SPDX-License-Identifier: GPL-2.0
//! Performance counters of guests: Intel's architectural ones. Where the host has none, or its kernel lends none, there is nothing to count
//! with, and what is left is that nobody says otherwise.

use krabtest::guest::*;
use krabtest::harness::emulated;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::*;
use krabtest::vm::{Device, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "pmu";
    announced_or_not;
    filters_are_checked;
    disabled;
    reserved_bits;
    state_is_kept;
    counts_instructions;
    fixed_counter;
    overflow_interrupts;
    rdpmc_refused;
    filter_applies;
}

const PMC0: u32 = 0xC1;
const SELECT0: u32 = 0x186;
const FIXED0: u32 = 0x309;
const FIXED_CTRL: u32 = 0x38D;
const STATUS: u32 = 0x38E;
const GLOBAL_CTRL: u32 = 0x38F;
const OVF_CTRL: u32 = 0x390;
/// PERFEVTSELx: instructions retired, in the kernel, on.
const INSTRUCTIONS: u64 = 0x42_00C0;

const SET_FILTER: u32 = 0x4020_AEB2;
const ALLOW: u32 = 0;
const DENY: u32 = 1;
const MASKED: u32 = 1;

/// Leaf 0Ah, if guests can have counters of at least version 2.
fn leaf() -> Option<kvm_cpuid_entry2> {
    Device::open().supported_cpuid().find(0xA, 0).copied().filter(|leaf| leaf.eax & 0xFF > 1)
}

fn need() -> kvm_cpuid_entry2 {
    leaf().unwrap_or_else(|| skip!("guests have no performance counters here"))
}

/// `struct kvm_pmu_event_filter` with room for a few events.
#[repr(C)]
#[derive(Default)]
struct EventFilter {
    action: u32,
    nevents: u32,
    fixed: u32,
    flags: u32,
    pad: [u32; 4],
    events: [u64; 4],
}

fn filter(action: u32, events: &[u64]) -> EventFilter {
    let mut filter = EventFilter { action, nevents: events.len() as u32, ..Default::default() };
    filter.events[..events.len()].copy_from_slice(events);
    filter
}

fn disable(flags: u64) -> kvm_enable_cap {
    kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args: [flags, 0, 0, 0], ..Default::default() }
}

/// CPUID, the list of MSRs and the capability tell the same.
fn announced_or_not() {
    let device = Device::open();
    let cpuid = device.supported_cpuid();
    let Some(leaf) = cpuid.find(0xA, 0) else { skip!("no leaf 0Ah") };
    let intel = cpuid.find(0, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"));
    // `struct kvm_msr_list`: a number, and room for as many.
    let mut list = [0u32; 257];
    list[0] = 256;
    assert_ok!(ioctl_out(device.fd, KVM_GET_MSR_INDEX_LIST, &mut list));
    let has = |index| list[1..=list[0] as usize].contains(&index);
    let general = leaf.eax >> 8 & 0xFF;
    if leaf.eax & 0xFF == 0 {
        assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4]);
        assert!(!has(GLOBAL_CTRL) && !has(FIXED0));
        assert!(!intel || device.cap(KVM_CAP_PMU_CAPABILITY) == 0);
        return;
    }
    assert!(leaf.eax & 0xFF <= 2 && (1..=8).contains(&general) && leaf.edx & 0x1F <= 3, "{leaf:x?}");
    assert_eq!(device.cap(KVM_CAP_PMU_CAPABILITY), 1);
    for n in 0..8 {
        assert_eq!((has(PMC0 + n), has(SELECT0 + n)), (n < general, n < general), "counter {n}");
    }
    for n in 0..3 {
        assert_eq!(has(FIXED0 + n), n < leaf.edx & 0x1F, "fixed counter {n}");
    }
    assert!(has(GLOBAL_CTRL) && has(STATUS) && has(FIXED_CTRL));
}

fn filters_are_checked() {
    let vm = Vm::new();
    let _cpu = vm.create_vcpu(0);
    assert_err!(vm.set(SET_FILTER, &filter(2, &[])), EINVAL);
    assert_err!(vm.set(SET_FILTER, &EventFilter { flags: 2, ..Default::default() }), EINVAL);
    assert_err!(vm.set(SET_FILTER, &EventFilter { nevents: 301, ..Default::default() }), E2BIG);
    assert_err!(vm.ioctl(SET_FILTER, 0x10), EFAULT);
    // An entry with bits that mean nothing is refused only where entries have masks.
    assert_ok!(vm.set(SET_FILTER, &filter(DENY, &[1 << 40])));
    assert_err!(vm.set(SET_FILTER, &EventFilter { flags: MASKED, ..filter(DENY, &[1 << 40]) }), EINVAL);
    assert_ok!(vm.set(SET_FILTER, &EventFilter { flags: MASKED, ..filter(DENY, &[0xFF << 56 | 1 << 55 | 0xC0]) }));
    assert_ok!(vm.set(SET_FILTER, &filter(ALLOW, &[])));
}

payload! { pmu_rdpmc, 64,
    "2: rdpmc",
    "out 0xef, eax",
    "jmp 2b",
}
const RDPMC_BYTES: u64 = 2;

fn disabled() {
    let vm = Vm::new();
    if leaf().is_none() {
        assert_err!(vm.set(KVM_ENABLE_CAP, &disable(1)), EINVAL);
        return;
    }
    for flags in [2, 3, 1 << 32] {
        assert_err!(vm.set(KVM_ENABLE_CAP, &disable(flags)), EINVAL, "flags {flags:#x}");
    }
    assert_ok!(vm.set(KVM_ENABLE_CAP, &disable(1)));
    assert_ok!(vm.set(KVM_ENABLE_CAP, &disable(0)));
    let _cpu = vm.create_vcpu(0);
    assert_err!(vm.set(KVM_ENABLE_CAP, &disable(1)), EINVAL, "with a vCPU");
    let g = Guest::long_with(pmu_rdpmc(), |vm| {
        assert_ok!(vm.set(KVM_ENABLE_CAP, &disable(1)));
    });
    assert_eq!(g.exception(RDPMC_BYTES), (13, 0));
    // What is listed can be read and written back, though it is not there.
    assert_eq!(g.cpu.msr(GLOBAL_CTRL), Some(0));
    assert!(g.cpu.set_msr(GLOBAL_CTRL, 0) && !g.cpu.set_msr(GLOBAL_CTRL, 1));
}

fn reserved_bits() {
    let leaf = need();
    let (general, fixed) = (leaf.eax >> 8 & 0xFF, leaf.edx & 0x1F);
    let g = Guest::long(pmu_rdpmc());
    let enables = (1u64 << general) - 1 | ((1 << fixed) - 1) << 32;
    assert_eq!(g.cpu.msr(GLOBAL_CTRL), Some((1 << general) - 1), "after reset");
    for (index, good, bad) in [
        (SELECT0, 0xFFDF_FFFF, 1 << 21),
        (SELECT0 + general - 1, INSTRUCTIONS, 1 << 32),
        (FIXED_CTRL, 0xB, 4),
        (FIXED_CTRL, 0, 1 << (4 * fixed)),
        (GLOBAL_CTRL, enables, 1 << general),
        (GLOBAL_CTRL, 0, 1 << (32 + fixed)),
        (STATUS, 1, 1 << 61),
        (OVF_CTRL, 3 << 62, 1 << 60),
    ] {
        assert!(g.cpu.set_msr(index, good), "{index:#x} := {good:#x}");
        let before = g.cpu.msr(index);
        assert!(!g.cpu.set_msr(index, bad), "{index:#x} := {bad:#x}");
        assert_eq!(g.cpu.msr(index), before);
    }
    assert!(!g.cpu.set_msr(SELECT0 + general, INSTRUCTIONS) || general < 2, "a counter too many");
}

/// What userspace saves, another vCPU takes.
fn state_is_kept() {
    need();
    let values = [
        (PMC0, 0x1234_5678_9ABC),
        (SELECT0, 0x12_00C4),
        (FIXED0, 0xFFFF_FFFF_0000),
        (FIXED_CTRL, 0x8),
        (STATUS, 3),
        (GLOBAL_CTRL, 2),
    ];
    let (g, other) = (Guest::long(pmu_rdpmc()), Guest::long(pmu_rdpmc()));
    for (index, value) in values {
        assert!(g.cpu.set_msr(index, value), "{index:#x}");
    }
    for (index, value) in values {
        let read = g.cpu.msr(index);
        assert_eq!(read, Some(value), "{index:#x}");
        assert!(other.cpu.set_msr(index, read.unwrap_or(0)));
    }
    for (index, value) in values {
        assert_eq!(other.cpu.msr(index), Some(value), "{index:#x}");
    }
}

// Counts a thousand rounds of two instructions, again and again, and reports what RDPMC with ECX = R8 says of each. R9 is the bit in
// the upper half of GLOBAL_CTRL, R10 that in the lower one.
payload! { pmu_count, 64,
    "4: mov ecx, 0x38f",
    "mov eax, r10d",
    "mov edx, r9d",
    "wrmsr",
    "mov ecx, 1000",
    "2: dec ecx",
    "jnz 2b",
    "mov ecx, 0x38f",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, r8d",
    "rdpmc",
    "out 0xef, eax",
    "jmp 4b",
}
/// The first WRMSR, which is carried out for the guest, to the instruction before the second.
const COUNTED: u32 = 1 + 1 + 2000 + 3;

fn check_count(count: u32, wanted: u32, what: &str) {
    // Real CPUs may count their exits, too.
    let spare = if emulated() { 0 } else { 100 };
    assert!((wanted..=wanted + spare).contains(&count), "{what}: counted {count}, wanted {wanted}");
}

fn count_guest(r8: u64, r9: u64, r10: u64) -> Guest {
    let g = Guest::long(pmu_count());
    g.cpu.set_regs(&kvm_regs { r8, r9, r10, ..g.cpu.regs() });
    assert!(g.cpu.set_msr(GLOBAL_CTRL, 0));
    g
}

fn counts_instructions() {
    let general = need().eax >> 8 & 0xFF;
    let last = general - 1;
    let g = count_guest(last.into(), 0, 1 << last);
    assert!(g.cpu.set_msr(SELECT0 + last, INSTRUCTIONS));
    for round in 1..=3 {
        check_count(g.report(), round * COUNTED, "instructions");
    }
    assert!(g.cpu.set_msr(PMC0 + last, 7));
    check_count(g.report(), 7 + COUNTED, "from 7");
    // For user mode, where this guest never is.
    assert!(g.cpu.set_msr(SELECT0 + last, INSTRUCTIONS & !(1 << 17) | 1 << 16));
    assert!(g.cpu.set_msr(PMC0 + last, 0));
    check_count(g.report(), 0, "user mode");
    // Off.
    assert!(g.cpu.set_msr(SELECT0 + last, INSTRUCTIONS & !(1 << 22)));
    check_count(g.report(), 0, "off");
}

fn fixed_counter() {
    if need().edx & 0x1F == 0 {
        skip!("no fixed counters");
    }
    let g = count_guest(0x4000_0000, 1, 0);
    assert!(g.cpu.set_msr(FIXED_CTRL, 1));
    check_count(g.report(), COUNTED, "fixed");
    assert!(g.cpu.set_msr(FIXED0, (1 << 48) - 1));
    check_count(g.report(), COUNTED - 1, "over the top");
    assert_eq!(g.cpu.msr(STATUS), Some(1 << 32));
}

// Runs until vector 51h comes, which counter 0 raises after 5,000 instructions: five a round.
payload! { pmu_overflow, 64,
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x340], 0x51",
    "mov ecx, 0xc1",
    "mov eax, -5000",
    "cdq",
    "wrmsr",
    "mov ecx, 0x186",
    "mov eax, 0x5200c0",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x38f",
    "mov eax, 1",
    "wrmsr",
    "xor esi, esi",
    "sti",
    "2: cmp qword ptr [0x7288], 0",
    "jne 3f",
    "inc rsi",
    "cmp rsi, 1000000",
    "jb 2b",
    "3: cli",
    "mov ecx, 0x38e",
    "rdmsr",
    "out 0xef, eax",
    "mov eax, dword ptr [rbx + 0x340]",
    "out 0xef, eax",
    "mov eax, esi",
    "out 0xef, eax",
    "mov ecx, 0x390",
    "mov eax, 1",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x38e",
    "rdmsr",
    "out 0xef, eax",
    "out 0xed, al",
}

fn overflow_interrupts() {
    need();
    let g = Guest::long_irqchip(pmu_overflow());
    g.set_eoi(Eoi::Xapic);
    let (status, entry, rounds) = (g.report(), g.report(), g.report());
    assert_eq!((status, entry), (1, 0x1_0051), "the entry that was delivered is masked");
    assert!((990..1200).contains(&rounds), "after {rounds} rounds");
    assert_eq!(g.report(), 0, "cleared");
    g.expect_done();
    assert_eq!(g.count(0x51), 1);
}

fn rdpmc_refused() {
    let leaf = need();
    let (general, fixed) = (leaf.eax >> 8 & 0xFF, leaf.edx & 0x1F);
    for ecx in [general, 0x4000_0000 | fixed, 0x8000_0000, 0x2000_0000] {
        let g = Guest::long(pmu_rdpmc());
        g.cpu.set_regs(&kvm_regs { rcx: ecx.into(), ..g.cpu.regs() });
        assert_eq!(g.exception(RDPMC_BYTES), (13, 0), "ECX = {ecx:#x}");
    }
    let g = Guest::long(pmu_rdpmc());
    assert!(g.cpu.set_msr(PMC0, 0x1234));
    g.cpu.set_regs(&kvm_regs { rcx: 0, rdx: 7, ..g.cpu.regs() });
    assert_eq!(g.report(), 0x1234);
    assert_eq!(g.cpu.regs().rdx, 0);
}

fn filter_applies() {
    need();
    let g = count_guest(0, 0, 1);
    assert!(g.cpu.set_msr(SELECT0, INSTRUCTIONS));
    check_count(g.report(), COUNTED, "without a filter");
    assert_ok!(g.vm.set(SET_FILTER, &filter(DENY, &[0xC0])));
    check_count(g.report(), COUNTED, "denied");
    assert_ok!(g.vm.set(SET_FILTER, &filter(ALLOW, &[0xC0])));
    check_count(g.report(), 2 * COUNTED, "allowed");
    assert_ok!(g.vm.set(SET_FILTER, &filter(ALLOW, &[0x3C])));
    check_count(g.report(), 2 * COUNTED, "not allowed");
}
