// SPDX-License-Identifier: GPL-2.0
//! The descriptors and their calls before any guest runs: versions, capabilities, wrong arguments, lifetimes.

use krabtest::guest::Guest;
use krabtest::harness::{on_kvm, options};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Cpuid, Device, Exit, Ram, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "api";
    api_version;
    capabilities;
    capabilities_imply_ioctls;
    unknown_capabilities_are_zero;
    unknown_ioctls;
    ioctls_of_another_descriptor;
    system_bad_arguments;
    supported_cpuid;
    supported_cpuid_bad_room;
    msr_index_list;
    create_vm_bad_type;
    create_vcpu_ids;
    vcpu_mmap;
    vcpu_mmap_beyond_end;
    bad_pointers_vm;
    bad_pointers_vcpu;
    run_bad_argument;
    memory_region_bad_arguments;
    tss_and_identity_map;
    close_device_first;
    close_vm_before_vcpu;
    run_page_outlives_descriptors;
    dup_and_cloexec;
    read_write_poll_refused;
    forked_child_gets_eio;
    module_is_busy;
}

/// What Firecracker, libkrun and vmm-reference refuse to start without, or use.
const WANTED: &[(&str, u32)] = &[
    ("USER_MEMORY", KVM_CAP_USER_MEMORY),
    ("IRQCHIP", KVM_CAP_IRQCHIP),
    ("HLT", KVM_CAP_HLT),
    ("IRQFD", KVM_CAP_IRQFD),
    ("IRQFD_RESAMPLE", KVM_CAP_IRQFD_RESAMPLE),
    ("IOEVENTFD", KVM_CAP_IOEVENTFD),
    ("SET_TSS_ADDR", KVM_CAP_SET_TSS_ADDR),
    ("EXT_CPUID", KVM_CAP_EXT_CPUID),
    ("IRQ_ROUTING", KVM_CAP_IRQ_ROUTING),
    ("SET_IDENTITY_MAP_ADDR", KVM_CAP_SET_IDENTITY_MAP_ADDR),
    ("MP_STATE", KVM_CAP_MP_STATE),
    ("VCPU_EVENTS", KVM_CAP_VCPU_EVENTS),
    ("XSAVE", KVM_CAP_XSAVE),
    ("XCRS", KVM_CAP_XCRS),
    ("ADJUST_CLOCK", KVM_CAP_ADJUST_CLOCK),
    ("DEBUGREGS", KVM_CAP_DEBUGREGS),
    ("PIT2", KVM_CAP_PIT2),
    ("PIT_STATE2", KVM_CAP_PIT_STATE2),
    ("SIGNAL_MSI", KVM_CAP_SIGNAL_MSI),
    ("IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT),
    ("TSC_DEADLINE_TIMER", KVM_CAP_TSC_DEADLINE_TIMER),
    ("GET_TSC_KHZ", KVM_CAP_GET_TSC_KHZ),
    ("SYNC_MMU", KVM_CAP_SYNC_MMU),
    ("READONLY_MEM", KVM_CAP_READONLY_MEM),
    ("DESTROY_MEMORY_REGION_WORKS", KVM_CAP_DESTROY_MEMORY_REGION_WORKS),
    ("JOIN_MEMORY_REGIONS_WORKS", KVM_CAP_JOIN_MEMORY_REGIONS_WORKS),
    ("INTERNAL_ERROR_DATA", KVM_CAP_INTERNAL_ERROR_DATA),
    ("USER_NMI", KVM_CAP_USER_NMI),
];

fn api_version() {
    let d = Device::open();
    assert_eq!(assert_ok!(d.ioctl(KVM_GET_API_VERSION, 0)), 12);
    assert_err!(d.ioctl(KVM_GET_API_VERSION, 1), EINVAL);
}

fn capabilities() {
    let d = Device::open();
    let vm = d.create_vm();
    let mut missing = Vec::new();
    for (name, cap) in WANTED {
        if d.cap(*cap) <= 0 || vm.cap(*cap) <= 0 {
            missing.push(*name);
        }
    }
    assert!(missing.is_empty(), "missing: {missing:?}");
    let (nr, max, max_id) = (d.cap(KVM_CAP_NR_VCPUS), d.cap(KVM_CAP_MAX_VCPUS), d.cap(KVM_CAP_MAX_VCPU_ID));
    assert!(nr >= 1 && max >= 64 && nr <= max && max_id >= max, "NR {nr}, MAX {max}, MAX_ID {max_id}");
    assert!(d.cap(KVM_CAP_NR_MEMSLOTS) >= 32);
    // Firecracker takes -1 for fatal, and anything from 1 to 4095 is no size.
    let xsave2 = vm.cap(KVM_CAP_XSAVE2);
    assert!(xsave2 == 0 || xsave2 >= 4096, "XSAVE2 {xsave2}");
}

/// A capability is a promise: its calls may fail, but not with ENOTTY.
fn capabilities_imply_ioctls() {
    let d = Device::open();
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    let all = [
        (KVM_CAP_SIGNAL_MSI, vm.fd, KVM_SIGNAL_MSI),
        (KVM_CAP_IRQFD, vm.fd, KVM_IRQFD),
        (KVM_CAP_IOEVENTFD, vm.fd, KVM_IOEVENTFD),
        (KVM_CAP_IRQ_ROUTING, vm.fd, KVM_SET_GSI_ROUTING),
        (KVM_CAP_PIT2, vm.fd, KVM_CREATE_PIT2),
        (KVM_CAP_PIT_STATE2, vm.fd, KVM_SET_PIT2),
        (KVM_CAP_ADJUST_CLOCK, vm.fd, KVM_SET_CLOCK),
        (KVM_CAP_COALESCED_MMIO, vm.fd, KVM_REGISTER_COALESCED_MMIO),
        (KVM_CAP_SET_IDENTITY_MAP_ADDR, vm.fd, KVM_SET_IDENTITY_MAP_ADDR),
        (KVM_CAP_USER_MEMORY2, vm.fd, KVM_SET_USER_MEMORY_REGION2),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, vm.fd, KVM_CLEAR_DIRTY_LOG),
        (KVM_CAP_DEVICE_CTRL, vm.fd, KVM_CREATE_DEVICE),
        (KVM_CAP_MP_STATE, cpu.fd, KVM_SET_MP_STATE),
        (KVM_CAP_VCPU_EVENTS, cpu.fd, KVM_SET_VCPU_EVENTS),
        (KVM_CAP_DEBUGREGS, cpu.fd, KVM_SET_DEBUGREGS),
        (KVM_CAP_SREGS2, cpu.fd, KVM_SET_SREGS2),
        (KVM_CAP_ONE_REG, cpu.fd, KVM_SET_ONE_REG),
        (KVM_CAP_ONE_REG, cpu.fd, KVM_GET_REG_LIST),
        (KVM_CAP_SYS_ATTRIBUTES, d.fd, KVM_HAS_DEVICE_ATTR),
        (KVM_CAP_XSAVE, cpu.fd, KVM_SET_XSAVE),
        (KVM_CAP_XCRS, cpu.fd, KVM_SET_XCRS),
        (KVM_CAP_EXT_CPUID, cpu.fd, KVM_SET_CPUID2),
        (KVM_CAP_MCE, cpu.fd, KVM_X86_SETUP_MCE),
        (KVM_CAP_SET_GUEST_DEBUG, cpu.fd, KVM_SET_GUEST_DEBUG),
        (KVM_CAP_USER_NMI, cpu.fd, KVM_NMI),
        (KVM_CAP_X86_SMM, cpu.fd, KVM_SMI),
        (KVM_CAP_NESTED_STATE, cpu.fd, KVM_SET_NESTED_STATE),
    ];
    for (cap, fd, nr) in all {
        if vm.cap(cap) > 0 {
            // A null argument: refused, but for another reason. (The calls without an argument just work.)
            let r = ioctl(fd, nr, 0);
            assert!(r != Err(ENOTTY), "capability {cap} is announced, ioctl {nr:#x} unknown");
        }
    }
}

