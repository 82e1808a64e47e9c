// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The main thread while the guest runs: input for the console, signals, and waiting for the end.
//!
//! poll(2) and not epoll, because standard input may be a file, which epoll refuses.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::create_sigset;

use crate::devices::serial::Console;
use crate::exit::{Outcome, Stop};
use crate::terminal::{Escape, Key, RawMode, ESCAPE_HELP};

/// Signals that the loop takes; all other threads must have them blocked.
const SIGNALS: [libc::c_int; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGCONT];
/// When the guest has the console in a mode that takes no input, look again after so many milliseconds.
const RETRY_MS: libc::c_int = 20;
const NO_TIMEOUT: libc::c_int = -1;

/// Signals as a file descriptor.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks [`SIGNALS`] for this thread and those it starts from now on.
    pub fn block() -> Result<Self> {
        let set = create_sigset(&SIGNALS).context("cannot make a signal set")?;
        // SAFETY: `set` is valid, and the descriptor that signalfd returns is ours alone.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error()).context("signalfd failed");
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    fn next(&self) -> Option<libc::c_int> {
        let mut bytes = [0; std::mem::size_of::<libc::signalfd_siginfo>()];
        let read = read(self.0.as_raw_fd(), &mut bytes).ok()?;
        // The record starts with the signal's number.
        let number = bytes.get(..4).filter(|_| read == bytes.len())?;
        Some(i32::from_ne_bytes(number.try_into().ok()?))
    }
}

/// Everything that the loop listens to.
pub struct MainLoop<'a> {
    pub stop: Arc<Stop>,
    /// Signalled by `stop`.
    pub wake: EventFd,
    /// Signalled when the guest has read all input.
    pub drained: EventFd,
    pub console: &'a Console,
    pub signals: Signals,
    /// Where input comes from: standard input, but for tests.
    pub input: RawFd,
    /// `None` when standard input is no terminal of ours.
    pub terminal: Option<RawMode>,
}

impl MainLoop<'_> {
    /// Serves input and signals until a reason for the end is in `stop`.
    pub fn run(&self) -> Result<()> {
        let mut input = Input { escape: Escape::default(), waiting: Vec::new(), open: self.may_read_input() };
        while !self.stop.is_requested() {
            let mut fds = [self.wake.as_raw_fd(), self.drained.as_raw_fd(), self.signals.0.as_raw_fd(), -1]
                .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
            if input.open && input.waiting.is_empty() && self.console.input_room() > 0 {
                fds[3].fd = self.input;
            }
            let timeout = if input.waiting.is_empty() { NO_TIMEOUT } else { RETRY_MS };
            // SAFETY: An array of valid pollfds and its length. Negative descriptors are ignored.
            if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } < 0 {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error).context("poll failed"),
                }
            }
            if fds[1].revents != 0 {
                let _ = self.drained.read();
            }
            while let Some(signal) = self.signals.next() {
                self.handle_signal(signal)?;
            }
            if fds[3].revents != 0 {
                self.read_input(&mut input);
            }
            let taken = self.console.input(&input.waiting);
            input.waiting.drain(..taken);
        }
        Ok(())
    }

    fn handle_signal(&self, signal: libc::c_int) -> Result<()> {
        match (signal, &self.terminal) {
            (libc::SIGCONT, Some(terminal)) => terminal.resume(),
            (libc::SIGCONT, None) => Ok(()),
            _ => {
                self.stop.request(Outcome::Signal(signal));
                Ok(())
            }
        }
    }

    /// A terminal that is not ours to read would stop us with SIGTTIN.
    fn may_read_input(&self) -> bool {
        // SAFETY: Only reads the state of the descriptor.
        self.terminal.is_some() || unsafe { libc::isatty(self.input) } != 1
    }

    fn read_input(&self, input: &mut Input) {
        let mut bytes = [0; 64];
        let len = bytes.len().min(self.console.input_room()).max(1);
        let read = match read(self.input, &mut bytes[..len]) {
            Ok(read) if read > 0 => &bytes[..read],
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return,
            // The end, or a descriptor that is closed or broken: never look at it again.
            _ => {
                input.open = false;
                return;
            }
        };
        if self.terminal.is_none() {
            input.waiting.extend_from_slice(read);
            return;
        }
        for byte in read {
            match input.escape.feed(*byte) {
                Key::Send(byte) => input.waiting.push(byte),
                Key::Nothing => {}
                Key::Help => {
                    let _ = io::stderr().write_all(ESCAPE_HELP.as_bytes());
                }
                Key::Quit => self.stop.request(Outcome::Quit),
            }
        }
    }
}

