// SPDX-License-Identifier: GPL-2.0
//! Protected mode without paging. A CPU without unrestricted guests has paging all the same, with a page table that maps every address to
//! itself (KVM_SET_IDENTITY_MAP_ADDR), and the guest must not see that. With a slot where that table would be, Krab's emulator has the
//! guest: the same tests run so once more.

use krabtest::guest::*;
use krabtest::harness::{on_kvm, options, tcg};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{EEXIST, EINVAL};
use krabtest::vm::{Device, Exit, Ram, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "unpaged";
    control_registers;
    paging_comes_and_goes;
    pae_comes_and_goes;
    user_code;
    exception_through_a_gate;
    two_vcpus;
    table_and_slots;
    bad_place;
    table_destroyed;
}

/// Where the table is if nobody says.
const TABLE: u64 = 0xfffb_c000;
const PAE: u64 = 1 << 5;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;

/// Whether the host runs guests without paging with a page table of its own.
pub(super) fn restricted() -> bool {
    !options().unrestricted
}

/// With it Krab's emulator has a guest that is neither the CPU's as it is nor with a table.
pub(super) fn slot_at_table(vm: &Vm) {
    assert_ok!(vm.map(7, 0, Ram::new(TABLE, 0x1000)));
}

/// The guests to test: one that hardware runs, and one that the emulator runs where it can be made to.
fn guests(code: &[u8]) -> Vec<Guest> {
    let mut all = vec![Guest::protected(code)];
    if !on_kvm() {
        all.push(Guest::protected_with(code, slot_at_table));
    }
    all
}

payload! { unpaged_registers, 32,
    "mov cr4, edi",
    "mov edi, cr4",
    "mov eax, 0x12345000",
    "mov cr3, eax",
    "mov ebx, cr3",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "rdmsr",
    "mov ebp, eax",
    "mov esi, cr0",
    "mov dword ptr [0x200000], 0x11223344",
    "inc dword ptr [0x200000]",
    "mov edx, dword ptr [0x200000]",
    "mov eax, dword ptr [0xd0000010]",
    "mov dword ptr [0xd0000020], eax",
    "hlt",
}

fn control_registers() {
    if on_kvm() && tcg() {
        skip!("KVM gives LME to hardware, and QEMU's host is lost");
    }
    // The CPU's own paging must not come from these.
    for cr4 in [0, PAE, PAE | SMEP | SMAP | 0x80] {
        for g in guests(unpaged_registers()) {
            let mut s = g.cpu.sregs();
            s.cr4 = cr4;
            if g.cpu.set(KVM_SET_SREGS, &s).is_err() {
                println!("# no CR4 {cr4:x}");
                continue;
            }
            s.cr4 = 0;
            g.cpu.set_sregs(&s);
            let mut r = g.cpu.regs();
            r.rdi = cr4;
            g.cpu.set_regs(&r);
            assert_eq!(assert_ok!(g.cpu.run()), Exit::Mmio { write: false, gpa: MMIO + 0x10, len: 4, data: vec![] });
            g.cpu.reply(&[1, 2, 3, 4]);
            let want = Exit::Mmio { write: true, gpa: MMIO + 0x20, len: 4, data: vec![1, 2, 3, 4] };
            assert_eq!(assert_ok!(g.cpu.run()), want);
            assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
            let (r, s) = (g.cpu.regs(), g.cpu.sregs());
            assert_eq!((r.rbx, r.rdi, r.rdx), (0x1234_5000, cr4, 0x1122_3345));
            assert_eq!((r.rsi & 0x8000_0001, r.rbp & 0x500), (1, 0x100), "CR0 and EFER");
            assert_eq!((s.cr3, s.cr4, s.efer & 0x500, s.cr0 >> 31), (0x1234_5000, cr4, 0x100, 0));
        }
    }
}

payload! { unpaged_toggle, 32,
    "mov eax, 0x300000",
    "mov cr3, eax",
    "mov cr4, esi",
    "mov ecx, 100",
    "2: mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "jmp 3f",
    "3: mov dword ptr [0x40200000], ecx",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "jmp 4f",
    "4: cmp dword ptr [0x200000], ecx",
    "jne 5f",
    "mov eax, cr3",
    "cmp eax, 0x300000",
    "jne 5f",
    "dec ecx",
    "jnz 2b",
    "mov ebx, 0x600d",
    "5: hlt",
}

/// Paging on and off, a hundred times, with the guest's own tables at 3 MiB: they have the first memory again at 1 GiB.
#[track_caller]
fn toggle(cr4: u64, tables: impl Fn(Ram)) {
    for g in guests(unpaged_toggle()) {
        tables(g.ram);
        let mut r = g.cpu.regs();
        r.rsi = cr4;
        g.cpu.set_regs(&r);
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        let r = g.cpu.regs();
        assert_eq!((r.rbx, r.rcx), (0x600d, 0));
        assert_eq!(g.cpu.sregs().cr0 >> 31, 0);
    }
}

fn paging_comes_and_goes() {
    toggle(0x10, |ram| {
        // 4 MiB each.
        ram.write_u32(0x30_0000, 0x83);
        ram.write_u32(0x30_0000 + 0x100 * 4, 0x83);
    });
}

fn pae_comes_and_goes() {
    if on_kvm() && tcg() {
        skip!("KVM's guest shuts down in QEMU's emulation; why is not known");
    }
    toggle(PAE, |ram| {
        for entry in 0..2 {
            ram.write_u64(0x30_0000 + entry * 8, 0x30_1001);
            ram.write_u64(0x30_1000 + entry * 8, entry << 21 | 0x83);
        }
    });
}

