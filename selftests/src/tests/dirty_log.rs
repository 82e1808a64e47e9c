// SPDX-License-Identifier: GPL-2.0
//! The dirty log where hardware may keep it: many pages in one run, logs that begin under a running guest, the guest's own page walks.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::sys::*;
use krabtest::vm::{Exit, Ram, Vcpu, Vm};
use krabtest::{assert_err, assert_ok, payload, tests};

tests! { "dirty_log";
    many_pages_in_one_run;
    large_pages_in_one_run;
    begins_while_running(40);
    walks_of_the_guest;
    rings_have_room_for_all(40);
}

/// Where the logged slot is.
const BASE: u64 = 0x1000_0000;

// Writes to RCX pages, from RSI on, RDI apart; then ends, and begins again.
payload! { log_sweep, 64,
    "2: add qword ptr [rsi], 1",
    "add rsi, rdi",
    "dec rcx",
    "jnz 2b",
    "out 0xed, al",
    "jmp 2b",
}

fn sweep(g: &Guest, first: u64, step: u64, count: u64) {
    let mut regs = g.cpu.regs();
    (regs.rsi, regs.rdi, regs.rcx) = (BASE + first * 4096, step * 4096, count);
    g.cpu.set_regs(&regs);
    g.expect_done();
}

/// KVM_GET_DIRTY_LOG of slot 1 as page numbers.
fn dirty(vm: &Vm, pages: usize) -> Vec<u64> {
    let mut bitmap = vec![0u64; pages.div_ceil(64)];
    let request = kvm_dirty_log {
        slot: 1,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr() as *mut _ },
        ..Default::default()
    };
    assert_ok!(vm.set(KVM_GET_DIRTY_LOG, &request));
    (0..pages as u64).filter(|p| bitmap[(p / 64) as usize] >> (p % 64) & 1 != 0).collect()
}

fn expect_sweeps(g: &Guest, pages: usize) {
    let count = pages as u64;
    sweep(g, 0, 1, count);
    assert_eq!(dirty(&g.vm, pages), (0..count).collect::<Vec<_>>(), "pages that nothing was known of");
    for (first, step) in [(0, 1), (1, 2), (0, 1), (3, 7)] {
        let wanted: Vec<u64> = (first..count).step_by(step as usize).collect();
        // Twice: the second writes are nothing new.
        for _ in 0..2 {
            sweep(g, first, step, wanted.len() as u64);
        }
        assert_eq!(dirty(&g.vm, pages), wanted, "from {first} in steps of {step}");
        assert_eq!(dirty(&g.vm, pages), [], "after the harvest");
    }
}

/// More than hardware's log of 512 entries holds, and not in multiples of it.
fn many_pages_in_one_run() {
    let g = Guest::long(log_sweep());
    let pages = 1700;
    let ram = Ram::new(BASE, pages * 4096);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    expect_sweeps(&g, pages);
    let rounds = ram.read_u64(BASE + 3 * 4096);
    // A log that goes and comes back knows nothing of what was written meanwhile.
    assert_ok!(g.vm.map(1, 0, ram));
    sweep(&g, 0, 1, pages as u64);
    assert_eq!(ram.read_u64(BASE + 3 * 4096), rounds + 1);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    assert_eq!(dirty(&g.vm, pages), []);
    sweep(&g, 9, 100, 3);
    assert_eq!(dirty(&g.vm, pages), [9, 109, 209]);
}

/// The same over pages that were mapped, large if the host has them so, before there was a log.
fn large_pages_in_one_run() {
    let g = Guest::long(log_sweep());
    let pages = 2048;
    let ram = Ram::new(BASE, pages * 4096);
    // SAFETY: memory of the test's own.
    unsafe { libc::madvise(ram.hva.cast(), pages * 4096, libc::MADV_HUGEPAGE) };
    assert_ok!(g.vm.map(1, 0, ram));
    sweep(&g, 0, 1, pages as u64);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    expect_sweeps(&g, pages);
}

payload! { log_rounds, 64,
    // Every quadword at the start of a page counts the rounds.
    "mov r8, 1",
    "2: mov rsi, 0x10000000",
    "mov ecx, 1024",
    "3: mov [rsi], r8",
    "add rsi, 0x1000",
    "dec ecx",
    "jnz 3b",
    "mov [0x100000], r8",
    "inc r8",
    "jmp 2b",
}

