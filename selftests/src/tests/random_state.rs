// SPDX-License-Identifier: GPL-2.0
//! Random states of a vCPU: whatever userspace sets is refused with EINVAL, refused by the entry (KVM_EXIT_FAIL_ENTRY with the CPU's reason),
//! or runs, and neither the host nor another VM notices. SDM "Checks on the Guest State Area"; APM Vol. 2 "Canonicalization and
//! Consistency Checks".
//!
//! `KRAB_STATES` says how many, `KRAB_SEED` which. A few thousand with a fixed seed are part of every run; the whole hundred thousand are
//! `KRAB_STATES=100000 krab-selftests random_state`, a minute or two in Bochs.

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::rng::Rng;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Ram, Vcpu};
use krabtest::{assert_ok, payload, skip, tests};
use std::collections::BTreeMap;

tests! { "random_state";
    states(600);
    refused_states_change_nothing;
}

/// A failed entry's basic reason is one of these, with bit 31. SDM "VM-Entry Failures During or After Loading Guest State".
const INTEL_REASONS: [u64; 2] = [0x8000_0021, 0x8000_0022];

payload! { rs_neighbour, 64,
    "2: mov rcx, 100",
    "xor rax, rax",
    "3: imul rax, rax, 31",
    "add rax, rcx",
    "movq xmm3, rax",
    "mov [0x100000 + rcx * 8], rax",
    "loop 3b",
    "movq rax, xmm3",
    "mov rdx, rax",
    "shr rdx, 32",
    "xor eax, edx",
    "out 0xef, eax",
    "jmp 2b",
}

