// SPDX-License-Identifier: GPL-2.0
//! The current task: signals, rescheduling, deferred work.
use core::{arch::asm, marker::PhantomData};
use kernel::{bindings, prelude::*};

use super::{bindings as own, cpu::IrqsOff};

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

/// The current task's CPU time counts as a guest's (`guest_time` in /proc/PID/stat, a part of the user time) until this is dropped.
/// Preemption is off. The tick that ended a guest's turn is counted when its interrupt is taken, so the drop belongs behind interrupts-on.
pub(crate) struct GuestTime {
    not_send: PhantomData<*mut ()>,
}

impl GuestTime {
    #[inline]
    pub(crate) fn begin(_irqs: &IrqsOff) -> Self {
        // SAFETY: interrupts are off; the drop is the counterpart.
        unsafe { own::krab_guest_time_begin() };
        Self { not_send: PhantomData }
    }
}

impl Drop for GuestTime {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the same task on the same CPU, because preemption was off.
        unsafe { own::krab_guest_time_end() };
    }
}
