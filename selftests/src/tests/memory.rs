// SPDX-License-Identifier: GPL-2.0
//! Memory slots, the dirty log, and what happens when the host moves the memory under the guest.

use krabtest::guest::*;
use krabtest::harness::emulated;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::{Exit, Ram, Vcpu, Vm};
use krabtest::{assert_err, assert_ok, payload, skip, tests};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

tests! { "memory";
    slot_add_delete;
    slot_move;
    slot_churn_while_running(40);
    many_slots;
    slots_thinned_out(60);
    read_only_slot_long;
    unmapped_host_address;
    write_protected_host_address;
    munmap_while_running;
    dontneed_gives_zeros;
    mprotect_round_trip;
    broken_memory_is_sigbus;
    mremap_moves_backing;
    fork_and_copy_on_write;
    host_writes_seen_by_guest;
    huge_page_split_and_collapse(60);
    swapped_out(60);
    shared_file_truncated;
    notifier_storm(60);
    two_vcpus_share;
    two_vms_share;
    dirty_log_exact;
    dirty_log_host_and_emulator_writes;
    dirty_log_toggled;
    dirty_log_bad_arguments;
    dirty_log_while_running(40);
    address_beyond_physical_width;
    closed_while_mapped;
}

/// Where the second slot is, in every test here.
const BASE: u64 = 0x1000_0000;

// A server: RSI address, RDI value, RAX command 0 read, 1 write, 2 add 1.
payload! { mem_server, 64,
    "2: out 0xed, al",
    "cmp eax, 1",
    "je 3f",
    "ja 4f",
    "mov rdi, [rsi]",
    "jmp 2b",
    "3: mov [rsi], rdi",
    "jmp 2b",
    "4: inc qword ptr [rsi]",
    "jmp 2b",
}

struct Server {
    g: Guest,
}

impl Server {
    fn new() -> Server {
        let g = Guest::long(mem_server());
        g.expect_done();
        Server { g }
    }

    fn start(&self, command: u64, gpa: u64, value: u64) {
        let mut r = self.g.cpu.regs();
        (r.rax, r.rsi, r.rdi) = (command, gpa, value);
        self.g.cpu.set_regs(&r);
    }

    #[track_caller]
    fn read(&self, gpa: u64) -> u64 {
        self.start(0, gpa, 0);
        self.g.expect_done();
        self.g.cpu.regs().rdi
    }

    #[track_caller]
    fn write(&self, gpa: u64, value: u64) {
        self.start(1, gpa, value);
        self.g.expect_done();
    }

    /// One access that goes to userspace: true when it did.
    fn is_mmio(&self, command: u64, gpa: u64) -> bool {
        self.start(command, gpa, 0);
        match self.g.event() {
            Event::Done => false,
            Event::Exit(Exit::Mmio { gpa: at, .. }) => {
                assert_eq!(at, gpa);
                self.g.expect_done();
                true
            }
            other => panic!("{other:x?}"),
        }
    }
}

fn slot_add_delete() {
    let s = Server::new();
    assert!(s.is_mmio(0, BASE));
    let ram = Ram::new(BASE, 0x10000);
    ram.write_u64(BASE + 0x1000, 0x1234);
    assert_ok!(s.g.vm.map(1, 0, ram));
    assert_eq!(s.read(BASE + 0x1000), 0x1234);
    s.write(BASE + 0x2000, 0x5678);
    assert_eq!(ram.read_u64(BASE + 0x2000), 0x5678);
    assert!(s.is_mmio(1, BASE + 0x10000), "beyond the end");
    assert_ok!(s.g.vm.set_slot(1, 0, 0, 0, 0));
    assert!(s.is_mmio(0, BASE + 0x1000), "a deleted slot");
    assert!(s.is_mmio(1, BASE + 0x2000), "a deleted slot");
    assert_eq!(ram.read_u64(BASE + 0x2000), 0x5678);
    // Other memory at the same place
    let other = s.g.vm.add_ram(1, BASE, 0x10000);
    other.write_u64(BASE + 0x1000, 0x9999);
    assert_eq!(s.read(BASE + 0x1000), 0x9999);
}

