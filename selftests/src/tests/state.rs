// SPDX-License-Identifier: GPL-2.0
//! Every GET and SET of vCPU and VM state: what is set is what is got, what is wrong is refused, and a guest moved to
//! another VM goes on.

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::rng::Rng;
use krabtest::sys::{self, *};
use krabtest::vm::{Cpuid, Device, Exit, OneMsr, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

use std::sync::atomic::{AtomicBool, Ordering};

tests! { "state";
    reset_state;
    regs;
    sregs;
    sregs_refused;
    sregs_interrupt_bitmap;
    fpu;
    xsave;
    xsave_refused;
    xcrs;
    debug_registers;
    vcpu_events;
    vcpu_events_inject_exception;
    mp_state;
    msrs_of_the_list;
    msrs_refused;
    cpuid;
    cpuid_refused;
    cpuid_after_run;
    clock;
    kvmclock_follows_tsc;
    kvmclock_guest_stopped;
    clock_read_while_it_is_set;
    machine_check;
    moved_to_another_vm;
}

payload! { st_hlt, 64, "hlt" }

fn reset_state() {
    let g = Guest::bare(|_| ());
    let (r, s) = (g.cpu.regs(), g.cpu.sregs());
    assert_eq!((r.rip, r.rflags, r.rax, r.rsp), (0xfff0, 2, 0, 0));
    assert_eq!(r.rdx & !0xf_ffff, r.rdx & 0xfff0_0000, "RDX holds the signature");
    // (KVM on AMD leaves the accessed bits clear.)
    assert_eq!((s.cs.base, s.cs.selector, s.cs.limit, s.cs.type_ | 1), (0xffff_0000, 0xf000, 0xffff, 0xb));
    for (name, seg) in [("DS", s.ds), ("ES", s.es), ("SS", s.ss), ("FS", s.fs), ("GS", s.gs)] {
        assert_eq!((seg.base, seg.selector, seg.limit, seg.type_ | 1, seg.present), (0, 0, 0xffff, 3, 1), "{name}");
    }
    assert_eq!((s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer), (0x6000_0010, 0, 0, 0, 0, 0));
    assert_eq!((s.gdt.limit, s.idt.limit, s.gdt.base, s.idt.base), (0xffff, 0xffff, 0, 0));
    assert_eq!(s.apic_base, 0xfee0_0900);
    // A busy TSS, of 32 or (KVM on AMD) of 16 bits
    assert_eq!((s.tr.type_ | 8, s.ldt.type_), (0xb, 2));
    let d: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((d.dr6, d.dr7, d.db), (0xffff_0ff0, 0x400, [0; 4]));
    let f: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    // As after RESET, or as after FNINIT (KVM)
    assert!(matches!((f.fcw, f.fsw), (0x40, 0) | (0x37f, 0)), "FCW {:#x} FSW {:#x}", f.fcw, f.fsw);
    let x: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
    assert_eq!(x.region[6], 0x1f80, "MXCSR");
    // PAT, after reset
    assert_eq!(g.cpu.msr(0x277), Some(0x0007_0406_0007_0406));
}

fn regs() {
    let g = Guest::long(st_hlt());
    let mut rng = Rng::new(5);
    for _ in 0..50 {
        let mut r = kvm_regs::default();
        for reg in [
            &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rsp, &mut r.rbp, &mut r.r8,
            &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15, &mut r.rip,
        ] {
            *reg = rng.word();
        }
        r.rflags = rng.word() & 0x24_0cd5 | 2;
        g.cpu.set_regs(&r);
        assert_eq!(g.cpu.regs(), r);
    }
    // Bit 1 of RFLAGS is always set.
    g.cpu.set_regs(&kvm_regs { rip: CODE, ..Default::default() });
    assert_eq!(g.cpu.regs().rflags, 2);
}

fn sregs() {
    let g = Guest::long(st_hlt());
    let mut s = g.cpu.sregs();
    for (i, seg) in [&mut s.ds, &mut s.es, &mut s.fs, &mut s.gs].into_iter().enumerate() {
        let i = i as u64;
        seg.base = 0x1_0000 * (i + 1);
        seg.selector = 0x10 + 8 * i as u16;
        seg.limit = 0xf_ffff - i as u32;
        seg.g = 0;
        seg.type_ = 3;
        seg.avl = 1;
    }
    s.ldt = kvm_segment { base: 0x4_0000, limit: 0x1f, selector: 0x50, type_: 2, present: 1, ..Default::default() };
    (s.cr2, s.cr8) = (0x1234_5678_9abc, 5);
    s.cr0 |= 1 << 16 | 1 << 18;
    s.cr4 |= 1 << 2 | 1 << 3 | 1 << 7;
    s.efer |= 1 << 11;
    s.gdt.limit = 0x6f;
    s.idt.base = 0x2100;
    g.cpu.set_sregs(&s);
    let t = g.cpu.sregs();
    assert_eq!((t.ds, t.es, t.fs, t.gs), (s.ds, s.es, s.fs, s.gs));
    assert_eq!((t.ldt.base, t.ldt.limit, t.ldt.selector), (s.ldt.base, s.ldt.limit, s.ldt.selector));
    assert_eq!((t.cr0, t.cr2, t.cr3, t.cr8, t.efer), (s.cr0, s.cr2, s.cr3, s.cr8, s.efer));
    assert_eq!(t.cr4 & !(1 << 6), s.cr4);
    assert_eq!((t.gdt, t.idt, t.apic_base), (s.gdt, s.idt, s.apic_base));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let after = g.cpu.sregs();
    assert_eq!((after.ds, after.fs, after.gs, after.ldt.base), (s.ds, s.fs, s.gs, s.ldt.base));
    // An unusable segment stays unusable.
    s.fs = kvm_segment { unusable: 1, ..Default::default() };
    g.cpu.set_sregs(&s);
    assert_eq!((g.cpu.sregs().fs.present, g.cpu.sregs().fs.unusable), (0, 1));
}

fn sregs_refused() {
    let g = Guest::long(st_hlt());
    let good = g.cpu.sregs();
    let refused = |what: &str, change: &dyn Fn(&mut kvm_sregs)| {
        let mut s = good;
        change(&mut s);
        assert_err!(g.cpu.set(KVM_SET_SREGS, &s), EINVAL, "{what}");
    };
    refused("CR0.PG without PE", &|s| s.cr0 &= !1);
    refused("CR0, upper half", &|s| s.cr0 |= 1 << 40);
    refused("CR0.NW without CD", &|s| s.cr0 |= 1 << 29);
    refused("long mode without PAE", &|s| s.cr4 &= !0x20);
    refused("LME and PG without LMA", &|s| s.efer &= !0x400);
    refused("LMA without PG", &|s| s.cr0 &= !(1 << 31));
    refused("CR4, reserved", &|s| s.cr4 |= 1 << 63);
    refused("EFER, reserved", &|s| s.efer |= 1 << 40);
    refused("CR3 beyond physical addresses", &|s| s.cr3 |= 1 << 60);
    refused("APIC base, reserved", &|s| s.apic_base |= 1 << 60);
    refused("CS.L outside long mode", &|s| {
        s.cr0 &= !(1 << 31);
        s.efer = 0;
    });
    // A refused call changes nothing that matters: the guest runs.
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

payload! { st_sti, 64, "sti", "nop", "nop", "out 0xed, al" }

fn sregs_interrupt_bitmap() {
    let g = Guest::long(st_sti());
    let mut s = g.cpu.sregs();
    s.interrupt_bitmap[1] = 1 << 5;
    g.cpu.set_sregs(&s);
    let mut r = g.cpu.regs();
    r.rflags |= 0x200;
    g.cpu.set_regs(&r);
    let s = g.cpu.sregs();
    assert_eq!(s.interrupt_bitmap[1], 1 << 5);
    g.expect_done();
    assert_eq!(g.count(0x45), 1);
    assert_eq!(g.cpu.sregs().interrupt_bitmap, [0; 4]);
}

fn fpu() {
    let g = Guest::long(st_hlt());
    let mut f =
        kvm_fpu { fcw: 0x27f, fsw: 0x3800, ftwx: 0x81, last_opcode: 0x123, mxcsr: 0x1fa0, ..Default::default() };
    (f.last_ip, f.last_dp) = (0x1234_5678, 0x8765_4321);
    Rng::new(3).fill(f.xmm.as_flattened_mut());
    // KVM_SET_FPU writes the registers, and not the bits that say that they hold something.
    set_xmm(&g.cpu, &[[1; 16]; 16]);
    f.fpr[0] = [1, 2, 3, 4, 5, 6, 7, 0x80, 0xff, 0x3f, 0, 0, 0, 0, 0, 0];
    assert_ok!(g.cpu.set(KVM_SET_FPU, &f));
    let got: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    assert_eq!((got.fcw, got.fsw, got.ftwx, got.xmm, got.fpr[0]), (f.fcw, f.fsw, f.ftwx, f.xmm, f.fpr[0]));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let got: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    assert_eq!((got.fcw, got.xmm, got.fpr[0]), (f.fcw, f.xmm, f.fpr[0]));
}

fn xsave() {
    let g = Guest::long(st_hlt());
    let mut x: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
    // FCW, MXCSR, XMM3, and XSTATE_BV with x87 and SSE
    x.region[0] = x.region[0] & !0xffff | 0x37a;
    x.region[6] = 0x1fa0;
    for i in 0..4 {
        x.region[40 + 3 * 4 + i] = 0x1111_1111 * (i as u32 + 1);
    }
    x.region[128] |= 3;
    let avx = std::is_x86_feature_detected!("avx");
    if avx {
        x.region[128] |= 4;
        for i in 0..64 {
            x.region[144 + i] = 0xa000_0000 + i as u32;
        }
    }
    assert_ok!(g.cpu.set(KVM_SET_XSAVE, &x));
    for _ in 0..2 {
        let got: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
        assert_eq!((got.region[0] & 0xffff, got.region[6]), (0x37a, 0x1fa0));
        assert_eq!(got.region[52..56], x.region[52..56]);
        assert_eq!(got.region[128] & 2, 2);
        if avx {
            assert_eq!(got.region[144..208], x.region[144..208]);
        }
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        let mut r = g.cpu.regs();
        r.rip = CODE;
        g.cpu.set_regs(&r);
    }
    let f: kvm_fpu = assert_ok!(g.cpu.get(KVM_GET_FPU));
    assert_eq!((f.fcw, f.xmm[3][..4].to_vec()), (0x37a, vec![0x11; 4]));
}

fn xsave_refused() {
    let g = Guest::long(st_hlt());
    let good: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
    let refused = |what: &str, at: usize, v: u32| {
        let mut x: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
        x.region[at] = v;
        assert_err!(g.cpu.set(KVM_SET_XSAVE, &x), EINVAL, "{what}");
    };
    refused("XSTATE_BV, unknown bits", 129, 0x4000_0000);
    refused("XCOMP_BV", 130, 1);
    refused("reserved header", 134, 1);
    let mut x: kvm_xsave = assert_ok!(g.cpu.get(KVM_GET_XSAVE));
    x.region[6] = 0xffff_0000;
    x.region[128] |= 3;
    assert_err!(g.cpu.set(KVM_SET_XSAVE, &x), EINVAL, "MXCSR, reserved bits");
    assert_ok!(g.cpu.set(KVM_SET_XSAVE, &good));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn xcrs() {
    let g = Guest::long(st_hlt());
    let Some(leaf) = g.cpuid.find(0xd, 0) else { skip!("no XSAVE") };
    let all = leaf.eax as u64;
    let set = |value: u64| {
        let mut x = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        x.xcrs[0].value = value;
        g.cpu.set(KVM_SET_XCRS, &x)
    };
    for value in [1, 3, all] {
        assert_ok!(set(value));
        let x: kvm_xcrs = assert_ok!(g.cpu.get(KVM_GET_XCRS));
        assert_eq!((x.nr_xcrs, x.xcrs[0].xcr, x.xcrs[0].value), (1, 0, value));
    }
    for value in [0, 2, 5, all | 1 << 62, u64::MAX] {
        assert_err!(set(value), EINVAL, "{value:#x}");
    }
    let mut x = kvm_xcrs { nr_xcrs: 17, ..Default::default() };
    x.xcrs[0].value = 1;
    assert_err!(g.cpu.set(KVM_SET_XCRS, &x), EINVAL, "17 registers");
    (x.nr_xcrs, x.flags) = (1, 1);
    assert_err!(g.cpu.set(KVM_SET_XCRS, &x), EINVAL, "flags");
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn debug_registers() {
    let g = Guest::long(st_hlt());
    let mut d = kvm_debugregs { db: [1, 2, 3, 0x7fff_ffff_fff4], dr6: 0xffff_0ff1, dr7: 0x700, ..Default::default() };
    assert_ok!(g.cpu.set(KVM_SET_DEBUGREGS, &d));
    let got: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((got.db, got.dr6, got.dr7), (d.db, d.dr6, d.dr7));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let got: kvm_debugregs = assert_ok!(g.cpu.get(KVM_GET_DEBUGREGS));
    assert_eq!((got.db, got.dr7), (d.db, d.dr7));
    d.dr7 = 1 << 32;
    assert_err!(g.cpu.set(KVM_SET_DEBUGREGS, &d), EINVAL, "DR7, upper half");
    (d.dr7, d.dr6) = (0x400, 1 << 32);
    assert_err!(g.cpu.set(KVM_SET_DEBUGREGS, &d), EINVAL, "DR6, upper half");
    (d.dr6, d.flags) = (0xffff_0ff0, 1);
    assert_err!(g.cpu.set(KVM_SET_DEBUGREGS, &d), EINVAL, "flags");
}

fn vcpu_events() {
    let g = Guest::long(st_hlt());
    let mut e: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    assert_eq!((e.exception.injected, e.interrupt.injected, e.nmi.pending, e.nmi.masked), (0, 0, 0, 0));
    e.nmi.masked = 1;
    e.nmi.pending = 1;
    e.interrupt.shadow = 1;
    e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &e));
    let got: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    // AMD has one shadow bit for STI and MOV SS.
    assert_eq!((got.nmi.masked, got.nmi.pending, got.interrupt.shadow & 1), (1, 1, 1));
    for (what, change) in [
        ("exception 32", (|e: &mut kvm_vcpu_events| (e.exception.injected, e.exception.nr) = (1, 32)) as fn(&mut _)),
        ("exception 2", |e: &mut kvm_vcpu_events| (e.exception.injected, e.exception.nr) = (1, 2)),
        ("flags", |e: &mut kvm_vcpu_events| e.flags = 0x8000_0000),
    ] {
        let mut bad = got;
        change(&mut bad);
        assert_err!(g.cpu.set(KVM_SET_VCPU_EVENTS, &bad), EINVAL, "{what}");
    }
}

payload! { st_nops, 64, "nop", "nop", "out 0xed, al" }

fn vcpu_events_inject_exception() {
    let g = Guest::long(st_nops());
    let mut e: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    e.exception.injected = 1;
    e.exception.nr = 13;
    e.exception.has_error_code = 1;
    e.exception.error_code = 0x1230;
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &e));
    g.expect(Event::Exception { vector: 13, error: 0x1230, rip: CODE, cr2: 0 });
    g.expect_done();
    // An interrupt whose delivery was cut short is delivered again.
    let mut e: kvm_vcpu_events = assert_ok!(g.cpu.get(KVM_GET_VCPU_EVENTS));
    e.interrupt.injected = 1;
    e.interrupt.nr = 0x66;
    assert_ok!(g.cpu.set(KVM_SET_VCPU_EVENTS, &e));
    let mut r = g.cpu.regs();
    r.rip = CODE;
    // Intel refuses to deliver an interrupt to a guest with interrupts off.
    r.rflags |= 0x200;
    g.cpu.set_regs(&r);
    g.expect_done();
    assert_eq!(g.count(0x66), 1);
}

