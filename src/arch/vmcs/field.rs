// SPDX-License-Identifier: GPL-2.0
//! VMCS fields by role and width. SDM appendix "Field Encoding in VMCS".
//!
//! Reading gives the field's own width, and a read-only field has no way to be written:
//!
//! ```
//! use krab_pure::arch::vmcs::{Guest64, Writable};
//! fn write<F: Writable>(_: F, _: F::Value) {}
//! write(Guest64::Efer, 0x500);
//! ```
//! ```compile_fail
//! use krab_pure::arch::vmcs::{ReadOnly32, Writable};
//! fn write<F: Writable>(_: F, _: F::Value) {}
//! write(ReadOnly32::ExitReason, 0);
//! ```
//! ```compile_fail
//! use krab_pure::arch::vmcs::{Guest16, Writable};
//! fn write<F: Writable>(_: F, _: F::Value) {}
//! write(Guest16::CsSelector, 0x1_0000_u32);
//! ```
//!
//! The "high" encodings of 64-bit fields are left out: they are for processors outside 64-bit mode.
#![forbid(unsafe_code)]

use crate::arch::segment::SegmentName;

/// A field that VMREAD reads.
pub trait Readable: Copy {
    /// As wide as the field. Natural width is 64 bits on every CPU that matters here.
    type Value: Copy + Into<u64>;

    /// VMREAD's and VMWRITE's operand.
    fn encoding(self) -> u32;

    /// The field's value out of the register that VMREAD filled.
    fn value(raw: u64) -> Self::Value;
}

/// A field that VMWRITE writes on every CPU.
pub trait Writable: Readable {}