/// The log is turned on again and again under a guest that writes all the time: no write after that is lost.
fn begins_while_running() {
    let g = Guest::long(log_rounds());
    let pages = 1024;
    let ram = Ram::new(BASE, pages * 4096);
    assert_ok!(g.vm.map(1, 0, ram));
    let mut seen = vec![0; pages];
    let take = |vm: &Vm, seen: &mut [u64]| {
        // The log first, then the data: what is written between them is in the next log.
        for page in dirty(vm, pages) {
            seen[page as usize] = ram.read_u64(BASE + page * 4096);
        }
    };
    let mut last = 0;
    for _ in 0..5 {
        g.while_running(|| {
            last += 2;
            g.ram.wait_u64(DATA, last, 10_000);
            assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
            last = g.ram.read_u64(DATA) + 3;
            for _ in 0..4 {
                sleep_ms(2);
                take(&g.vm, &mut seen);
            }
            g.ram.wait_u64(DATA, last, 10_000);
        });
        take(&g.vm, &mut seen);
        for (page, seen) in seen.iter().enumerate() {
            assert_eq!(*seen, ram.read_u64(BASE + page as u64 * 4096), "page {page} was written and not logged");
        }
        assert_ok!(g.vm.map(1, 0, ram));
        last = g.ram.read_u64(DATA);
    }
}

/// Page tables of the guest in logged memory: the CPU writes to them.
fn walks_of_the_guest() {
    let g = Guest::long(log_sweep());
    let ram = Ram::new(BASE, 16 * 4096);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    // 1 GiB: a directory in page 2, a table in page 3, then page 7.
    ram.write_u64(BASE + 0x2000, BASE + 0x3000 + 7);
    ram.write_u64(BASE + 0x3000, BASE + 0x7000 + 7);
    g.ram.write_u64(PDPT + 8, BASE + 0x2000 + 7);
    for dirty_bit in [1 << 6, 0] {
        let mut regs = g.cpu.regs();
        (regs.rsi, regs.rdi, regs.rcx) = (1 << 30, 0, 1);
        g.cpu.set_regs(&regs);
        g.expect_done();
        let pages = dirty(&g.vm, 16);
        assert!(pages.contains(&7), "{pages:?}");
        if dirty_bit != 0 {
            assert!(pages.contains(&2) && pages.contains(&3), "{pages:?}");
            assert_eq!(ram.read_u64(BASE + 0x3000) & dirty_bit, dirty_bit);
        }
        assert!(pages.iter().all(|page| [2, 3, 7].contains(page)), "{pages:?}");
    }
}

/// Flags of an entry of a dirty ring.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The vCPU's dirty ring, as memory at 0.
fn ring_of(cpu: &Vcpu, bytes: usize) -> Ram {
    let (access, first) = (libc::PROT_READ | libc::PROT_WRITE, i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096);
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, cpu.fd, first) };
    assert_ne!(at, libc::MAP_FAILED, "the ring: {:?}", Errno::last());
    Ram { gpa: 0, hva: at.cast(), len: bytes }
}

/// A ring takes what hardware noted while the guest ran on, in the order of the writes: it is full in time, and never overflows.
fn rings_have_room_for_all() {
    const ENTRIES: usize = 1024;
    let g = Guest::long_with(log_sweep(), |vm| {
        let enable = |entries: usize| {
            let request = kvm_enable_cap {
                cap: KVM_CAP_DIRTY_LOG_RING,
                args: [entries as u64 * 16, 0, 0, 0],
                ..Default::default()
            };
            vm.set(KVM_ENABLE_CAP, &request)
        };
        assert_err!(enable(128), EINVAL, "less than a page");
        assert_err!(enable(ENTRIES + 1), EINVAL, "not a power of two");
        assert_ok!(enable(ENTRIES));
    });
    let pages = 3000;
    let ram = Ram::new(BASE, pages * 4096);
    assert_ok!(g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram));
    let ring = ring_of(&g.cpu, ENTRIES * 16);
    let mut next = 0;
    for round in 0..3 {
        let mut seen = vec![false; pages];
        let mut regs = g.cpu.regs();
        (regs.rsi, regs.rdi, regs.rcx) = (BASE, 4096, pages as u64);
        g.cpu.set_regs(&regs);
        let (mut full, mut last) = (0, 0);
        loop {
            let event = g.event();
            // The vCPU is outside of guest mode: everything that it wrote is in the ring.
            loop {
                let at = next % ENTRIES as u64 * 16;
                if ring.read_u32(at) & DIRTY == 0 {
                    break;
                }
                if ring.read_u32(at + 4) == 1 {
                    let page = ring.read_u64(at + 8);
                    assert!(page >= last, "round {round}: page {page} comes after {last}, and was written before it");
                    (seen[page as usize], last) = (true, page);
                }
                ring.write_u32(at, RESET);
                next += 1;
            }
            assert_ok!(g.vm.ioctl(KVM_RESET_DIRTY_RINGS, 0));
            match event {
                Event::Done => break,
                Event::Exit(Exit::Other(KVM_EXIT_DIRTY_RING_FULL)) => full += 1,
                other => panic!("{other:x?}"),
            }
        }
        let missing = seen.iter().position(|seen| !seen);
        assert_eq!(missing, None, "round {round}: a page was written and is in no ring");
        assert!(full >= 2, "the ring was full {full} times");
    }
    ring.unmap();
}