fn mp_state() {
    let g = Guest::long(st_hlt());
    assert_eq!(g.cpu.mp_state(), KVM_MP_STATE_RUNNABLE);
    assert_ok!(g.cpu.set_mp_state(KVM_MP_STATE_RUNNABLE));
    // Without an irqchip a vCPU cannot wait in the kernel.
    for bad in [KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, 100, u32::MAX] {
        assert_err!(g.cpu.set_mp_state(bad), EINVAL, "{bad}");
    }
    let g = Guest::long_irqchip(st_hlt());
    let ap = g.add_vcpu(1);
    assert_eq!(ap.mp_state(), KVM_MP_STATE_UNINITIALIZED);
    for state in [KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE] {
        assert_ok!(ap.set_mp_state(state));
        // KVM shows INIT_RECEIVED as it is.
        assert_eq!(ap.mp_state(), state);
    }
    assert_err!(ap.set_mp_state(100), EINVAL);
}

fn msr_list() -> Vec<u32> {
    let d = Device::open();
    let mut list = vec![0u32; 1025];
    list[0] = 1024;
    assert_ok!(sys::ioctl(d.fd, KVM_GET_MSR_INDEX_LIST, list.as_mut_ptr() as usize));
    list[1..=list[0] as usize].to_vec()
}