/// What the neighbour reports each time.
fn neighbours_answer() -> u32 {
    let sum = (1..=100u64).rev().fold(0u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
    sum as u32 ^ (sum >> 32) as u32
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn segments(s: &mut kvm_sregs) -> [&mut kvm_segment; 8] {
    [&mut s.cs, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss, &mut s.tr, &mut s.ldt]
}

/// One field of a segment becomes another.
fn change_segment(rng: &mut Rng, segment: &mut kvm_segment) {
    match rng.below(10) {
        0 => segment.base = rng.edge(),
        1 => segment.limit = rng.edge() as u32,
        2 => segment.selector = rng.edge() as u16,
        3 => segment.type_ = rng.below(16) as u8,
        4 => segment.present ^= 1,
        5 => segment.dpl = rng.below(4) as u8,
        6 => segment.db ^= 1,
        7 => segment.s ^= 1,
        8 => segment.l ^= 1,
        _ => segment.g ^= 1,
    }
    segment.unusable = rng.one_in(8) as u8;
    segment.avl = rng.one_in(16) as u8;
}

/// One thing of the system registers becomes another: mostly bits that exist.
fn change_sregs(rng: &mut Rng, s: &mut kvm_sregs) {
    match rng.below(16) {
        0 => s.cr0 ^= 1 << rng.pick(&[0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31]),
        1 => s.cr0 = rng.edge(),
        2 => s.cr4 ^= 1 << rng.below(24),
        3 => s.cr4 = rng.edge(),
        4 => s.efer ^= 1 << rng.pick(&[0, 8, 10, 11, 12, 14]),
        5 => s.efer = rng.edge(),
        6 => s.cr3 = if rng.one_in(2) { rng.below(1024) << 12 } else { rng.edge() },
        7 => s.cr2 = rng.edge(),
        8 => s.cr8 = if rng.one_in(4) { rng.edge() } else { rng.below(16) },
        9 => (s.gdt.base, s.gdt.limit) = (rng.edge(), rng.edge() as u16),
        10 => (s.idt.base, s.idt.limit) = (rng.edge(), rng.edge() as u16),
        11 if rng.one_in(8) => s.apic_base = rng.edge(),
        _ => {
            let which = rng.below(8) as usize;
            change_segment(rng, segments(s)[which]);
        }
    }
}

fn change_regs(rng: &mut Rng, r: &mut kvm_regs) {
    for register in [&mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.r15] {
        *register = rng.edge();
    }
    if rng.one_in(3) {
        r.rsp = rng.edge();
    }
    match rng.below(4) {
        0 => r.rip = rng.edge(),
        1 => r.rip = rng.below(4 << 20),
        _ => {}
    }
    match rng.below(4) {
        0 => r.rflags = rng.edge(),
        1 => r.rflags ^= 1 << rng.below(22),
        _ => {}
    }
}

fn random_events(rng: &mut Rng) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events::default();
    let bit = |rng: &mut Rng, n| rng.one_in(n) as u8;
    e.exception.injected = bit(rng, 4);
    e.exception.nr = if rng.one_in(4) { rng.word() as u8 } else { rng.below(32) as u8 };
    e.exception.has_error_code = bit(rng, 2);
    e.exception.error_code = rng.edge() as u32;
    e.interrupt.injected = bit(rng, 6);
    e.interrupt.nr = rng.word() as u8;
    e.interrupt.soft = bit(rng, 8);
    e.interrupt.shadow = rng.below(4) as u8;
    e.nmi.injected = bit(rng, 8);
    e.nmi.pending = rng.below(4) as u8;
    e.nmi.masked = bit(rng, 4);
    e.flags = if rng.one_in(16) { rng.edge() as u32 } else { rng.below(2) as u32 * 5 };
    e
}

/// MSRs that are part of what an entry loads.
const MSRS: [u32; 12] = [
    0x174,
    0x175,
    0x176,
    0x1d9,
    0x277,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
];

/// States to start from: each mode's, of a guest that works.
fn good_states() -> Vec<(kvm_sregs, kvm_regs)> {
    let of = |g: Guest| (g.cpu.sregs(), g.cpu.regs());
    let long = of(Guest::long(&[]));
    let protected = of(Guest::protected(&[]));
    let mut paging = protected;
    paging.0.cr0 |= 0x8000_0000;
    paging.0.cr3 = PD;
    paging.0.cr4 |= 0x10; // PSE: the kit's page directory holds large pages
    let mut pae = protected;
    pae.0.cr0 |= 0x8000_0000;
    pae.0.cr3 = PDPT;
    pae.0.cr4 |= 0x20;
    let mut compatibility = long;
    compatibility.0.cs = protected.0.cs;
    let mut v86 = paging;
    v86.1.rflags |= 0x2_0000;
    let mut user = long;
    user.0.cs.dpl = 3;
    user.0.cs.selector = SEL_USER_CODE;
    user.0.ss.dpl = 3;
    user.0.ss.selector = SEL_USER_DATA;
    vec![of(Guest::real(&[])), protected, paging, pae, long, compatibility, v86, user]
}

/// What became of the states, for the log.
#[derive(Default)]
struct Tally(BTreeMap<String, u64>);

impl Tally {
    fn count(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }
}

/// Everything that makes a state up, as far as userspace can set it. What is refused stays as it was.
/// Returns whether an interrupt is to be injected.
fn set_state(cpu: &Vcpu, rng: &mut Rng, good: &(kvm_sregs, kvm_regs), tally: &mut Tally) -> bool {
    let (mut s, mut r) = *good;
    for _ in 0..rng.below(6) {
        change_sregs(rng, &mut s);
    }
    if rng.one_in(3) {
        change_regs(rng, &mut r);
    }
    match cpu.set(KVM_SET_SREGS, &s) {
        Ok(_) => tally.count("sregs taken"),
        Err(EINVAL) => {
            tally.count("sregs refused");
            cpu.set_sregs(&good.0);
        }
        Err(e) => panic!("KVM_SET_SREGS: {e:?} for {s:x?}"),
    }
    cpu.set_regs(&r);
    if rng.one_in(4) {
        let index = *rng.pick(&MSRS);
        let value = rng.edge();
        tally.count(if cpu.set_msr(index, value) { "MSR taken" } else { "MSR refused" });
    }
    let events = if rng.one_in(3) { random_events(rng) } else { kvm_vcpu_events { flags: 5, ..Default::default() } };
    let mut injected = false;
    match cpu.set(KVM_SET_VCPU_EVENTS, &events) {
        Ok(_) => injected = events.interrupt.injected != 0,
        Err(EINVAL) => {
            tally.count("events refused");
            // What an earlier state left undelivered is not this one's.
            assert_ok!(cpu.set(KVM_SET_VCPU_EVENTS, &kvm_vcpu_events { flags: 5, ..Default::default() }));
        }
        Err(e) => panic!("KVM_SET_VCPU_EVENTS: {e:?} for {events:x?}"),
    }
    if rng.one_in(8) {
        let mut d = kvm_debugregs::default();
        d.db.iter_mut().for_each(|db| *db = rng.edge());
        (d.dr6, d.dr7) = (rng.edge(), if rng.one_in(2) { rng.below(1 << 16) } else { rng.edge() });
        match cpu.set(KVM_SET_DEBUGREGS, &d) {
            Ok(_) => {}
            Err(EINVAL) => tally.count("debug registers refused"),
            Err(e) => panic!("KVM_SET_DEBUGREGS: {e:?} for {d:x?}"),
        }
    }
    injected
}

/// Whether the entry may refuse a state whose system registers were taken: for RIP, RFLAGS and what depends on them, which no ioctl checks,
/// and for an EFER that KVM_SET_MSRS changed. SDM "Checks on Guest RIP, RFLAGS, and SSP".
fn may_fail(s: &kvm_sregs, r: &kvm_regs, injected: bool) -> bool {
    let long = s.efer & 0x400 != 0;
    let rip = match long && s.cs.l != 0 {
        true => !matches!(r.rip as i64 >> 47, 0 | -1),
        false => r.rip >> 32 != 0,
    };
    let vm86 = r.rflags & 0x2_0000 != 0 && (long || s.cr0 & 1 == 0);
    let mode = s.cr0 >> 31 & 1 != 0 && matches!(s.efer & 0x500, 0x100 | 0x400);
    rip || vm86 || mode || r.rflags & !0x3f_7fd7 != 0 || injected && r.rflags & 0x200 == 0
}

/// The last entries of the tables that the guest itself is mapped with, not present, become HLT. QEMU's TCG locks a page while it
/// translates an instruction that begins there, and locks it again when it sets accessed bits in it on the way to the next page: a guest that
/// runs from the end of such a table into the next page stops the CPU for good, host and all.
fn end_tables_with_hlt(ram: Ram) {
    for table in [PML4, PDPT, PD] {
        for entry in 508..512 {
            ram.write_u64(table + entry * 8, 0xF4F4_F4F4_F4F4_F4F4);
        }
    }
}

fn states() {
    if on_kvm() {
        skip!("KVM takes states that its own entry then warns about");
    }
    let count = setting("KRAB_STATES", 4000);
    let seed = setting("KRAB_SEED", 1);
    let good = good_states();
    let neighbour = Guest::long(rs_neighbour());
    let answer = neighbours_answer();
    let mut rng = Rng::new(seed);
    let mut tally = Tally::default();
    let fresh = || {
        let g = Guest::bare(|_| ());
        write_kit(g.ram);
        end_tables_with_hlt(g.ram);
        // HLT wherever it lands: most states end at once.
        g.ram.write(0x1000, &[0xf4; 64]);
        g.ram.write(CODE, &vec![0xf4; 0x1000]);
        g.ram.write(DATA, &vec![0xf4; 0x10_0000]);
        g
    };
    let mut guest = fresh();
    let begin = now_ns();
    // A state that leads to an endless loop ends with the next kick.
    let mut kicks = Some(sys::Kicks::after_us(10_000));
    for n in 0..count {
        if n % 1000 == 999 {
            // A signal would end the creation of a VM with EINTR.
            drop(kicks.take());
            guest = fresh();
            kicks = Some(sys::Kicks::after_us(10_000));
        }
        let start = rng.below(good.len() as u64) as usize;
        let injected = set_state(&guest.cpu, &mut rng, &good[start], &mut tally);
        for _ in 0..3 {
            let went = match guest.cpu.run() {
                Err(EINTR) => "kicked".into(),
                Err(e) => panic!("state {n} of seed {seed}: KVM_RUN {e:?}"),
                Ok(Exit::FailEntry(reason)) => {
                    // Others are a VM-instruction error, 1 to 28, and AMD's one reason.
                    let known = INTEL_REASONS.contains(&reason) || (1..=28).contains(&reason) || reason == u64::MAX;
                    assert!(known, "state {n} of seed {seed}: entry failure {reason:#x}");
                    let (s, r) = (guest.cpu.sregs(), guest.cpu.regs());
                    if INTEL_REASONS.contains(&reason) && !may_fail(&s, &r, injected) {
                        let e: kvm_vcpu_events = assert_ok!(guest.cpu.get(KVM_GET_VCPU_EVENTS));
                        panic!("state {n} of seed {seed} from {start} fails the entry: {e:x?} {r:x?} {s:x?}");
                    }
                    format!("fail entry {reason:#x}")
                }
                Ok(Exit::Io { .. }) => "port".into(),
                Ok(Exit::Mmio { .. }) => "mmio".into(),
                Ok(other) => format!("{other:?}").to_lowercase(),
            };
            tally.count(went.clone());
            if went != "port" && went != "mmio" {
                break;
            }
        }
        if n % 64 == 0 {
            match event_of(&neighbour.cpu, neighbour.ram) {
                Event::Report(v) if v == answer => {}
                other => panic!("after state {n} of seed {seed} another VM's guest is wrong: {other:x?}"),
            }
        }
    }
    drop(kicks);
    let ms = (now_ns() - begin) / 1_000_000;
    println!("# {count} states in {ms} ms: {:?}", tally.0);
    assert!(count < 100 || tally.0.contains_key("sregs refused") && tally.0.contains_key("hlt"), "too few kinds");
    // This vCPU works again as soon as its state is a good one.
    guest.ram.write(CODE, rs_neighbour());
    write_kit(guest.ram);
    assert_ok!(guest.cpu.set(KVM_SET_VCPU_EVENTS, &kvm_vcpu_events { flags: 5, ..Default::default() }));
    assert_ok!(guest.cpu.set(KVM_SET_DEBUGREGS, &kvm_debugregs { dr7: 0x400, dr6: 0xffff_0ff0, ..Default::default() }));
    enter_long(&guest.cpu, CODE, STACK);
    assert_eq!(event_of(&guest.cpu, guest.ram), Event::Report(answer));
}

payload! { rs_halt, 64, "hlt" }

/// States that no CPU can be in are refused before anything of them is taken.
fn refused_states_change_nothing() {
    if on_kvm() {
        skip!("KVM takes some of these states, and leaves the rest to the CPU");
    }
    let g = Guest::long(rs_halt());
    let good = g.cpu.sregs();
    type Change = fn(&mut kvm_sregs);
    let bad: [(&str, Change); 12] = [
        ("paging without protection", |s| s.cr0 &= !1),
        ("CR0.NW without CR0.CD", |s| s.cr0 |= 1 << 29),
        ("CR0 beyond 32 bits", |s| s.cr0 |= 1 << 32),
        ("long mode without PAE", |s| s.cr4 &= !0x20),
        ("LMA without LME", |s| s.efer &= !0x100),
        ("LME and paging without LMA", |s| s.efer &= !0x400),
        ("a code segment of 64 and 32 bits", |s| s.cs.db = 1),
        ("CR3 beyond physical addresses", |s| s.cr3 |= 1 << 62),
        ("CR4 with an undefined bit", |s| s.cr4 |= 1 << 40),
        ("EFER with an undefined bit", |s| s.efer |= 1 << 20),
        ("CR8 with 5 bits", |s| s.cr8 = 16),
        ("LMA without paging", |s| s.cr0 &= !(1 << 31)),
    ];
    for (what, change) in bad {
        let mut s = good;
        change(&mut s);
        match g.cpu.set(KVM_SET_SREGS, &s) {
            Err(EINVAL) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(g.cpu.sregs(), good, "{what}");
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}
