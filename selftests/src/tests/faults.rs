// SPDX-License-Identifier: GPL-2.0
//! Guest memory that a userfaultfd fills in: the vCPU waits for its page, and is to be had all the time.

use std::time::{Duration, Instant};

use krabtest::guest::*;
use krabtest::harness::on_kvm;
use krabtest::kvm::*;
use krabtest::sys::{self, *};
use krabtest::vm::Ram;
use krabtest::{assert_err, assert_ok, payload, skip, tests};

tests! { "faults";
    page_by_userfaultfd;
    signal_while_waiting_for_a_page;
    memory_that_is_not_there;
}

const BASE: u64 = 0x1000_0000;
const LEN: usize = 0x4000;

// Linux UAPI <linux/userfaultfd.h>
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const REGISTER_MODE_MISSING: u64 = 1;

/// Memory that nobody has filled in yet, and the descriptor that says who wants it.
struct Missing {
    fd: i32,
    ram: Ram,
}

impl Missing {
    fn new(ram: Ram) -> Missing {
        // SAFETY: plain system call.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as i32;
        if fd < 0 {
            skip!("userfaultfd: {:?}", Errno::last());
        }
        let call = |nr: u64, words: &mut [u64]| {
            // SAFETY: the structures of these calls are arrays of 64-bit words, of the length that the number says.
            assert_eq!(unsafe { libc::ioctl(fd, nr as _, words.as_mut_ptr()) }, 0, "{nr:#x}: {:?}", Errno::last());
        };
        call(UFFDIO_API, &mut [UFFD_API, 0, 0]);
        call(UFFDIO_REGISTER, &mut [ram.hva as u64, ram.len as u64, REGISTER_MODE_MISSING, 0]);
        Missing { fd, ram }
    }

    /// Waits until somebody wants a page, and gives its guest address.
    fn wanted(&self) -> Option<u64> {
        let end = Instant::now() + Duration::from_secs(5);
        let mut message = [0u64; 4];
        while Instant::now() < end {
            // SAFETY: 32 bytes into a local.
            if unsafe { libc::read(self.fd, message.as_mut_ptr() as *mut _, 32) } == 32 {
                return Some(message[2] - self.ram.hva as u64 + self.ram.gpa);
            }
            sys::sleep_ms(1);
        }
        None
    }

    fn fill(&self, gpa: u64, value: u64) {
        let page = [value; 512];
        let mut copy = [self.ram.at(gpa) as u64, page.as_ptr() as u64, 4096, 0, 0];
        // SAFETY: `struct uffdio_copy`: destination, source, length, mode, result.
        assert_eq!(unsafe { libc::ioctl(self.fd, UFFDIO_COPY as _, copy.as_mut_ptr()) }, 0, "{:?}", Errno::last());
    }
}

payload! { fa_read, 64,
    "mov rax, 0x10000000",
    "mov rax, [rax]",
    "out 0xef, eax",
    "mov rax, 0x10001000",
    "mov rax, [rax]",
    "out 0xef, eax",
    "out 0xed, al",
}

fn page_by_userfaultfd() {
    let g = Guest::long(fa_read());
    let missing = Missing::new(g.vm.add_ram(1, BASE, LEN));
    std::thread::scope(|s| {
        let server = s.spawn(|| {
            for (page, value) in [(BASE, 0x11), (BASE + 4096, 0x22)] {
                assert_eq!(missing.wanted(), Some(page));
                missing.fill(page, value);
            }
        });
        assert_eq!(g.report(), 0x11);
        assert_eq!(g.report(), 0x22);
        g.expect_done();
        assert!(server.join().is_ok(), "the server failed");
    });
    assert_ok!(sys::close(missing.fd));
}

/// KVM_RUN ends with EINTR though the page never came; nothing is lost when it does come.
fn signal_while_waiting_for_a_page() {
    sys::arm_kick_signal();
    let g = Guest::long(fa_read());
    let missing = Missing::new(g.vm.add_ram(1, BASE, LEN));
    for _ in 0..3 {
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            let vcpu = s.spawn(|| {
                send.send(sys::gettid()).expect("the test listens");
                g.cpu.run()
            });
            let tid = receive.recv().expect("the thread runs");
            assert_eq!(missing.wanted(), Some(BASE));
            assert!(!vcpu.is_finished(), "no page and no signal");
            sys::kick(tid);
            let end = Instant::now() + Duration::from_secs(5);
            while !vcpu.is_finished() && Instant::now() < end {
                sys::sleep_ms(1);
            }
            let interrupted = vcpu.is_finished();
            if !interrupted {
                missing.fill(BASE, 0x11);
            }
            let outcome = vcpu.join().expect("no panic");
            assert!(interrupted, "the signal waits for the page; then {outcome:x?}");
            assert_eq!(outcome, Err(EINTR));
        });
    }
    missing.fill(BASE, 0x11);
    missing.fill(BASE + 4096, 0x22);
    assert_eq!(g.report(), 0x11);
    assert_eq!(g.report(), 0x22);
    g.expect_done();
    assert_ok!(sys::close(missing.fd));
}

/// A slot over nothing: KVM_RUN says EFAULT, and `kvm_run` where. (KVM says where for private memory only.) What was there before does
/// not stay.
fn memory_that_is_not_there() {
    let g = Guest::long(fa_read());
    assert_eq!(g.vm.cap(KVM_CAP_MEMORY_FAULT_INFO), 1);
    let ram = g.vm.add_ram(1, BASE, LEN);
    ram.write_u64(BASE, 0x11);
    assert_eq!(g.report(), 0x11);
    sys::munmap(ram.hva, LEN);
    for _ in 0..2 {
        assert_err!(g.cpu.run(), EFAULT);
        let page = g.cpu.page();
        if on_kvm() {
            assert_eq!(page.exit_reason, KVM_EXIT_UNKNOWN);
            continue;
        }
        assert_eq!(page.exit_reason, KVM_EXIT_MEMORY_FAULT);
        // SAFETY: the exit's arm of the union, plain data.
        let fault = unsafe { page.__bindgen_anon_1.memory_fault };
        assert_eq!((fault.flags, fault.gpa, fault.size), (0, BASE + 0x1000, 0x1000));
    }
    // With memory there the guest goes on.
    let again = g.vm.set_slot(1, 0, BASE, 0, 0);
    assert_ok!(again);
    g.vm.add_ram(1, BASE, LEN).write_u64(BASE + 0x1000, 0x22);
    assert_eq!(g.report(), 0x22);
    g.expect_done();
}