fn unknown_capabilities_are_zero() {
    let d = Device::open();
    let vm = d.create_vm();
    for cap in [10_000usize, 0x7fff_ffff, 0xffff_ffff, 1 << 40, usize::MAX] {
        assert_eq!(assert_ok!(d.ioctl(KVM_CHECK_EXTENSION, cap)), 0, "device, {cap:#x}");
        assert_eq!(assert_ok!(vm.ioctl(KVM_CHECK_EXTENSION, cap)), 0, "VM, {cap:#x}");
    }
}

fn is_unknown(r: Result<i32>) -> bool {
    // KVM on x86 answers EINVAL on the device and on vCPUs where its own documentation says ENOTTY.
    r == Err(ENOTTY) || (on_kvm() && r == Err(EINVAL))
}

fn unknown_ioctls() {
    let d = Device::open();
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    let mut buffer = [0u8; 4096];
    let p = buffer.as_mut_ptr() as usize;
    for nr in [0xf0u32, 0xfe, 0xff] {
        for dir in 0..4 {
            for size in [0, 8, 4096] {
                let request = number(dir, nr, size);
                for fd in [d.fd, vm.fd, cpu.fd] {
                    assert!(is_unknown(ioctl(fd, request, p)), "{request:#x}");
                }
            }
        }
    }
    // The right number with another type, and with another size.
    for request in [0x5400 | 0x80, 0xb080, number(1, 0x46, 8), number(2, 0x81, 8), number(3, 0x81, 4)] {
        for fd in [d.fd, vm.fd, cpu.fd] {
            assert!(is_unknown(ioctl(fd, request, p)), "{request:#x}");
        }
    }
    assert!(buffer.iter().all(|b| *b == 0), "an unknown call wrote to its argument");
}