payload! { unpaged_user, 32,
    "mov eax, dword ptr [0x200000]",
    "inc eax",
    "mov dword ptr [0x3ffffc], eax",
    "out 0xef, eax",
    "jmp 2f",
    "2: out 0xef, eax",
    "hlt",
}

/// There are no pages of the supervisor, and none of the user.
fn user_code() {
    for cpl in [0u8, 3] {
        for wanted in [0, SMEP | SMAP] {
            for g in guests(unpaged_user()) {
                let mut s = g.cpu.sregs();
                s.cr4 = wanted;
                s.cr0 |= 1 << 16;
                (s.cs.dpl, s.ss.dpl) = (cpl, cpl);
                s.cs.selector = s.cs.selector & !3 | u16::from(cpl);
                s.ss.selector = s.ss.selector & !3 | u16::from(cpl);
                for data in [&mut s.ds, &mut s.es, &mut s.fs, &mut s.gs] {
                    (data.dpl, data.selector) = (cpl, data.selector & !3 | u16::from(cpl));
                }
                if g.cpu.set(KVM_SET_SREGS, &s).is_err() {
                    continue;
                }
                let mut r = g.cpu.regs();
                r.rflags = 0x3002;
                g.cpu.set_regs(&r);
                g.ram.write_u32(0x20_0000, 41);
                for _ in 0..2 {
                    let want = Exit::Io { out: true, port: 0xef, size: 4, count: 1, data: vec![42, 0, 0, 0] };
                    assert_eq!(assert_ok!(g.cpu.run()), want, "level {cpl}, CR4 {wanted:x}");
                }
                assert_eq!(g.ram.read_u32(0x3f_fffc), 42);
                // HLT is not for the user, and there is no IDT.
                assert_eq!(assert_ok!(g.cpu.run()), if cpl == 0 { Exit::Hlt } else { Exit::Shutdown });
            }
        }
    }
}

payload! { unpaged_divide, 32,
    "xor ecx, ecx",
    "2: div ecx",
    "dec ebx",
    "jnz 2b",
    "hlt",
    ".balign 0x100, 0x90",
    "inc edx",
    "add dword ptr [esp], 2",
    "iretd",
}

fn exception_through_a_gate() {
    for g in guests(unpaged_divide()) {
        let handler = CODE + 0x100;
        g.ram.write_u64(IDT, handler & 0xffff | u64::from(SEL_CODE32) << 16 | 0x8e00 << 32 | handler >> 16 << 48);
        let mut s = g.cpu.sregs();
        s.idt = kvm_dtable { base: IDT, limit: 7, ..Default::default() };
        g.cpu.set_sregs(&s);
        let mut r = g.cpu.regs();
        (r.rbx, r.rdx) = (50, 7);
        g.cpu.set_regs(&r);
        assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
        let r = g.cpu.regs();
        assert_eq!((r.rdx, r.rsp), (57, STACK));
    }
}

/// Both use the one table.
fn two_vcpus() {
    let g = Guest::protected(unpaged_toggle());
    let second = g.vm.create_vcpu(1);
    assert_ok!(second.set_cpuid(&g.cpuid));
    let s = g.cpu.sregs();
    second.set_sregs(&s);
    g.ram.write_u32(0x30_0000, 0x83);
    g.ram.write_u32(0x30_0000 + 0x100 * 4, 0x83);
    for cpu in [&g.cpu, &second] {
        cpu.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, rsi: 0x10, ..Default::default() });
        assert_eq!(assert_ok!(cpu.run()), Exit::Hlt);
        assert_eq!(cpu.regs().rbx, 0x600d);
    }
}

/// Userspace chooses the place, and from the first vCPU on there can be no slot.
fn table_and_slots() {
    const PLACE: u64 = 0xe000_0000;
    let g = Guest::protected_with(unpaged_user(), |vm| {
        assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &PLACE));
    });
    for (gpa, taken) in [(PLACE, true), (PLACE - 0x1000, true), (PLACE + 0x1000, false), (PLACE - 0x2000, false)] {
        let ram = Ram::new(gpa, 0x2000);
        if taken && restricted() {
            assert_err!(g.vm.map(3, 0, ram), EEXIST, "{gpa:x}");
        } else {
            assert_ok!(g.vm.map(3, 0, ram));
            assert_ok!(g.vm.set_slot(3, 0, 0, 0, 0));
        }
    }
    // Nothing happened to the guest.
    for _ in 0..2 {
        assert!(matches!(assert_ok!(g.cpu.run()), Exit::Io { .. }));
    }
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn bad_place() {
    for place in [TABLE + 8, 1 << 32] {
        let vm = Device::open().create_vm();
        assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &place));
        if restricted() {
            assert_err!(vm.try_vcpu(0).map(drop), EINVAL, "{place:x}");
            assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &0u64));
        }
        assert_ok!(vm.try_vcpu(0).map(drop));
    }
}

payload! { unpaged_destroy, 32,
    "mov edi, 0xfffbc000",
    "mov ecx, 0x400",
    "xor eax, eax",
    "cld",
    "rep stosd",
    "mov cr3, eax",
    "2: jmp 2b",
}

/// The guest is told where the table is, and loses itself if it writes there.
fn table_destroyed() {
    if on_kvm() {
        skip!("KVM's own business");
    }
    let g = Guest::protected(unpaged_destroy());
    for _ in 0..2000 {
        match g.cpu.run_for(500) {
            Ok(Exit::Mmio { gpa, write: true, .. }) => assert_eq!(gpa >> 12, TABLE >> 12),
            Ok(Exit::Shutdown) | Err(_) => break,
            other => panic!("{other:?}"),
        }
    }
    let fresh = Guest::protected(unpaged_user());
    assert!(matches!(assert_ok!(fresh.cpu.run()), Exit::Io { .. }));
}