/// Whatever is in the index list can be read, and written back (QEMU asserts it).
fn msrs_of_the_list() {
    let g = Guest::long_irqchip(st_hlt());
    let mut bad = Vec::new();
    for index in msr_list() {
        match g.cpu.msr(index) {
            None => bad.push((index, "cannot be read")),
            Some(v) if !g.cpu.set_msr(index, v) => bad.push((index, "cannot be written back")),
            Some(_) => {}
        }
    }
    assert!(bad.is_empty(), "{bad:x?}");
    // All in one call
    let list = msr_list();
    #[repr(C)]
    struct Many {
        nmsrs: u32,
        pad: u32,
        entries: [kvm_msr_entry; 256],
    }
    let mut m = Many { nmsrs: list.len().min(256) as u32, pad: 0, entries: [kvm_msr_entry::default(); 256] };
    for (e, i) in m.entries.iter_mut().zip(&list) {
        e.index = *i;
    }
    assert_eq!(assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_MSRS, &mut m)) as u32, m.nmsrs);
    assert_eq!(assert_ok!(g.cpu.set(KVM_SET_MSRS, &m)) as u32, m.nmsrs);
    // An unknown one in the middle: the number before it.
    m.nmsrs = 5;
    m.entries[3].index = 0x1234_5678;
    assert_eq!(assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_MSRS, &mut m)), 3);
    assert_eq!(assert_ok!(g.cpu.set(KVM_SET_MSRS, &m)), 3);
    m.nmsrs = 0;
    assert_eq!(assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_MSRS, &mut m)), 0);
}

