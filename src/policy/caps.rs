// SPDX-License-Identifier: GPL-2.0
//! What follows from a CPUID table for the rest of the module: which register bits a guest may set.
//!
//! The same derivation serves the table that Krab supports and the one that userspace gave a vCPU; what holds for a
//! guest is what both allow. So a bit that userspace invented never reaches hardware.
#![forbid(unsafe_code)]

use crate::arch::cpuid::*;
use crate::arch::cr::{cr4, efer, xcr0};

/// Bits of the SPEC_CTRL MSR. SDM Vol. 4 "IA32_SPEC_CTRL", APM Vol. 2 "SPEC_CTRL".
pub mod spec_ctrl {
    pub const IBRS: u64 = 1 << 0;
    pub const STIBP: u64 = 1 << 1;
    pub const SSBD: u64 = 1 << 2;
    pub const IPRED_DIS: u64 = 3 << 3;
    pub const RRSBA_DIS: u64 = 3 << 5;
    pub const PSFD: u64 = 1 << 7;
    pub const DDPD_U: u64 = 1 << 8;
    pub const BHI_DIS_S: u64 = 1 << 10;
}

/// Bits of the PRED_CMD MSR.
pub mod pred_cmd {
    pub const IBPB: u64 = 1 << 0;
    pub const SBPB: u64 = 1 << 7;
}

/// Limits of one guest, or of this host. All zero before KVM_SET_CPUID2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCaps {
    pub vendor: Vendor,
    /// Family from leaf 1, extended family added.
    pub family: u8,
    /// Physical address bits, 32 to 52.
    pub physical_bits: u8,
    /// CR4 bits that may be set.
    pub cr4: u64,
    /// EFER bits that may be set; LMA is among them with LME.
    pub efer: u64,
    /// XCR0 bits that may be set; 0 without XSAVE.
    pub xcr0: u64,
    /// XSAVES and XRSTORS: MSR XSS exists, and is 0.
    pub xsaves: bool,
    /// SPEC_CTRL bits that may be set; 0: the MSR does not exist.
    pub spec_ctrl: u64,
    /// PRED_CMD bits that may be written; 0: the MSR does not exist.
    pub pred_cmd: u64,
    pub x2apic: bool,
    pub tsc_deadline: bool,
    pub tsc_adjust: bool,
    /// RDTSCP.
    pub rdtscp: bool,
    /// RDTSCP or RDPID: MSR TSC_AUX exists.
    pub tsc_aux: bool,
    pub arch_capabilities: bool,
    pub flush_cmd: bool,
    pub invpcid: bool,
    /// 1 GiB pages.
    pub page_1g: bool,
    pub long_mode: bool,
    /// LFENCE can be made serializing by DE_CFG.
    pub lfence_serializing: bool,
}

/// CR4 bits that need no CPUID bit, as in KVM: a guest that sets one without the feature sees its own CPUID lie.
const CR4_ALWAYS: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT;

/// Leaf, subleaf, register number, bit there, and the CR4 bits it allows.
const CR4_FEATURES: &[(u32, u32, usize, u32, u64)] = &[
    (1, 0, 2, leaf1_ecx::PCID, cr4::PCIDE),
    (1, 0, 2, leaf1_ecx::XSAVE, cr4::OSXSAVE),
    (7, 0, 1, leaf7_ebx::FSGSBASE, cr4::FSGSBASE),
    (7, 0, 1, leaf7_ebx::SMEP, cr4::SMEP),
    (7, 0, 1, leaf7_ebx::SMAP, cr4::SMAP),
    (7, 0, 2, leaf7_ecx::UMIP, cr4::UMIP),
    (7, 0, 2, leaf7_ecx::PKU, cr4::PKE),
    (7, 0, 2, leaf7_ecx::LA57, cr4::LA57),
];

/// The same for EFER.
const EFER_FEATURES: &[(u32, u32, usize, u32, u64)] = &[
    (0x8000_0001, 0, 3, ext1_edx::NX, efer::NXE),
    (0x8000_0001, 0, 3, ext1_edx::LM, efer::LME | efer::LMA),
    (0x8000_0001, 0, 3, ext1_edx::FFXSR, efer::FFXSR),
    (0x8000_0021, 0, 0, ext21_eax::AUTOMATIC_IBRS, efer::AIBRSE),
];