macro_rules! fields {
    ($($(#[$doc:meta])* $access:ident $name:ident: $value:ident { $($field:ident = $encoding:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            #[repr(u32)]
            pub enum $name {
                $($field = $encoding,)*
            }

            impl Readable for $name {
                type Value = $value;

                #[inline]
                fn encoding(self) -> u32 {
                    self as u32
                }

                #[inline]
                fn value(raw: u64) -> $value {
                    raw as $value
                }
            }

            fields!(@$access $name);
        )*

        #[cfg(test)]
        const ALL: &[(&str, &[u32])] = &[$((stringify!($name), &[$($encoding,)*]),)*];
    };
    (@writable $name:ident) => { impl Writable for $name {} };
    (@read_only $name:ident) => {};
}

fields! {
    /// 16-bit control fields.
    writable Control16: u16 {
        Vpid = 0x0000,
        PostedInterruptNotificationVector = 0x0002,
        EptpIndex = 0x0004,
        HlatPrefixSize = 0x0006,
        LastPidPointerIndex = 0x0008,
    }
    /// 16-bit guest-state fields.
    writable Guest16: u16 {
        EsSelector = 0x0800,
        CsSelector = 0x0802,
        SsSelector = 0x0804,
        DsSelector = 0x0806,
        FsSelector = 0x0808,
        GsSelector = 0x080A,
        LdtrSelector = 0x080C,
        TrSelector = 0x080E,
        InterruptStatus = 0x0810,
        PmlIndex = 0x0812,
        Uinv = 0x0814,
    }
    /// 16-bit host-state fields.
    writable Host16: u16 {
        EsSelector = 0x0C00,
        CsSelector = 0x0C02,
        SsSelector = 0x0C04,
        DsSelector = 0x0C06,
        FsSelector = 0x0C08,
        GsSelector = 0x0C0A,
        TrSelector = 0x0C0C,
    }
    /// 64-bit control fields. Addresses are host physical.
    writable Control64: u64 {
        IoBitmapA = 0x2000,
        IoBitmapB = 0x2002,
        MsrBitmaps = 0x2004,
        ExitMsrStoreAddress = 0x2006,
        ExitMsrLoadAddress = 0x2008,
        EntryMsrLoadAddress = 0x200A,
        ExecutiveVmcsPointer = 0x200C,
        PmlAddress = 0x200E,
        TscOffset = 0x2010,
        VirtualApicAddress = 0x2012,
        ApicAccessAddress = 0x2014,
        PostedInterruptDescriptor = 0x2016,
        VmFunctionControls = 0x2018,
        EptPointer = 0x201A,
        EoiExitBitmap0 = 0x201C,
        EoiExitBitmap1 = 0x201E,
        EoiExitBitmap2 = 0x2020,
        EoiExitBitmap3 = 0x2022,
        EptpList = 0x2024,
        VmreadBitmap = 0x2026,
        VmwriteBitmap = 0x2028,
        VirtualizationExceptionInfo = 0x202A,
        XssExitBitmap = 0x202C,
        EnclsExitBitmap = 0x202E,
        SubPagePermissionTable = 0x2030,
        TscMultiplier = 0x2032,
        Tertiary = 0x2034,
        EnclvExitBitmap = 0x2036,
        LowPasidDirectory = 0x2038,
        HighPasidDirectory = 0x203A,
        SharedEptPointer = 0x203C,
        PconfigExitBitmap = 0x203E,
        HlatPointer = 0x2040,
        PidPointerTable = 0x2042,
        SecondaryExit = 0x2044,
        SpecCtrlMask = 0x204A,
        SpecCtrlShadow = 0x204C,
    }
    /// 64-bit exit information.
    read_only ReadOnly64: u64 {
        GuestPhysicalAddress = 0x2400,
    }
    /// 64-bit guest-state fields.
    writable Guest64: u64 {
        LinkPointer = 0x2800,
        Debugctl = 0x2802,
        Pat = 0x2804,
        Efer = 0x2806,
        PerfGlobalCtrl = 0x2808,
        Pdpte0 = 0x280A,
        Pdpte1 = 0x280C,
        Pdpte2 = 0x280E,
        Pdpte3 = 0x2810,
        Bndcfgs = 0x2812,
        RtitCtl = 0x2814,
        LbrCtl = 0x2816,
        Pkrs = 0x2818,
    }
    /// 64-bit host-state fields.
    writable Host64: u64 {
        Pat = 0x2C00,
        Efer = 0x2C02,
        PerfGlobalCtrl = 0x2C04,
        Pkrs = 0x2C06,
    }
    /// 32-bit control fields. The bits of the control words are in [`control`](super::control).
    writable Control32: u32 {
        Pin = 0x4000,
        Primary = 0x4002,
        ExceptionBitmap = 0x4004,
        PageFaultErrorMask = 0x4006,
        PageFaultErrorMatch = 0x4008,
        Cr3TargetCount = 0x400A,
        Exit = 0x400C,
        ExitMsrStoreCount = 0x400E,
        ExitMsrLoadCount = 0x4010,
        Entry = 0x4012,
        EntryMsrLoadCount = 0x4014,
        EntryInterruptionInfo = 0x4016,
        EntryErrorCode = 0x4018,
        EntryInstructionLength = 0x401A,
        TprThreshold = 0x401C,
        Secondary = 0x401E,
        PleGap = 0x4020,
        PleWindow = 0x4022,
        InstructionTimeout = 0x4024,
    }
    /// 32-bit exit information.
    read_only ReadOnly32: u32 {
        InstructionError = 0x4400,
        ExitReason = 0x4402,
        InterruptionInfo = 0x4404,
        InterruptionErrorCode = 0x4406,
        IdtVectoringInfo = 0x4408,
        IdtVectoringErrorCode = 0x440A,
        InstructionLength = 0x440C,
        InstructionInfo = 0x440E,
    }
    /// 32-bit guest-state fields.
    writable Guest32: u32 {
        EsLimit = 0x4800,
        CsLimit = 0x4802,
        SsLimit = 0x4804,
        DsLimit = 0x4806,
        FsLimit = 0x4808,
        GsLimit = 0x480A,
        LdtrLimit = 0x480C,
        TrLimit = 0x480E,
        GdtrLimit = 0x4810,
        IdtrLimit = 0x4812,
        EsAccessRights = 0x4814,
        CsAccessRights = 0x4816,
        SsAccessRights = 0x4818,
        DsAccessRights = 0x481A,
        FsAccessRights = 0x481C,
        GsAccessRights = 0x481E,
        LdtrAccessRights = 0x4820,
        TrAccessRights = 0x4822,
        Interruptibility = 0x4824,
        ActivityState = 0x4826,
        Smbase = 0x4828,
        SysenterCs = 0x482A,
        PreemptionTimer = 0x482E,
    }
    /// 32-bit host-state fields.
    writable Host32: u32 {
        SysenterCs = 0x4C00,
    }
    /// Natural-width control fields.
    writable ControlNatural: u64 {
        Cr0Mask = 0x6000,
        Cr4Mask = 0x6002,
        Cr0Shadow = 0x6004,
        Cr4Shadow = 0x6006,
        Cr3Target0 = 0x6008,
        Cr3Target1 = 0x600A,
        Cr3Target2 = 0x600C,
        Cr3Target3 = 0x600E,
    }
    /// Natural-width exit information.
    read_only ReadOnlyNatural: u64 {
        ExitQualification = 0x6400,
        IoRcx = 0x6402,
        IoRsi = 0x6404,
        IoRdi = 0x6406,
        IoRip = 0x6408,
        GuestLinearAddress = 0x640A,
    }
    /// Natural-width guest-state fields.
    writable GuestNatural: u64 {
        Cr0 = 0x6800,
        Cr3 = 0x6802,
        Cr4 = 0x6804,
        EsBase = 0x6806,
        CsBase = 0x6808,
        SsBase = 0x680A,
        DsBase = 0x680C,
        FsBase = 0x680E,
        GsBase = 0x6810,
        LdtrBase = 0x6812,
        TrBase = 0x6814,
        GdtrBase = 0x6816,
        IdtrBase = 0x6818,
        Dr7 = 0x681A,
        Rsp = 0x681C,
        Rip = 0x681E,
        Rflags = 0x6820,
        PendingDebugExceptions = 0x6822,
        SysenterEsp = 0x6824,
        SysenterEip = 0x6826,
        SCet = 0x6828,
        Ssp = 0x682A,
        InterruptSspTable = 0x682C,
    }
    /// Natural-width host-state fields.
    writable HostNatural: u64 {
        Cr0 = 0x6C00,
        Cr3 = 0x6C02,
        Cr4 = 0x6C04,
        FsBase = 0x6C06,
        GsBase = 0x6C08,
        TrBase = 0x6C0A,
        GdtrBase = 0x6C0C,
        IdtrBase = 0x6C0E,
        SysenterEsp = 0x6C10,
        SysenterEip = 0x6C12,
        Rsp = 0x6C14,
        Rip = 0x6C16,
        SCet = 0x6C18,
        Ssp = 0x6C1A,
        InterruptSspTable = 0x6C1C,
    }
}

/// The four fields of one guest segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentFields {
    pub selector: Guest16,
    pub base: GuestNatural,
    pub limit: Guest32,
    pub access_rights: Guest32,
}

