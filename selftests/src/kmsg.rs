// SPDX-License-Identifier: GPL-2.0
//! The host kernel's log: anything that says a kernel bug was met since the reader was made.

use crate::sys;
use std::os::fd::RawFd;

pub struct Kmsg(RawFd);

/// What a healthy kernel never says. `unchecked MSR access` and the like are warnings too.
const BAD: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "general protection fault",
    "unable to handle",
    "kernel panic",
    "rcu_preempt detected stalls",
    "soft lockup",
    "blocked for more than",
    "unchecked MSR access",
    "Bad page state",
    "Bad rss-counter",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "Undefined insn",
    "scheduling while atomic",
    "sleeping function called",
];

impl Kmsg {
    /// Starts at the end of the log. None where /dev/kmsg cannot be read.
    pub fn new() -> Option<Kmsg> {
        // SAFETY: a literal path.
        let fd = unsafe { libc::open(c"/dev/kmsg".as_ptr(), libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC) };
        if fd < 0 {
            return None;
        }
        // SAFETY: plain system call on our descriptor.
        unsafe { libc::lseek(fd, 0, libc::SEEK_END) };
        Some(Kmsg(fd))
    }

    /// The lines since the last call that tell of a kernel bug.
    pub fn bad_lines(&mut self) -> Vec<String> {
        let mut out = Vec::new();
        let mut buf = [0u8; 8192];
        loop {
            // SAFETY: the buffer is ours.
            let n = unsafe { libc::read(self.0, buf.as_mut_ptr() as *mut _, buf.len()) };
            if n <= 0 {
                // EPIPE: the ring went round under us; the next read goes on with what is left.
                if n < 0 && sys::Errno::last() == sys::EPIPE {
                    continue;
                }
                return out;
            }
            let record = String::from_utf8_lossy(&buf[..n as usize]);
            let text = record.split_once(';').map_or("", |(_, t)| t).lines().next().unwrap_or("");
            if BAD.iter().any(|b| text.contains(b)) {
                out.push(text.to_string());
            }
        }
    }
}

impl Drop for Kmsg {
    fn drop(&mut self) {
        let _ = sys::close(self.0);
    }
}
