// SPDX-License-Identifier: GPL-2.0
//! Interruption information: of VM entries, of exits, and of the delivery that an exit cut short. SDM "VM-Entry Controls for Event
//! Injection", "Information for VM Exits Due to Vectored Events", "Information for VM Exits That Occur During Event Delivery".
#![forbid(unsafe_code)]

/// Interruption type, bits 10 to 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    ExternalInterrupt = 0,
    Reserved = 1,
    Nmi = 2,
    HardwareException = 3,
    /// INT n.
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3 and INTO.
    SoftwareException = 6,
    /// Pending monitor trap flag exits.
    Other = 7,
}

/// One word of interruption information.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    pub const ERROR_CODE: u32 = 1 << 11;
    /// In exit information: the exit undid an IRET's unblocking of NMIs. Reserved at VM entry, undefined in IDT-vectoring information.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    pub const VALID: u32 = 1 << 31;

    /// A valid word.
    #[inline]
    pub const fn new(kind: Kind, vector: u8, error_code: bool) -> Self {
        let code = if error_code { Self::ERROR_CODE } else { 0 };
        Self(vector as u32 | (kind as u32) << 8 | code | Self::VALID)
    }

    #[inline]
    pub const fn valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    #[inline]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    #[inline]
    pub const fn kind(self) -> Kind {
        match self.0 >> 8 & 7 {
            0 => Kind::ExternalInterrupt,
            2 => Kind::Nmi,
            3 => Kind::HardwareException,
            4 => Kind::SoftwareInterrupt,
            5 => Kind::PrivilegedSoftwareException,
            6 => Kind::SoftwareException,
            7 => Kind::Other,
            _ => Kind::Reserved,
        }
    }

    #[inline]
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    #[inline]
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & Self::NMI_UNBLOCKING != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_built_and_taken_apart() {
        let info = InterruptionInfo::new(Kind::HardwareException, 14, true);
        assert_eq!(info.0, 0x8000_0B0E);
        assert_eq!((info.kind(), info.vector(), info.has_error_code()), (Kind::HardwareException, 14, true));
        assert_eq!(InterruptionInfo::new(Kind::Nmi, 2, false).0, 0x8000_0202);
        assert!(!InterruptionInfo(0x0B0E).valid());
        assert!(InterruptionInfo(0x8000_1B0E).nmi_unblocking());
        for raw in 0..8 {
            assert_eq!(InterruptionInfo(raw << 8).kind() as u32, raw);
        }
    }
}
