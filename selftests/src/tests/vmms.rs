// SPDX-License-Identifier: GPL-2.0
//! The calls of well-known VMMs, in their order: how Firecracker, Cloud Hypervisor, crosvm and kvmtool set a VM and its vCPUs up, how
//! they pause them, and how they save one and restore it elsewhere. Read from their sources (2024 to 2026); the code is our own.
//!
//! Not here: devices, and what these programs do only with options that Krab has not (VFIO, SEV, TDX, Hyper-V).

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::{self, *};
use krabtest::vm::{Cpuid, Device, Exit, Ram, Vcpu, Vm};
use krabtest::{assert_err, assert_ok, payload, tests};

use super::irqchip::APIC;
use super::state::st_worker;

tests! { "vmms";
    capabilities;
    lists_fit;
    firecracker_boot;
    firecracker_snapshot(60);
    cloud_hypervisor_snapshot(60);
    cloud_hypervisor_dirty_log;
    crosvm_snapshot(60);
    kvmtool_boot;
    tsc_frequency;
}

const REQUIRED: &[(&str, &[u32])] = &[
    (
        "Firecracker",
        &[
            KVM_CAP_IRQCHIP,
            KVM_CAP_IOEVENTFD,
            KVM_CAP_IRQFD,
            KVM_CAP_USER_MEMORY,
            KVM_CAP_SET_TSS_ADDR,
            KVM_CAP_PIT2,
            KVM_CAP_PIT_STATE2,
            KVM_CAP_ADJUST_CLOCK,
            KVM_CAP_DEBUGREGS,
            KVM_CAP_MP_STATE,
            KVM_CAP_VCPU_EVENTS,
            KVM_CAP_XCRS,
            KVM_CAP_XSAVE,
            KVM_CAP_EXT_CPUID,
        ],
    ),
    (
        "Cloud Hypervisor",
        &[
            KVM_CAP_ADJUST_CLOCK,
            KVM_CAP_EXT_CPUID,
            KVM_CAP_GET_TSC_KHZ,
            KVM_CAP_IMMEDIATE_EXIT,
            KVM_CAP_IOEVENTFD,
            KVM_CAP_IRQCHIP,
            KVM_CAP_IRQFD,
            KVM_CAP_IRQ_ROUTING,
            KVM_CAP_MP_STATE,
            KVM_CAP_SET_IDENTITY_MAP_ADDR,
            KVM_CAP_SET_TSS_ADDR,
            KVM_CAP_SPLIT_IRQCHIP,
            KVM_CAP_TSC_DEADLINE_TIMER,
            KVM_CAP_USER_MEMORY,
            KVM_CAP_USER_NMI,
            KVM_CAP_VCPU_EVENTS,
        ],
    ),
    ("crosvm", &[KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_SIGNAL_MSI, KVM_CAP_KVMCLOCK_CTRL]),
    (
        "kvmtool",
        &[
            KVM_CAP_COALESCED_MMIO,
            KVM_CAP_SET_TSS_ADDR,
            KVM_CAP_PIT2,
            KVM_CAP_USER_MEMORY,
            KVM_CAP_IRQ_ROUTING,
            KVM_CAP_IRQCHIP,
            KVM_CAP_HLT,
            KVM_CAP_IRQ_INJECT_STATUS,
            KVM_CAP_EXT_CPUID,
        ],
    ),
];

fn capabilities() {
    let device = Device::open();
    assert_eq!(device.ioctl(KVM_GET_API_VERSION, 0), Ok(12));
    let vm = device.create_vm();
    for (client, caps) in REQUIRED {
        for &cap in *caps {
            assert!(device.cap(cap) > 0 && vm.cap(cap) > 0, "{client} wants capability {cap}");
        }
    }
    // Firecracker asks for the size on the VM, and takes a negative answer for an error.
    assert!(vm.cap(KVM_CAP_XSAVE2) >= 4096);
}

