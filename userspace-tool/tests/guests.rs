// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tiny guests, one for each way in which a run can end. They need a hypervisor, so they are ignored unless asked for:
//! set KRAB_TEST_DEVICE to its device node, KRAB to the launcher where that is not the one that Cargo built, and run
//! this program with `--ignored`. It is static, so it runs in an initramfs too (which needs /tmp and /dev/pts).
//!
//! Each guest is an ELF file with a PVH note, loaded at 1 MiB and entered in 32-bit protected mode.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Where the guests' code is loaded, and a message in it.
const LOAD: u32 = 0x10_0000;
const MESSAGE_OFFSET: usize = 0x80;
const MESSAGE: &[u8] = b"hello strings\n";
const TIMEOUT: Duration = Duration::from_secs(60);

/// `al` to the exit port.
const EXIT_WITH_AL: &[u8] = b"\x66\xBA\x01\x05\xEE\xF4";
/// 0x3401 (SLP_EN, type 5) to PM1 control, as a word.
const POWER_OFF: &[u8] = b"\x66\xBA\x04\x06\x66\xB8\x01\x34\x66\xEF\xF4";
const BUSY: &[u8] = b"\xEB\xFE";
/// `cli; hlt`
const HALTED: &[u8] = b"\xFA\xF4\xF4";
/// Writes to COM1 forever.
const FLOOD: &[u8] = b"\x66\xBA\xF8\x03\xEE\xEB\xFD";
/// Reads COM1 by polling and writes each byte back; powers off after a 'q'.
const ECHO: &[u8] = b"\x66\xBA\xFD\x03\xEC\xA8\x01\x74\xFB\x66\xBA\xF8\x03\xEC\xEE\x66\xBA\xFD\x03\x3C\x71\x75\xED\
    \x66\xBA\x04\x06\x66\xB8\x01\x34\x66\xEF\xF4";

/// The guest's ELF file.
fn image(code: &[u8]) -> Vec<u8> {
    const SEGMENT: usize = 0x1000;
    const NOTE: usize = 0x200;
    let mut image = vec![0; SEGMENT + 0x100];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7FELF\x02\x01\x01");
    put(24, &u64::from(LOAD).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2, 0]);
    for (offset, kind, file, size) in [(64, 1u32, SEGMENT, 0x100u64), (120, 4, NOTE, 20)] {
        put(offset, &kind.to_le_bytes());
        for (index, word) in [file as u64, LOAD.into(), LOAD.into(), size, size, 4].iter().enumerate() {
            put(offset + 8 + 8 * index, &word.to_le_bytes());
        }
    }
    put(NOTE, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    put(NOTE + 16, &LOAD.to_le_bytes());
    assert!(code.len() <= MESSAGE_OFFSET);
    put(SEGMENT, code);
    put(SEGMENT + MESSAGE_OFFSET, MESSAGE);
    image
}

/// The guest's file, as long as it is needed.
struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A launcher with the guest `code`.
fn launcher(name: &str, code: &[&[u8]]) -> (Image, Command) {
    let device = std::env::var_os("KRAB_TEST_DEVICE").expect("KRAB_TEST_DEVICE names the hypervisor's device node");
    let kernel = Image(std::env::temp_dir().join(format!("krab-guest-{}-{name}", std::process::id())));
    std::fs::write(&kernel.0, image(&code.concat())).unwrap();
    let mut command = Command::new(std::env::var_os("KRAB").unwrap_or_else(|| env!("CARGO_BIN_EXE_krab").into()));
    command.args(["run", "--memory", "16M", "--kernel"]).arg(&kernel.0).arg("--device").arg(device);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    (kernel, command)
}