fn msrs_refused() {
    let g = Guest::long(st_hlt());
    for n in [257, 1 << 16, u32::MAX] {
        let mut m = OneMsr::new(0x10, 0);
        m.nmsrs = n;
        assert_err!(sys::ioctl_out(g.cpu.fd, KVM_GET_MSRS, &mut m), E2BIG, "{n} MSRs");
        assert_err!(g.cpu.set(KVM_SET_MSRS, &m), E2BIG, "{n} MSRs");
    }
    for (index, value, what) in [
        (0xc000_0082u32, 1u64 << 63, "LSTAR, not canonical"),
        (0xc000_0100, 1 << 63, "FS base, not canonical"),
        (0xc000_0080, 1 << 40, "EFER"),
        (0x277, 2, "PAT"),
        (0x1b, 1, "APIC base"),
        (0x1234_5678, 0, "no such MSR"),
    ] {
        assert!(!g.cpu.set_msr(index, value), "{what}");
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn cpuid() {
    let g = Guest::long(st_hlt());
    let mut got = Cpuid::with_room(256);
    assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_CPUID2, &mut got));
    assert_eq!(got.nent, g.cpuid.nent);
    for (a, b) in got.as_slice().iter().zip(g.cpuid.as_slice()) {
        assert_eq!((a.function, a.index), (b.function, b.index));
        // Leaves that follow the vCPU's state may differ: 1 and 7 (OSXSAVE, APIC, OSPKE), 0xD (sizes), and KVM's own.
        if !matches!(a.function, 1 | 7 | 0xd | 0x4000_0000..=0x4fff_ffff | 0x8000_001e | 0xb) {
            assert_eq!((a.eax, a.ebx, a.ecx, a.edx), (b.eax, b.ebx, b.ecx, b.edx), "leaf {:#x}", a.function);
        }
    }
    let mut small = Cpuid::with_room(1);
    assert_err!(sys::ioctl_out(g.cpu.fd, KVM_GET_CPUID2, &mut small), E2BIG);
    // An empty table is a table.
    assert_ok!(g.cpu.set_cpuid(&Cpuid::with_room(0)));
}