fn slot_move() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x10000);
    ram.write_u64(BASE, 77);
    assert_eq!(s.read(BASE), 77);
    assert_ok!(s.g.vm.set_slot(1, 0, BASE + 0x10_0000, 0x10000, ram.hva as u64));
    assert!(s.is_mmio(0, BASE));
    assert_eq!(s.read(BASE + 0x10_0000), 77);
    assert_err!(s.g.vm.set_slot(1, 0, 0, 0x10000, ram.hva as u64), EEXIST, "onto slot 0");
    assert_eq!(s.read(BASE + 0x10_0000), 77);
}

payload! { mem_spin_write, 64,
    "sti",
    "mov rsi, 0x10000000",
    "2: mov rdi, rsi",
    "mov ecx, 16",
    "3: add qword ptr [rdi], 1",
    "add rdi, 0x1000",
    "dec ecx",
    "jnz 3b",
    "lock inc qword ptr [0x100000]",
    "jmp 2b",
}

fn slot_churn_while_running() {
    let g = Guest::long(mem_spin_write());
    let ram = Ram::new(BASE, 0x20_0000);
    g.while_running(|| {
        for i in 0..100u64 {
            assert_ok!(g.vm.map(1, if i % 3 == 2 { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }, ram));
            let n = g.ram.read_u64(DATA);
            g.ram.wait_u64(DATA, n + 1, 1000);
            assert_ok!(g.vm.set_slot(1, 0, 0, 0, 0));
            // Once the call is back, the memory is the host's alone.
            let before = ram.read(BASE, 0x10000);
            sleep_ms(1);
            assert!(ram.read(BASE, 0x10000) == before, "written after the slot was deleted");
        }
    });
    assert!(ram.read_u64(BASE) > 0);
}

fn many_slots() {
    let s = Server::new();
    let n = (s.g.vm.cap(KVM_CAP_NR_MEMSLOTS) as u32).min(500);
    let ram = Ram::new(BASE, 0x2000);
    // Every slot shows the same two pages, in scattered order.
    for i in 1..n {
        let slot = i * 7 % n;
        if slot != 0 {
            assert_ok!(s.g.vm.set_slot(slot, 0, BASE + slot as u64 * 0x4000, 0x2000, ram.hva as u64));
        }
    }
    let last = (1..n).map(|i| i * 7 % n).find(|x| *x == n - 1).unwrap_or(1);
    s.write(BASE + last as u64 * 0x4000, 0xabcd);
    for slot in (1..n).filter(|x| (1..n).any(|i| i * 7 % n == *x)).step_by(17) {
        assert_eq!(s.read(BASE + slot as u64 * 0x4000), 0xabcd, "slot {slot}");
        assert!(s.is_mmio(0, BASE + slot as u64 * 0x4000 + 0x2000));
    }
}

/// Many slots come, most of them go in some order, and others come between those that are left: each address has what it should.
fn slots_thinned_out() {
    let s = Server::new();
    let count = (s.g.vm.cap(KVM_CAP_NR_MEMSLOTS) as u32).min(500) - 1;
    let ram = Ram::new(BASE, 0x1000);
    let at = |slot: u32| BASE + u64::from(slot) * 0x2000;
    let set = |slot: u32, len: u64| assert_ok!(s.g.vm.set_slot(slot, 0, at(slot), len, ram.hva as u64));
    ram.write_u64(BASE, 0xabcd);
    let mut there = vec![false; count as usize + 1];
    let change = |there: &mut Vec<bool>, slot: u32, wanted: bool| {
        if there[slot as usize] != wanted {
            set(slot, if wanted { 0x1000 } else { 0 });
            there[slot as usize] = wanted;
        }
    };
    // Few are left at the front, at the back, everywhere, and none at all.
    let left: [fn(u32) -> bool; 4] = [|slot| slot % 100 == 1, |slot| slot > 480, |slot| slot % 7 == 0, |_| false];
    for (round, left) in left.iter().enumerate() {
        (1..=count).for_each(|slot| change(&mut there, slot, true));
        for i in 0..count {
            // Up, down, and scattered.
            let slot = [i, count - 1 - i, i * 7 % count][round % 3] + 1;
            change(&mut there, slot, left(slot));
        }
        for slot in (1..=count).filter(|slot| left(*slot) || slot % 50 == 2) {
            assert_eq!(s.is_mmio(0, at(slot)), !left(slot), "round {round}, slot {slot}");
            assert!(!left(slot) || s.read(at(slot)) == 0xabcd, "round {round}, slot {slot}");
        }
        (1..=count).filter(|slot| slot % 3 == 0).for_each(|slot| change(&mut there, slot, true));
        for slot in (1..=count).step_by(23) {
            assert_eq!(s.is_mmio(0, at(slot)), !there[slot as usize], "round {round}, slot {slot}, again");
        }
    }
}