/// Room that clients give for lists: it must suffice, because most of them do not ask twice.
fn lists_fit() {
    let device = Device::open();
    for (client, room) in [("Firecracker and Cloud Hypervisor", 80), ("kvmtool", 100), ("crosvm", 256)] {
        let mut cpuid = Cpuid::with_room(room);
        assert_ok!(sys::ioctl_out(device.fd, KVM_GET_SUPPORTED_CPUID, &mut cpuid));
        assert!(cpuid.nent > 10 && cpuid.nent <= room, "{client}: {} CPUID entries", cpuid.nent);
    }
    let mut cpuid = Cpuid::with_room(1);
    assert_err!(sys::ioctl_out(device.fd, KVM_GET_SUPPORTED_CPUID, &mut cpuid), E2BIG);
    let list = msr_list();
    assert!(list.len() > 10 && list.len() <= 256, "{} MSRs", list.len());
}

/// `struct kvm_msrs` with room for 256.
#[repr(C)]
#[derive(Clone)]
struct Msrs {
    nmsrs: u32,
    pad: u32,
    entries: [kvm_msr_entry; 256],
}

impl Msrs {
    fn new(values: &[(u32, u64)]) -> Msrs {
        let mut msrs = Msrs { nmsrs: values.len() as u32, pad: 0, entries: [kvm_msr_entry::default(); 256] };
        for (entry, &(index, data)) in msrs.entries.iter_mut().zip(values) {
            *entry = kvm_msr_entry { index, data, ..Default::default() };
        }
        msrs
    }

    fn values(&self) -> Vec<(u32, u64)> {
        self.entries[..self.nmsrs as usize].iter().map(|e| (e.index, e.data)).collect()
    }

    /// One call for all; the first that is not to be had is named.
    fn get(cpu: &Vcpu, list: &[u32]) -> Msrs {
        let mut msrs = Msrs::new(&list.iter().map(|&index| (index, 0)).collect::<Vec<_>>());
        let got = assert_ok!(sys::ioctl_out(cpu.fd, KVM_GET_MSRS, &mut msrs)) as usize;
        assert!(got == list.len(), "KVM_GET_MSRS stops at {:#x}", list[got]);
        msrs
    }

    fn set(cpu: &Vcpu, values: &[(u32, u64)]) {
        let done = assert_ok!(cpu.set(KVM_SET_MSRS, &Msrs::new(values))) as usize;
        assert!(done == values.len(), "KVM_SET_MSRS stops at {:x?}", values[done]);
    }
}

fn msr_list() -> Vec<u32> {
    let mut list = [0u32; 257];
    list[0] = 256;
    assert_ok!(sys::ioctl_out(Device::open().fd, KVM_GET_MSR_INDEX_LIST, &mut list));
    list[1..=list[0] as usize].to_vec()
}

const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// SYSENTER, STAR to SYSCALL_MASK, KERNEL_GS_BASE, the TSC: what all but QEMU set before they start.
const BOOT_MSRS: &[(u32, u64)] = &[
    (0x174, 0),
    (0x175, 0),
    (0x176, 0),
    (0xc000_0081, 0),
    (0xc000_0082, 0),
    (0xc000_0083, 0),
    (0xc000_0084, 0),
    (0xc000_0102, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, 1),
    // MTRRs on, write-back
    (0x2ff, 0x806),
];

fn enable(vm: &Vm, cap: u32, argument: u64) {
    let mut e = kvm_enable_cap { cap, ..Default::default() };
    e.args[0] = argument;
    assert_ok!(vm.set(KVM_ENABLE_CAP, &e));
}

fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// LINT0 takes what the 8259A has, LINT1 is the NMI.
fn set_lint(cpu: &Vcpu) {
    let mut lapic: kvm_lapic_state = assert_ok!(cpu.get(KVM_GET_LAPIC));
    for (at, mode) in [(0x350, 7u32), (0x360, 4)] {
        let old = u32::from_le_bytes([0, 1, 2, 3].map(|i| lapic.regs[at + i] as u8));
        for (byte, new) in lapic.regs[at..at + 4].iter_mut().zip((old & !0x700 | mode << 8).to_le_bytes()) {
            *byte = new as _;
        }
    }
    assert_ok!(cpu.set(KVM_SET_LAPIC, &lapic));
}