fn ioctls_of_another_descriptor() {
    let d = Device::open();
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    let mut buffer = vec![0u64; 4096];
    let p = buffer.as_mut_ptr() as usize;
    for nr in [KVM_RUN, KVM_GET_REGS, KVM_SET_SREGS, KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION] {
        assert!(is_unknown(ioctl(d.fd, nr, p)), "device {nr:#x}");
    }
    for nr in [KVM_RUN, KVM_GET_REGS, KVM_SET_SREGS, KVM_CREATE_VM, KVM_GET_SUPPORTED_CPUID] {
        assert!(is_unknown(ioctl(vm.fd, nr, p)), "VM {nr:#x}");
    }
    for nr in [KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_CREATE_IRQCHIP, KVM_CREATE_VM] {
        assert!(is_unknown(ioctl(cpu.fd, nr, p)), "vCPU {nr:#x}");
    }
}

fn system_bad_arguments() {
    let d = Device::open();
    assert_err!(d.ioctl(KVM_GET_VCPU_MMAP_SIZE, 1), EINVAL);
    for nr in [KVM_GET_SUPPORTED_CPUID, KVM_GET_MSR_INDEX_LIST] {
        for p in [0usize, 8, usize::MAX - 7, 0xffff_8000_0000_0000, 0x8000_0000_0000] {
            assert_err!(d.ioctl(nr, p), EFAULT, "{nr:#x} at {p:#x}");
        }
    }
}

fn supported_cpuid() {
    let d = Device::open();
    let c = d.supported_cpuid();
    assert!(c.nent > 10 && c.nent < 256, "{} entries", c.nent);
    let leaf0 = c.find(0, 0).expect("leaf 0");
    assert!(leaf0.eax >= 1);
    let leaf1 = c.find(1, 0).expect("leaf 1");
    // FPU PSE TSC MSR PAE CX8 APIC SEP PGE CMOV PAT CLFSH FXSR SSE SSE2
    let want = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16 | 0x0608_0000;
    assert_eq!(leaf1.edx & want, want, "leaf 1 EDX {:#x}", leaf1.edx);
    let ext = c.find(0x8000_0001, 0).expect("leaf 0x80000001");
    assert!(ext.edx >> 29 & 1 == 1 && ext.edx >> 20 & 1 == 1, "long mode and NX: {:#x}", ext.edx);
    let mut seen = std::collections::HashSet::new();
    for e in c.as_slice() {
        assert!(seen.insert((e.function, e.index)), "leaf {:#x} index {} twice", e.function, e.index);
    }
    // XSAVE areas never promise more than the host has.
    if let Some(x) = c.find(0xd, 0) {
        // SAFETY: CPUID has no side effects; leaf 0xD exists when XSAVE is announced.
        let host = unsafe { std::arch::x86_64::__cpuid_count(0xd, 0) };
        assert_eq!(x.eax & !host.eax, 0, "XCR0 bits beyond the host's");
    }
    let sig = c.find(0x4000_0000, 0);
    if let Some(s) = sig {
        assert!(s.eax == 0 || s.eax >= 0x4000_0001, "hypervisor leaf {:#x}", s.eax);
    }
}

