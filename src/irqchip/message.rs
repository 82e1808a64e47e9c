// SPDX-License-Identifier: GPL-2.0
//! What travels between interrupt controllers. SDM "Interrupt Command Register", "Message Data Register Format".
#![forbid(unsafe_code)]

/// The access raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

/// How a destination is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestMode {
    Physical,
    Logical,
}

impl DestMode {
    pub const fn from_logical(logical: bool) -> Self {
        if logical {
            Self::Logical
        } else {
            Self::Physical
        }
    }
}

/// Destination shorthand of the interrupt command register. Devices only know `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    None,
    Me,
    All,
    AllButMe,
}

/// Edge or level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    Edge,
    Level,
}

impl Trigger {
    pub const fn from_level(level: bool) -> Self {
        if level {
            Self::Level
        } else {
            Self::Edge
        }
    }
}

/// The three delivery mode bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed = 0,
    LowestPriority = 1,
    Smi = 2,
    /// Reserved by the manuals; KVM's paravirtual "wake up a halted CPU" uses it.
    RemoteRead = 3,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the low three bits.
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::RemoteRead,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }

    /// Whether it ends in the IRR, as opposed to a signal beside it.
    pub const fn is_vectored(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// An interrupt message: an IPI, an MSI, or an I/O APIC pin that fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// APIC ID or logical mask, by `dest_mode`; unused with a shorthand.
    pub dest: u32,
    pub dest_mode: DestMode,
    pub shorthand: Shorthand,
    pub delivery: DeliveryMode,
    pub vector: u8,
    pub trigger: Trigger,
    /// Level bit of the ICR; true for every device message.
    pub assert: bool,
    /// MSI redirection hint: any one of the destinations will do.
    pub redirection_hint: bool,
}

impl Message {
    /// Whether it is a vector for the IRR, and edge-triggered.
    #[inline]
    pub const fn is_edge_vector(&self) -> bool {
        self.delivery.is_vectored() && matches!(self.trigger, Trigger::Edge)
    }

    /// A level de-assert: nothing happens at any target. SDM "Interrupt Command Register": only the obsolete INIT
    /// level de-assert used it.
    pub const fn is_deassert(&self) -> bool {
        let matters = matches!(self.delivery, DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::Init);
        matters && matches!(self.trigger, Trigger::Level) && !self.assert
    }

    /// Whether one of the destinations is to be chosen.
    pub const fn is_lowest_priority(&self) -> bool {
        matches!(self.delivery, DeliveryMode::LowestPriority) || self.redirection_hint
    }
}

/// A local APIC finished an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eoi {
    pub vector: u8,
    /// The vector was level-triggered (its TMR bit was set).
    pub level: bool,
    /// False when the guest suppresses EOI broadcasts: who listens for acknowledgements is still told, but the I/O
    /// APIC's remote IRR stays.
    pub broadcast: bool,
}

/// Who drives an interrupt line. A line is high while any of them holds it high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LineSource {
    /// KVM_IRQ_LINE and plain irqfds.
    User = 0,
    /// irqfds with a resample eventfd.
    Resampler = 1,
    Pit = 2,
}

impl LineSource {
    /// This source's bit in a per-pin mask, updated to `level`; returns the new mask.
    pub(super) const fn apply(self, lines: u8, level: bool) -> u8 {
        let bit = 1 << self as u8;
        if level {
            lines | bit
        } else {
            lines & !bit
        }
    }
}

/// What became of a change on a line, as KVM_IRQ_LINE_STATUS tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineStatus {
    /// Masked, or otherwise not delivered.
    Ignored,
    /// The previous one is still pending.
    Coalesced,
    Delivered,
}

impl LineStatus {
    /// KVM's number: negative, zero, or the CPUs it went to (here: 1).
    pub const fn kvm(self) -> i32 {
        match self {
            Self::Ignored => -1,
            Self::Coalesced => 0,
            Self::Delivered => 1,
        }
    }
}