/// The irqchip and a PIT whose speaker port needs no userspace.
fn firecracker_vm(vm: &Vm) {
    assert_ok!(vm.ioctl(KVM_SET_TSS_ADDR, 0xfffb_d000));
    assert_ok!(vm.ioctl(KVM_CREATE_IRQCHIP, 0));
    assert_ok!(vm.set(KVM_CREATE_PIT2, &kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }));
}

payload! { vmms_start_second, 64,
    "in al, 0x61",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x1000000",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x300], 0x4601",
    "out 0xed, al",
}

payload! { vmms_second, 16,
    "mov ax, cs",
    "out 0x90, ax",
}

/// All vCPUs get the state of the boot CPU; a start-up IPI takes that from the others.
fn firecracker_boot() {
    let g = Guest::long_with(vmms_start_second(), firecracker_vm);
    let second = g.vm.create_vcpu(1);
    g.ram.write(0x1000, vmms_second());
    for (id, cpu) in [&g.cpu, &second].into_iter().enumerate() {
        let mut cpuid = g.cpuid.clone();
        set_apic_id(&mut cpuid, id as u32);
        assert_ok!(cpu.set_cpuid(&cpuid));
        Msrs::set(cpu, BOOT_MSRS);
        enter_long(cpu, CODE, STACK);
        assert_ok!(cpu.set(KVM_SET_FPU, &fpu()));
        set_lint(cpu);
    }
    assert_eq!([g.cpu.mp_state(), second.mp_state()], [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED]);
    assert_eq!(second.run_for(20), Err(EINTR), "it waits");
    g.expect_done();
    let exit = loop {
        match second.run_for(1000) {
            // KVM comes back once to say that the CPU has been woken.
            Err(EAGAIN) => continue,
            other => break assert_ok!(other),
        }
    };
    assert_eq!(exit, Exit::Io { out: true, port: 0x90, size: 2, count: 1, data: vec![0, 1] });
    assert_eq!(second.sregs().cr0 & 1, 0);
}

/// State of a vCPU that has KVM_GET_XSAVE2's size.
#[repr(C)]
#[derive(Clone)]
struct Xsave([u32; 4096]);

struct Saved {
    cpuid: Cpuid,
    mp_state: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    tsc_khz: i32,
}

/// In the order of Firecracker and Cloud Hypervisor: first what may change the rest, the events last.
fn save(g: &Guest) -> Saved {
    let cpu = &g.cpu;
    let mut cpuid = Cpuid::with_room(80);
    assert_ok!(sys::ioctl_out(cpu.fd, KVM_GET_CPUID2, &mut cpuid));
    let mp_state = cpu.mp_state();
    let (regs, sregs) = (cpu.regs(), cpu.sregs());
    let mut xsave = Xsave([0; 4096]);
    assert!(g.vm.cap(KVM_CAP_XSAVE2) as usize <= size_of::<Xsave>());
    assert_ok!(sys::ioctl_out(cpu.fd, KVM_GET_XSAVE2, &mut xsave));
    Saved {
        cpuid,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs: assert_ok!(cpu.get(KVM_GET_XCRS)),
        debug: assert_ok!(cpu.get(KVM_GET_DEBUGREGS)),
        lapic: assert_ok!(cpu.get(KVM_GET_LAPIC)),
        fpu: assert_ok!(cpu.get(KVM_GET_FPU)),
        tsc_khz: assert_ok!(cpu.ioctl(KVM_GET_TSC_KHZ, 0)),
        msrs: Msrs::get(cpu, &msr_list()).values(),
        events: assert_ok!(cpu.get(KVM_GET_VCPU_EVENTS)),
    }
}

