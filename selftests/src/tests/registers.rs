// SPDX-License-Identifier: GPL-2.0
//! Further ways to a vCPU's registers: KVM_GET_SREGS2 and KVM_SET_SREGS2, KVM_GET_ONE_REG and KVM_SET_ONE_REG, and the attributes of the
//! device itself.

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::*;
use krabtest::vm::{Cpuid, Device, Exit};
use krabtest::{assert_err, assert_ok, payload, tests};

tests! { "registers";
    sregs2;
    sregs2_refused;
    sregs2_leaves_interrupts;
    sregs2_pdptrs;
    one_reg;
    one_reg_refused;
    reg_list;
    system_attributes;
}

payload! { rg_hlt, 64, "hlt" }

fn get(g: &Guest) -> kvm_sregs2 {
    assert_ok!(g.cpu.get(KVM_GET_SREGS2))
}

fn sregs2() {
    let g = Guest::long(rg_hlt());
    assert_eq!(g.vm.cap(KVM_CAP_SREGS2), 1);
    let (new, old) = (get(&g), g.cpu.sregs());
    assert_eq!((new.cs, new.ss, new.tr, new.ldt), (old.cs, old.ss, old.tr, old.ldt));
    assert_eq!((new.gdt, new.idt, new.apic_base), (old.gdt, old.idt, old.apic_base));
    assert_eq!((new.cr0, new.cr3, new.cr4, new.cr8, new.efer), (old.cr0, old.cr3, old.cr4, old.cr8, old.efer));
    assert_eq!((new.flags, new.pdptrs), (0, [0; 4]), "no such entries in long mode");
    let mut changed = new;
    (changed.cr2, changed.cr8, changed.fs.base) = (0x1234, 7, 0x5678);
    assert_ok!(g.cpu.set(KVM_SET_SREGS2, &changed));
    let (new, old) = (get(&g), g.cpu.sregs());
    assert_eq!((new.cr2, new.cr8, new.fs.base), (0x1234, 7, 0x5678));
    assert_eq!((old.cr2, old.cr8, old.fs.base), (0x1234, 7, 0x5678));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn sregs2_refused() {
    let g = Guest::long(rg_hlt());
    let good = get(&g);
    let refused = |what: &str, change: &dyn Fn(&mut kvm_sregs2)| {
        let mut s = good;
        change(&mut s);
        assert_err!(g.cpu.set(KVM_SET_SREGS2, &s), EINVAL, "{what}");
    };
    refused("entries in long mode", &|s| s.flags = 1);
    refused("an unknown flag", &|s| s.flags = 2);
    refused("an unknown flag above", &|s| s.flags = 1 << 63);
    refused("entries without paging", &|s| {
        (s.flags, s.efer) = (1, 0);
        s.cr0 &= !(1 << 31);
        s.cs.l = 0;
    });
    refused("CR0.PG without PE", &|s| s.cr0 &= !1);
    refused("LME and PG without LMA", &|s| s.efer &= !0x400);
    refused("CR4, reserved", &|s| s.cr4 |= 1 << 63);
    refused("APIC base, reserved", &|s| s.apic_base |= 1 << 60);
    assert_err!(ioctl(g.cpu.fd, KVM_GET_SREGS2, 0), EFAULT);
    assert_err!(ioctl(g.cpu.fd, KVM_SET_SREGS2, 0), EFAULT);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

/// An interrupt on its way is not in the structure, and stays.
fn sregs2_leaves_interrupts() {
    let g = Guest::long(rg_hlt());
    let mut s = g.cpu.sregs();
    s.interrupt_bitmap[1] = 1 << 0x10;
    g.cpu.set_sregs(&s);
    assert_ok!(g.cpu.set(KVM_SET_SREGS2, &get(&g)));
    assert_eq!(g.cpu.sregs().interrupt_bitmap, [0, 1 << 0x10, 0, 0]);
}

payload! { rg_pae, 32,
    "mov eax, [0x40000000]",
    "out 0x10, eax",
    "mov eax, 0x20020",
    "mov cr3, eax",
    "mov eax, [0x40000000]",
    "out 0x10, eax",
    "hlt",
}

/// The four entries of PAE paging: where the CPU keeps them in registers (Intel), those of the structure count, whatever is in memory now.
fn sregs2_pdptrs() {
    let g = Guest::protected(rg_pae());
    let table = |n: u64| 0x20000 + n * 0x20;
    for n in 0..3 {
        let (low, high) = (0x21000 + n * 0x2000, 0x22000 + n * 0x2000);
        g.ram.write_u64(table(n), low | 1);
        g.ram.write_u64(table(n) + 8, high | 1);
        g.ram.write_u64(low, 0x83);
        g.ram.write_u64(high, (0x28000 + n * 0x1000) | 3);
        g.ram.write_u64(0x28000 + n * 0x1000, (0x30000 + n * 0x1000) | 3);
        g.ram.write(0x30000 + n * 0x1000, &(0x1111 * (n as u32 + 1)).to_le_bytes());
    }
    let entries = |n: u64| [0, 8, 16, 24].map(|at| g.ram.read_u64(table(n) + at));
    let mut s = g.cpu.sregs();
    s.cr0 |= 1 << 31;
    s.cr4 |= 1 << 5;
    s.cr3 = table(0);
    g.cpu.set_sregs(&s);
    let mut s = get(&g);
    assert_eq!((s.flags, s.pdptrs), (1, entries(0)));
    // Those of the third table with CR3 of the first.
    s.pdptrs = entries(2);
    assert_ok!(g.cpu.set(KVM_SET_SREGS2, &s));
    let out = || match assert_ok!(g.cpu.run()) {
        Exit::Io { out: true, port: 0x10, data, .. } => u32::from_le_bytes([data[0], data[1], data[2], data[3]]),
        other => panic!("{other:?}"),
    };
    let intel =
        Device::open().supported_cpuid().find(0, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"));
    assert_eq!(out(), if intel { 0x3333 } else { 0x1111 });
    // (KVM on AMD goes on to show those that were set.)
    let shown = |want| assert!(get(&g).pdptrs == want || on_kvm() && !intel);
    shown(if intel { entries(2) } else { entries(0) });
    // The guest's own MOV to CR3 brings new ones, and they are those that are shown.
    assert_eq!(out(), 0x2222);
    let s = get(&g);
    assert_eq!((s.cr3, s.flags), (table(1), 1));
    shown(entries(1));
    // Without the flag they come from memory.
    assert_ok!(g.cpu.set(KVM_SET_SREGS2, &kvm_sregs2 { flags: 0, cr3: table(2), ..s }));
    assert_eq!(get(&g).pdptrs, entries(2));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

/// ID of an MSR: x86, 64 bits, kind 2.
const MSR: u64 = 0x2030_0002 << 32;
const KERNEL_GS_BASE: u64 = 0xc000_0102;

fn one_reg() {
    let g = Guest::long(rg_hlt());
    assert_eq!(g.vm.cap(KVM_CAP_ONE_REG), 1);
    let mut value = 0x1234_5678_9abcu64;
    let reg = kvm_one_reg { id: MSR | KERNEL_GS_BASE, addr: &raw mut value as u64 };
    assert_ok!(g.cpu.set(KVM_SET_ONE_REG, &reg));
    assert_eq!(g.cpu.msr(KERNEL_GS_BASE as u32), Some(0x1234_5678_9abc));
    assert!(g.cpu.set_msr(KERNEL_GS_BASE as u32, 0x77));
    assert_ok!(g.cpu.set(KVM_GET_ONE_REG, &reg));
    assert_eq!(value, 0x77);
}

fn one_reg_refused() {
    let g = Guest::long(rg_hlt());
    // What PAT refuses, too.
    let mut value = 1u64 << 63;
    let addr = &raw mut value as u64;
    let good = MSR | KERNEL_GS_BASE;
    let bad = [
        // Another architecture, size, kind; bits that mean nothing; a register without a shadow stack; no such MSR.
        good ^ 1 << 62,
        good & !(0xff << 56),
        good ^ 1 << 52,
        good ^ 4 << 52,
        good ^ 3 << 32,
        good & !(0xff << 32),
        good | 1 << 40,
        good | 1 << 48,
        0x2030_0003 << 32,
        MSR | 0x1234_5678,
    ];
    for id in bad {
        for nr in [KVM_GET_ONE_REG, KVM_SET_ONE_REG] {
            assert_err!(g.cpu.set(nr, &kvm_one_reg { id, addr }), EINVAL, "{id:#x}");
        }
    }
    for nr in [KVM_GET_ONE_REG, KVM_SET_ONE_REG] {
        assert_err!(g.cpu.set(nr, &kvm_one_reg { id: good, addr: 0 }), EFAULT);
        assert_err!(ioctl(g.cpu.fd, nr, 0), EFAULT);
    }
    assert_err!(g.cpu.set(KVM_SET_ONE_REG, &kvm_one_reg { id: MSR | 0x277, addr }), EINVAL);
    // The ID is looked at before the address.
    assert_err!(g.cpu.set(KVM_SET_ONE_REG, &kvm_one_reg { id: bad[0], addr: 0 }), EINVAL);
    assert_eq!(g.cpu.msr(KERNEL_GS_BASE as u32), Some(0));
}

/// Registers beside the MSRs: none, where guests have no shadow stacks.
fn reg_list() {
    let g = Guest::bare(|_| ());
    let mut list = [7u64, 0, 0];
    assert_ok!(ioctl_out(g.cpu.fd, KVM_GET_REG_LIST, &mut list));
    let shadow_stacks = g.cpuid.find(7, 0).is_some_and(|leaf| leaf.ecx & 1 << 7 != 0);
    assert_eq!(list[0], shadow_stacks.into());
    assert_err!(ioctl(g.cpu.fd, KVM_GET_REG_LIST, 0), EFAULT);
}

/// The components of the extended state that a guest may have: what CPUID leaf Dh of the supported table says, and what needs permission.
fn system_attributes() {
    let d = Device::open();
    assert_eq!(d.cap(KVM_CAP_SYS_ATTRIBUTES), 1);
    let mut xcr0 = 0u64;
    let attribute = |group, attr, addr| kvm_device_attr { flags: 0, group, attr, addr };
    let good = attribute(0, 0, &raw mut xcr0 as u64);
    assert_ok!(ioctl_in(d.fd, KVM_HAS_DEVICE_ATTR, &good));
    assert_eq!(xcr0, 0);
    assert_ok!(ioctl_in(d.fd, KVM_GET_DEVICE_ATTR, &good));
    let table: Cpuid = d.supported_cpuid();
    let leaf = table.find(0xd, 0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    assert_eq!(xcr0 & leaf, leaf);
    assert!(on_kvm() || xcr0 == leaf);
    for (group, attr) in [(0, 1), (0, u64::MAX), (2, 0)] {
        let bad = attribute(group, attr, &raw mut xcr0 as u64);
        for nr in [KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR] {
            assert_err!(ioctl_in(d.fd, nr, &bad), ENXIO, "{group} {attr}");
        }
    }
    assert_err!(ioctl_in(d.fd, KVM_GET_DEVICE_ATTR, &attribute(0, 0, 0)), EFAULT);
    assert_err!(ioctl(d.fd, KVM_HAS_DEVICE_ATTR, 0), EFAULT);
}
