// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a run ended, and the exit code that tells the caller.
//!
//! The first reason wins: once one is recorded, every later one is dropped. So a guest that writes the exit port
//! and powers off afterwards ends with its own code, and a guest that is killed while it reboots counts as killed.

use std::fmt;
use std::process::ExitCode;
use std::sync::OnceLock;

use vmm_sys_util::eventfd::EventFd;

/// Exit code of an error of the launcher itself: no kernel, no device node, a failing ioctl.
pub const CODE_LAUNCHER_ERROR: u8 = 1;
/// Exit code of the user's escape key.
pub const CODE_QUIT: u8 = 6;

/// Printed by `krab run --help`.
pub const EXIT_CODES_HELP: &str = "\
Exit codes:
  0        the guest powered off
  1        the launcher failed (bad file, no device, out of memory); stderr says what to do
  2        wrong usage
  3        the guest asked for a reboot
  4        the guest crashed: triple fault, or its kernel reported a panic through pvpanic (port 0x505)
  5        the hypervisor gave up: KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY; registers on stderr
  6        the user quit with Ctrl-A x
  64..127  the guest wrote C to the exit port 0x501, or to the byte at 0xFEB00000: 64 + (C & 63)
  128 + N  the launcher was ended by signal N
The first of these reasons wins.";

/// Why the run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// ACPI S5, or KVM_SYSTEM_EVENT_SHUTDOWN.
    PowerOff,
    /// Keyboard controller, port 0xCF9, or KVM_SYSTEM_EVENT_RESET.
    Reboot,
    /// The byte that the guest wrote to the exit port.
    GuestCode(u8),
    /// The guest is beyond help; `dump` may hold its registers.
    Crash { reason: String, dump: String },
    /// The hypervisor cannot go on with this guest; `dump` may hold its registers.
    Internal { reason: String, dump: String },
    /// The escape key.
    Quit,
    /// A signal that ends the launcher.
    Signal(i32),
    /// The launcher itself failed while the guest ran.
    Failed(String),
}

impl Outcome {
    /// The launcher's exit code, see [`EXIT_CODES_HELP`].
    pub fn code(&self) -> u8 {
        match self {
            Outcome::PowerOff => 0,
            Outcome::Failed(_) => CODE_LAUNCHER_ERROR,
            Outcome::Reboot => 3,
            Outcome::Crash { .. } => 4,
            Outcome::Internal { .. } => 5,
            Outcome::Quit => CODE_QUIT,
            Outcome::GuestCode(code) => 64 + (code & 0x3F),
            Outcome::Signal(number) => 128u8.wrapping_add((number & 0x7F) as u8),
        }
    }

    /// Says on stderr how the run ended. A clean power-off needs no words.
    pub fn report(&self) -> ExitCode {
        if *self != Outcome::PowerOff {
            eprintln!("krab: {self}");
        }
        if let Outcome::Crash { dump, .. } | Outcome::Internal { dump, .. } = self {
            eprint!("{dump}");
        }
        ExitCode::from(self.code())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PowerOff => write!(f, "the guest powered off"),
            Outcome::Reboot => write!(f, "the guest asked for a reboot"),
            Outcome::GuestCode(code) => write!(f, "the guest ended with code {code}"),
            Outcome::Crash { reason, .. } => write!(f, "the guest crashed: {reason}"),
            Outcome::Internal { reason, .. } => write!(f, "the hypervisor gave up: {reason}"),
            Outcome::Quit => write!(f, "ended by Ctrl-A x"),
            Outcome::Signal(number) => write!(f, "ended by signal {number}"),
            Outcome::Failed(reason) => write!(f, "error: {reason}"),
        }
    }
}

/// Where devices, vCPUs and the main loop leave the reason for the end of the run.
#[derive(Debug)]
pub struct Stop {
    outcome: OnceLock<Outcome>,
    wake: EventFd,
}

impl Stop {
    /// `wake` is an event of the main loop: it is signalled when a reason has been recorded.
    pub fn new(wake: EventFd) -> Self {
        Stop { outcome: OnceLock::new(), wake }
    }

    /// Records `outcome` if none was recorded before, and wakes the main loop.
    pub fn request(&self, outcome: Outcome) {
        let _ = self.outcome.set(outcome);
        // An event counter can only refuse when it is full, and then the reader is awake anyway.
        let _ = self.wake.write(1);
    }

    /// The recorded reason.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// True once a reason was recorded.
    pub fn is_requested(&self) -> bool {
        self.outcome.get().is_some()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A `Stop` of its own, for tests of devices.
    pub fn stop() -> std::sync::Arc<Stop> {
        std::sync::Arc::new(Stop::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    fn crash() -> Outcome {
        Outcome::Crash { reason: String::new(), dump: String::new() }
    }

    fn internal() -> Outcome {
        Outcome::Internal { reason: String::new(), dump: String::new() }
    }

    #[test]
    fn codes_are_as_documented() {
        let table = [
            (Outcome::PowerOff, 0),
            (Outcome::Failed(String::new()), 1),
            (Outcome::Reboot, 3),
            (crash(), 4),
            (internal(), 5),
            (Outcome::Quit, 6),
            (Outcome::GuestCode(0), 64),
            (Outcome::GuestCode(63), 127),
            (Outcome::GuestCode(64), 64),
            (Outcome::GuestCode(255), 127),
            (Outcome::Signal(libc::SIGTERM), 143),
            (Outcome::Signal(libc::SIGINT), 130),
        ];
        for (outcome, code) in table {
            assert_eq!(outcome.code(), code, "{outcome:?}");
        }
    }

    #[test]
    fn a_guest_code_never_looks_like_another_reason() {
        let others = [Outcome::PowerOff, Outcome::Reboot, crash(), internal(), Outcome::Quit, Outcome::Signal(1)];
        for code in 0..=255 {
            assert!(others.iter().all(|o| o.code() != Outcome::GuestCode(code).code()));
        }
    }

    #[test]
    fn the_first_reason_wins() {
        let stop = stop();
        assert!(!stop.is_requested());
        stop.request(Outcome::GuestCode(7));
        stop.request(Outcome::PowerOff);
        assert_eq!(stop.outcome(), Some(&Outcome::GuestCode(7)));
    }
}
