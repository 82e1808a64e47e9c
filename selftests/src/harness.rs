// SPDX-License-Identifier: GPL-2.0
//! The KTAP harness: every test runs in a forked child, so that a crash, a hang or a leak is that test's alone.
//!
//! Output is KTAP version 1 ("The Kernel Test Anything Protocol" in the kernel's documentation), one flat list. A test
//! fails by panicking, skips with `skip!`, and fails as well when the kernel log shows a warning during its run.

use crate::kmsg::Kmsg;
use crate::sys;
use std::io::Write;
use std::panic;
use std::sync::OnceLock;

/// One test. `secs` is its time limit, meant for a machine that is emulated.
pub struct Test {
    pub name: &'static str,
    pub secs: u32,
    pub func: fn(),
}

/// A named set of tests.
pub struct Group {
    pub name: &'static str,
    pub tests: &'static [Test],
}

/// `tests! { "group"; first; second; third(60) }`: the default limit is 20 seconds.
#[macro_export]
macro_rules! tests {
    ($group:literal; $($name:ident $(($secs:literal))?;)*) => {
        pub const GROUP: $crate::harness::Group = $crate::harness::Group {
            name: $group,
            tests: &[$($crate::harness::Test {
                name: stringify!($name),
                secs: $crate::tests!(@secs $($secs)?),
                func: $name,
            },)*],
        };
    };
    (@secs) => { 20 };
    (@secs $secs:literal) => { $secs };
}

/// Options that every program of this crate shares.
pub struct Options {
    pub device: String,
    pub bed: String,
    pub times: bool,
    /// The CPU may deliver a guest's interrupts, where it can.
    pub apicv: bool,
    /// The CPU may run guests in real mode and without paging, where it can.
    pub unrestricted: bool,
}

static OPTIONS: OnceLock<Options> = OnceLock::new();

pub fn set_options(o: Options) {
    assert!(OPTIONS.set(o).is_ok(), "options are set once");
}

pub fn options() -> &'static Options {
    OPTIONS.get().expect("options are set before any test")
}

/// True when the device under test is KVM: the oracle, whose few intended differences a test may name.
pub fn on_kvm() -> bool {
    options().device.ends_with("/kvm")
}

/// True when the host is emulated, so that its timing means little.
pub fn emulated() -> bool {
    options().bed.contains("tcg") || options().bed.contains("bochs")
}

/// True under QEMU's TCG, whose CPU is lax here and there (no canonical checks in most MSRs, #GP for #SS, and so on).
pub fn tcg() -> bool {
    options().bed.contains("tcg")
}

/// The panic payload of `skip!`.
pub struct Skip(pub String);

#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => { std::panic::panic_any($crate::harness::Skip(format!($($arg)*))) };
}

/// Asserts that a result is this error.
#[macro_export]
macro_rules! assert_err {
    ($result:expr, $errno:expr) => {
        $crate::assert_err!($result, $errno, "{}", stringify!($result))
    };
    ($result:expr, $errno:expr, $($arg:tt)+) => {
        match $result {
            Err(e) if e == $errno => {}
            other => panic!("{}: wanted {:?}, got {:?}", format!($($arg)+), $errno, other.map(|_| "success")),
        }
    };
}

/// Asserts success and gives the value.
#[macro_export]
macro_rules! assert_ok {
    ($result:expr) => {
        match $result {
            Ok(v) => v,
            Err(e) => panic!("{}: {:?}", stringify!($result), e),
        }
    };
}

enum Outcome {
    Ok,
    Fail(String),
    Skip(String),
}

