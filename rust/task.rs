// SPDX-License-Identifier: GPL-2.0
//! The current task: signals, rescheduling, deferred work.
use core::arch::asm;
use kernel::{bindings, prelude::*};

use super::bindings as own;

/// The current task.
#[inline(always)]
pub(super) fn current() -> *mut bindings::task_struct {
    let task;
    // SAFETY: reads this CPU's copy of a per-CPU word that stays the same for as long as the task runs.
    unsafe {
        asm!("mov {0}, qword ptr gs:[rip + {1}]", out(reg) task, sym bindings::const_current_task,
             options(pure, readonly, nostack, preserves_flags))
    };
    task
}

/// The current task's id in the initial namespace: `gettid()`.
pub fn id() -> i32 {
    // SAFETY: the current task is valid, and its id does not change.
    unsafe { (*current()).pid }
}

/// A number that no other task has at the same time; never 0.
#[inline(always)]
pub fn identity() -> usize {
    current() as usize
}

/// The flags of the current task's thread; others may set bits at any time.
#[inline(always)]
fn thread_flags() -> usize {
    // SAFETY: the current task is valid; the word is read in one piece.
    unsafe { core::ptr::read_volatile(&raw const (*current()).thread_info.flags) }
}

const fn bit(number: u32) -> usize {
    1 << number
}

/// Thread flags that must be looked after before guest code may run.
const WORK: usize = bit(bindings::TIF_NOTIFY_RESUME)
    | bit(bindings::TIF_SIGPENDING)
    | bit(bindings::TIF_NOTIFY_SIGNAL)
    | bit(bindings::TIF_NEED_RESCHED)
    | bit(bindings::TIF_NEED_RESCHED_LAZY);
const SIGNAL: usize = bit(bindings::TIF_SIGPENDING) | bit(bindings::TIF_NOTIFY_SIGNAL);

/// Whether a signal, a reschedule or other work must be looked after before guest code may run: to be asked last, with
/// interrupts off.
#[inline(always)]
pub fn work_pending() -> bool {
    thread_flags() & WORK != 0
}

/// Whether a signal is pending.
#[inline(always)]
pub fn signal_pending() -> bool {
    thread_flags() & SIGNAL != 0
}

/// Looks after what [`work_pending`] found: reschedules, runs task work. EINTR when a signal is pending. Process context with
/// interrupts and preemption on.
#[cold]
pub fn handle_work() -> Result {
    // SAFETY: process context; no guard that forbids sleeping can be checked here, as for every function that sleeps.
    kernel::error::to_result(unsafe { own::xfer_to_guest_mode_handle_work() })
}

/// Whether this CPU has softirqs to run, which interrupts-on would do.
#[inline(always)]
pub fn softirq_pending() -> bool {
    let pending: u32;
    // SAFETY: reads this CPU's copy of a per-CPU word.
    unsafe {
        asm!("movzx {0:e}, word ptr gs:[rip + {1}]", out(reg) pending, sym bindings::__softirq_pending,
             options(readonly, nostack, preserves_flags))
    };
    pending != 0
}

/// Number of the CPU this runs on; only a hint unless the caller cannot migrate.
#[inline(always)]
pub(super) fn this_cpu() -> u32 {
    let cpu: u32;
    // SAFETY: reads this CPU's copy of a per-CPU word.
    unsafe {
        asm!("mov {0:e}, dword ptr gs:[rip + {1}]", out(reg) cpu, sym bindings::cpu_number,
             options(readonly, nostack, preserves_flags))
    };
    cpu
}

/// Nanoseconds that the current task was ready to run and did not, since it began.
pub fn run_delay_ns() -> u64 {
    // SAFETY: the current task is valid; only itself and the scheduler on its CPU write the counter.
    unsafe { core::ptr::read_volatile(&raw const (*current()).sched_info.run_delay) }
}
