// SPDX-License-Identifier: GPL-2.0
//! The device, VMs, vCPUs and guest memory as plain objects over raw ioctls.

use crate::harness::options;
use crate::ioctls::*;
use crate::sys::{self, check, ioctl, ioctl_in, ioctl_out, Errno, Result};
use kvm_bindings::*;
use std::ffi::CString;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, Ordering};

/// The device node, /dev/krab or /dev/kvm.
pub struct Device {
    pub fd: RawFd,
}

impl Device {
    pub fn open() -> Device {
        Device { fd: Device::try_open().unwrap_or_else(|e| panic!("open {}: {e:?}", options().device)) }
    }

    pub fn try_open() -> Result<RawFd> {
        let path = CString::new(options().device.as_str()).expect("a path without NUL");
        // SAFETY: a NUL-terminated path.
        check(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) } as i64).map(|v| v as RawFd)
    }

    pub fn ioctl(&self, nr: u32, arg: usize) -> Result<i32> {
        ioctl(self.fd, nr, arg)
    }

    /// KVM_CHECK_EXTENSION.
    pub fn cap(&self, cap: u32) -> i32 {
        self.ioctl(KVM_CHECK_EXTENSION, cap as usize).unwrap_or(-1)
    }

    pub fn create_vm(&self) -> Vm {
        let fd = self.ioctl(KVM_CREATE_VM, 0).unwrap_or_else(|e| panic!("KVM_CREATE_VM: {e:?}"));
        let run_size = self.ioctl(KVM_GET_VCPU_MMAP_SIZE, 0).expect("KVM_GET_VCPU_MMAP_SIZE") as usize;
        Vm { fd, run_size }
    }

    /// KVM_GET_SUPPORTED_CPUID, whole.
    pub fn supported_cpuid(&self) -> Cpuid {
        let mut c = Cpuid::with_room(256);
        ioctl_out(self.fd, KVM_GET_SUPPORTED_CPUID, &mut c).expect("KVM_GET_SUPPORTED_CPUID");
        c
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = sys::close(self.fd);
    }
}

/// `struct kvm_cpuid2` with room for 256 entries behind it.
#[repr(C)]
#[derive(Clone)]
pub struct Cpuid {
    pub nent: u32,
    pub padding: u32,
    pub entries: [kvm_cpuid_entry2; 256],
}

impl Cpuid {
    pub fn with_room(nent: u32) -> Cpuid {
        Cpuid { nent, padding: 0, entries: [kvm_cpuid_entry2::default(); 256] }
    }

    pub fn as_slice(&self) -> &[kvm_cpuid_entry2] {
        &self.entries[..(self.nent as usize).min(256)]
    }

    pub fn find(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.as_slice().iter().find(|e| e.function == function && e.index == index)
    }

    /// Replaces or adds a leaf without an index.
    pub fn set(&mut self, function: u32, [eax, ebx, ecx, edx]: [u32; 4]) {
        let n = self.nent as usize;
        let at = self.entries[..n].iter().position(|e| e.function == function).unwrap_or(n);
        if at == n {
            self.nent += 1;
        }
        self.entries[at] = kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
    }
}

/// Memory of this process that a guest sees at `gpa`.
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    pub hva: *mut u8,
    pub gpa: u64,
    pub len: usize,
}

// SAFETY: a plain address; the mapping outlives the test, and racing accesses are what the tests are about.
unsafe impl Send for Ram {}
unsafe impl Sync for Ram {}

impl Ram {
    /// New anonymous memory, 2 MiB aligned when it is that long.
    pub fn new(gpa: u64, len: usize) -> Ram {
        Ram { hva: sys::anon(len, if len >= 2 << 20 { 2 << 20 } else { 4096 }), gpa, len }
    }