macro_rules! segment {
    ($selector:ident, $base:ident, $limit:ident, $access_rights:ident) => {
        SegmentFields {
            selector: Guest16::$selector,
            base: GuestNatural::$base,
            limit: Guest32::$limit,
            access_rights: Guest32::$access_rights,
        }
    };
}

impl SegmentFields {
    pub const LDTR: Self = segment!(LdtrSelector, LdtrBase, LdtrLimit, LdtrAccessRights);
    pub const TR: Self = segment!(TrSelector, TrBase, TrLimit, TrAccessRights);

    /// ES, CS, SS, DS, FS, GS, as [`SegmentName`] numbers them.
    pub const ALL: [Self; 6] = [
        segment!(EsSelector, EsBase, EsLimit, EsAccessRights),
        segment!(CsSelector, CsBase, CsLimit, CsAccessRights),
        segment!(SsSelector, SsBase, SsLimit, SsAccessRights),
        segment!(DsSelector, DsBase, DsLimit, DsAccessRights),
        segment!(FsSelector, FsBase, FsLimit, FsAccessRights),
        segment!(GsSelector, GsBase, GsLimit, GsAccessRights),
    ];

    /// The fields of one segment register.
    #[inline]
    pub const fn of(name: SegmentName) -> Self {
        Self::ALL[name as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, vec::Vec};

    /// Bits 14:13 and 11:10 of an encoding by its enum's name; bit 0 is the "high" access, bit 12 and 31:15 are reserved.
    fn wanted(name: &str) -> u32 {
        let width = match name {
            name if name.ends_with("16") => 0,
            name if name.ends_with("64") => 1,
            name if name.ends_with("32") => 2,
            _ => 3,
        };
        let role = match name {
            name if name.starts_with("Control") => 0,
            name if name.starts_with("ReadOnly") => 1,
            name if name.starts_with("Guest") => 2,
            name if name.starts_with("Host") => 3,
            _ => panic!("{name}"),
        };
        width << 13 | role << 10
    }

    #[test]
    fn encodings_agree_with_width_and_role() {
        assert_eq!(ALL.len(), 15);
        for (name, encodings) in ALL {
            for encoding in *encodings {
                assert_eq!(encoding & !0x3FE, wanted(name), "{name} {encoding:#x}");
            }
        }
    }

    #[test]
    fn encodings_are_ordered_and_unique() {
        let mut seen = BTreeSet::new();
        for (name, encodings) in ALL {
            let sorted: Vec<u32> = encodings.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
            assert_eq!(&sorted, encodings, "{name}");
            encodings.iter().for_each(|&encoding| assert!(seen.insert(encoding), "{encoding:#x}"));
        }
    }

    #[test]
    fn values_are_as_wide_as_their_fields() {
        assert_eq!(Guest16::value(0x1_2345), 0x2345);
        assert_eq!(ReadOnly32::value(0x1_0000_0030), 0x30);
        assert_eq!(GuestNatural::value(u64::MAX), u64::MAX);
        assert_eq!(Guest64::Efer.encoding(), 0x2806);
    }

    #[test]
    fn segment_fields_are_in_step() {
        for (number, fields) in SegmentFields::ALL.iter().chain([&SegmentFields::LDTR, &SegmentFields::TR]).enumerate()
        {
            let step = 2 * number as u32;
            assert_eq!(fields.selector.encoding(), 0x0800 + step);
            assert_eq!(fields.base.encoding(), 0x6806 + step);
            assert_eq!(fields.limit.encoding(), 0x4800 + step);
            assert_eq!(fields.access_rights.encoding(), 0x4814 + step);
        }
        assert_eq!(SegmentFields::of(SegmentName::Gs).base, GuestNatural::GsBase);
    }
}
