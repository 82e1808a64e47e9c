// SPDX-License-Identifier: GPL-2.0
//! One thread of a fuzzing child: what it calls, with what.

use super::{Shared, ARENA};
use krabtest::guest::write_kit;
use krabtest::harness::tcg;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::rng::Rng;
use krabtest::sys::{self, *};
use krabtest::vm::{Device, Ram};
use std::sync::atomic::Ordering;
use std::sync::Mutex;

/// Descriptors of a child, by kind. Threads share them, races and all.
#[derive(Default)]
pub struct Fds {
    device: Vec<i32>,
    vm: Vec<i32>,
    vcpu: Vec<i32>,
    event: Vec<i32>,
}

/// Held while this process itself writes to the arena, or takes parts of it away for a moment.
static ARENA_LOCK: Mutex<()> = Mutex::new(());

/// One thread of a child.
pub struct Worker {
    rng: Rng,
    fds: &'static Mutex<Fds>,
    shared: &'static Shared,
    arena: Ram,
    /// Two pages for arguments, between unmapped ones.
    buffer: *mut u8,
    run_size: usize,
    /// A mapped run page, if there is one.
    page: Option<*mut u8>,
    msrs: Vec<u32>,
}

impl Worker {
    pub fn new(seed: u64, fds: &'static Mutex<Fds>, shared: &'static Shared, arena: Ram) -> Worker {
        let whole = sys::anon(4 * 4096, 4096);
        sys::munmap(whole, 4096);
        sys::munmap(whole.wrapping_add(3 * 4096), 4096);
        let device = Device::try_open().expect("the device");
        let run_size = ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0).unwrap_or(4096) as usize;
        fds.lock().expect("not poisoned").device.push(device);
        let mut list = vec![0u32; 1025];
        list[0] = 1024;
        let _ = ioctl(device, KVM_GET_MSR_INDEX_LIST, list.as_mut_ptr() as usize);
        let mut msrs = list[1..(list[0] as usize + 1).clamp(1, 1025)].to_vec();
        msrs.extend([0x1b, 0x6e0, 0x800, 0x80b, 0x830, 0x83f, 0xc000_0080, 0x277, 0x200, 0x2ff, 0x1d9, 0xc001_0015]);
        Worker { rng: Rng::new(seed), fds, shared, arena, buffer: whole.wrapping_add(4096), run_size, page: None, msrs }
    }

    fn call(&mut self, fd: i32, nr: u32, arg: usize) -> Result<i32> {
        if tcg() && arg == self.buffer as usize {
            self.spare_qemu(nr);
        }
        let r = ioctl(fd, nr, arg);
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        if r.is_ok() {
            self.shared.succeeded.fetch_add(1, Ordering::Relaxed);
        }
        if nr == KVM_RUN {
            self.shared.runs.fetch_add(1, Ordering::Relaxed);
            self.shared.exits.fetch_add(r.is_ok() as u64, Ordering::Relaxed);
        }
        r
    }

    /// QEMU's TCG asserts (`bql_lock_impl`) when a data breakpoint is hit while it delivers an exception: so guests get
    /// none of those on that bed.
    fn spare_qemu(&mut self, nr: u32) {
        match nr {
            KVM_SET_DEBUGREGS => self.put(40, 0x400, 8),
            KVM_SET_SREGS => {
                // TR: QEMU ends itself ("invalid tss") where a CPU would raise an exception. A busy 64-bit TSS, a system segment.
                self.put(6 * 24 + 14, 11, 1);
                self.put(6 * 24 + 18, 0, 1);
            }
            KVM_SET_GUEST_DEBUG => {
                let control = self.bytes()[2] & !2;
                self.bytes()[2] = control;
            }
            _ => {}
        }
    }

    /// Some descriptor of this kind, or -1.
    fn fd(&mut self, kind: Kind) -> i32 {
        let fds = self.fds.lock().expect("not poisoned");
        let from = match kind {
            Kind::System => &fds.device,
            Kind::Vm => &fds.vm,
            Kind::Vcpu => &fds.vcpu,
        };
        if from.is_empty() {
            return -1;
        }
        from[self.rng.below(from.len() as u64) as usize]
    }

    fn any_fd(&mut self) -> i32 {
        let kind = *self.rng.pick(&[Kind::System, Kind::Vm, Kind::Vcpu]);
        self.fd(kind)
    }

    fn event(&mut self) -> i32 {
        let mut fds = self.fds.lock().expect("not poisoned");
        if fds.event.len() < 8 {
            fds.event.push(eventfd());
        }
        let i = self.rng.below(fds.event.len() as u64) as usize;
        match self.rng.below(16) {
            0 => -1,
            1 => fds.vm.first().copied().unwrap_or(-1),
            _ => fds.event[i],
        }
    }

    fn bytes(&mut self) -> &'static mut [u8] {
        // SAFETY: two mapped pages of this thread, which outlives every use.
        unsafe { std::slice::from_raw_parts_mut(self.buffer, 8192) }
    }

    /// The buffer as words.
    fn put(&mut self, at: usize, v: u64, len: usize) {
        self.bytes()[at..at + len].copy_from_slice(&v.to_le_bytes()[..len]);
    }

    pub fn step(&mut self) {
        let few = {
            let f = self.fds.lock().expect("not poisoned");
            f.vm.is_empty() || f.vcpu.is_empty()
        };
        if few || self.rng.one_in(2500) {
            self.new_vm();
        }
        match self.rng.below(100) {
            0..=51 => self.structured(),
            52..=69 => self.table_with_random(),
            70..=75 => self.raw_number(),
            76..=84 => self.run(),
            85..=89 => self.scribble(),
            90..=92 => self.code(),
            93..=94 => self.memory(),
            95 if self.rng.one_in(3) => self.descriptors(),
            _ => self.sane_state(),
        }
    }

    fn new_vm(&mut self) {
        let device = self.fd(Kind::System);
        let Ok(vm) = self.call(device, KVM_CREATE_VM, 0) else {
            let mut f = self.fds.lock().expect("not poisoned");
            if f.device.is_empty() {
                f.device.extend(Device::try_open());
            }
            return;
        };
        if self.rng.one_in(2) {
            let _ = self.call(vm, KVM_CREATE_IRQCHIP, 0);
            if self.rng.one_in(2) {
                self.bytes()[..64].fill(0);
                let _ = self.call(vm, KVM_CREATE_PIT2, self.buffer as usize);
            }
        }
        let r = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: 4 << 20,
            userspace_addr: self.arena.hva as u64,
        };
        let _ = self.call(vm, KVM_SET_USER_MEMORY_REGION, &r as *const _ as usize);
        let mut vcpus = Vec::new();
        for id in 0..1 + self.rng.below(2) {
            if let Ok(fd) = self.call(vm, KVM_CREATE_VCPU, id as usize) {
                vcpus.push(fd);
            }
        }
        let mut f = self.fds.lock().expect("not poisoned");
        f.vm.push(vm);
        f.vcpu.extend(vcpus);
        let mut old = Vec::new();
        while f.vm.len() > 3 {
            old.push(f.vm.remove(0));
        }
        while f.vcpu.len() > 6 {
            old.push(f.vcpu.remove(0));
        }
        drop(f);
        for fd in old {
            let _ = close(fd);
        }
    }

    /// A pointer that is good, or one that is bad in some way.
    fn pointer(&mut self) -> usize {
        match self.rng.below(20) {
            0 => 0,
            1 => self.buffer as usize + 8192 - self.rng.below(64) as usize,
            2 => self.buffer as usize + 8192,
            3 => 0xffff_8880_0000_0000 | self.rng.below(1 << 40) as usize,
            4 => !(self.rng.below(4096) as usize),
            5 => 0x7fff_ffff_f000 - self.rng.below(64) as usize,
            6 => self.rng.below(4096) as usize,
            _ => self.buffer as usize,
        }
    }

    fn edges(&mut self, len: usize) {
        let mut at = 0;
        while at < len {
            let n = *self.rng.pick(&[4usize, 8]);
            let v = self.rng.edge();
            self.put(at, v, n.min(len - at));
            at += n;
        }
    }

    fn table_with_random(&mut self) {
        let i = *self.rng.pick(ALL);
        if i.nr == KVM_SET_SIGNAL_MASK {
            return;
        }
        let fd = if self.rng.one_in(10) { self.any_fd() } else { self.fd(i.kind) };
        let len = i.size().clamp(64, 4096);
        match self.rng.below(4) {
            0 => self.bytes()[..len].fill(0),
            1 => {
                let mut bytes = vec![0; len];
                self.rng.fill(&mut bytes);
                self.bytes()[..len].copy_from_slice(&bytes);
            }
            _ => self.edges(len.min(512)),
        }
        if i.nr == KVM_SET_USER_MEMORY_REGION || i.nr == KVM_SET_USER_MEMORY_REGION2 {
            self.tame_region();
        }
        let arg = if i.size() == 0 { self.rng.edge() as usize } else { self.pointer() };
        let r = self.call(fd, i.nr, arg);
        self.keep(i.nr, r);
    }

    /// Huge slots are fine, but their dirty bitmaps would eat the machine's memory.
    fn tame_region(&mut self) {
        let b = self.bytes();
        let size = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| b[16 + i]));
        if size > 1 << 30 {
            b[4] &= !1;
            if size > 1 << 40 {
                b[16] |= 1;
            }
        }
    }

    /// A new descriptor that a call returned.
    fn keep(&mut self, nr: u32, r: Result<i32>) {
        let Ok(fd) = r else { return };
        match nr {
            KVM_CREATE_VM | KVM_CREATE_VCPU => {
                let mut f = self.fds.lock().expect("not poisoned");
                let list = if nr == KVM_CREATE_VM { &mut f.vm } else { &mut f.vcpu };
                list.push(fd);
                let old = if list.len() > 6 { Some(list.remove(0)) } else { None };
                drop(f);
                if let Some(fd) = old {
                    let _ = close(fd);
                }
            }
            KVM_GET_STATS_FD => {
                // SAFETY: reads into this thread's buffer.
                unsafe { libc::read(fd, self.buffer as *mut _, 4096) };
                let _ = close(fd);
            }
            KVM_CREATE_DEVICE => {
                let b = self.bytes();
                let _ = close(i32::from_le_bytes([b[4], b[5], b[6], b[7]]));
            }
            _ => {}
        }
    }

    fn raw_number(&mut self) {
        let fd = self.any_fd();
        let size = self.rng.edge() as usize & 0x3fff;
        let nr = number(self.rng.below(4) as u32, self.rng.below(256) as u32, size);
        if nr >> 8 & 0xff == 0xae && nr & 0xff == KVM_SET_SIGNAL_MASK & 0xff {
            return;
        }
        self.edges(256);
        self.tame_region();
        let arg = self.pointer();
        let r = self.call(fd, nr, arg);
        self.keep(nr, r);
    }

    /// GET, change a few bytes, SET.
    fn mutate(&mut self, fd: i32, get: u32, set: u32, len: usize) {
        let p = self.buffer as usize;
        if self.call(fd, get, p).is_err() && self.rng.one_in(2) {
            return;
        }
        for _ in 0..self.rng.below(4) {
            let at = self.rng.below(len as u64) as usize & !3;
            let (v, len) = (self.rng.edge(), *self.rng.pick(&[1, 4]));
            self.put(at, v, len);
        }
        let _ = self.call(fd, set, p);
    }

    fn structured(&mut self) {
        let p = self.buffer as usize;
        let (vm, vcpu) = (self.fd(Kind::Vm), self.fd(Kind::Vcpu));
        match self.rng.below(32) {
            0 | 1 => self.region(vm),
            2 => self.mutate(vcpu, KVM_GET_REGS, KVM_SET_REGS, 144),
            3 | 4 => self.mutate(vcpu, KVM_GET_SREGS, KVM_SET_SREGS, 312),
            5 => self.mutate(vcpu, KVM_GET_FPU, KVM_SET_FPU, 416),
            6 => self.mutate(vcpu, KVM_GET_XSAVE, KVM_SET_XSAVE, 832),
            7 => self.mutate(vcpu, KVM_GET_XCRS, KVM_SET_XCRS, 64),
            8 => self.mutate(vcpu, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, 64),
            9 => self.mutate(vcpu, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, 64),
            10 => self.mutate(vcpu, KVM_GET_MP_STATE, KVM_SET_MP_STATE, 4),
            11 | 12 => self.mutate(vcpu, KVM_GET_LAPIC, KVM_SET_LAPIC, 1024),
            13 => {
                self.bytes()[..520].fill(0);
                let chip = self.rng.below(4);
                self.put(0, chip, 4);
                self.mutate(vm, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, 520);
            }
            14 => self.mutate(vm, KVM_GET_PIT2, KVM_SET_PIT2, 112),
            15 => self.mutate(vm, KVM_GET_CLOCK, KVM_SET_CLOCK, 48),
            16 => {
                self.put(0, 100, 8);
                let device = self.fd(Kind::System);
                let _ = self.call(device, KVM_GET_SUPPORTED_CPUID, p);
                for _ in 0..self.rng.below(4) {
                    let at = 8 + self.rng.below(4000) as usize & !3;
                    let v = self.rng.edge();
                    self.put(at, v, 4);
                }
                if self.rng.one_in(8) {
                    let v = self.rng.edge();
                    self.put(0, v, 4);
                }
                let _ = self.call(vcpu, KVM_SET_CPUID2, p);
                let _ = self.call(vcpu, KVM_GET_CPUID2, p);
            }
            17..=19 => {
                let n = self.rng.below(8);
                let count = if self.rng.one_in(20) { self.rng.edge() } else { n };
                self.put(0, count, 8);
                for i in 0..n as usize {
                    let index = if self.rng.one_in(4) { self.rng.edge() as u32 } else { *self.rng.pick(&self.msrs) };
                    self.put(8 + i * 16, index as u64, 8);
                    let v = self.rng.edge();
                    self.put(16 + i * 16, v, 8);
                }
                let nr = *self.rng.pick(&[KVM_GET_MSRS, KVM_SET_MSRS]);
                let _ = self.call(vcpu, nr, p);
            }
            20 => {
                let (fd, resample) = (self.event(), self.event());
                let (gsi, flags) = (self.rng.below(30), self.rng.below(4));
                self.bytes()[..32].fill(0);
                self.put(0, fd as u32 as u64, 4);
                self.put(4, gsi, 4);
                self.put(8, flags, 4);
                self.put(12, resample as u32 as u64, 4);
                let _ = self.call(vm, KVM_IRQFD, p);
                eventfd_write_any(fd);
            }
            21 => {
                let fd = self.event();
                self.bytes()[..64].fill(0);
                let (data, addr) = (self.rng.below(3), *self.rng.pick(&[0x60, 0x3f8, 0xd000_0000, 0xfee0_0000, 0xcf8]));
                let (len, flags) = (self.rng.below(9), self.rng.below(8));
                self.put(0, data, 8);
                self.put(8, addr, 8);
                self.put(16, len, 4);
                self.put(20, fd as u32 as u64, 4);
                self.put(24, flags, 4);
                let _ = self.call(vm, KVM_IOEVENTFD, p);
            }
            22 => {
                let n = self.rng.below(6);
                self.bytes()[..8 + 48 * 6].fill(0);
                let count = if self.rng.one_in(20) { self.rng.edge() } else { n };
                self.put(0, count, 4);
                for i in 0..n as usize {
                    let at = 8 + i * 48;
                    let (gsi, kind) = (self.rng.below(40), 1 + self.rng.below(3));
                    self.put(at, gsi, 4);
                    self.put(at + 4, kind, 4);
                    let (a, b, c) = (self.rng.edge(), self.rng.edge(), self.rng.edge());
                    let msi = kind == 2;
                    self.put(at + 16, if msi { 0xfee0_0000 | a & 0xf_fffc } else { a & 3 }, 4);
                    self.put(at + 20, if msi { 0 } else { b & 31 }, 4);
                    self.put(at + 24, c, 4);
                }
                let _ = self.call(vm, KVM_SET_GSI_ROUTING, p);
            }
            23 | 24 => {
                self.bytes()[..32].fill(0);
                let (address, data) = (0xfee0_0000 | self.rng.below(1 << 20) & !3, self.rng.edge());
                self.put(0, address, 8);
                self.put(8, data, 4);
                let _ = self.call(vm, KVM_SIGNAL_MSI, p);
            }
            25 => {
                let (gsi, level) = (self.rng.below(32), self.rng.below(2));
                self.put(0, gsi, 4);
                self.put(4, level, 4);
                let nr = *self.rng.pick(&[KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS]);
                let _ = self.call(vm, nr, p);
            }
            26 => {
                let v = self.rng.below(260);
                self.put(0, v, 4);
                let _ = self.call(vcpu, KVM_INTERRUPT, p);
            }
            27 => {
                let nr = *self.rng.pick(&[KVM_NMI, KVM_SMI, KVM_KVMCLOCK_CTRL]);
                let _ = self.call(vcpu, nr, 0);
            }
            28 => {
                self.bytes()[..16].fill(0);
                let (slot, to) = (self.rng.below(9), self.buffer as u64 + self.rng.below(2) * 4096);
                self.put(0, slot, 4);
                self.put(8, to, 8);
                let _ = self.call(vm, KVM_GET_DIRTY_LOG, p);
            }
            29 => {
                // Only capabilities of x86 that change behaviour; the rest comes at random elsewhere.
                self.bytes()[..104].fill(0);
                let (cap, arg) = (self.rng.below(250), self.rng.edge());
                self.put(0, cap, 4);
                self.put(8, arg, 8);
                let fd = if self.rng.one_in(2) { vm } else { vcpu };
                let _ = self.call(fd, KVM_ENABLE_CAP, p);
            }
            30 => {
                let nr = *self.rng.pick(&[KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU, KVM_SET_BOOT_CPU_ID, KVM_SET_TSS_ADDR]);
                let arg = if self.rng.one_in(3) { self.rng.edge() } else { self.rng.below(6) };
                let r = self.call(vm, nr, arg as usize);
                self.keep(nr, r);
            }
            _ => {
                self.bytes()[..64].fill(0);
                let control = self.rng.edge() & 0xffff_ffff;
                self.put(0, control, 4);
                for i in 0..8 {
                    let v = self.rng.edge();
                    self.put(8 + i * 8, v, 8);
                }
                let _ = self.call(vcpu, KVM_SET_GUEST_DEBUG, p);
            }
        }
    }

    fn region(&mut self, vm: i32) {
        let (slot, flags) = (self.rng.below(6), self.rng.below(4));
        let gpa = *self.rng.pick(&[0, 0x10_0000, 0x40_0000, 0x80_0000, 0xd000_0000, 0xfee0_0000, 1 << 36, 1 << 51]);
        let pages = match self.rng.below(8) {
            0 => 0,
            1 => 1,
            2 => 4096,
            _ => self.rng.below(1024),
        };
        let pages = pages.min((ARENA >> 12) as u64);
        let at = self.rng.below((ARENA >> 12) as u64 - pages + 1) << 12;
        self.put(0, slot, 4);
        self.put(4, flags, 4);
        self.put(8, gpa, 8);
        self.put(16, pages << 12, 8);
        self.put(24, self.arena.hva as u64 + at, 8);
        let p = self.buffer as usize;
        let _ = self.call(vm, KVM_SET_USER_MEMORY_REGION, p);
    }

    fn run(&mut self) {
        let fd = self.fd(Kind::Vcpu);
        for _ in 0..1 + self.rng.below(4) {
            if self.call(fd, KVM_RUN, 0).is_err() {
                break;
            }
        }
    }

    /// Writes on a run page, which may be that of any vCPU and in use by another thread.
    fn scribble(&mut self) {
        if self.page.is_none() || self.rng.one_in(50) {
            if let Some(p) = self.page.take() {
                sys::munmap(p, self.run_size);
            }
            let fd = self.fd(Kind::Vcpu);
            let len = self.run_size;
            // SAFETY: a fresh mapping.
            let p = unsafe {
                libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
            };
            if p == libc::MAP_FAILED {
                return;
            }
            self.page = Some(p as *mut u8);
        }
        let Some(page) = self.page else { return };
        let size = self.run_size as u64;
        for _ in 0..self.rng.below(16) {
            let at = if self.rng.one_in(3) { self.rng.below(size) } else { self.rng.below(256) };
            let v = self.rng.word() as u8;
            // SAFETY: within the mapping, which this thread alone unmaps.
            unsafe { page.add(at as usize).write_volatile(v) };
        }
        if !self.rng.one_in(16) {
            // immediate_exit, or else nothing would run for long
            // SAFETY: as above.
            unsafe { page.add(1).write_volatile(0) };
        }
    }

    fn code(&mut self) {
        let mut code = [0u8; 256];
        self.rng.fill(&mut code);
        for _ in 0..self.rng.below(40) {
            let i = self.rng.below(254) as usize;
            let b = *self.rng.pick(&[0x0f, 0xf4, 0xe6, 0xec, 0x6c, 0x6e, 0xf3, 0xa4, 0xab, 0xcd, 0x8e, 0x66, 0xfb]);
            code[i] = b;
            if b == 0x0f {
                code[i + 1] = *self.rng.pick(&[0x01, 0x20, 0x22, 0x30, 0x32, 0xa2, 0xb0, 0xc7, 0xae, 0x0b]);
            }
        }
        let at = *self.rng.pick(&[0x1000u64, 0x10000, 0x10_0000]);
        let _steady = ARENA_LOCK.lock();
        self.arena.write(at, &code);
    }

    /// The host moves memory under the guest.
    fn memory(&mut self) {
        let pages = 1 + self.rng.below(512);
        let at = self.rng.below((ARENA >> 12) as u64 - pages) << 12;
        let p = self.arena.hva.wrapping_add(at as usize) as *mut libc::c_void;
        let len = (pages << 12) as usize;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let _steady = ARENA_LOCK.lock();
        // SAFETY: within the arena, which holds nothing but guest memory.
        unsafe {
            match self.rng.below(8) {
                0..=2 => libc::madvise(p, len, libc::MADV_DONTNEED),
                3 => libc::madvise(p, len, libc::MADV_HUGEPAGE),
                4 => libc::madvise(p, len, libc::MADV_PAGEOUT),
                5 => {
                    libc::mprotect(p, len, libc::PROT_READ);
                    libc::mprotect(p, len, rw)
                }
                6 => {
                    libc::mprotect(p, len, libc::PROT_NONE);
                    libc::mprotect(p, len, rw)
                }
                _ => {
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
                    libc::mmap(p, len, rw, flags, -1, 0);
                    0
                }
            };
        }
    }

    fn descriptors(&mut self) {
        let mut f = self.fds.lock().expect("not poisoned");
        let which = self.rng.below(6);
        let list = match which {
            0 | 1 => &mut f.vm,
            2 | 3 => &mut f.vcpu,
            4 => &mut f.event,
            _ => &mut f.device,
        };
        if list.is_empty() {
            return;
        }
        let i = self.rng.below(list.len() as u64) as usize;
        if self.rng.one_in(2) {
            // SAFETY: plain system call.
            let copy = unsafe { libc::dup(list[i]) };
            if copy >= 0 && list.len() < 8 {
                list.push(copy);
            } else if copy >= 0 {
                let _ = close(copy);
            }
        } else if which != 5 || list.len() > 1 {
            let fd = list.swap_remove(i);
            drop(f);
            let _ = close(fd);
        }
    }

    /// Puts a vCPU into a state from which code really runs, in real or long mode.
    fn sane_state(&mut self) {
        let vcpu = self.fd(Kind::Vcpu);
        let p = self.buffer as usize;
        self.put(0, 0, 8);
        let _ = self.call(vcpu, KVM_SET_MP_STATE, p);
        let mut s = kvm_sregs::default();
        if self.call(vcpu, KVM_GET_SREGS, &mut s as *mut _ as usize).is_err() {
            return;
        }
        let flat = kvm_segment {
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let mut rip = 0x1000;
        if self.rng.one_in(2) {
            let seg = kvm_segment { limit: 0xffff, selector: 0, db: 0, g: 0, ..flat };
            (s.ds, s.es, s.fs, s.gs, s.ss) = (seg, seg, seg, seg, seg);
            s.cs = kvm_segment { type_: 0xb, ..seg };
            (s.cr0, s.cr4, s.efer) = (0x10, 0, 0);
            s.idt = kvm_dtable { base: 0, limit: 0x3ff, ..Default::default() };
        } else {
            {
                let _steady = ARENA_LOCK.lock();
                write_kit(self.arena);
            }
            (s.ds, s.es, s.fs, s.gs, s.ss) = (flat, flat, flat, flat, flat);
            s.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, db: 0, ..flat };
            s.tr =
                kvm_segment { base: 0x3000, limit: 0x67, selector: 0x38, type_: 0xb, present: 1, ..Default::default() };
            s.gdt = kvm_dtable { base: 0x1000, limit: 0x7f, ..Default::default() };
            s.idt = kvm_dtable { base: 0x2000, limit: 0xfff, ..Default::default() };
            (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0033, 0x8000, 0x620, 0x501);
            rip = 0x10000;
        }
        let _ = self.call(vcpu, KVM_SET_SREGS, &s as *const _ as usize);
        let mut r = kvm_regs { rip, rsp: 0x8_0000, rflags: 2, ..Default::default() };
        for reg in [&mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi] {
            *reg = if self.rng.one_in(2) { self.rng.below(0x100_0000) } else { self.rng.edge() };
        }
        let _ = self.call(vcpu, KVM_SET_REGS, &r as *const _ as usize);
        self.code();
    }
}

/// An eventfd write that may fail.
fn eventfd_write_any(fd: i32) {
    let one = 1u64;
    // SAFETY: eight bytes from a local.
    unsafe { libc::write(fd, &one as *const u64 as *const _, 8) };
}