fn supported_cpuid_bad_room() {
    let d = Device::open();
    let full = d.supported_cpuid();
    let mut c = Cpuid::with_room(0);
    assert_err!(ioctl_out(d.fd, KVM_GET_SUPPORTED_CPUID, &mut c), E2BIG);
    let mut c = Cpuid::with_room(1);
    assert_err!(ioctl_out(d.fd, KVM_GET_SUPPORTED_CPUID, &mut c), E2BIG);
    let mut c = Cpuid::with_room(full.nent - 1);
    assert_err!(ioctl_out(d.fd, KVM_GET_SUPPORTED_CPUID, &mut c), E2BIG);
    let mut c = Cpuid::with_room(full.nent);
    assert_ok!(ioctl_out(d.fd, KVM_GET_SUPPORTED_CPUID, &mut c));
    assert_eq!(c.nent, full.nent);
    // More room than any CPUID needs is cut down, not believed.
    let mut c = Cpuid::with_room(u32::MAX);
    match ioctl_out(d.fd, KVM_GET_SUPPORTED_CPUID, &mut c) {
        Ok(_) => assert_eq!(c.nent, full.nent),
        Err(e) => assert!(e == E2BIG || e == EINVAL || e == ENOMEM, "{e:?}"),
    }
}

/// `struct kvm_msr_list` with room.
#[repr(C)]
struct MsrList {
    n: u32,
    indices: [u32; 1024],
}

fn msr_index_list() {
    let d = Device::open();
    let mut l = MsrList { n: 0, indices: [0; 1024] };
    assert_err!(ioctl_out(d.fd, KVM_GET_MSR_INDEX_LIST, &mut l), E2BIG);
    let n = l.n;
    assert!(n > 8 && n < 1024, "{n} MSRs");
    l.n = n - 1;
    assert_err!(ioctl_out(d.fd, KVM_GET_MSR_INDEX_LIST, &mut l), E2BIG);
    l.n = n;
    assert_ok!(ioctl_out(d.fd, KVM_GET_MSR_INDEX_LIST, &mut l));
    assert_eq!(l.n, n);
    let list = &l.indices[..n as usize];
    // TSC, SYSENTER x 3, PAT, STAR, LSTAR, CSTAR, SF_MASK, KERNEL_GS_BASE
    for want in [0x10, 0x174, 0x175, 0x176, 0x277, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102] {
        assert!(list.contains(&want), "MSR {want:#x} is not in the list");
    }
    let mut sorted = list.to_vec();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), n as usize, "an MSR is listed twice");
}

fn create_vm_bad_type() {
    let d = Device::open();
    for t in [0x100usize, 0xffff, usize::MAX, 1 << 32] {
        assert_err!(d.ioctl(KVM_CREATE_VM, t), EINVAL, "type {t:#x}");
    }
}

fn create_vcpu_ids() {
    let d = Device::open();
    let vm = d.create_vm();
    let max_id = d.cap(KVM_CAP_MAX_VCPU_ID) as usize;
    for id in [max_id, max_id + 1, 0x7fff_ffff, 0xffff_ffff, usize::MAX] {
        assert_err!(vm.ioctl(KVM_CREATE_VCPU, id), EINVAL, "id {id:#x}");
    }
    let a = vm.create_vcpu(0);
    assert_err!(vm.ioctl(KVM_CREATE_VCPU, 0), EEXIST);
    let b = vm.create_vcpu(5);
    assert_err!(vm.ioctl(KVM_CREATE_VCPU, 5), EEXIST);
    drop((a, b));
    // A closed vCPU still exists in its VM.
    assert_err!(vm.ioctl(KVM_CREATE_VCPU, 5), EEXIST);
}

fn map_vcpu(fd: i32, len: usize, offset: i64, flags: i32) -> Result<*mut u8> {
    // SAFETY: a fresh mapping.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
    if p == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(p as *mut u8)
    }
}