/// The same for SPEC_CTRL; AMD and Intel each have their own bits for the same thing.
const SPEC_CTRL_FEATURES: &[(u32, u32, usize, u32, u64)] = &[
    (7, 0, 3, leaf7_edx::SPEC_CTRL, spec_ctrl::IBRS),
    (7, 0, 3, leaf7_edx::STIBP, spec_ctrl::STIBP),
    (7, 0, 3, leaf7_edx::SSBD, spec_ctrl::SSBD),
    (7, 2, 3, leaf7_2_edx::PSFD, spec_ctrl::PSFD),
    (7, 2, 3, leaf7_2_edx::IPRED_CTRL, spec_ctrl::IPRED_DIS),
    (7, 2, 3, leaf7_2_edx::RRSBA_CTRL, spec_ctrl::RRSBA_DIS),
    (7, 2, 3, leaf7_2_edx::DDPD_U, spec_ctrl::DDPD_U),
    (7, 2, 3, leaf7_2_edx::BHI_CTRL, spec_ctrl::BHI_DIS_S),
    (0x8000_0008, 0, 1, ext8_ebx::IBRS, spec_ctrl::IBRS),
    (0x8000_0008, 0, 1, ext8_ebx::STIBP, spec_ctrl::STIBP),
    (0x8000_0008, 0, 1, ext8_ebx::SSBD, spec_ctrl::SSBD),
    (0x8000_0008, 0, 1, ext8_ebx::PSFD, spec_ctrl::PSFD),
];

/// The same for PRED_CMD.
const PRED_CMD_FEATURES: &[(u32, u32, usize, u32, u64)] = &[
    (7, 0, 3, leaf7_edx::SPEC_CTRL, pred_cmd::IBPB),
    (0x8000_0008, 0, 1, ext8_ebx::IBPB, pred_cmd::IBPB),
    (0x8000_0021, 0, 0, ext21_eax::SBPB, pred_cmd::SBPB),
];

impl GuestCaps {
    /// What a table allows. `leaf` returns EAX, EBX, ECX, EDX of an exact entry, zeros where there is none.
    pub fn derive(leaf: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let has = |function, index, register: usize, bit| {
            leaf(function, index).get(register).is_some_and(|value| value & bit != 0)
        };
        let collect = |features: &[(u32, u32, usize, u32, u64)]| {
            let set =
                features.iter().filter(|(function, index, register, bit, _)| has(*function, *index, *register, *bit));
            set.fold(0, |bits, feature| bits | feature.4)
        };
        let [signature, ..] = leaf(1, 0);
        let base_family = (signature >> 8 & 0xF) as u8;
        let extended_family = (signature >> 20 & 0xFF) as u8;
        let [xcr0_low, _, _, xcr0_high] = leaf(0xD, 0);
        let xsave = has(1, 0, 2, leaf1_ecx::XSAVE);
        let [sizes, ..] = leaf(0x8000_0008, 0);
        let rdtscp = has(0x8000_0001, 0, 3, ext1_edx::RDTSCP);
        Self {
            vendor: Vendor::from_leaf_0(leaf(0, 0)),
            family: if base_family == 0xF { extended_family.saturating_add(0xF) } else { base_family },
            physical_bits: match (sizes & 0xFF) as u8 {
                0 => 36,
                bits => bits.clamp(32, 52),
            },
            cr4: CR4_ALWAYS | collect(CR4_FEATURES),
            efer: efer::SCE | collect(EFER_FEATURES),
            xcr0: if xsave { u64::from(xcr0_high) << 32 | u64::from(xcr0_low) } else { 0 },
            spec_ctrl: collect(SPEC_CTRL_FEATURES),
            pred_cmd: collect(PRED_CMD_FEATURES),
            x2apic: has(1, 0, 2, leaf1_ecx::X2APIC),
            tsc_deadline: has(1, 0, 2, leaf1_ecx::TSC_DEADLINE),
            tsc_adjust: has(7, 0, 1, leaf7_ebx::TSC_ADJUST),
            rdtscp,
            tsc_aux: rdtscp || has(7, 0, 2, leaf7_ecx::RDPID),
            arch_capabilities: has(7, 0, 3, leaf7_edx::ARCH_CAPABILITIES),
            flush_cmd: has(7, 0, 3, leaf7_edx::L1D_FLUSH),
            xsaves: has(0xD, 1, 0, leaf_d_1_eax::XSAVES),
            invpcid: has(7, 0, 1, leaf7_ebx::INVPCID),
            page_1g: has(0x8000_0001, 0, 3, ext1_edx::PAGE1GB),
            long_mode: has(0x8000_0001, 0, 3, ext1_edx::LM),
            lfence_serializing: has(0x8000_0021, 0, 0, ext21_eax::LFENCE_SERIALIZING),
        }
    }