fn read_only_slot_long() {
    let s = Server::new();
    let ram = Ram::new(BASE, 0x20_0000);
    ram.write_u64(BASE + 8, 0x55);
    assert_ok!(s.g.vm.map(1, KVM_MEM_READONLY, ram));
    assert_eq!(s.read(BASE + 8), 0x55);
    assert!(s.is_mmio(1, BASE + 8));
    assert_eq!(ram.read_u64(BASE + 8), 0x55);
    // Writing first, before any mapping exists
    assert!(s.is_mmio(1, BASE + 0x10_0000));
    // The host's own writes arrive.
    ram.write_u64(BASE + 8, 0x66);
    assert_eq!(s.read(BASE + 8), 0x66);
    assert_err!(s.g.vm.map(1, 0, ram), EINVAL, "writable later");
}

fn expect_efault(cpu: &Vcpu) {
    match cpu.run() {
        Err(EFAULT) => {}
        other => panic!("wanted EFAULT, got {other:x?}"),
    }
}

fn unmapped_host_address() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x20_0000);
    sys::munmap(ram.hva.wrapping_add(0x10_0000), 0x10_0000);
    s.write(BASE, 1);
    s.start(0, BASE + 0x10_0000, 0);
    expect_efault(&s.g.cpu);
    expect_efault(&s.g.cpu);
    // Memory comes back, and the guest goes on.
    // SAFETY: the range was ours and is free.
    let p = unsafe {
        libc::mmap(
            ram.hva.add(0x10_0000) as *mut _,
            0x10_0000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED);
    ram.write_u64(BASE + 0x10_0000, 42);
    s.g.expect_done();
    assert_eq!(s.g.cpu.regs().rdi, 42);
}

fn protect(ram: Ram, prot: i32) {
    // SAFETY: memory of the test's own.
    assert_eq!(unsafe { libc::mprotect(ram.hva as *mut _, ram.len, prot) }, 0);
}

fn advise(ram: Ram, advice: i32) -> Result<()> {
    // SAFETY: memory of the test's own.
    check(unsafe { libc::madvise(ram.hva as *mut _, ram.len, advice) } as i64).map(|_| ())
}

fn write_protected_host_address() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x10000);
    ram.write_u64(BASE, 5);
    protect(ram, libc::PROT_READ);
    assert_eq!(s.read(BASE), 5);
    s.start(1, BASE, 6);
    expect_efault(&s.g.cpu);
    assert_eq!(ram.read_u64(BASE), 5);
    protect(ram, libc::PROT_READ | libc::PROT_WRITE);
    s.g.expect_done();
    assert_eq!(ram.read_u64(BASE), 6);
    protect(ram, libc::PROT_NONE);
    s.start(0, BASE, 0);
    expect_efault(&s.g.cpu);
}

fn munmap_while_running() {
    let g = Guest::long(mem_spin_write());
    let ram = g.vm.add_ram(1, BASE, 0x20_0000);
    let failed = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| loop {
            match g.cpu.run() {
                Err(EFAULT) => break failed.store(true, Ordering::Relaxed),
                Err(EINTR) => {}
                other => panic!("{other:x?}"),
            }
        });
        g.ram.wait_u64(DATA, 10, 5000);
        ram.unmap();
    });
    assert!(failed.load(Ordering::Relaxed));
}