fn vcpu_mmap() {
    let d = Device::open();
    let size = assert_ok!(d.ioctl(KVM_GET_VCPU_MMAP_SIZE, 0)) as usize;
    assert!(size >= 4096 + 4096 && size % 4096 == 0 && size <= 64 * 4096, "{size}");
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    // Two mappings are the same memory.
    let p = assert_ok!(map_vcpu(cpu.fd, size, 0, libc::MAP_SHARED));
    // SAFETY: byte 1 of the page is `immediate_exit`.
    unsafe { p.add(1).write_volatile(1) };
    assert_eq!(cpu.page().immediate_exit, 1);
    assert_err!(cpu.run(), EINTR);
    let again = assert_ok!(map_vcpu(cpu.fd, 4096, 0, libc::MAP_SHARED));
    // SAFETY: mapped just now.
    assert_eq!(unsafe { again.add(1).read_volatile() }, 1);
    // Every page of the size that was announced is there.
    for page in 0..size / 4096 {
        // SAFETY: within the mapping.
        unsafe { p.add(page * 4096 + 4095).read_volatile() };
    }
    // The device and the VM have nothing to map.
    assert!(map_vcpu(d.fd, 4096, 0, libc::MAP_SHARED).is_err());
    assert!(map_vcpu(vm.fd, 4096, 0, libc::MAP_SHARED).is_err());
}

/// Beyond the announced size: refused at mmap, or SIGBUS at the touch.
fn vcpu_mmap_beyond_end() {
    let d = Device::open();
    let size = assert_ok!(d.ioctl(KVM_GET_VCPU_MMAP_SIZE, 0)) as usize;
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    for (len, offset) in [(4096, size as i64), (size + 4096, 0), (4096, 1 << 30), (4096, i64::MAX & !4095)] {
        let Ok(p) = map_vcpu(cpu.fd, len, offset, libc::MAP_SHARED) else { continue };
        let status = in_child(|| {
            // SAFETY: mapped; a signal is the wanted end.
            unsafe { p.add(len - 4096).read_volatile() };
            0
        });
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
            "{len:#x} bytes at {offset:#x}: status {status:#x}"
        );
    }
}

/// Addresses that no process may read: unmapped low, the gap, kernel space.
const BAD: [usize; 5] = [0, 0x10, 0x8000_0000_0000, 0xffff_8880_0000_0000, usize::MAX - 0xff];

fn bad_pointers_vm() {
    let vm = Vm::new();
    vm.create_irqchip();
    vm.create_pit();
    let calls = [
        KVM_SET_USER_MEMORY_REGION,
        KVM_GET_DIRTY_LOG,
        KVM_IRQFD,
        KVM_IOEVENTFD,
        KVM_SET_GSI_ROUTING,
        KVM_SIGNAL_MSI,
        KVM_GET_IRQCHIP,
        KVM_SET_IRQCHIP,
        KVM_GET_PIT2,
        KVM_SET_PIT2,
        KVM_SET_CLOCK,
        KVM_GET_CLOCK,
        KVM_IRQ_LINE,
        KVM_SET_IDENTITY_MAP_ADDR,
    ];
    for nr in calls {
        for p in BAD {
            assert_err!(vm.ioctl(nr, p), EFAULT, "{nr:#x} at {p:#x}");
        }
    }
}

fn bad_pointers_vcpu() {
    let vm = Vm::new();
    vm.create_irqchip();
    let cpu = vm.create_vcpu(0);
    let calls = [
        KVM_GET_REGS,
        KVM_SET_REGS,
        KVM_GET_SREGS,
        KVM_SET_SREGS,
        KVM_GET_FPU,
        KVM_SET_FPU,
        KVM_GET_XSAVE,
        KVM_SET_XSAVE,
        KVM_GET_XCRS,
        KVM_SET_XCRS,
        KVM_GET_DEBUGREGS,
        KVM_SET_DEBUGREGS,
        KVM_GET_VCPU_EVENTS,
        KVM_SET_VCPU_EVENTS,
        KVM_GET_MP_STATE,
        KVM_SET_MP_STATE,
        KVM_GET_MSRS,
        KVM_SET_MSRS,
        KVM_SET_CPUID2,
        KVM_GET_CPUID2,
        KVM_GET_LAPIC,
        KVM_SET_LAPIC,
    ];
    for nr in calls {
        for p in BAD {
            assert_err!(cpu.ioctl(nr, p), EFAULT, "{nr:#x} at {p:#x}");
        }
    }
    // A structure that begins in mapped memory and ends outside.
    let page = anon(8192, 4096);
    munmap(page.wrapping_add(4096), 4096);
    let p = page as usize + 4096 - 8;
    for nr in [KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS] {
        assert_err!(cpu.ioctl(nr, p), EFAULT, "{nr:#x} across the end of a page");
    }
}