/// Lets the worker run until it got further and had a timer interrupt; it is stopped as VMMs do it.
fn work(g: &Guest, progress: &mut u64) {
    let ticks = g.count(0x44);
    for _ in 0..40 {
        let end = g.cpu.run_for(30);
        if end != Err(EINTR) {
            let regs = g.cpu.regs();
            let frame: Vec<u64> = (0..3).map(|i| g.ram.read_u64(regs.rsp + 8 * i)).collect();
            panic!("{end:x?}, frame {frame:x?}, counted {:#x} {:#x} {:#x}", regs.r12, regs.rax, g.ram.read_u64(DATA));
        }
        if g.count(0x44) > ticks && g.ram.read_u64(DATA) > *progress {
            break;
        }
    }
    // What userspace owes the vCPU is finished by a run that comes back at once.
    g.cpu.set_immediate_exit(true);
    assert_eq!(g.cpu.run(), Err(EINTR));
    g.cpu.set_immediate_exit(false);
    let now = g.ram.read_u64(DATA);
    assert!(g.count(0x44) > ticks && now > *progress, "{} ticks, counted to {now}", g.count(0x44));
    *progress = now;
}

/// Moves the worker four times; `setup` makes each VM, `chips` moves what belongs to it, `restore` the vCPU.
fn moved(setup: impl Fn(&Vm), chips: impl Fn(&Vm, &Vm), restore: impl Fn(&Vcpu, &Saved)) {
    let mut g = Guest::long_with(st_worker(), &setup);
    g.set_eoi(Eoi::Xapic);
    let mut progress = 0;
    for _ in 0..4 {
        work(&g, &mut progress);
        let saved = save(&g);
        let to = Guest::bare(&setup);
        to.ram.write(0, &g.ram.read(0, 4 << 20));
        chips(&g.vm, &to.vm);
        restore(&to.cpu, &saved);
        g = to;
    }
    work(&g, &mut progress);
}

fn move_clock(from: &Vm, to: &Vm) {
    let mut clock = kvm_clock_data::default();
    assert_ok!(sys::ioctl_out(from.fd, KVM_GET_CLOCK, &mut clock));
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    assert_ok!(to.set(KVM_SET_CLOCK, &clock));
}

fn move_chips(from: &Vm, to: &Vm) {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        assert_ok!(sys::ioctl_out(from.fd, KVM_GET_IRQCHIP, &mut chip));
        assert_ok!(to.set(KVM_SET_IRQCHIP, &chip));
    }
}

fn move_pit(from: &Vm, to: &Vm) -> u32 {
    let mut pit = kvm_pit_state2::default();
    assert_ok!(sys::ioctl_out(from.fd, KVM_GET_PIT2, &mut pit));
    assert_ok!(to.set(KVM_SET_PIT2, &pit));
    pit.flags
}

fn firecracker_snapshot() {
    let chips = |from: &Vm, to: &Vm| {
        assert_eq!(move_pit(from, to) & KVM_PIT_FLAGS_SPEAKER_DATA_ON, 0);
        move_clock(from, to);
        move_chips(from, to);
    };
    moved(firecracker_vm, chips, |cpu, saved| {
        assert_ok!(cpu.set_cpuid(&saved.cpuid));
        assert_ok!(cpu.set_mp_state(saved.mp_state));
        cpu.set_regs(&saved.regs);
        cpu.set_sregs(&saved.sregs);
        assert_ok!(cpu.set(KVM_SET_XSAVE, &saved.xsave));
        assert_ok!(cpu.set(KVM_SET_XCRS, &saved.xcrs));
        assert_ok!(cpu.set(KVM_SET_DEBUGREGS, &saved.debug));
        assert_ok!(cpu.set(KVM_SET_LAPIC, &saved.lapic));
        // The deadline comes after the TSC that it is measured on; one of 0 is set to now.
        let (deadline, rest): (Vec<_>, Vec<_>) = saved.msrs.iter().partition(|msr| msr.0 == IA32_TSC_DEADLINE);
        Msrs::set(cpu, &rest);
        let now = saved.msrs.iter().find(|msr| msr.0 == IA32_TSC).map_or(0, |msr| msr.1);
        let deadline = deadline.iter().map(|&(index, value)| (index, if value == 0 { now } else { value }));
        Msrs::set(cpu, &deadline.collect::<Vec<_>>());
        assert_ok!(cpu.set(KVM_SET_VCPU_EVENTS, &saved.events));
        assert_err!(cpu.ioctl(KVM_KVMCLOCK_CTRL, 0), EINVAL, "this guest has no clock");
    });
}