    pub fn at(&self, gpa: u64) -> *mut u8 {
        let offset = gpa.checked_sub(self.gpa).expect("address below the slot") as usize;
        assert!(offset < self.len, "guest address {gpa:#x} beyond the slot");
        self.hva.wrapping_add(offset)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa - self.gpa + bytes.len() as u64 <= self.len as u64);
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(gpa), bytes.len()) }
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        assert!(gpa - self.gpa + len as u64 <= self.len as u64);
        // SAFETY: within the mapping; volatile-like copies are enough, the guest is not running or the test knows.
        unsafe { std::slice::from_raw_parts(self.at(gpa), len).to_vec() }
    }

    pub fn write_u64(&self, gpa: u64, v: u64) {
        // SAFETY: within the mapping.
        unsafe { std::ptr::write_volatile(self.at(gpa) as *mut u64, v) }
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        // SAFETY: within the mapping.
        unsafe { std::ptr::read_volatile(self.at(gpa) as *const u64) }
    }

    pub fn write_u32(&self, gpa: u64, v: u32) {
        // SAFETY: within the mapping.
        unsafe { std::ptr::write_volatile(self.at(gpa) as *mut u32, v) }
    }

    pub fn read_u32(&self, gpa: u64) -> u32 {
        // SAFETY: within the mapping.
        unsafe { std::ptr::read_volatile(self.at(gpa) as *const u32) }
    }

    /// Waits (about `ms` milliseconds at most) until the 64-bit word at `gpa` is at least `want`.
    pub fn wait_u64(&self, gpa: u64, want: u64, ms: u64) -> bool {
        let end = sys::now_ns() + ms * 1_000_000;
        while self.read_u64(gpa) < want {
            if sys::now_ns() > end {
                return false;
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        true
    }

    pub fn unmap(self) {
        sys::munmap(self.hva, self.len);
    }
}

pub struct Vm {
    pub fd: RawFd,
    run_size: usize,
}

impl Vm {
    pub fn new() -> Vm {
        Device::open().create_vm()
    }

    pub fn ioctl(&self, nr: u32, arg: usize) -> Result<i32> {
        ioctl(self.fd, nr, arg)
    }

    pub fn set<T>(&self, nr: u32, arg: &T) -> Result<i32> {
        ioctl_in(self.fd, nr, arg)
    }

    pub fn cap(&self, cap: u32) -> i32 {
        self.ioctl(KVM_CHECK_EXTENSION, cap as usize).unwrap_or(-1)
    }

    pub fn set_slot(&self, slot: u32, flags: u32, gpa: u64, len: u64, hva: u64) -> Result<i32> {
        let r =
            kvm_userspace_memory_region { slot, flags, guest_phys_addr: gpa, memory_size: len, userspace_addr: hva };
        self.set(KVM_SET_USER_MEMORY_REGION, &r)
    }

    /// Maps `ram` as slot `slot`.
    pub fn map(&self, slot: u32, flags: u32, ram: Ram) -> Result<i32> {
        self.set_slot(slot, flags, ram.gpa, ram.len as u64, ram.hva as u64)
    }

    /// New memory in slot `slot`.
    pub fn add_ram(&self, slot: u32, gpa: u64, len: usize) -> Ram {
        let ram = Ram::new(gpa, len);
        self.map(slot, 0, ram).unwrap_or_else(|e| panic!("slot {slot} of {len:#x} bytes at {gpa:#x}: {e:?}"));
        ram
    }

    pub fn create_vcpu(&self, id: u32) -> Vcpu {
        self.try_vcpu(id).unwrap_or_else(|e| panic!("KVM_CREATE_VCPU {id}: {e:?}"))
    }

    pub fn try_vcpu(&self, id: u32) -> Result<Vcpu> {
        let fd = self.ioctl(KVM_CREATE_VCPU, id as usize)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of the run page.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), self.run_size, prot, libc::MAP_SHARED, fd, 0) };
        if p == libc::MAP_FAILED {
            panic!("mmap of the vCPU: {:?}", Errno::last());
        }
        Ok(Vcpu { fd, run: p as *mut kvm_run, run_size: self.run_size })
    }

    /// An in-kernel PIC, IOAPIC and LAPICs, and what KVM on Intel wants beside them.
    pub fn create_irqchip(&self) {
        let _ = self.ioctl(KVM_SET_TSS_ADDR, 0xfffb_d000);
        self.ioctl(KVM_CREATE_IRQCHIP, 0).unwrap_or_else(|e| panic!("KVM_CREATE_IRQCHIP: {e:?}"));
    }

    pub fn create_pit(&self) {
        let config = kvm_pit_config { flags: 0, ..Default::default() };
        self.set(KVM_CREATE_PIT2, &config).unwrap_or_else(|e| panic!("KVM_CREATE_PIT2: {e:?}"));
    }

    pub fn irq_line(&self, gsi: u32, level: u32) -> Result<i32> {
        let l = kvm_irq_level { __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: gsi }, level };
        self.set(KVM_IRQ_LINE, &l)
    }

    /// KVM_SIGNAL_MSI: 1 when some vCPU took it, 0 when it was blocked.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<i32> {
        let m = kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
        self.set(KVM_SIGNAL_MSI, &m)
    }

    pub fn irqfd(&self, fd: RawFd, gsi: u32, flags: u32, resample: RawFd) -> Result<i32> {
        let i = kvm_irqfd { fd: fd as u32, gsi, flags, resamplefd: resample as u32, ..Default::default() };
        self.set(KVM_IRQFD, &i)
    }

    pub fn ioeventfd(&self, fd: RawFd, addr: u64, len: u32, flags: u32, datamatch: u64) -> Result<i32> {
        let i = kvm_ioeventfd { datamatch, addr, len, fd, flags, ..Default::default() };
        self.set(KVM_IOEVENTFD, &i)
    }
}

