// SPDX-License-Identifier: GPL-2.0
//! `power [--device PATH] ACTION`: guests run on every CPU while the host goes to sleep or down.
//!
//! - `freeze`, `mem`: suspend to idle or to RAM, and back; the guests and their time go on afterwards.
//! - `reboot`: at once, as `reboot -f` does.
//! - `kexec KERNEL INITRD COMMANDLINE`: another kernel takes over.
//! - `crash KERNEL INITRD COMMANDLINE`: the kernel panics, and the crash kernel takes over (the host needs `crashkernel=`).
//!
//! A CPU that was left in VMX operation, or with SVM on, does not come through the last three: INIT is blocked or the other kernel faults. The
//! exit code is 0 after a sleep; the others do not come back.

mod guests;
mod sleep;

use krabtest::harness::{set_options, Options};
use krabtest::sys;
use std::ffi::CString;
use std::fs::{write, File};
use std::os::fd::AsRawFd;

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut device = "/dev/krab".to_string();
    if args.len() > 1 && args[0] == "--device" {
        device = args.remove(1);
        args.remove(0);
    }
    set_options(Options { device, bed: "unknown".into(), times: false, apicv: false, unrestricted: true });
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    sys::arm_kick_signal();
    let workers = guests::start();
    match words[..] {
        [state @ ("freeze" | "mem")] => sleep::sleep(state, workers),
        ["reboot"] => restart(libc::LINUX_REBOOT_CMD_RESTART),
        ["kexec", kernel, initrd, line] => {
            load(kernel, initrd, line, 0);
            restart(libc::LINUX_REBOOT_CMD_KEXEC);
        }
        ["crash", kernel, initrd, line] => {
            const ON_CRASH: u64 = 2;
            load(kernel, initrd, line, ON_CRASH);
            let _ = write("/proc/sys/kernel/sysrq", "1");
            write("/proc/sysrq-trigger", "c").expect("sysrq");
        }
        _ => {
            eprintln!("usage: power [--device PATH] freeze|mem | reboot | kexec|crash KERNEL INITRD COMMANDLINE");
            std::process::exit(2);
        }
    }
}

fn load(kernel: &str, initrd: &str, line: &str, flags: u64) {
    let open = |path: &str| File::open(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (kernel, initrd) = (open(kernel), open(initrd));
    let line = CString::new(line).expect("a command line");
    let len = line.as_bytes_with_nul().len();
    // SAFETY: descriptors and a string that live through the call.
    let done = unsafe {
        libc::syscall(libc::SYS_kexec_file_load, kernel.as_raw_fd(), initrd.as_raw_fd(), len, line.as_ptr(), flags)
    };
    assert_eq!(done, 0, "kexec_file_load: {}", std::io::Error::last_os_error());
}

fn restart(command: libc::c_int) {
    println!("# goes down");
    // SAFETY: no memory is involved.
    let done =
        unsafe { libc::syscall(libc::SYS_reboot, libc::LINUX_REBOOT_MAGIC1, libc::LINUX_REBOOT_MAGIC2, command, 0) };
    panic!("reboot: {done} {}", std::io::Error::last_os_error());
}