fn dontneed_gives_zeros() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x40_0000);
    for i in 0..20 {
        s.write(BASE + i * 0x1_1000, i + 1);
        assert_eq!(s.read(BASE + i * 0x1_1000), i + 1);
        assert_ok!(advise(ram, libc::MADV_DONTNEED));
        assert_eq!(s.read(BASE + i * 0x1_1000), 0, "round {i}");
        assert_eq!(ram.read_u64(BASE + i * 0x1_1000), 0);
        s.write(BASE + i * 0x1_1000, i + 100);
        assert_eq!(ram.read_u64(BASE + i * 0x1_1000), i + 100);
    }
}

/// What the handler below was told: code and address.
static SIGBUS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Memory that the hardware reports as broken is a SIGBUS for the thread whose guest wants it.
fn broken_memory_is_sigbus() {
    extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid structure.
        let (code, at) = unsafe { ((*info).si_code, (*info).si_addr()) };
        SIGBUS[0].store(code as u64, Ordering::SeqCst);
        SIGBUS[1].store(at as u64, Ordering::SeqCst);
    }
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 64 << 12);
    s.write(BASE + 0x3000, 1);
    s.write(BASE + 0x4000, 2);
    let page = ram.at(BASE + 0x3000);
    // SAFETY: a handler that only stores, and memory of this program's own that it does not touch again.
    let r = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        libc::madvise(page as *mut _, 4096, libc::MADV_HWPOISON)
    };
    if r != 0 {
        skip!("MADV_HWPOISON: {:?}", Errno::last());
    }
    s.start(0, BASE + 0x3000, 0);
    assert_err!(s.g.cpu.run(), EINTR);
    let told = [0, 1].map(|n| SIGBUS[n].load(Ordering::SeqCst));
    // BUS_MCEERR_AR
    assert_eq!(told, [4, page as u64]);
    assert_eq!(s.read(BASE + 0x4000), 2);
}

fn mprotect_round_trip() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x40_0000);
    for i in 0..20 {
        s.write(BASE + 0x1000, i);
        protect(ram, libc::PROT_READ);
        assert_eq!(s.read(BASE + 0x1000), i);
        protect(ram, libc::PROT_READ | libc::PROT_WRITE);
        s.write(BASE + 0x1000, i + 1);
        assert_eq!(ram.read_u64(BASE + 0x1000), i + 1);
    }
}

/// The pages move to another address of the process and others take their place.
fn mremap_moves_backing() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x20_0000);
    s.write(BASE, 1);
    let elsewhere = anon(0x20_0000, 0x20_0000);
    // SAFETY: both ranges are the test's own.
    unsafe {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let p = libc::mremap(ram.hva as *mut _, ram.len, ram.len, flags, elsewhere);
        assert_eq!(p as *mut u8, elsewhere);
        assert_eq!((elsewhere as *const u64).read_volatile(), 1);
    }
    s.start(1, BASE, 2);
    expect_efault(&s.g.cpu);
    // SAFETY: as above.
    unsafe {
        assert_eq!((elsewhere as *const u64).read_volatile(), 1, "the guest wrote to a page that moved away");
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(elsewhere as *mut _, ram.len, ram.len, flags, ram.hva);
    }
    s.g.expect_done();
    assert_eq!(ram.read_u64(BASE), 2);
}

/// After fork the pages are shared copy-on-write: what the guest writes must not reach the child, and the guest must
/// not go on writing to the page that the child keeps.
fn fork_and_copy_on_write() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x40_0000);
    for i in 0..8 {
        s.write(BASE + i * 0x1000, i);
    }
    let mut pipe = [0; 2];
    // SAFETY: the child reads its own copy of the memory and leaves.
    unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        let pid = libc::fork();
        if pid == 0 {
            let mut b = 0u8;
            libc::read(pipe[0], &mut b as *mut u8 as *mut _, 1);
            let good = (0..8).all(|i| ram.read_u64(BASE + i * 0x1000) == i);
            libc::_exit(if good { 0 } else { 1 });
        }
        for i in 0..8 {
            s.write(BASE + i * 0x1000, i + 1000);
            assert_eq!(ram.read_u64(BASE + i * 0x1000), i + 1000, "the host sees the guest's write");
        }
        libc::write(pipe[1], &1u8 as *const u8 as *const _, 1);
        assert_eq!(sys::wait(pid), 0, "the child saw writes of the guest");
    }
    for i in 0..8 {
        assert_eq!(s.read(BASE + i * 0x1000), i + 1000);
    }
}