/// The exit code, `None` after a signal; a launcher that does not end in time is killed.
fn wait(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    while start.elapsed() < TIMEOUT {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("the launcher does not end");
}

fn signal(child: &Child, number: i32) {
    // SAFETY: The child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, number) }, 0);
}

#[test]
#[ignore = "needs a hypervisor"]
fn every_end_has_its_code() {
    let table: [(&str, &[&[u8]], i32, &str); 12] = [
        ("exit", &[b"\xB0\x07", EXIT_WITH_AL], 71, "code 7"),
        ("power-off", &[POWER_OFF], 0, ""),
        ("reset-keyboard", &[b"\xB0\xFE\xE6\x64\xF4"], 3, "reboot"),
        ("reset-cf9", &[b"\x66\xBA\xF9\x0C\xB0\x06\xEE\xF4"], 3, "reboot"),
        ("pvpanic", &[b"\x66\xBA\x05\x05\xEC\xEE\xF4"], 4, "panic"),
        // An IDT of zeros at an address that is zero, then an invalid opcode.
        ("triple-fault", &[b"\x0F\x01\x1D\x00\x70\x00\x00\x0F\x0B"], 4, "triple fault on vCPU 0"),
        // Code where there is no memory.
        ("run-mmio", &[b"\xB8\x00\x00\x00\xD0\xFF\xE0"], 5, "rip 00000000d0000000"),
        // MMIO: a write is dropped, a dword and a byte read as ones.
        (
            "mmio",
            &[
                b"\xBB\x00\x00\x00\xD0\xC7\x03\x78\x56\x34\x12\xB0\x01\x83\x3B\xFF\x75\x08",
                b"\xB0\x02\x80\x7B\x03\xFF\x75\x00\x74\x02\xEB\x02\xB0\x00",
                EXIT_WITH_AL,
            ],
            64,
            "code 0",
        ),
        ("exit-register", &[b"\xBB\x00\x00\xB0\xFE\xC6\x03\x2A\xF4"], 64 + 42, "code 42"),
        // IN of an unclaimed port by dword: `al` is what the comparison says.
        ("port", &[b"\x66\xBA\x34\x12\xED\x83\xF8\xFF\xB0\x05\x75\x02\xB0\x00", EXIT_WITH_AL], 64, "code 0"),
        // REP INSW of 100 words from an unclaimed port to 2 MiB; the last two are ones.
        (
            "rep-ins",
            &[
                b"\xFC\xBF\x00\x00\x20\x00\xB9\x64\x00\x00\x00\x66\xBA\x78\x02\x66\xF3\x6D",
                b"\x83\x3D\xC4\x00\x20\x00\xFF\xB0\x09\x74\x02\xB0\x08",
                EXIT_WITH_AL,
            ],
            73,
            "code 9",
        ),
        // REP OUTSB of the message to COM1.
        ("rep-outs", &[b"\xFC\xBE\x80\x00\x10\x00\xB9\x0E\x00\x00\x00\x66\xBA\xF8\x03\xF3\x6E", POWER_OFF], 0, ""),
    ];
    for (name, code, wanted, text) in table {
        let (_image, mut command) = launcher(name, code);
        let mut child = command.spawn().unwrap();
        let found = wait(&mut child);
        let (mut stdout, mut stderr) = (Vec::new(), String::new());
        child.stdout.unwrap().read_to_end(&mut stdout).unwrap();
        child.stderr.unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(found, Some(wanted), "{name}: {stderr}");
        assert!(stderr.contains(text), "{name}: {stderr}");
        assert_eq!(stdout, if name == "rep-outs" { MESSAGE } else { b"" }, "{name}");
    }
}

#[test]
#[ignore = "needs a hypervisor"]
fn any_number_of_cpus_and_memory_beyond_the_hole() {
    for options in [["--cpus", "8"], ["--memory", "5G"]] {
        let (_image, mut command) = launcher("large", &[b"\xB0\x01", EXIT_WITH_AL]);
        let mut child = command.args(options).spawn().unwrap();
        assert_eq!(wait(&mut child), Some(65), "{options:?}");
    }
}

#[test]
#[ignore = "needs a hypervisor"]
fn signals_stop_any_guest() {
    let table: [(&str, &[u8], i32); 3] =
        [("busy", BUSY, libc::SIGTERM), ("halted", HALTED, libc::SIGINT), ("flood", FLOOD, libc::SIGHUP)];
    for (name, code, number) in table {
        let (_image, mut command) = launcher(name, &[code]);
        // Nobody reads the pipe, so the flooding guest's vCPU hangs in a write.
        let mut child = command.args(["--cpus", "2"]).spawn().unwrap();
        thread::sleep(Duration::from_millis(700));
        assert_eq!(child.try_wait().unwrap(), None, "{name}");
        signal(&child, number);
        assert_eq!(wait(&mut child), Some(128 + number), "{name}");
    }
}

#[test]
#[ignore = "needs a hypervisor"]
fn a_closed_standard_output_does_not_end_the_guest() {
    let (_image, mut command) = launcher("closed", &[FLOOD]);
    let mut child = command.spawn().unwrap();
    // The guest runs once it says something: the launcher's signals are set up then, too.
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    drop(output);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(child.try_wait().unwrap(), None);
    signal(&child, libc::SIGTERM);
    assert_eq!(wait(&mut child), Some(143));
}

#[test]
#[ignore = "needs a hypervisor"]
fn piped_input_passes_unchanged() {
    let (_image, mut command) = launcher("echo", &[ECHO]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    // More than the FIFO holds, and with what would be an escape on a terminal.
    let text = [&[1; 2], b"x".as_slice(), &b"0123456789".repeat(30), b"q"].concat();
    child.stdin.take().unwrap().write_all(&text).unwrap();
    assert_eq!(wait(&mut child), Some(0));
    let mut stdout = Vec::new();
    child.stdout.unwrap().read_to_end(&mut stdout).unwrap();
    assert_eq!(stdout, text);
}

/// A pseudo-terminal: its master, its slave, and the slave's modes.
fn terminal() -> (File, OwnedFd) {
    let (mut master, mut slave) = (0, 0);
    // SAFETY: openpty fills both descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::openpty(&mut master, &mut slave, std::ptr::null_mut(), std::ptr::null(), std::ptr::null()), 0);
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    }
}

fn local_flags(terminal: &impl AsRawFd) -> libc::tcflag_t {
    // SAFETY: A termios of zeros is valid, and tcgetattr fills it.
    unsafe {
        let mut modes: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut modes), 0);
        modes.c_lflag
    }
}