fn cpuid_refused() {
    let g = Guest::bare(|_| ());
    for n in [257, 1000, u32::MAX] {
        let mut c = g.cpuid.clone();
        c.nent = n;
        assert_err!(g.cpu.set_cpuid(&c), E2BIG, "{n} entries");
    }
    assert_ok!(g.cpu.set_cpuid(&g.cpuid));
}

/// After the first KVM_RUN a guest has seen its CPU: KVM refuses another table, but takes the same one again.
fn cpuid_after_run() {
    let g = Guest::long(st_hlt());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let mut c = Cpuid::with_room(256);
    assert_ok!(sys::ioctl_out(g.cpu.fd, KVM_GET_CPUID2, &mut c));
    assert_ok!(g.cpu.set_cpuid(&c));
    c.set(0x4000_0010, [1, 2, 3, 4]);
    let r = g.cpu.set_cpuid(&c);
    assert!(r == Err(EINVAL) || (!on_kvm() && r.is_ok()), "{r:?}");
}

fn clock() {
    let g = Guest::long(st_hlt());
    let get = || {
        let mut c = kvm_clock_data::default();
        assert_ok!(sys::ioctl_out(g.vm.fd, KVM_GET_CLOCK, &mut c));
        c
    };
    let first = get();
    sleep_ms(5);
    let second = get();
    assert!(second.clock >= first.clock + 4_000_000, "{} then {}", first.clock, second.clock);
    let set = kvm_clock_data { clock: 1_000_000_000_000, ..Default::default() };
    assert_ok!(g.vm.set(KVM_SET_CLOCK, &set));
    let now = get();
    assert!((1_000_000_000_000..1_010_000_000_000).contains(&now.clock), "{}", now.clock);
    let bad = kvm_clock_data { clock: 1, flags: 0x8000_0000, ..Default::default() };
    assert_err!(g.vm.set(KVM_SET_CLOCK, &bad), EINVAL, "flags");
}

