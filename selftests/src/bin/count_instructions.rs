// SPDX-License-Identifier: GPL-2.0
//! Runs in a Linux guest: what `perf stat` and `perf record` do with two million instructions, in user mode and in all. Prints "counted", or
//! what was not as it should be, or "none" where the kernel has no performance counters.

use std::arch::asm;
use std::ptr;

/// `struct perf_event_attr`, version 0.
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    bp_type: u32,
    config1: u64,
}

const HARDWARE: u32 = 0;
const INSTRUCTIONS: u64 = 1;
const DISABLED: u64 = 1;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const ENABLE: libc::c_ulong = 0x2400;
const DISABLE: libc::c_ulong = 0x2401;
/// Where `data_head` is in the page in front of the samples: bytes written so far. perf_event_open(2).
const DATA_HEAD: usize = 1024;
/// A sample that was asked to have nothing in it is its header.
const SAMPLE_BYTES: u64 = 8;

const LOOPS: u64 = 1_000_000;
const PERIOD: u64 = 100_000;

/// Counts the loop's instructions: the number, and with a period the number of samples.
fn count(flags: u64, sample_period: u64) -> Option<(u64, u64)> {
    let attr = Attr {
        kind: HARDWARE,
        size: 64,
        config: INSTRUCTIONS,
        sample_period,
        flags: DISABLED | flags,
        ..Attr::default()
    };
    let mut counted = 0_u64;
    // SAFETY: the structures live through the calls, the pages are the kernel's to give, and the loop has no memory effects.
    unsafe {
        let fd = libc::syscall(libc::SYS_perf_event_open, &attr, 0, -1, -1, 0) as i32;
        if fd < 0 {
            return None;
        }
        let pages = libc::mmap(ptr::null_mut(), 2 * 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0);
        assert!(pages != libc::MAP_FAILED, "mmap");
        libc::ioctl(fd, ENABLE as _, 0);
        asm!("2: dec {0}", "jnz 2b", inout(reg) LOOPS => _);
        libc::ioctl(fd, DISABLE as _, 0);
        assert_eq!(libc::read(fd, ptr::from_mut(&mut counted).cast(), 8), 8);
        let written = pages.byte_add(DATA_HEAD).cast::<u64>().read_volatile();
        Some((counted, written / SAMPLE_BYTES))
    }
}

fn main() {
    let Some((user, _)) = count(EXCLUDE_KERNEL, 0) else {
        return println!("none");
    };
    let all = count(0, 0).map_or(0, |counted| counted.0);
    let samples = count(EXCLUDE_KERNEL, PERIOD).map_or(0, |counted| counted.1);
    let right = (2 * LOOPS..2 * LOOPS + 1000).contains(&user) && all > user && samples == 2 * LOOPS / PERIOD;
    match right {
        true => println!("counted"),
        false => println!("{user} in user mode, {all} in all, {samples} samples"),
    }
}
