// SPDX-License-Identifier: GPL-2.0
//! `ioctl_fuzz [--device PATH] [--calls N] [--seconds S] [--seed X] [--epoch E] [--threads T] [--bed NAME]`: random
//! calls on the three kinds of descriptors.
//!
//! The work is done by forked children, one after the other ("epochs"), each with its own seed made from the given one
//! and the epoch's number, so that `--epoch` repeats a single one (but for the times of the kicks; and every fourth
//! epoch has `--threads` threads, which race). A child holds a few VMs and vCPUs, an arena of guest memory, and argument
//! buffers between guard pages; it calls every ioctl of the table with structured, mutated, random and wrong arguments,
//! scribbles on the run pages, lets random code run, and unmaps, protects, closes and duplicates what it has. It opens
//! nothing but the device and eventfds, and its memory and descriptors are limited. Crashes of a child are expected and
//! counted; what must not happen is a warning in the kernel's log, or a child that stands still.

mod worker;

use krabtest::harness::{on_kvm, set_options, tcg, Options};
use krabtest::kmsg::Kmsg;
use krabtest::sys::{self, *};
use krabtest::vm::{Device, Ram};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use worker::{Fds, Worker};

/// Calls of one child.
const EPOCH_CALLS: u64 = 20_000;
/// Guest memory of one child.
const ARENA: usize = 16 << 20;
/// A child that makes no progress for so long is killed.
const STALL_SECS: u64 = 30;
/// A child that makes no progress for so long gets signals, where a CPU may be lost without.
const NUDGE_NS: u64 = 100_000_000;

struct Args {
    calls: u64,
    seconds: u64,
    seed: u64,
    epoch: Option<u64>,
    threads: u64,
}

/// What children and parent share.
struct Shared {
    calls: AtomicU64,
    succeeded: AtomicU64,
    runs: AtomicU64,
    exits: AtomicU64,
}

fn main() {
    let mut options =
        Options { device: "/dev/krab".into(), bed: String::new(), times: false, apicv: true, unrestricted: true };
    let mut a = Args { calls: 1_000_000, seconds: u64::MAX / 4, seed: sys::now_ns(), epoch: None, threads: 2 };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_else(|| usage());
        let number = || value.parse().unwrap_or_else(|_| usage());
        match name.as_str() {
            "--device" => options.device = value,
            "--bed" => options.bed = value,
            "--calls" => a.calls = number(),
            "--seconds" => a.seconds = number(),
            "--seed" => a.seed = number(),
            "--epoch" => a.epoch = Some(number()),
            "--threads" => a.threads = number().clamp(1, 16),
            _ => usage(),
        }
    }
    set_options(options);
    std::process::exit(fuzz(&a));
}

fn usage() -> ! {
    eprintln!(
        "usage: ioctl_fuzz [--device PATH] [--calls N] [--seconds S] [--seed X] [--epoch E] [--threads T] [--bed B]"
    );
    std::process::exit(2);
}

fn fuzz(a: &Args) -> i32 {
    drop(Device::open());
    let shared: &Shared = {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: fresh zeroed memory, shared with the children.
        unsafe {
            let p = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert!(p != libc::MAP_FAILED);
            &*(p as *const Shared)
        }
    };
    let mut kmsg = Kmsg::new();
    println!("# seed {}", a.seed);
    if guests_may_be_deaf() {
        keep_to(|cpu, count| count < 3 || cpu == count - 1);
    }
    let start = now_ns();
    let seconds = || (now_ns() - start) / 1_000_000_000;
    let (mut epoch, mut crashes, mut stalls, mut warnings) = (a.epoch.unwrap_or(0), 0, 0, 0);
    let first = epoch;
    let mut spoken = 0;
    while shared.calls.load(Ordering::Relaxed) < a.calls && seconds() < a.seconds {
        match run_epoch(a, epoch, shared) {
            End::Ok => {}
            End::Crashed => crashes += 1,
            End::Stalled => {
                println!("# epoch {epoch}: no progress for {STALL_SECS} seconds");
                stalls += 1;
            }
        }
        for line in kmsg.as_mut().map_or(Vec::new(), Kmsg::bad_lines) {
            println!("# epoch {epoch}: kernel: {line}");
            warnings += 1;
        }
        epoch += 1;
        if seconds() >= spoken + 10 {
            spoken = seconds();
            println!("# {spoken} s: {} calls, epoch {epoch}", shared.calls.load(Ordering::Relaxed));
            let _ = std::io::stdout().flush();
        }
        if a.epoch.is_some() {
            break;
        }
    }
    let calls = shared.calls.load(Ordering::Relaxed);
    let ns = (now_ns() - start).max(1);
    println!(
        "fuzz: seed {} calls {calls} ({} succeeded, {} runs, {} exits) in {:.1} s, {} calls/s, epochs {}, \
         children crashed {crashes}, stalled {stalls}, kernel warnings {warnings}",
        a.seed,
        shared.succeeded.load(Ordering::Relaxed),
        shared.runs.load(Ordering::Relaxed),
        shared.exits.load(Ordering::Relaxed),
        ns as f64 / 1e9,
        (calls as u128 * 1_000_000_000 / ns as u128),
        epoch - first,
    );
    let bad = stalls > 0 || warnings > 0;
    println!("{} fuzz", if bad { "not ok" } else { "ok" });
    bad as i32
}