fn run_bad_argument() {
    let vm = Vm::new();
    let cpu = vm.create_vcpu(0);
    for arg in [1usize, 4096, usize::MAX] {
        assert_err!(cpu.ioctl(KVM_RUN, arg), EINVAL);
    }
}

fn memory_region_bad_arguments() {
    let vm = Vm::new();
    let ram = Ram::new(0, 0x10000);
    let hva = ram.hva as u64;
    let slots = vm.cap(KVM_CAP_NR_MEMSLOTS) as u32;
    assert_err!(vm.set_slot(slots, 0, 0, 0x1000, hva), EINVAL, "slot number");
    assert_err!(vm.set_slot(0xffff, 0, 0, 0x1000, hva), EINVAL, "slot number");
    assert_err!(vm.set_slot(0x7_0000, 0, 0, 0x1000, hva), EINVAL, "address space");
    assert_err!(vm.set_slot(0, 1 << 31, 0, 0x1000, hva), EINVAL, "flags");
    assert_err!(vm.set_slot(0, 0, 0x800, 0x1000, hva), EINVAL, "unaligned gpa");
    assert_err!(vm.set_slot(0, 0, 0, 0x1800, hva), EINVAL, "unaligned size");
    assert_err!(vm.set_slot(0, 0, 0, 0x1000, hva + 0x800), EINVAL, "unaligned hva");
    assert_err!(vm.set_slot(0, 0, 0, 0x1000, 0xffff_8880_0000_0000), EINVAL, "kernel hva");
    assert_err!(vm.set_slot(0, 0, 0, 0x1_0000, 0x7fff_ffff_f000), EINVAL, "hva over the end of user space");
    assert_err!(vm.set_slot(0, 0, u64::MAX & !0xfff, 0x2000, hva), EINVAL, "gpa wraps");
    assert_err!(vm.set_slot(0, 0, 0, 0, hva), EINVAL, "deleting what is not there");
    // The good call is good, the same again too.
    assert_ok!(vm.map(0, 0, ram));
    assert_ok!(vm.map(0, 0, ram));
    assert_err!(vm.map(1, 0, Ram { gpa: 0x8000, ..ram }), EEXIST, "overlap");
    assert_err!(vm.set_slot(0, 0, 0, 0x8000, hva), EINVAL, "another size");
    assert_err!(vm.set_slot(0, 0, 0, 0x10000, hva + 0x1000), EINVAL, "another hva");
    assert_err!(vm.set_slot(0, KVM_MEM_READONLY, 0, 0x10000, hva), EINVAL, "read-only later");
    assert_ok!(vm.set_slot(0, 0, 0, 0, 0));
    assert_ok!(vm.map(1, 0, Ram { gpa: 0x8000, ..ram }));
}

fn tss_and_identity_map() {
    let vm = Vm::new();
    assert_err!(vm.ioctl(KVM_SET_TSS_ADDR, usize::MAX - 4096), EINVAL, "beyond 32 bits");
    assert_ok!(vm.ioctl(KVM_SET_TSS_ADDR, 0xfffb_d000));
    let addr = 0xfffb_c000u64;
    assert_ok!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &addr));
    let _cpu = vm.create_vcpu(0);
    assert_err!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, &addr), EINVAL, "after a vCPU was made");
}

payload! { api_hlt, 16, "hlt", "hlt" }

fn close_device_first() {
    let g = Guest::real(api_hlt());
    // `Guest` closed its device already; the run shows that nothing hung on it.
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
}

fn close_vm_before_vcpu() {
    let g = Guest::real(api_hlt());
    assert_ok!(close(g.vm.fd));
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_eq!(g.cpu.regs().rip, 0x1001);
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    let Guest { cpu, vm, .. } = g;
    std::mem::forget(vm);
    drop(cpu);
}