impl Default for Vm {
    fn default() -> Vm {
        Vm::new()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = sys::close(self.fd);
    }
}

/// Why KVM_RUN came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `out` with the bytes, or a request for `size * count` bytes (`data` is then empty).
    Io {
        out: bool,
        port: u16,
        size: u8,
        count: u32,
        data: Vec<u8>,
    },
    /// A write with its bytes, or a read of `len` bytes (`data` is then empty).
    Mmio {
        write: bool,
        gpa: u64,
        len: u32,
        data: Vec<u8>,
    },
    Hlt,
    Shutdown,
    IrqWindow,
    Intr,
    Debug,
    Internal(u32),
    FailEntry(u64),
    Eoi(u8),
    Other(u32),
}

pub struct Vcpu {
    pub fd: RawFd,
    run: *mut kvm_run,
    pub run_size: usize,
}

// SAFETY: the run page is shared with the kernel and with whoever writes `immediate_exit`; accesses to it are of
// single words, and a test that uses a vCPU from two threads does it to see what happens.
unsafe impl Send for Vcpu {}
unsafe impl Sync for Vcpu {}

impl Vcpu {
    pub fn ioctl(&self, nr: u32, arg: usize) -> Result<i32> {
        ioctl(self.fd, nr, arg)
    }

    /// A GET call into a zeroed structure.
    pub fn get<T>(&self, nr: u32) -> Result<T> {
        // SAFETY: only used for the plain-data structures of the KVM API.
        let mut t: T = unsafe { std::mem::zeroed() };
        ioctl_out(self.fd, nr, &mut t)?;
        Ok(t)
    }

    pub fn set<T>(&self, nr: u32, t: &T) -> Result<i32> {
        ioctl_in(self.fd, nr, t)
    }

    pub fn regs(&self) -> kvm_regs {
        self.get(KVM_GET_REGS).expect("KVM_GET_REGS")
    }

    pub fn set_regs(&self, r: &kvm_regs) {
        self.set(KVM_SET_REGS, r).expect("KVM_SET_REGS");
    }

    pub fn sregs(&self) -> kvm_sregs {
        self.get(KVM_GET_SREGS).expect("KVM_GET_SREGS")
    }

    pub fn set_sregs(&self, s: &kvm_sregs) {
        self.set(KVM_SET_SREGS, s).unwrap_or_else(|e| panic!("KVM_SET_SREGS: {e:?}"));
    }

    pub fn set_cpuid(&self, c: &Cpuid) -> Result<i32> {
        self.set(KVM_SET_CPUID2, c)
    }

