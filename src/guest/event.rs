// SPDX-License-Identifier: GPL-2.0
//! Events that go into a guest: exceptions, interrupts, NMIs.
#![forbid(unsafe_code)]

/// Exception vectors. SDM "Exception and Interrupt Vectors".
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    pub error_code: Option<u32>,
    /// What goes with it: CR2 for #PF, the DR6 bits to set for #DB.
    pub payload: Option<u64>,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, payload: None }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), payload: None }
    }

    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);
    /// #GP(0).
    pub const GP0: Self = Self::with_code(vector::GP, 0);

    /// A page fault at linear address `cr2`.
    pub const fn page_fault(code: u32, cr2: u64) -> Self {
        Self { vector: vector::PF, error_code: Some(code), payload: Some(cr2) }
    }
}

/// What a VM entry delivers, and what an exit may interrupt the delivery of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// External interrupt: already acknowledged at the interrupt controller.
    Interrupt(u8),
    Nmi,
    Exception(Exception),
    /// INT n, INT3 or INTO seen in the middle of its delivery: the instruction runs again instead.
    Software {
        vector: u8,
        length_bytes: u8,
    },
}
