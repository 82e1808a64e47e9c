// SPDX-License-Identifier: GPL-2.0
//! The host goes to sleep and wakes by itself. ACPI Specification, "ACPI Hardware Specification" (the power management timer and its event),
//! "Fixed ACPI Description Table"; the kernel's "System Sleep States".
//!
//! From suspend to RAM the alarm of the clock wakes the machine. From suspend to idle it does not, where the machine has no interrupt for it:
//! there it is the power management timer, whose top bit changes every 2.3 seconds. The kernel has no use for that event: it takes it as a
//! reason to wake up, and turns it off.

use crate::guests::{all_run, stop, Worker};
use std::arch::asm;
use std::fs::{read, read_to_string, write};
use std::time::Duration;

/// How far the guests' clocks may be from the host's afterwards: a host whose TSC stops tells the time by its clock of full seconds.
const SLACK_NS: u64 = 1_500_000_000;

/// Goes to sleep as /sys/power/state calls it: "freeze" or "mem". The guests go on afterwards, and their time does.
pub fn sleep(state: &str, workers: &[Worker]) {
    let behind = |guest_ns| host_ns().wrapping_sub(guest_ns);
    let clocks = || workers.iter().map(|w| (behind(w.clock_ns()), behind(w.tsc_ns()))).collect::<Vec<_>>();
    let successes = || read_to_string("/sys/power/suspend_stats/success").expect("suspend_stats");
    let (before, slept) = (clocks(), successes());
    match state {
        "freeze" => PmTimer::find().wake_at_next_turn(),
        _ => {
            write("/sys/power/mem_sleep", "deep").expect("suspend to RAM");
            write("/sys/class/rtc/rtc0/wakealarm", "+3").expect("an alarm to wake up by");
        }
    }
    let (began, tsc) = (host_ns(), host_tsc());
    write("/sys/power/state", state).expect("the host goes to sleep");
    let lost = if host_tsc() < tsc { "; the host's TSC went back" } else { "" };
    println!("# {state}: {} ms{lost}", (host_ns() - began) / 1_000_000);
    assert_ne!(slept, successes(), "the host did not sleep");
    assert!(all_run(workers, 20_000), "the guests do not go on");
    for ((worker, before), after) in workers.iter().zip(before).zip(clocks()) {
        assert_eq!(worker.went_back(), (0, 0), "TSC and paravirtual clock went back");
        let off = after.0.wrapping_sub(before.0) as i64;
        assert!(off.unsigned_abs() < SLACK_NS, "a guest's clock is {off} ns behind the host's");
        // It may have stood still.
        let off = before.1.wrapping_sub(after.1) as i64;
        assert!(off < SLACK_NS as i64, "a guest's TSC is {off} ns ahead of the host's clock");
        assert!(worker.was_told(), "a guest does not know that it was stopped");
    }
    stop(workers);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!all_run(workers, 1000), "guests that do not run were not missed");
}

/// CLOCK_BOOTTIME: goes on while the host sleeps, as guests' paravirtual clock does.
fn host_ns() -> u64 {
    // SAFETY: the structure lives through the call.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The power management timer: 24 bits, 3.579545 MHz.
struct PmTimer {
    counter: u16,
    status: u16,
    enable: u16,
}

impl PmTimer {
    /// Where the FADT says.
    fn find() -> Self {
        let fadt = read("/sys/firmware/acpi/tables/FACP").expect("a FADT");
        let port = |at: usize| u16::from_le_bytes([fadt[at], fadt[at + 1]]);
        let (status, event_bytes, counter) = (port(56), u16::from(fadt[88]), port(76));
        for (first, count) in [(status, event_bytes), (counter, 4)] {
            // SAFETY: no memory is involved.
            let done = unsafe { libc::ioperm(first.into(), count.into(), 1) };
            assert_eq!(done, 0, "ioperm: {}", std::io::Error::last_os_error());
        }
        Self { counter, status, enable: status + event_bytes / 2 }
    }

    /// The machine wakes when the counter's top bit changes next: in 2.3 seconds, less up to a tenth of that.
    fn wake_at_next_turn(&self) {
        const TOP: u32 = 1 << 23;
        const EVENT: u16 = 1;
        assert_ne!(
            in32(self.counter),
            u32::MAX,
            "no power management timer: QEMU's q35 has lost it after suspend to RAM"
        );
        while in32(self.counter) % TOP > TOP / 16 {
            std::thread::sleep(Duration::from_millis(10));
        }
        out16(self.status, EVENT);
        out16(self.enable, in16(self.enable) | EVENT);
    }
}

fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: `ioperm` allows the port; reading the timer has no effect.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as above, for the register of enabled events.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) };
    value
}

fn out16(port: u16, value: u16) {
    // SAFETY: `ioperm` allows the port. The kernel takes an event that it did not ask for by turning it off.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}