/// A page that the guest has read is the zero page; then the host writes it, which gives it another page.
fn host_writes_seen_by_guest() {
    let s = Server::new();
    let ram = s.g.vm.add_ram(1, BASE, 0x40_0000);
    for i in 0..64 {
        let at = BASE + i * 0x3000;
        assert_eq!(s.read(at), 0);
        ram.write_u64(at, i + 5);
        assert_eq!(s.read(at), i + 5);
        s.write(at, i + 6);
        assert_eq!(ram.read_u64(at), i + 6);
    }
}

payload! { mem_counters, 64,
    // Every quadword at the start of a page is a counter that is equal in all pages, but for the pages not yet reached.
    "mov r8, 1",
    "2: mov rsi, 0x10000000",
    "mov ecx, 1024",
    "3: lea r9, [r8 - 1]",
    "cmp [rsi], r9",
    "jne 4f",
    "mov [rsi], r8",
    "add rsi, 0x1000",
    "dec ecx",
    "jnz 3b",
    "mov [0x100000], r8",
    "inc r8",
    "jmp 2b",
    "4: mov rax, [rsi]",
    "mov [0x100010], rax",
    "mov [0x100018], r8",
    "mov [0x100020], rsi",
    "mov qword ptr [0x100008], 1",
    "5: jmp 5b",
}

/// The guest writes and checks 4 MiB over and over while `work` disturbs the memory without changing its contents.
pub(super) fn undisturbed(rounds: usize, mut work: impl FnMut(Ram, usize)) {
    let g = Guest::long(mem_counters());
    let ram = g.vm.add_ram(1, BASE, 4 << 20);
    assert_eq!(ram.hva as usize % (2 << 20), 0);
    g.while_running(|| {
        for i in 0..rounds {
            work(ram, i);
            let n = g.ram.read_u64(DATA);
            let went_on = g.ram.wait_u64(DATA, n + 2, 4000) || g.ram.read_u64(DATA + 8) == 1;
            assert!(went_on, "the guest stands still in round {i}");
            assert!(
                g.ram.read_u64(DATA + 8) == 0,
                "round {i}: the guest read {:#x} for {:#x} at {:#x}",
                g.ram.read_u64(DATA + 16),
                g.ram.read_u64(DATA + 24) - 1,
                g.ram.read_u64(DATA + 32)
            );
        }
    });
}

fn huge_page_split_and_collapse() {
    const MADV_COLLAPSE: i32 = 25;
    let mut collapsed = 0;
    undisturbed(30, |ram, i| match i % 3 {
        0 => {
            let _ = advise(ram, libc::MADV_DODUMP);
            let _ = advise(ram, libc::MADV_HUGEPAGE);
            collapsed += advise(ram, MADV_COLLAPSE).is_ok() as u32;
        }
        1 => {
            // Another attribute for one page splits the huge mapping. (Not its protection: the guest would see EFAULT.)
            let page = Ram { hva: ram.hva.wrapping_add(0x5000), gpa: ram.gpa + 0x5000, len: 0x1000 };
            let _ = advise(page, libc::MADV_NOHUGEPAGE);
            let _ = advise(page, libc::MADV_DONTDUMP);
        }
        _ => {
            let _ = advise(ram, libc::MADV_NOHUGEPAGE);
            let _ = advise(Ram { len: 0x1000, ..ram }, libc::MADV_PAGEOUT);
        }
    });
    println!("# collapsed {collapsed} times");
}