    /// What a guest with this table may do on a host that supports `host`. Identity and address width are the guest's.
    pub fn within(self, host: &Self) -> Self {
        Self {
            vendor: self.vendor,
            family: self.family,
            physical_bits: self.physical_bits.min(host.physical_bits),
            cr4: self.cr4 & host.cr4,
            efer: self.efer & host.efer,
            xcr0: self.xcr0 & host.xcr0,
            spec_ctrl: self.spec_ctrl & host.spec_ctrl,
            pred_cmd: self.pred_cmd & host.pred_cmd,
            x2apic: self.x2apic && host.x2apic,
            tsc_deadline: self.tsc_deadline && host.tsc_deadline,
            tsc_adjust: self.tsc_adjust && host.tsc_adjust,
            rdtscp: self.rdtscp && host.rdtscp,
            tsc_aux: self.tsc_aux && host.tsc_aux,
            arch_capabilities: self.arch_capabilities && host.arch_capabilities,
            flush_cmd: self.flush_cmd && host.flush_cmd,
            xsaves: self.xsaves && host.xsaves,
            invpcid: self.invpcid && host.invpcid,
            page_1g: self.page_1g && host.page_1g,
            long_mode: self.long_mode && host.long_mode,
            lfence_serializing: self.lfence_serializing && host.lfence_serializing,
        }
    }

    /// Whether five-level paging may be turned on.
    pub const fn la57(&self) -> bool {
        self.cr4 & cr4::LA57 != 0
    }

    /// Bits of a canonical address that are sign-extended from, for MSRs that hold linear addresses: what the guest's
    /// CPUID allows, not what its CR4 says at the moment. SDM Vol. 3 "Canonicality Checking".
    pub const fn linear_bits(&self) -> u32 {
        if self.la57() {
            57
        } else {
            48
        }
    }

    /// Bits of a physical address that a guest must not set.
    pub const fn reserved_physical(&self) -> u64 {
        match 1u64.checked_shl(self.physical_bits as u32) {
            Some(limit) => !(limit - 1),
            None => 0,
        }
    }

    /// Whether XSETBV may write `value` to XCR0. SDM Vol. 1 "Enabling the XSAVE Feature Set and XSAVE-Enabled Features".
    pub const fn xcr0_valid(&self, value: u64) -> bool {
        use xcr0::*;
        const AVX512: u64 = OPMASK | ZMM_HI256 | HI16_ZMM;
        const BOUNDS: u64 = BNDREGS | BNDCSR;
        let avx_without_sse = value & AVX != 0 && value & SSE == 0;
        let part_of_avx512 = value & AVX512 != 0 && value & (AVX512 | AVX) != AVX512 | AVX;
        let half_of_bounds = value & BOUNDS != 0 && value & BOUNDS != BOUNDS;
        value & !self.xcr0 == 0 && value & X87 != 0 && !avx_without_sse && !part_of_avx512 && !half_of_bounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps_with_xcr0(allowed: u64) -> GuestCaps {
        GuestCaps { xcr0: allowed, ..GuestCaps::default() }
    }

    #[test]
    fn xcr0_rules() {
        let caps = caps_with_xcr0(0x2E7);
        for good in [1, 3, 7, 0xE7, 0x207, 0x2E7] {
            assert!(caps.xcr0_valid(good), "{good:#x}");
        }
        for bad in [0, 2, 5, 6, 0x27, 0x67, 0xE3, 0x18 | 7, 1 << 63 | 7, 1 << 17 | 7] {
            assert!(!caps.xcr0_valid(bad), "{bad:#x}");
        }
        assert!(!caps_with_xcr0(0).xcr0_valid(1), "without XSAVE nothing is valid");
        assert!(!caps_with_xcr0(0x1F).xcr0_valid(0xF), "half of MPX");
    }

    #[test]
    fn no_table_allows_nothing_dangerous() {
        let caps = GuestCaps::derive(|_, _| [0; 4]);
        assert_eq!(caps.cr4, CR4_ALWAYS);
        assert_eq!(caps.efer, efer::SCE);
        assert_eq!((caps.xcr0, caps.spec_ctrl, caps.pred_cmd), (0, 0, 0));
        assert_eq!(caps.physical_bits, 36);
        assert_eq!(GuestCaps::default().within(&caps).cr4, 0);
    }

    #[test]
    fn inventions_of_userspace_stay_out() {
        let host = GuestCaps::derive(|function, _| match function {
            0x8000_0001 => [0, 0, 0, ext1_edx::LM | ext1_edx::NX],
            0x8000_0008 => [48, 0, 0, 0],
            _ => [0; 4],
        });
        let everything = GuestCaps::derive(|_, _| [u32::MAX; 4]);
        assert!(everything.la57());
        let guest = everything.within(&host);
        assert!(!guest.la57() && guest.cr4 == CR4_ALWAYS);
        assert_eq!(guest.efer, efer::SCE | efer::NXE | efer::LME | efer::LMA);
        assert_eq!(guest.physical_bits, 48);
        assert_eq!(guest.reserved_physical(), 0xFFFF_0000_0000_0000);
        assert!(!guest.xcr0_valid(1));
    }
}