struct Input {
    escape: Escape,
    /// Read, but not taken by the guest yet.
    waiting: Vec<u8>,
    open: bool,
}

fn read(fd: RawFd, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: The pointer and the length are those of `bytes`.
    let read = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::{Duration, Instant};

    struct Fixture {
        stop: Arc<Stop>,
        wake: EventFd,
        drained: EventFd,
        console: Console,
    }

    impl Fixture {
        fn new() -> Self {
            let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let (wake, drained) = (event(), event());
            Fixture {
                stop: Arc::new(Stop::new(wake.try_clone().unwrap())),
                console: Console::new(event(), drained.try_clone().unwrap(), Box::new(io::sink())),
                wake,
                drained,
            }
        }

        /// Runs the loop with `input` in this thread and `guest` in another one.
        fn run(&self, input: RawFd, guest: impl FnOnce(&Self) + Send) {
            let main_loop = MainLoop {
                stop: self.stop.clone(),
                wake: self.wake.try_clone().unwrap(),
                drained: self.drained.try_clone().unwrap(),
                console: &self.console,
                signals: Signals::block().unwrap(),
                input,
                terminal: None,
            };
            thread::scope(|scope| {
                scope.spawn(|| guest(self));
                main_loop.run().unwrap();
            });
        }

        /// What the guest reads from COM1 until it has `len` bytes.
        fn read(&self, len: usize) -> Vec<u8> {
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut bytes = Vec::new();
            while bytes.len() < len && Instant::now() < deadline {
                if self.console.read(5) & 1 != 0 {
                    bytes.push(self.console.read(0));
                } else {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            bytes
        }
    }

    fn pipe() -> (OwnedFd, std::fs::File) {
        let mut fds = [0; 2];
        // SAFETY: pipe2 fills `fds` with descriptors that nobody else owns.
        unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
            (OwnedFd::from_raw_fd(fds[0]), std::fs::File::from_raw_fd(fds[1]))
        }
    }

    fn thread_cpu_time() -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: Fills `time`.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    #[test]
    fn input_larger_than_the_fifo_arrives_whole_and_with_escapes() {
        let (reader, mut writer) = pipe();
        let text: Vec<u8> = (0..=255).cycle().take(1000).collect();
        writer.write_all(&text).unwrap();
        Fixture::new().run(reader.as_raw_fd(), |fixture| {
            assert_eq!(fixture.read(text.len()), text);
            fixture.stop.request(Outcome::PowerOff);
        });
    }

    #[test]
    fn no_spinning_at_the_end_of_input() {
        let (reader, writer) = pipe();
        drop(writer);
        let before = thread_cpu_time();
        Fixture::new().run(reader.as_raw_fd(), |fixture| {
            thread::sleep(Duration::from_millis(300));
            fixture.stop.request(Outcome::PowerOff);
        });
        let used = thread_cpu_time() - before;
        assert!(used < Duration::from_millis(100), "{used:?}");
    }

    #[test]
    fn a_closed_descriptor_is_no_input() {
        Fixture::new().run(9999, |fixture| {
            thread::sleep(Duration::from_millis(50));
            fixture.stop.request(Outcome::Reboot);
        });
    }

    #[test]
    fn signals_end_the_run() {
        let fixture = Fixture::new();
        // SAFETY: Signals of this thread only; `run` blocks them before the guest sends one.
        let me = unsafe { libc::pthread_self() } as usize;
        fixture.run(-1, move |_| {
            thread::sleep(Duration::from_millis(50));
            // SAFETY: The thread lives as long as the loop runs.
            unsafe { libc::pthread_kill(me as libc::pthread_t, libc::SIGTERM) };
        });
        assert_eq!(fixture.stop.outcome(), Some(&Outcome::Signal(libc::SIGTERM)));
    }
}