fn swapped_out() {
    let swap = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swap.lines().count() < 2 {
        skip!("no swap");
    }
    let used = || -> u64 {
        let text = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        text.lines().skip(1).filter_map(|l| l.split_whitespace().nth(3)?.parse::<u64>().ok()).sum()
    };
    let mut most = 0;
    undisturbed(5, |ram, _| {
        assert_ok!(advise(ram, libc::MADV_PAGEOUT));
        most = most.max(used());
    });
    println!("# at most {most} KiB in swap");
}

fn shared_file_truncated() {
    let s = Server::new();
    // SAFETY: plain system calls on a memory file of our own.
    let (fd, p) = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        assert_eq!(libc::ftruncate(fd, 0x20000), 0);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        (fd, libc::mmap(std::ptr::null_mut(), 0x20000, prot, libc::MAP_SHARED, fd, 0))
    };
    assert!(p != libc::MAP_FAILED);
    assert_ok!(s.g.vm.set_slot(1, 0, BASE, 0x20000, p as u64));
    s.write(BASE + 0x1_0000, 7);
    let mut b = 0u64;
    // SAFETY: eight bytes into a local; the file is ours.
    unsafe {
        assert_eq!(libc::pread(fd, &mut b as *mut u64 as *mut _, 8, 0x1_0000), 8);
        assert_eq!(b, 7, "the file has the guest's write");
        b = 8;
        assert_eq!(libc::pwrite(fd, &b as *const u64 as *const _, 8, 0x1_0000), 8);
    }
    assert_eq!(s.read(BASE + 0x1_0000), 8);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::ftruncate(fd, 0x1_0000) }, 0);
    s.start(0, BASE + 0x1_0000, 0);
    expect_efault(&s.g.cpu);
    // SAFETY: as above. A hole reads as zeros.
    assert_eq!(unsafe { libc::ftruncate(fd, 0x2_0000) }, 0);
    s.g.expect_done();
    assert_eq!(s.g.cpu.regs().rdi, 0);
}

fn notifier_storm() {
    let rounds = if emulated() { 60 } else { 400 };
    undisturbed(rounds, |ram, i| {
        let part = Ram { hva: ram.hva.wrapping_add(i % 16 * 0x1000), gpa: 0, len: 0x8000 };
        match i % 4 {
            0 => {
                let _ = advise(part, libc::MADV_PAGEOUT);
            }
            1 => {
                let _ = advise(part, libc::MADV_COLD);
            }
            // fork write-protects every page; the guest's writes must fetch them back.
            2 => assert_eq!(in_child(|| 0), 0),
            _ => {
                let _ = advise(part, libc::MADV_POPULATE_WRITE);
            }
        }
    });
}

payload! { mem_adder, 64,
    "mov ecx, 100000",
    "2: lock inc qword ptr [0x100000]",
    "dec ecx",
    "jnz 2b",
    "out 0xed, al",
}

fn two_vcpus_share() {
    let g = Guest::long(mem_adder());
    let second = g.add_long_vcpu(1, mem_adder());
    std::thread::scope(|s| {
        let t = s.spawn(|| assert_eq!(event_of(&second, g.ram), Event::Done));
        g.expect_done();
        assert!(t.join().is_ok());
    });
    assert_eq!(g.ram.read_u64(DATA), 200_000);
}

/// The same memory in two VMs: they are two windows on one thing.
fn two_vms_share() {
    let (a, b) = (Server::new(), Server::new());
    let ram = a.g.vm.add_ram(1, BASE, 0x20_0000);
    assert_ok!(b.g.vm.map(3, 0, Ram { gpa: BASE + 0x40_0000, ..ram }));
    a.write(BASE + 8, 11);
    assert_eq!(b.read(BASE + 0x40_0008), 11);
    b.write(BASE + 0x40_0008, 12);
    assert_eq!(a.read(BASE + 8), 12);
    assert_ok!(advise(ram, libc::MADV_DONTNEED));
    assert_eq!((a.read(BASE + 8), b.read(BASE + 0x40_0008)), (0, 0));
    drop(a);
    b.write(BASE + 0x40_0008, 13);
    assert_eq!(ram.read_u64(BASE + 8), 13);
}