fn run_page_outlives_descriptors() {
    let g = Guest::real(api_hlt());
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    assert_ok!(close(g.cpu.fd));
    assert_ok!(close(g.vm.fd));
    // The mapping holds the page, and the last exit can still be read.
    assert_eq!(g.cpu.exit(), Exit::Hlt);
    g.cpu.page().immediate_exit = 1;
    std::mem::forget(g);
}

fn dup_and_cloexec() {
    let g = Guest::real(api_hlt());
    for fd in [g.vm.fd, g.cpu.fd] {
        // SAFETY: plain system calls.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
    // SAFETY: as above.
    let copy = unsafe { libc::dup(g.cpu.fd) };
    assert_ok!(ioctl(copy, KVM_RUN, 0));
    assert_eq!(g.cpu.exit(), Exit::Hlt);
    assert_ok!(close(copy));
    assert_ok!(g.cpu.run());
}

fn read_write_poll_refused() {
    let d = Device::open();
    let vm = d.create_vm();
    let cpu = vm.create_vcpu(0);
    let mut b = [0u8; 16];
    for fd in [d.fd, vm.fd, cpu.fd] {
        // SAFETY: the buffer is ours.
        unsafe {
            assert!(libc::read(fd, b.as_mut_ptr() as *mut _, b.len()) < 0);
            assert!(libc::write(fd, b.as_ptr() as *const _, b.len()) < 0);
        }
    }
}

fn forked_child_gets_eio() {
    let g = Guest::real(api_hlt());
    let ram = Ram::new(0x100_0000, 0x1000);
    let failed = in_child(|| {
        let results = [
            g.vm.map(1, 0, ram),
            g.vm.ioctl(KVM_CREATE_VCPU, 1),
            g.vm.ioctl(KVM_CHECK_EXTENSION, 0),
            g.cpu.ioctl(KVM_RUN, 0),
            g.cpu.get::<kvm_regs>(KVM_GET_REGS).map(|_| 0),
        ];
        results.iter().position(|r| *r != Err(EIO)).map_or(0, |i| i as i32 + 1)
    });
    assert_eq!(libc::WEXITSTATUS(failed), 0, "call number {} of the child", libc::WEXITSTATUS(failed));
    // The parent's VM is unharmed.
    assert_eq!(assert_ok!(g.cpu.run()), Exit::Hlt);
    // The device descriptor, unlike those, belongs to nobody.
    let d = Device::open();
    let status = in_child(|| (d.ioctl(KVM_GET_API_VERSION, 0) != Ok(12)) as i32);
    assert_eq!(status, 0);
}

fn refcount(module: &str) -> Option<i64> {
    std::fs::read_to_string(format!("/sys/module/{module}/refcnt")).ok()?.trim().parse().ok()
}

fn delete_module(name: &str) -> Result<i64> {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: a NUL-terminated name; the module is in use, so that the call is refused.
    check(unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) })
}

/// Each of the three descriptors alone keeps the module in memory.
fn module_is_busy() {
    let module = match options().device.as_str() {
        "/dev/kvm" => ["kvm_amd", "kvm_intel"].into_iter().find(|m| refcount(m).is_some()),
        _ => Some("krab"),
    };
    let Some(module) = module else { skip!("no vendor module: KVM is built in") };
    let Some(before) = refcount(module) else { skip!("/sys/module/{module}/refcnt cannot be read") };
    let busy = |what: &str| {
        let now = refcount(module).unwrap_or(0);
        assert!(now > before, "{what}: reference count {now}, {before} before");
        assert_err!(delete_module(module), EAGAIN, "rmmod with {what} open");
    };
    let d = Device::open();
    busy("the device");
    let vm = d.create_vm();
    drop(d);
    busy("a VM");
    let cpu = vm.create_vcpu(0);
    drop(vm);
    busy("a vCPU");
    let page = cpu.page_bytes();
    let fd = cpu.fd;
    std::mem::forget(cpu);
    assert_ok!(close(fd));
    busy("the run page");
    let size = assert_ok!(ioctl(Device::open().fd, KVM_GET_VCPU_MMAP_SIZE, 0)) as usize;
    sys::munmap(page, size);
    // The last reference may be dropped a little later (delayed fput, SRCU).
    for _ in 0..200 {
        if refcount(module) == Some(before) {
            return;
        }
        sleep_ms(5);
    }
    panic!("reference count {:?} after everything was closed, {before} before", refcount(module));
}