fn cloud_hypervisor_vm(vm: &Vm) {
    assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &0xfeff_c000_u64));
    assert_ok!(vm.ioctl(KVM_SET_TSS_ADDR, 0xfeff_d000));
    enable(vm, KVM_CAP_SPLIT_IRQCHIP, 24);
    enable(vm, KVM_CAP_X2APIC_API, 3);
    assert_ok!(Routing::new().msi(4, APIC, 0x44).msi(24, APIC, 0x45).set(vm));
}

fn cloud_hypervisor_snapshot() {
    moved(cloud_hypervisor_vm, move_clock, |cpu, saved| {
        assert_ok!(cpu.set_cpuid(&saved.cpuid));
        assert_ok!(cpu.set_mp_state(saved.mp_state));
        cpu.set_regs(&saved.regs);
        cpu.set_sregs(&saved.sregs);
        assert_ok!(cpu.set(KVM_SET_XSAVE, &saved.xsave));
        assert_ok!(cpu.set(KVM_SET_XCRS, &saved.xcrs));
        assert_ok!(cpu.set(KVM_SET_LAPIC, &saved.lapic));
        assert_ok!(cpu.set(KVM_SET_FPU, &saved.fpu));
        // Only EIO, which KVM gives where a TSC cannot be had, would not stop it.
        assert_ok!(cpu.ioctl(KVM_SET_TSC_KHZ, saved.tsc_khz as usize));
        Msrs::set(cpu, &saved.msrs);
        assert_ok!(cpu.set(KVM_SET_VCPU_EVENTS, &saved.events));
    });
}

payload! { vmms_touch, 64,
    "mov rbx, 0x10000000",
    "2: inc qword ptr [rbx]",
    "inc qword ptr [rbx + 0x3000]",
    "out 0xed, al",
    "jmp 2b",
}

/// Migration turns the log on in a slot that the guest uses, and off again.
fn cloud_hypervisor_dirty_log() {
    const BASE: u64 = 0x1000_0000;
    let g = Guest::long_with(vmms_touch(), cloud_hypervisor_vm);
    let ram = Ram::new(BASE, 64 * 4096);
    assert_ok!(g.vm.map(1, 0, ram));
    g.expect_done();
    let log = || {
        let mut bits = 0u64;
        let dirty_bitmap = (&raw mut bits).cast();
        let request = kvm_dirty_log {
            slot: 1,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap },
            ..Default::default()
        };
        g.vm.set(KVM_GET_DIRTY_LOG, &request).map(|_| bits)
    };
    assert_err!(log(), ENOENT, "no log yet");
    for round in 0..3 {
        assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
        assert_eq!(log(), Ok(0), "round {round}: what was written before does not count");
        for _ in 0..2 {
            g.expect_done();
            assert_eq!(log(), Ok(1 | 1 << 3), "round {round}");
        }
        assert_ok!(g.vm.map(1, 0, ram));
        assert_err!(log(), ENOENT, "round {round}: off");
        g.expect_done();
    }
    assert_eq!(ram.read_u64(BASE), 10);
}

/// crosvm restores the vCPU first, and its local APIC with the other interrupt controllers after all vCPUs.
fn crosvm_snapshot() {
    let setup = |vm: &Vm| {
        assert_ok!(vm.ioctl(KVM_SET_TSS_ADDR, 0xfeff_d000));
        assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &0xfeff_c000_u64));
        vm.create_irqchip();
        assert_ok!(vm.set(KVM_CREATE_PIT2, &kvm_pit_config::default()));
    };
    let chips = |from: &Vm, to: &Vm| {
        move_clock(from, to);
        move_chips(from, to);
        move_pit(from, to);
    };
    moved(setup, chips, |cpu, saved| {
        cpu.set_regs(&saved.regs);
        cpu.set_sregs(&saved.sregs);
        assert_ok!(cpu.set(KVM_SET_DEBUGREGS, &saved.debug));
        assert_ok!(cpu.set(KVM_SET_XCRS, &saved.xcrs));
        for &msr in saved.msrs.iter().filter(|msr| msr.0 != IA32_TSC_DEADLINE) {
            Msrs::set(cpu, &[msr]);
        }
        assert_ok!(cpu.set(KVM_SET_XSAVE, &saved.xsave));
        assert_ok!(cpu.set(KVM_SET_VCPU_EVENTS, &saved.events));
        assert_ok!(cpu.set(KVM_SET_LAPIC, &saved.lapic));
        assert_ok!(cpu.set_mp_state(saved.mp_state));
        for &msr in saved.msrs.iter().filter(|msr| msr.0 == IA32_TSC_DEADLINE) {
            Msrs::set(cpu, &[msr]);
        }
    });
}