/// KVM_GET_DIRTY_LOG as page numbers.
fn dirty(vm: &Vm, slot: u32, pages: usize) -> Vec<usize> {
    let mut bitmap = vec![0u64; pages.div_ceil(64)];
    let d = kvm_dirty_log {
        slot,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr() as *mut _ },
        ..Default::default()
    };
    assert_ok!(vm.set(KVM_GET_DIRTY_LOG, &d));
    (0..pages).filter(|p| bitmap[p / 64] >> (p % 64) & 1 != 0).collect()
}

fn dirty_log_exact() {
    let s = Server::new();
    let pages = 1100;
    let ram = Ram::new(BASE, pages * 4096);
    assert_ok!(s.g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    assert_eq!(dirty(&s.g.vm, 1, pages), []);
    for p in [3u64, 64, 65, 700, 1099] {
        s.write(BASE + p * 4096 + 8, p);
    }
    assert_eq!(s.read(BASE + 5 * 4096), 0);
    // A read that meets a page for the first time may count as a write, because it maps the page writable.
    let first: Vec<usize> = dirty(&s.g.vm, 1, pages).into_iter().filter(|p| *p != 5).collect();
    assert_eq!(first, [3, 64, 65, 700, 1099]);
    // Reading the log clears it, and the next write is seen again.
    assert_eq!(dirty(&s.g.vm, 1, pages), []);
    s.write(BASE + 64 * 4096, 1);
    s.write(BASE + 5 * 4096, 1);
    assert_eq!(dirty(&s.g.vm, 1, pages), [5, 64]);
    // A read after the harvest is no write.
    assert_eq!(s.read(BASE + 64 * 4096), 1);
    assert_eq!(dirty(&s.g.vm, 1, pages), []);
    // Across the end of a page
    s.write(BASE + 10 * 4096 - 4, u64::MAX);
    assert_eq!(dirty(&s.g.vm, 1, pages), [9, 10]);
}

payload! { mem_emulated_writes, 64,
    "cld",
    // From MMIO to logged memory: the hypervisor writes.
    "mov rsi, 0xd0000000",
    "mov rdi, 0x10002000",
    "movsq",
    // A port read into logged memory
    "mov rdi, 0x10005000",
    "mov edx, 0x70",
    "insb",
    // push of MMIO onto a stack in logged memory
    "mov r8, rsp",
    "mov rsp, 0x10008000",
    "push qword ptr [rsi]",
    "mov rsp, r8",
    "out 0xed, al",
}

fn dirty_log_host_and_emulator_writes() {
    let g = Guest::long(mem_emulated_writes());
    let ram = Ram::new(BASE, 16 * 4096);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    loop {
        match g.event() {
            Event::Exit(Exit::Mmio { write: false, .. }) => g.cpu.reply(&[9; 8]),
            Event::Exit(Exit::Io { out: false, .. }) => g.cpu.reply(&[9]),
            Event::Done => break,
            other => panic!("{other:?}"),
        }
    }
    // What the process itself writes is its own business, and not in the log.
    ram.write_u64(BASE + 12 * 4096, 1);
    assert_eq!(ram.read_u64(BASE + 0x2000), 0x0909_0909_0909_0909);
    assert_eq!(ram.read(BASE + 0x5000, 1), [9]);
    assert_eq!(ram.read_u64(BASE + 0x7ff8), 0x0909_0909_0909_0909);
    assert_eq!(dirty(&g.vm, 1, 16), [2, 5, 7]);
}

fn dirty_log_toggled() {
    let s = Server::new();
    let pages = 1024;
    let ram = s.g.vm.add_ram(1, BASE, pages * 4096);
    // Mapped writable, perhaps huge, before the log is switched on.
    for p in 0..pages as u64 {
        s.write(BASE + p * 4096, p);
        if p % 100 == 3 {
            assert_eq!(ram.read_u64(BASE + p * 4096), p);
        }
    }
    assert_ok!(s.g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    s.write(BASE + 17 * 4096, 1);
    s.write(BASE + 900 * 4096, 1);
    assert_eq!(dirty(&s.g.vm, 1, pages), [17, 900]);
    assert_ok!(s.g.vm.map(1, 0, ram));
    s.write(BASE + 18 * 4096, 1);
    assert_ok!(s.g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    s.write(BASE + 19 * 4096, 1);
    assert_eq!(dirty(&s.g.vm, 1, pages), [19]);
    for p in 20..pages as u64 {
        assert_eq!(s.read(BASE + p * 4096), if p == 900 { 1 } else { p });
    }
}

fn dirty_log_bad_arguments() {
    let s = Server::new();
    let log = |slot: u32, bitmap: usize| {
        let d = kvm_dirty_log {
            slot,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap as *mut _ },
            ..Default::default()
        };
        s.g.vm.set(KVM_GET_DIRTY_LOG, &d)
    };
    let mut bitmap = [0u64; 64];
    let good = bitmap.as_mut_ptr() as usize;
    assert_err!(log(0, good), ENOENT, "a slot without a log");
    assert_err!(log(5, good), ENOENT, "no such slot");
    assert_err!(log(0x7fff_ffff, good), EINVAL, "a slot number out of range");
    let ram = Ram::new(BASE, 64 * 4096);
    assert_ok!(s.g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    s.write(BASE, 1);
    assert_err!(log(1, 16), EFAULT, "no memory at the bitmap");
    assert_err!(log(1, 0xffff_8880_0000_0000), EFAULT, "kernel memory for the bitmap");
    assert_ok!(log(1, good));
}

/// Two threads: the guest writes, the host harvests. Every page that the guest wrote is found in some harvest after it.
fn dirty_log_while_running() {
    let g = Guest::long(mem_counters());
    let ram = Ram::new(BASE, 4 << 20);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    let mut shadow = vec![0u64; 1024];
    g.while_running(|| {
        for _ in 0..20 {
            sleep_ms(5);
            // The log first, then the data: a page that is written later is in the next log.
            for p in dirty(&g.vm, 1, 1024) {
                shadow[p] = ram.read_u64(BASE + p as u64 * 4096);
            }
        }
        g.ram.wait_u64(DATA, 3, 10_000);
    });
    for p in dirty(&g.vm, 1, 1024) {
        shadow[p] = ram.read_u64(BASE + p as u64 * 4096);
    }
    assert!(g.ram.read_u64(DATA) >= 3, "the guest made {} rounds", g.ram.read_u64(DATA));
    for (p, seen) in shadow.iter().enumerate() {
        assert_eq!(*seen, ram.read_u64(BASE + p as u64 * 4096), "page {p} was written and not logged");
    }
}

/// Guest-physical addresses that the CPU cannot have.
fn address_beyond_physical_width() {
    let s = Server::new();
    let ram = Ram::new(0, 0x1000);
    // The page tables point at bit 50: reserved there, or no memory. Either way the guest alone has the trouble.
    s.g.ram.write_u64(PDPT + 8, 1 << 50 | 0x87);
    let _ = s.g.vm.set_slot(1, 0, 1 << 50, 0x1000, ram.hva as u64);
    s.start(0, 0x4000_0000, 0);
    match s.g.event() {
        Event::Exception { vector: 14, .. } | Event::Done | Event::Exit(Exit::Mmio { .. } | Exit::Internal(_)) => {}
        other => panic!("{other:x?}"),
    }
}

fn closed_while_mapped() {
    for round in 0..10 {
        let s = Server::new();
        let ram = s.g.vm.add_ram(1, BASE, 8 << 20);
        for p in 0..64 {
            s.write(BASE + p * 0x1_0000, p + round);
        }
        let Server { g } = s;
        drop(g);
        // The memory is still ours, with the guest's data, and can go away now.
        assert_eq!(ram.read_u64(BASE + 63 * 0x1_0000), 63 + round);
        assert_ok!(advise(ram, libc::MADV_DONTNEED));
        ram.unmap();
    }
}
