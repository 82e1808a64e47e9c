// SPDX-License-Identifier: GPL-2.0
//! Why a guest stopped, in neutral words. A vendor decodes its raw exit into this; one `match` handles it.
#![forbid(unsafe_code)]

use super::event::Exception;
use crate::arch::Gpa;

/// A non-string port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size_bytes: u8,
    pub input: bool,
    /// INS or OUTS: the emulator does it.
    pub string: bool,
}

/// A guest physical access that the nested tables refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedFault {
    pub gpa: Gpa,
    pub write: bool,
    pub execute: bool,
    /// The translation was present: a permission was missing.
    pub present: bool,
    /// The access was the guest's own page walk, not its data.
    pub walk: bool,
}

/// Direction and register of a control or debug register move, where the CPU decodes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterMove {
    /// 0 to 15.
    pub register: u8,
    pub write: bool,
    /// General-purpose register, 0 to 15; `None` when the CPU has no decode assist, or for LMSW, CLTS and SMSW.
    pub gpr: Option<u8>,
}

/// What makes a guest change to another task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSource {
    Call,
    Iret,
    Jump,
    /// A task gate in the IDT.
    Gate,
}

/// A change to another task, which the CPU leaves to software.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Of the new task's state segment.
    pub selector: u16,
    pub source: TaskSource,
}

/// Why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A host interrupt is pending; it is taken as soon as interrupts are on.
    HostInterrupt,
    /// A host NMI was pending; it has been taken.
    HostNmi,
    /// The guest can take an interrupt now, and somebody waits for that.
    InterruptWindow,
    /// The guest can take an NMI now, and somebody waits for that.
    NmiWindow,
    /// The guest is at the IRET of its NMI handler.
    NmiReturn,
    Exception(Exception),
    Cpuid,
    Hlt,
    Pause,
    /// VMCALL or VMMCALL.
    Hypercall,
    Rdmsr,
    Wrmsr,
    Rdpmc,
    Rdtsc,
    Rdtscp,
    Invd,
    Wbinvd,
    Monitor,
    Mwait,
    Xsetbv,
    Port(PortAccess),
    ControlRegister(RegisterMove),
    DebugRegister(RegisterMove),
    NestedFault(NestedFault),
    TaskSwitch(TaskSwitch),
    /// The guest lowered CR8, and somebody waits for that; the instruction is over.
    PriorityLowered,
    /// Hardware's log of written pages was full; it has been emptied.
    WriteLogFull,
    /// The guest's time is up: there is a deadline.
    Deadline,
    /// The guest wrote `value` to the local APIC's register at `offset`; the instruction is over. The ICR comes with its upper half.
    ApicWrite {
        offset: u32,
        value: u64,
    },
    /// The CPU ended the interrupt `vector`, and somebody wants to know; the instruction is over.
    EndOfInterrupt {
        vector: u8,
    },
    /// An instruction that this virtual CPU does not have: #UD.
    UndefinedInstruction,
    /// Triple fault.
    Shutdown,
    /// The entry failed: the hardware reason, for KVM_EXIT_FAIL_ENTRY.
    EntryFailure {
        reason: u64,
    },
    /// A reason nobody asked for: INTERNAL_ERROR.
    Unknown {
        reason: u64,
    },
}

/// What a guest does without an exit, because userspace gives its CPUs to this guest alone. PAUSE never exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unintercepted {
    /// MONITOR and MWAIT.
    pub mwait: bool,
    pub hlt: bool,
    /// Reading the MSRs that count how long a core slept.
    pub sleep_counters: bool,
    /// Reading APERF and MPERF.
    pub frequency_counters: bool,
}

impl Exit {
    /// A number for tracepoints: the kinds that are told apart there.
    pub const fn number(&self) -> u32 {
        match self {
            Self::HostInterrupt => 0,
            Self::HostNmi => 1,
            Self::InterruptWindow => 2,
            Self::NmiWindow => 3,
            Self::Exception(_) => 4,
            Self::Cpuid => 5,
            Self::Hlt => 6,
            Self::Pause => 7,
            Self::Hypercall => 8,
            Self::Rdmsr | Self::Wrmsr => 9,
            Self::Port(_) => 10,
            Self::ControlRegister(_) => 11,
            Self::DebugRegister(_) => 12,
            Self::NestedFault(_) => 13,
            Self::Shutdown => 14,
            Self::PriorityLowered | Self::ApicWrite { .. } | Self::EndOfInterrupt { .. } => 16,
            _ => 15,
        }
    }
}