enum End {
    Ok,
    Crashed,
    Stalled,
}

fn run_epoch(a: &Args, epoch: u64, shared: &'static Shared) -> End {
    let _ = std::io::stdout().flush();
    // SAFETY: the parent has one thread.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {:?}", Errno::last());
    if pid == 0 {
        // SAFETY: limits of the child itself.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let limit = |what, n| {
                libc::setrlimit(what, &libc::rlimit { rlim_cur: n, rlim_max: n });
            };
            limit(libc::RLIMIT_CORE, 0);
            limit(libc::RLIMIT_NOFILE, 256);
            limit(libc::RLIMIT_AS, 512 << 20);
            limit(libc::RLIMIT_FSIZE, 0);
        }
        sys::arm_kick_signal();
        if guests_may_be_deaf() {
            keep_to(|cpu, count| count < 3 || cpu != count - 1);
        }
        child(a, epoch, shared);
        // SAFETY: the end of this process.
        unsafe { libc::_exit(0) };
    }
    let (mut last, mut since, mut nudged) = (u64::MAX, now_ns(), 0);
    let mut status = 0;
    loop {
        // SAFETY: plain system call on our child.
        if unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } == pid {
            return if status == 0 { End::Ok } else { End::Crashed };
        }
        let calls = shared.calls.load(Ordering::Relaxed);
        if calls != last {
            (last, since) = (calls, now_ns());
        } else if guests_may_be_deaf() && now_ns() - since > NUDGE_NS && nudged != now_ns() / NUDGE_NS {
            nudged = now_ns() / NUDGE_NS;
            nudge(pid);
        } else if now_ns() - since > STALL_SECS * 1_000_000_000 {
            // SAFETY: our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            sys::wait(pid);
            return End::Stalled;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Binds this process to the CPUs that `wanted` names, given a number and how many there are.
fn keep_to(wanted: impl Fn(usize, usize) -> bool) {
    // SAFETY: plain data and system calls.
    unsafe {
        let count = libc::sysconf(libc::_SC_NPROCESSORS_ONLN).clamp(1, 1024) as usize;
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (0..count).filter(|&cpu| wanted(cpu, count)).for_each(|cpu| libc::CPU_SET(cpu, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// Whether a guest may keep its CPU for good: QEMU's TCG (10.0) empties the VMCB's `int_ctl` when it refuses an entry, and without
/// V_INTR_MASKING a guest with interrupts off sees no host interrupt. KVM does not set the bit again.
fn guests_may_be_deaf() -> bool {
    tcg() && on_kvm()
}

/// Interrupts the CPUs on which threads of the child run, by signals.
fn nudge(pid: i32) {
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let tid: i64 = task.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(0);
        // SAFETY: a signal to a thread of our own child, which handles it by doing nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, pid as i64, tid, libc::SIGUSR1 as i64) };
    }
}

fn child(a: &Args, epoch: u64, shared: &'static Shared) {
    let fds: &'static Mutex<Fds> = Box::leak(Box::default());
    let arena = Ram { gpa: 0, ..Ram::new(0, ARENA) };
    let target = shared.calls.load(Ordering::Relaxed) + EPOCH_CALLS;
    // Three epochs of four have one thread: they are faster, and can be repeated exactly.
    let threads = if epoch % 4 == 3 { a.threads } else { 1 };
    let threads: Vec<_> = (0..threads)
        .map(|t| {
            let seed = a.seed.wrapping_mul(1_000_003).wrapping_add(epoch).wrapping_mul(31).wrapping_add(t);
            std::thread::spawn(move || {
                let mut w = Worker::new(seed, fds, shared, arena);
                let _kicks = sys::Kicks::after_us(300);
                while shared.calls.load(Ordering::Relaxed) < target {
                    w.step();
                }
            })
        })
        .collect();
    for t in threads {
        let _ = t.join();
    }
}