payload! { st_write_tsc, 64,
    "hlt",
    "hlt",
    "mov ecx, 0x10",
    "xor eax, eax",
    "mov edx, 0x80000",
    "wrmsr",
    "hlt",
}

/// After a write of the TSC, by userspace or by the guest, the paravirtual clock is right again before the guest goes on.
fn kvmclock_follows_tsc() {
    let g = Guest::long(st_write_tsc());
    assert!(g.cpu.set_msr(0x4b56_4d01, DATA | 1));
    let timestamp = || {
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        // Version; TSC and nanoseconds when it was written; multiplier, shift, flags.
        let version = g.ram.read_u32(DATA);
        assert!(version != 0 && version & 1 == 0, "version {version}");
        g.ram.read_u64(DATA + 8)
    };
    let first = timestamp();
    assert!(first >> 50 == 0, "{first:#x}");
    assert!(g.cpu.set_msr(0x10, 1 << 50));
    let second = timestamp();
    assert!(second >> 50 == 1, "{second:#x}");
    let third = timestamp();
    // (KVM leaves the clock as it is when the guest itself writes.)
    assert!(third >> 51 == 1 || on_kvm(), "{third:#x}");
}

payload! { st_halts, 64, "2: hlt", "jmp 2b" }

/// KVM_KVMCLOCK_CTRL: a flag in the clock's page, there until the guest takes it away.
fn kvmclock_guest_stopped() {
    let g = Guest::long(st_halts());
    assert_err!(g.cpu.ioctl(KVM_KVMCLOCK_CTRL, 0), EINVAL, "no clock");
    assert!(g.cpu.set_msr(0x4b56_4d01, DATA | 1));
    let flags = || {
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        g.ram.read(DATA + 29, 1)[0]
    };
    assert_eq!(flags() & 2, 0);
    assert_ok!(g.cpu.ioctl(KVM_KVMCLOCK_CTRL, 0));
    assert_eq!(flags() & 2, 2);
    assert!(g.cpu.set_msr(0x10, 1 << 40));
    assert_eq!(flags() & 2, 2, "kept when the clock is written again");
    g.ram.write(DATA + 29, &[0]);
    assert!(g.cpu.set_msr(0x10, 1 << 41));
    assert_eq!(flags() & 2, 0);
    // Off again
    assert!(g.cpu.set_msr(0x4b56_4d01, 0));
    assert_err!(g.cpu.ioctl(KVM_KVMCLOCK_CTRL, 0), EINVAL, "no clock any more");
}

