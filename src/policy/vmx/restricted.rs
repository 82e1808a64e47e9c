// SPDX-License-Identifier: GPL-2.0
//! Which guests a CPU without "unrestricted guest" can run: those with protection on, and with segments that fit. SDM "Checks on Guest
//! Segment Registers". For hardware paging is always on: without it the guest has [`identity`](crate::mmu::identity) paging, and does not
//! see it.
//!
//! A guest in another mode is emulated until it comes into one that fits. What [`Context`](super::guest_state::Context) puts right is
//! not asked here.
#![forbid(unsafe_code)]

use crate::{
    arch::{
        cr::{cr0, rflags},
        segment::{Segment, SegmentAttributes},
    },
    policy::vmx::guest_state::Mode,
};

const RPL: u16 = 3;
const KIND_CODE: u8 = 8;
const KIND_CONFORMING_CODE: u8 = 12;

/// Whether CR0 lets the CPU run the guest, which may have an identity map (`mapped`).
#[inline]
pub const fn mode_fits(cr0: u64, mapped: bool) -> bool {
    cr0 & cr0::PE != 0 && (mapped || cr0 & cr0::PG != 0)
}

/// Whether the segments of a guest with paging let the CPU run it: what real mode left in them may not.
pub fn segments_fit(mode: Mode, flags: u64, segments: &[Segment; 6]) -> bool {
    if matches!(mode, Mode::Virtual8086) || flags & rflags::VM != 0 {
        return true;
    }
    let [es, cs, ss, ds, fs, gs] = segments;
    let segment = |s: &Segment| s.attributes.present() && s.attributes.0 & SegmentAttributes::S != 0;
    let code = segment(cs) && cs.attributes.kind() & KIND_CODE != 0;
    // Of a null stack segment, too.
    let rpl = ss.selector & RPL;
    let stack =
        (!ss.attributes.present() || segment(ss)) && cs.selector & RPL == rpl && u16::from(ss.attributes.dpl()) == rpl;
    let data = [es, ds, fs, gs].into_iter().all(|s| {
        let conforming = s.attributes.kind() >= KIND_CONFORMING_CODE;
        !s.attributes.present() || segment(s) && (conforming || u16::from(s.attributes.dpl()) >= s.selector & RPL)
    });
    code && stack && data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::segment::SegmentName;

    fn segment(selector: u16, attributes: u16) -> Segment {
        Segment { base: 0, limit: u32::MAX, selector, attributes: SegmentAttributes(attributes) }
    }

    /// A flat 32-bit kernel.
    fn flat() -> [Segment; 6] {
        let mut all = [segment(0x10, 0xC93); 6];
        all[SegmentName::Cs as usize] = segment(0x08, 0xC9B);
        all
    }

    fn fits(name: SegmentName, selector: u16, attributes: u16) -> bool {
        let mut all = flat();
        all[name as usize] = segment(selector, attributes);
        segments_fit(Mode::Protected, 0, &all)
    }

    #[test]
    fn paging_and_protection() {
        for (value, wanted, mapped) in [
            (0, false, false),
            (cr0::PE, false, true),
            (cr0::PG, false, false),
            (cr0::PE | cr0::PG | cr0::TS, true, true),
        ] {
            assert_eq!((mode_fits(value, false), mode_fits(value, true)), (wanted, mapped));
        }
    }

    #[test]
    fn what_real_mode_leaves() {
        use SegmentName::*;
        assert!(segments_fit(Mode::Protected, 0, &flat()));
        assert!(!fits(Cs, 0xF000, 0x93), "a data segment to execute");
        assert!(!fits(Cs, 0x08, 0), "none at all");
        assert!(!fits(Ss, 0x1233, 0x93), "a selector's privilege level that was a part of an address");
        assert!(!fits(Ds, 0x1233, 0x93));
        assert!(fits(Ds, 0x1230, 0x93) && fits(Gs, 3, 0) && fits(Ss, 0, 0));
        assert!(!fits(Ss, 0x10, 0x60) && !fits(Ss, 3, 0x60), "a null stack segment has its level, too");
        assert!(fits(Es, 0x33, 0xCFB) && fits(Es, 0x1B, 0xC9E), "conforming code has no level to keep");
        assert!(!fits(Fs, 0x1B, 0xC9A) && !fits(Fs, 0x10, 0x82), "code of level 0 for level 3; a system segment");
        let mut v86 = flat();
        v86[Cs as usize] = segment(0x1233, 0xF3);
        assert!(segments_fit(Mode::Virtual8086, rflags::VM, &v86));
    }
}