    /// One MSR; None when the vCPU has none of that number.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut m = OneMsr::new(index, 0);
        match ioctl_out(self.fd, KVM_GET_MSRS, &mut m) {
            Ok(1) => Some(m.entry.data),
            Ok(0) => None,
            other => panic!("KVM_GET_MSRS {index:#x}: {other:?}"),
        }
    }

    /// True when the value was taken.
    pub fn set_msr(&self, index: u32, data: u64) -> bool {
        match self.set(KVM_SET_MSRS, &OneMsr::new(index, data)) {
            Ok(n) => n == 1,
            Err(e) => panic!("KVM_SET_MSRS {index:#x}: {e:?}"),
        }
    }

    pub fn mp_state(&self) -> u32 {
        self.get::<kvm_mp_state>(KVM_GET_MP_STATE).expect("KVM_GET_MP_STATE").mp_state
    }

    pub fn set_mp_state(&self, mp_state: u32) -> Result<i32> {
        self.set(KVM_SET_MP_STATE, &kvm_mp_state { mp_state })
    }

    /// The shared page. Fields may change under the caller when another thread writes them.
    #[allow(clippy::mut_from_ref)]
    pub fn page(&self) -> &mut kvm_run {
        // SAFETY: mapped as long as the vCPU lives, plain data.
        unsafe { &mut *self.run }
    }

    /// The shared page as bytes.
    pub fn page_bytes(&self) -> *mut u8 {
        self.run as *mut u8
    }

    /// `immediate_exit`, which other threads and signal handlers may set.
    pub fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: a byte in the mapped page.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) }
    }

    pub fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit().store(on as u8, Ordering::SeqCst);
    }

    /// One KVM_RUN.
    pub fn run(&self) -> Result<Exit> {
        self.ioctl(KVM_RUN, 0)?;
        Ok(self.exit())
    }

    /// KVM_RUN that comes back with EINTR at the latest after `ms` milliseconds.
    pub fn run_for(&self, ms: u64) -> Result<Exit> {
        let _kicks = sys::Kicks::after_us(ms * 1000);
        self.run()
    }

    /// Runs a guest that halts in the kernel until it has. On a busy machine a signal comes before that.
    pub fn run_to_halt(&self) {
        loop {
            assert_eq!(self.run_for(10), Err(sys::EINTR), "it halts");
            if self.mp_state() == KVM_MP_STATE_HALTED {
                return;
            }
        }
    }

    /// What the run page says about the last exit.
    pub fn exit(&self) -> Exit {
        let run = self.page();
        // SAFETY: the union's field is chosen by the exit reason; all are plain data.
        unsafe {
            match run.exit_reason {
                KVM_EXIT_IO => {
                    let io = run.__bindgen_anon_1.io;
                    let out = io.direction as u32 == KVM_EXIT_IO_OUT;
                    let len = io.size as usize * io.count as usize;
                    assert!(io.data_offset as usize + len <= self.run_size, "I/O data beyond the run pages");
                    let data = self.page_bytes().add(io.data_offset as usize);
                    let data = if out { std::slice::from_raw_parts(data, len).to_vec() } else { Vec::new() };
                    Exit::Io { out, port: io.port, size: io.size, count: io.count, data }
                }
                KVM_EXIT_MMIO => {
                    let m = run.__bindgen_anon_1.mmio;
                    assert!(m.len >= 1 && m.len <= 8, "MMIO of {} bytes", m.len);
                    let write = m.is_write != 0;
                    let data = if write { m.data[..m.len as usize].to_vec() } else { Vec::new() };
                    Exit::Mmio { write, gpa: m.phys_addr, len: m.len, data }
                }
                KVM_EXIT_HLT => Exit::Hlt,
                KVM_EXIT_SHUTDOWN => Exit::Shutdown,
                KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindow,
                KVM_EXIT_INTR => Exit::Intr,
                KVM_EXIT_DEBUG => Exit::Debug,
                KVM_EXIT_INTERNAL_ERROR => Exit::Internal(run.__bindgen_anon_1.internal.suberror),
                KVM_EXIT_FAIL_ENTRY => Exit::FailEntry(run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason),
                KVM_EXIT_IOAPIC_EOI => Exit::Eoi(run.__bindgen_anon_1.eoi.vector),
                n => Exit::Other(n),
            }
        }
    }

    /// Answers an `in` or an MMIO read with these bytes; the next KVM_RUN takes them.
    pub fn reply(&self, bytes: &[u8]) {
        let run = self.page();
        // SAFETY: as in `exit`.
        unsafe {
            match run.exit_reason {
                KVM_EXIT_IO => {
                    let io = run.__bindgen_anon_1.io;
                    let len = (io.size as usize * io.count as usize).min(bytes.len());
                    let data = self.page_bytes().add(io.data_offset as usize);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), data, len);
                }
                KVM_EXIT_MMIO => {
                    let n = bytes.len().min(8);
                    run.__bindgen_anon_1.mmio.data[..n].copy_from_slice(&bytes[..n]);
                }
                n => panic!("no reply to exit {n}"),
            }
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        sys::munmap(self.run as *mut u8, self.run_size);
        let _ = sys::close(self.fd);
    }
}

/// `struct kvm_msrs` with one entry.
#[repr(C)]
pub struct OneMsr {
    pub nmsrs: u32,
    pub pad: u32,
    pub entry: kvm_msr_entry,
}

impl OneMsr {
    pub fn new(index: u32, data: u64) -> OneMsr {
        OneMsr { nmsrs: 1, pad: 0, entry: kvm_msr_entry { index, reserved: 0, data } }
    }
}