/// A clock that is set while another thread reads it shows what was set, or a little before it.
fn clock_read_while_it_is_set() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    let vm = Vm::new();
    let set = || assert_ok!(vm.set(KVM_SET_CLOCK, &kvm_clock_data { clock: HOUR_NS, ..Default::default() }));
    set();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            (0..40_000).for_each(|_| {
                set();
            });
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let mut data = kvm_clock_data::default();
            assert_ok!(sys::ioctl_out(vm.fd, KVM_GET_CLOCK, &mut data));
            let off = data.clock.abs_diff(HOUR_NS);
            assert!(off < HOUR_NS / 60, "off by {off} ns");
        }
    });
}

// Counts in memory and in XMM5, takes timer interrupts, and dies by #UD where the two differ.
payload! { st_worker, 64,
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x3e0], 0xb",
    "mov dword ptr [rbx + 0x320], 0x20044",
    "mov dword ptr [rbx + 0x380], 3000000",
    "sti",
    "pxor xmm5, xmm5",
    "mov eax, 1",
    "movd xmm6, eax",
    "2: paddq xmm5, xmm6",
    "movq rax, xmm5",
    "mov [0x100000], rax",
    "inc r12",
    "cmp r12, rax",
    "jne 3f",
    "jmp 2b",
    "3: ud2",
}

