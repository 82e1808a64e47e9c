// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The user's terminal: raw mode, the escape key, input and output of the guest's console.
//!
//! The terminal is put back on every way out: normal return, error, panic, a signal that ends the process. Only
//! SIGKILL leaves it raw (`stty sane` helps). Standard input that is no terminal is passed through byte by byte and has
//! no escape key.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};

use crate::exit::Stop;

const CTRL_A: u8 = 1;

/// Shown on Ctrl-A h.
pub const ESCAPE_HELP: &str = "\r\n\
Ctrl-A x       stop the virtual machine and quit\r\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n\
Ctrl-A h       this help\r\n";

/// What a byte from the keyboard means.
#[derive(Debug, PartialEq, Eq)]
pub enum Key {
    /// A byte for the guest.
    Send(u8),
    /// Part of an escape sequence.
    Nothing,
    Help,
    Quit,
}

/// Finds the escape key in what the user types.
#[derive(Debug, Default)]
pub struct Escape {
    pressed: bool,
}

impl Escape {
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.pressed) {
            self.pressed = byte == CTRL_A;
            return if self.pressed { Key::Nothing } else { Key::Send(byte) };
        }
        match byte {
            CTRL_A => Key::Send(CTRL_A),
            b'x' | b'X' => Key::Quit,
            b'h' | b'H' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

/// The modes before we changed them, for those who must restore them without holding [`RawMode`].
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// Puts the terminal back. Safe in a signal handler.
fn restore() {
    if let Some(modes) = ORIGINAL.get() {
        // SAFETY: `modes` came from tcgetattr. Failure means that the terminal is gone.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, modes) };
    }
}

/// A fault of our own: the handler is one-shot, so the signal that it raises again takes its default course.
extern "C" fn handle_fault(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe. The signal is blocked until this handler returns.
    unsafe { libc::raise(signal) };
}

/// Standard input in raw mode while this lives.
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode if standard input is a terminal that we may use: in the background it belongs to others.
    pub fn enter() -> Result<Option<Self>> {
        // SAFETY: These calls only read the state of the descriptor.
        if unsafe { libc::isatty(libc::STDIN_FILENO) != 1 || libc::tcgetpgrp(libc::STDIN_FILENO) != libc::getpgrp() } {
            return Ok(None);
        }
        let mut modes = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills `modes` when it returns 0.
        let modes = unsafe {
            if libc::tcgetattr(libc::STDIN_FILENO, modes.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error()).context("cannot read the terminal's modes");
            }
            modes.assume_init()
        };
        if ORIGINAL.set(modes).is_ok() {
            restore_on_faults();
        }
        let raw = RawMode(());
        raw.resume()?;
        Ok(Some(raw))
    }

    /// Sets raw mode again, after a shell has put us in the foreground again.
    pub fn resume(&self) -> Result<()> {
        let Some(mut modes) = ORIGINAL.get().copied() else { return Ok(()) };
        // SAFETY: `modes` is a valid termios.
        let result = unsafe {
            libc::cfmakeraw(&mut modes);
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &modes)
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("cannot set the terminal to raw mode");
        }
        Ok(())
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore_on_faults() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        default(info);
    }));
    for signal in [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV] {
        // SAFETY: The handler only makes async-signal-safe calls and reads memory that was set before.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle_fault as *const () as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Standard output for the guest's console: unbuffered, and given up when the run ends.
pub struct Output(pub Arc<Stop>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            // SAFETY: The pointer and the length are those of `bytes`.
            let written = unsafe { libc::write(libc::STDOUT_FILENO, bytes.as_ptr().cast(), bytes.len()) };
            if let Ok(written) = usize::try_from(written) {
                return Ok(written);
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                // A kick; `write_all` would try forever on an output that nobody reads.
                io::ErrorKind::Interrupted if self.0.is_requested() => return Err(io::ErrorKind::BrokenPipe.into()),
                io::ErrorKind::Interrupted => {}
                // Whoever shares the terminal may have made it non-blocking.
                io::ErrorKind::WouldBlock if self.0.is_requested() => return Err(error),
                io::ErrorKind::WouldBlock => wait_for_room(),
                _ => return Err(error),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait_for_room() {
    let mut fd = libc::pollfd { fd: libc::STDOUT_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: One valid pollfd. Whatever the result, the caller writes again.
    unsafe { libc::poll(&mut fd, 1, 100) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(bytes: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        bytes.iter().map(|byte| escape.feed(*byte)).filter(|key| *key != Key::Nothing).collect()
    }

    #[test]
    fn plain_bytes_pass() {
        assert_eq!(feed(b"xh\x03\xFF"), [Key::Send(b'x'), Key::Send(b'h'), Key::Send(3), Key::Send(0xFF)]);
    }

    #[test]
    fn escapes() {
        assert_eq!(feed(b"\x01x"), [Key::Quit]);
        assert_eq!(feed(b"a\x01hb"), [Key::Send(b'a'), Key::Help, Key::Send(b'b')]);
        assert_eq!(feed(b"\x01\x01x"), [Key::Send(1), Key::Send(b'x')]);
        assert_eq!(feed(b"\x01\x01\x01x"), [Key::Send(1), Key::Quit]);
    }

    #[test]
    fn unknown_escapes_are_dropped_and_forgotten() {
        assert_eq!(feed(b"\x01qx"), [Key::Send(b'x')]);
        assert_eq!(feed(b"\x01"), []);
    }
}