#[test]
#[ignore = "needs a hypervisor"]
fn the_terminal_is_raw_while_the_guest_runs_and_restored_after_any_end() {
    let table: [(&str, &[u8], i32, Option<i32>); 4] = [
        ("escape", b"\x01x", 0, Some(6)),
        ("power-off", b"q", 0, Some(0)),
        ("signal", b"", libc::SIGTERM, Some(143)),
        ("abort", b"", libc::SIGABRT, None),
    ];
    for (name, keys, number, wanted) in table {
        let (_image, mut command) = launcher("echo", &[ECHO]);
        let (mut master, slave) = terminal();
        let before = local_flags(&master);
        command.stdin(slave.try_clone().unwrap()).stdout(slave);
        // SAFETY: Both calls are async-signal-safe: a session of its own with the terminal in the foreground.
        unsafe {
            command.pre_exec(|| {
                assert!(libc::setsid() > 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0);
                Ok(())
            })
        };
        let mut child = command.spawn().unwrap();
        // The command's copies of the slave stay open until it goes.
        let start = Instant::now();
        while local_flags(&master) & libc::ICANON != 0 && start.elapsed() < TIMEOUT {
            thread::sleep(Duration::from_millis(5));
        }
        assert_ne!(local_flags(&master), before, "{name}: not raw");
        master.write_all(b"a\x01\x01").unwrap();
        let mut echo = [0; 2];
        master.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"a\x01", "{name}");
        master.write_all(keys).unwrap();
        if number != 0 {
            signal(&child, number);
        }
        assert_eq!(wait(&mut child), wanted, "{name}");
        assert_eq!(local_flags(&master), before, "{name}: not restored");
    }
}