/// Runs `tests` and returns the number of failures.
pub fn run(tests: &[(String, &Test)]) -> usize {
    println!("KTAP version 1\n1..{}", tests.len());
    let mut kmsg = Kmsg::new();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (i, (name, test)) in tests.iter().enumerate() {
        let start = sys::now_ns();
        let mut outcome = run_one(test);
        let warnings = kmsg.as_mut().map_or(Vec::new(), Kmsg::bad_lines);
        for line in &warnings {
            println!("# kernel: {line}");
        }
        if !warnings.is_empty() {
            outcome = Outcome::Fail("the kernel log has a warning".into());
        }
        let n = i + 1;
        let time =
            if options().times { format!(" # time={}ms", (sys::now_ns() - start) / 1_000_000) } else { String::new() };
        match outcome {
            Outcome::Ok => {
                passed += 1;
                println!("ok {n} {name}{time}");
            }
            Outcome::Skip(why) => {
                skipped += 1;
                println!("ok {n} {name} # SKIP {why}");
            }
            Outcome::Fail(why) => {
                failed += 1;
                println!("# {name}: {why}\nnot ok {n} {name}{time}");
            }
        }
    }
    println!("# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:{skipped} error:0");
    failed
}

fn run_one(test: &Test) -> Outcome {
    let mut pipe = [0; 2];
    // SAFETY: two descriptors into a local array; the harness has one thread when it forks.
    let pid = unsafe {
        assert_eq!(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let _ = std::io::stdout().flush();
        libc::fork()
    };
    assert!(pid >= 0, "fork: {:?}", sys::Errno::last());
    if pid == 0 {
        child(test, pipe[1]);
    }
    let _ = sys::close(pipe[1]);
    let deadline = sys::now_ns() + test.secs as u64 * 1_000_000_000;
    let mut status = 0;
    let mut nap_us = 200;
    loop {
        // SAFETY: plain system calls on our child.
        if unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } == pid {
            break;
        }
        if sys::now_ns() > deadline {
            // SAFETY: the child made a process group of its own.
            unsafe {
                libc::kill(-pid, libc::SIGKILL);
                libc::kill(pid, libc::SIGKILL);
            }
            sys::wait(pid);
            let _ = sys::close(pipe[0]);
            return Outcome::Fail(format!("no end after {} seconds", test.secs));
        }
        std::thread::sleep(std::time::Duration::from_micros(nap_us));
        nap_us = (nap_us * 2).min(5000);
    }
    // SAFETY: what the test left behind in its process group, if anything.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
    let mut text = vec![0u8; 1024];
    // SAFETY: the buffer is ours; the child is gone, so this does not block.
    let n = unsafe { libc::read(pipe[0], text.as_mut_ptr() as *mut _, text.len()) };
    let _ = sys::close(pipe[0]);
    text.truncate(n.max(0) as usize);
    let text = String::from_utf8_lossy(&text).into_owned();
    if libc::WIFSIGNALED(status) {
        return Outcome::Fail(format!("killed by signal {}", libc::WTERMSIG(status)));
    }
    match libc::WEXITSTATUS(status) {
        0 => Outcome::Ok,
        4 => Outcome::Skip(text),
        _ => Outcome::Fail(text),
    }
}

fn child(test: &Test, report: i32) -> ! {
    // SAFETY: the child of a single-threaded parent.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    sys::arm_kick_signal();
    panic::set_hook(Box::new(|info| {
        let p = info.payload();
        if p.is::<Skip>() {
            return;
        }
        let text = p.downcast_ref::<&str>().copied().or(p.downcast_ref::<String>().map(|s| s.as_str()));
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        for line in text.unwrap_or("panic").lines() {
            println!("# {place}: {line}");
        }
    }));
    let (code, text) = match panic::catch_unwind(test.func) {
        Ok(()) => (0, String::new()),
        Err(p) => match p.downcast::<Skip>() {
            Ok(s) => (4, s.0.replace('\n', " ")),
            Err(_) => (1, "assertion failed".to_string()),
        },
    };
    let _ = std::io::stdout().flush();
    // SAFETY: our pipe and a live buffer; then the end of this process.
    unsafe {
        libc::write(report, text.as_ptr() as *const _, text.len().min(1024));
        libc::_exit(code)
    }
}
