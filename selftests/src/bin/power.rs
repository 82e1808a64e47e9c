// SPDX-License-Identifier: GPL-2.0
//! `power [--device PATH] ACTION`: guests run on every CPU while the host goes to sleep or down.
//!
//! - `freeze SECONDS`: suspend to idle, woken by the clock; the guests go on afterwards.
//! - `reboot`: at once, as `reboot -f` does.
//! - `kexec KERNEL INITRD COMMANDLINE`: another kernel takes over.
//! - `crash KERNEL INITRD COMMANDLINE`: the kernel panics, and the crash kernel takes over (the host needs `crashkernel=`).
//!
//! A CPU that was left in VMX operation, or with SVM on, does not come through the last three: INIT is blocked or the other kernel faults. The
//! exit code is 0 after `freeze`; the others do not come back.

use krabtest::guest::*;
use krabtest::harness::{set_options, Options};
use krabtest::{payload, sys};
use std::ffi::CString;
use std::fs::{read_to_string, write, File};
use std::os::fd::AsRawFd;

// Exits now and then, and memory that tells that it runs.
payload! { power_work, 64,
    "2: lock inc qword ptr [0x100000]",
    "mov ecx, 1000",
    "3: dec ecx",
    "jnz 3b",
    "xor eax, eax",
    "cpuid",
    "jmp 2b",
}

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut device = "/dev/krab".to_string();
    if args.len() > 1 && args[0] == "--device" {
        device = args.remove(1);
        args.remove(0);
    }
    set_options(Options { device, bed: "unknown".into(), times: false, apicv: false, unrestricted: true });
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    // SAFETY: no arguments.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize;
    let guests: &'static [Guest] = (0..cpus).map(|_| Guest::long(power_work())).collect::<Vec<_>>().leak();
    for (cpu, guest) in guests.iter().enumerate() {
        std::thread::spawn(move || {
            pin(cpu);
            loop {
                match guest.cpu.run() {
                    Err(sys::EINTR) => {}
                    other => panic!("KVM_RUN: {other:?}"),
                }
            }
        });
    }
    let all_run = |ms| guests.iter().all(|g| g.ram.wait_u64(DATA, g.ram.read_u64(DATA) + 3, ms));
    assert!(all_run(20_000), "the guests do not run");
    println!("# guests on {cpus} CPUs");
    match words[..] {
        ["freeze", seconds] => {
            freeze(seconds);
            assert!(all_run(20_000), "the guests do not go on");
        }
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
            eprintln!("usage: power [--device PATH] freeze SECONDS | reboot | kexec|crash KERNEL INITRD COMMANDLINE");
            std::process::exit(2);
        }
    }
}

fn pin(cpu: usize) {
    // SAFETY: the set lives through the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set);
    }
}

fn freeze(seconds: &str) {
    const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";
    let _ = write(ALARM, "0");
    write(ALARM, format!("+{seconds}")).expect("an alarm to wake up by");
    let before = read_to_string("/sys/power/suspend_stats/success").unwrap_or_default();
    write("/sys/power/state", "freeze").expect("suspend to idle");
    let after = read_to_string("/sys/power/suspend_stats/success").unwrap_or_default();
    assert_ne!(before, after, "the host did not sleep");
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