// Linked at 0x200 of its segment: only relative jumps.
payload! { vmms_setup_code, 16,
    "mov ax, cs",
    "mov bx, ss",
    "out 0x90, ax",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    "mov word ptr [0x20], 0x300",       // vector 8: the timer
    "mov word ptr [0x22], cs",
    "mov al, 0x11",
    "out 0x20, al",
    "mov al, 8",
    "out 0x21, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 1",
    "out 0x21, al",
    "mov al, 0xee",                     // IRQ 0 and 4
    "out 0x21, al",
    "sti",
    "2: hlt",
    "jmp 2b",
}

payload! { vmms_timer_handler, 16,
    "inc cx",
    "mov al, 0x20",
    "out 0x20, al",
    "cmp cx, 3",
    "jb 2f",
    "mov ax, cx",
    "out 0x91, ax",
    "2: iret",
}

/// The setup code of a kernel at 0x1000:0200, real mode, interrupts from the 8259A.
fn kvmtool_boot() {
    let g = Guest::bare(|vm| {
        assert_ok!(vm.ioctl(KVM_SET_TSS_ADDR, 0xfffb_d000));
        assert_ok!(vm.ioctl(KVM_CREATE_IRQCHIP, 0));
        assert_ok!(vm.set(KVM_CREATE_PIT2, &kvm_pit_config::default()));
    });
    g.ram.write(0x1_0200, vmms_setup_code());
    g.ram.write(0x1_0300, vmms_timer_handler());
    let mut sregs = g.cpu.sregs();
    for segment in [&mut sregs.cs, &mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        (segment.selector, segment.base) = (0x1000, 0x1_0000);
    }
    g.cpu.set_sregs(&sregs);
    g.cpu.set_regs(&kvm_regs { rflags: 2, rip: 0x200, rsp: 0x8000, rbp: 0x8000, ..Default::default() });
    assert_ok!(g.cpu.set(KVM_SET_FPU, &fpu()));
    // It does not look at how many were taken.
    Msrs::set(&g.cpu, &BOOT_MSRS[..10]);
    let exit = |port, value: u16| Exit::Io { out: true, port, size: 2, count: 1, data: value.to_le_bytes().to_vec() };
    assert_eq!(assert_ok!(g.cpu.run()), exit(0x90, 0x1000));
    let pulse = || {
        assert_ok!(g.vm.irq_line(0, 1));
        assert_ok!(g.vm.irq_line(0, 0));
    };
    for count in 0..3 {
        // It waits in HLT, in the kernel.
        for _ in 0..100 {
            assert_eq!(g.cpu.run_for(10), Err(EINTR));
            if g.cpu.regs().rcx == count {
                break;
            }
        }
        assert_eq!(g.cpu.regs().rcx, count);
        pulse();
    }
    assert_eq!(assert_ok!(g.cpu.run_for(2000)), exit(0x91, 3));
}

fn tsc_frequency() {
    let g = Guest::long(st_worker());
    let get = || assert_ok!(g.cpu.ioctl(KVM_GET_TSC_KHZ, 0)) as usize;
    let host = get();
    let near = host + host / 10_000;
    assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, near));
    assert_eq!(get(), near, "what was set");
    assert_ok!(g.cpu.ioctl(KVM_SET_TSC_KHZ, 0));
    assert_eq!(get(), host, "0 is the host's");
}
