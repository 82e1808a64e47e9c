// SPDX-License-Identifier: GPL-2.0
//! System calls with errors as values: `Errno`, ioctl, mmap, timers that kick a thread out of KVM_RUN.

use std::fmt;
use std::os::fd::RawFd;

/// An error number; prints as its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// The calling thread's errno.
    pub fn last() -> Errno {
        Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

macro_rules! errnos {
    ($($name:ident)*) => {
        $(pub const $name: Errno = Errno(libc::$name);)*
        impl fmt::Debug for Errno {
            fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
                match self.0 {
                    $(libc::$name => f.write_str(stringify!($name)),)*
                    n => write!(f, "errno {n}"),
                }
            }
        }
    };
}

errnos! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST ENODEV EINVAL ENFILE EMFILE
    ENOTTY ENOSPC ESPIPE EPIPE ENOSYS EOPNOTSUPP ETIMEDOUT EOVERFLOW
}

pub type Result<T> = std::result::Result<T, Errno>;

/// Turns the C convention (-1 and errno) into a `Result`.
pub fn check(ret: i64) -> Result<i64> {
    if ret < 0 {
        Err(Errno::last())
    } else {
        Ok(ret)
    }
}

/// The raw ioctl. `arg` may be anything at all, and a right pointer only if the call is to succeed.
pub fn ioctl(fd: RawFd, request: u32, arg: usize) -> Result<i32> {
    // SAFETY: the kernel checks user pointers. What it writes lands at `arg`, which callers point at memory of theirs.
    check(unsafe { libc::ioctl(fd, request as libc::Ioctl, arg) } as i64).map(|v| v as i32)
}

/// ioctl with a pointer to `arg`, for calls that only read it.
pub fn ioctl_in<T>(fd: RawFd, request: u32, arg: &T) -> Result<i32> {
    ioctl(fd, request, arg as *const T as usize)
}

/// ioctl with a pointer to `arg`, for calls that may write it.
pub fn ioctl_out<T>(fd: RawFd, request: u32, arg: &mut T) -> Result<i32> {
    ioctl(fd, request, arg as *mut T as usize)
}

/// Anonymous private memory, `len` bytes, aligned to `align` (a power of two, at least a page), zeroed, not yet
/// populated. It stays mapped until `munmap`: tests run in processes of their own.
pub fn anon(len: usize, align: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choosing.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), len + align, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert!(p != libc::MAP_FAILED, "mmap of {len} bytes: {:?}", Errno::last());
        let start = p as usize;
        let aligned = (start + align - 1) & !(align - 1);
        if aligned > start {
            libc::munmap(p, aligned - start);
        }
        let tail = start + align - aligned;
        if tail > 0 {
            libc::munmap((aligned + len) as *mut _, tail);
        }
        aligned as *mut u8
    }
}

pub fn munmap(p: *mut u8, len: usize) {
    // SAFETY: callers pass memory that they mapped and no longer use.
    unsafe { libc::munmap(p as *mut _, len) };
}

pub fn close(fd: RawFd) -> Result<()> {
    // SAFETY: closing a number that the caller owns.
    check(unsafe { libc::close(fd) } as i64).map(|_| ())
}

/// Keeps the calling thread on one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    // SAFETY: the set lives through the call.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    check(done.into()).map(|_| ())
}

pub fn gettid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Sends SIGUSR1 to one thread of this process.
pub fn kick(tid: i32) {
    // SAFETY: plain system call.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
}

extern "C" fn nothing(_: i32) {}

/// Installs a handler for SIGUSR1 that does nothing, without SA_RESTART: the signal ends a blocking KVM_RUN with EINTR.
pub fn arm_kick_signal() {
    // SAFETY: the handler is async-signal-safe, because it is empty.
    unsafe {
        let mut sa: libc::sigaction = std::mem::zeroed();
        sa.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &sa, std::ptr::null_mut());
    }
}

/// While it lives, the thread that made it gets SIGUSR1 after `first_us`, and then every `first_us` or 10 ms, whichever
/// is less (so a kick that comes between two system calls is not the last one).
pub struct Kicks(libc::timer_t);

impl Kicks {
    pub fn after_us(first_us: u64) -> Kicks {
        arm_kick_signal();
        // SAFETY: the structures live through the calls.
        unsafe {
            let mut ev: libc::sigevent = std::mem::zeroed();
            ev.sigev_notify = libc::SIGEV_THREAD_ID;
            ev.sigev_signo = libc::SIGUSR1;
            ev.sigev_notify_thread_id = gettid();
            let mut t: libc::timer_t = std::ptr::null_mut();
            check(libc::timer_create(libc::CLOCK_MONOTONIC, &mut ev, &mut t) as i64).expect("timer_create");
            let spec =
                |us: u64| libc::timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000 * 1000) as i64 };
            let its = libc::itimerspec { it_value: spec(first_us), it_interval: spec(first_us.clamp(100, 10_000)) };
            check(libc::timer_settime(t, 0, &its, std::ptr::null_mut()) as i64).expect("timer_settime");
            Kicks(t)
        }
    }
}

impl Drop for Kicks {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Runs `f` in a forked child; its return value is the exit code, 101 after a panic. Waits, and gives back the wait
/// status.
pub fn in_child(f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child calls only `f` and `_exit`; the tests that use this have no other thread at that time.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "fork: {:?}", Errno::last());
        if pid == 0 {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(101);
            libc::_exit(code);
        }
        wait(pid)
    }
}

/// waitpid, and the raw status.
pub fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 {
        assert_eq!(Errno::last(), EINTR);
    }
    status
}

/// eventfd(2), non-blocking.
pub fn eventfd() -> RawFd {
    // SAFETY: plain system call.
    check(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) } as i64).expect("eventfd") as RawFd
}

/// Adds `n` to an eventfd.
pub fn eventfd_write(fd: RawFd, n: u64) {
    // SAFETY: eight bytes from a local.
    assert_eq!(unsafe { libc::write(fd, &n as *const u64 as *const _, 8) }, 8);
}

/// Takes the count of an eventfd; 0 when nothing was signalled.
pub fn eventfd_read(fd: RawFd) -> u64 {
    let mut n = 0u64;
    // SAFETY: eight bytes into a local.
    match unsafe { libc::read(fd, &mut n as *mut u64 as *mut _, 8) } {
        8 => n,
        _ => 0,
    }
}

/// Monotonic time in nanoseconds.
pub fn now_ns() -> u64 {
    // SAFETY: the structure lives through the call.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

/// Sleeps `ms` milliseconds.
pub fn sleep_ms(ms: u64) {
    std::thread::sleep(std::time::Duration::from_millis(ms));
}