/// Everything that can be got is set in another VM, in the order that launchers use; the guest does not notice.
fn moved_to_another_vm() {
    let mut g = Guest::long_irqchip(st_worker());
    g.set_eoi(Eoi::Xapic);
    let mut progress = 0;
    for step in 0..5 {
        // On a busy machine the guest may get little of the time.
        for _ in 0..20 {
            let e = g.cpu.run_for(30);
            assert!(e == Err(EINTR), "step {step}: {e:x?} at {:#x}", g.cpu.regs().rip);
            if g.count(0x44) > step {
                break;
            }
        }
        let now = g.ram.read_u64(DATA);
        assert!(now > progress, "step {step}: no progress");
        progress = now;
        let ticks = g.count(0x44);
        assert!(ticks > step, "step {step}: {ticks} timer interrupts");
        let to = Guest::bare(|vm| vm.create_irqchip());
        to.ram.write(0, &g.ram.read(0, 4 << 20));
        let mut bad_msrs = Vec::new();
        let (a, b) = (&g.cpu, &to.cpu);
        let events: kvm_vcpu_events = assert_ok!(a.get(KVM_GET_VCPU_EVENTS));
        b.set_sregs(&a.sregs());
        b.set_regs(&a.regs());
        assert_ok!(b.set(KVM_SET_XCRS, &assert_ok!(a.get::<kvm_xcrs>(KVM_GET_XCRS))));
        assert_ok!(b.set(KVM_SET_XSAVE, &assert_ok!(a.get::<kvm_xsave>(KVM_GET_XSAVE))));
        for index in msr_list() {
            let v = a.msr(index).unwrap_or(0);
            if !b.set_msr(index, v) {
                bad_msrs.push(index);
            }
        }
        assert!(bad_msrs.is_empty(), "{bad_msrs:x?}");
        assert_ok!(b.set(KVM_SET_DEBUGREGS, &assert_ok!(a.get::<kvm_debugregs>(KVM_GET_DEBUGREGS))));
        assert_ok!(b.set(KVM_SET_LAPIC, &assert_ok!(a.get::<kvm_lapic_state>(KVM_GET_LAPIC))));
        assert_ok!(b.set_mp_state(a.mp_state()));
        assert_ok!(b.set(KVM_SET_VCPU_EVENTS, &events));
        for chip in 0..3 {
            let mut c = kvm_irqchip { chip_id: chip, ..Default::default() };
            assert_ok!(sys::ioctl_out(g.vm.fd, KVM_GET_IRQCHIP, &mut c));
            assert_ok!(to.vm.set(KVM_SET_IRQCHIP, &c));
        }
        g = to;
    }
}

payload! { st_dones, 64, "2: out 0xed, al", "jmp 2b" }

/// KVM_X86_SET_MCE: an error goes to the guest's banks, and as #MC to its handler; one too many ends it.
fn machine_check() {
    let g = Guest::long(st_dones());
    let mut sregs = g.cpu.sregs();
    sregs.cr4 |= 1 << 6;
    g.cpu.set_sregs(&sregs);
    assert_ok!(g.cpu.set(KVM_X86_SETUP_MCE, &(10u64 | 1 << 8)));
    let error = |bank, status, mcg_status| kvm_x86_mce {
        status,
        addr: 0x1234_5000,
        misc: 0x8c,
        mcg_status,
        bank,
        ..Default::default()
    };
    let (valid, fatal) = (1u64 << 63, 0xa6u64 << 56);
    let report = |error: kvm_x86_mce| g.cpu.set(KVM_X86_SET_MCE, &error);
    assert_err!(report(error(10, valid, 0)), EINVAL, "a bank that is not there");
    assert_err!(report(error(1, !valid, 0)), EINVAL, "no error");
    assert_ok!(report(error(1, valid | 0x17, 0)));
    g.expect_done();
    assert_eq!(
        [0x405, 0x406, 0x407].map(|index| g.cpu.msr(index)),
        [Some(valid | 0x17), Some(0x1234_5000), Some(0x8c)]
    );
    assert_ok!(report(error(2, fatal, 5)));
    assert_eq!(g.exception(0), (18, 0));
    g.expect_done();
    assert_eq!([0x409, 0x17a].map(|index| g.cpu.msr(index)), [Some(fatal), Some(5)]);
    assert_ok!(report(error(2, fatal, 5)));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Shutdown, "the first one is not over");
}
