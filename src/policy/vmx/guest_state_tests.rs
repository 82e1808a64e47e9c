// SPDX-License-Identifier: GPL-2.0
//! Tests of guest registers at VM entry: a table of what KVM's users set, and random states against a checker of the manual's rules that
//! shares nothing with the code under test.
#![forbid(unsafe_code)]

use std::{string::String, vec::Vec};

use super::guest_state::{Context, Mode, RawSegment};
use crate::{
    arch::{
        segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName},
        vmcs::AccessRights,
    },
    guest::{
        check::{self, Allowed},
        SystemRegs,
    },
};

/// The guest-state area, raw.
#[derive(Clone, Debug)]
struct Area {
    segments: [RawSegment; 6],
    ldtr: RawSegment,
    tr: RawSegment,
    gdtr: DescriptorTable,
    idtr: DescriptorTable,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    rip: u64,
    rflags: u64,
    ia32e: bool,
}

const NAMES: [SegmentName; 6] =
    [SegmentName::Es, SegmentName::Cs, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs];

/// The area for a set of registers, as a VM entry would load it. `None`: no CPU can be at this RIP.
fn area(regs: &SystemRegs, rip: u64, rflags: u64, bits: u32) -> Option<Area> {
    let context = Context::new(regs, rflags, bits);
    let long_code = regs.segments[SegmentName::Cs as usize].attributes.long();
    Some(Area {
        segments: NAMES.map(|name| context.segment(name, &regs.segments[name as usize])),
        ldtr: context.ldtr(&regs.ldtr),
        tr: context.tr(&regs.tr),
        gdtr: context.table(regs.gdtr),
        idtr: context.table(regs.idtr),
        cr0: regs.cr0,
        cr3: context.cr3(regs.cr3),
        cr4: regs.cr4,
        efer: regs.efer,
        rip: context.rip(rip, long_code)?,
        rflags: context.rflags(rflags),
        ia32e: context.ia32e(),
    })
}

fn canonical(address: u64, bits: u32) -> bool {
    let upper = address >> (bits - 1);
    upper == 0 || upper == u64::MAX >> (bits - 1)
}

/// The rules of "Checks on the Guest State Area" for a CPU with unrestricted guest, by the manual's order. Returns what is violated.
fn violations(area: &Area, bits: u32, physical_bits: u32) -> Vec<String> {
    let mut found = Vec::new();
    let mut rule = |holds: bool, text: &str| {
        if !holds {
            found.push(String::from(text));
        }
    };
    let pe = area.cr0 & 1 != 0;
    let pg = area.cr0 >> 31 & 1 != 0;
    let v86 = area.rflags >> 17 & 1 != 0;

    // Control registers and MSRs.
    rule(!pg || pe, "CR0.PG without PE");
    rule(!area.ia32e || pg && area.cr4 >> 5 & 1 != 0, "IA-32e mode without PG and PAE");
    rule(area.ia32e || area.cr4 >> 17 & 1 == 0, "PCIDE without IA-32e mode");
    rule(area.cr3 >> physical_bits == 0, "CR3 beyond physical addresses");
    rule((area.efer >> 10 & 1 != 0) == area.ia32e, "EFER.LMA");
    rule(!pg || area.efer >> 8 & 1 == area.efer >> 10 & 1, "EFER.LME");

    // Segment registers.
    let [_, cs, ss, ..] = &area.segments;
    let unusable = |s: &RawSegment| s.access_rights.0 >> 16 & 1 != 0;
    let kind = |s: &RawSegment| s.access_rights.0 & 0xF;
    let dpl = |s: &RawSegment| s.access_rights.0 >> 5 & 3;
    rule(area.tr.selector & 4 == 0, "TR.TI");
    rule(unusable(&area.ldtr) || area.ldtr.selector & 4 == 0, "LDTR.TI");
    rule(canonical(area.tr.base, bits), "TR base");
    rule(unusable(&area.ldtr) || canonical(area.ldtr.base, bits), "LDTR base");
    for (number, segment) in area.segments.iter().enumerate() {
        let usable = number == 1 || !unusable(segment);
        let ar = segment.access_rights.0;
        if v86 {
            rule(segment.base == u64::from(segment.selector) << 4, "v86 base");
            rule(segment.limit == 0xFFFF, "v86 limit");
            rule(ar == 0xF3, "v86 access rights");
            continue;
        }
        match number {
            4 | 5 => rule(canonical(segment.base, bits), "FS or GS base"),
            _ => rule(!usable || segment.base >> 32 == 0, "CS, SS, DS or ES base"),
        }
        match number {
            1 => {
                rule(!unusable(segment), "CS unusable");
                rule([3, 9, 11, 13, 15].contains(&kind(segment)), "CS type");
                match kind(segment) {
                    3 => rule(dpl(segment) == 0, "DPL of a data CS"),
                    9 | 11 => rule(dpl(segment) == dpl(ss), "DPL of CS"),
                    _ => rule(dpl(segment) <= dpl(ss), "DPL of a conforming CS"),
                }
                rule(!(area.ia32e && ar >> 13 & 1 != 0 && ar >> 14 & 1 != 0), "CS.L and CS.D");
            }
            2 => {
                rule(!usable || [3, 7].contains(&kind(segment)), "SS type");
                rule(dpl(segment) == 0 || pe && kind(cs) != 3, "DPL of SS");
            }
            _ => {
                rule(!usable || kind(segment) & 1 != 0, "data segment not accessed");
                rule(!usable || kind(segment) & 8 == 0 || kind(segment) & 2 != 0, "code segment not readable");
            }
        }
        if usable {
            rule(ar >> 4 & 1 != 0, "S");
            rule(ar >> 7 & 1 != 0, "P");
            rule(ar & 0xFFFE_0F00 == 0, "reserved access rights");
            granularity(segment, &mut rule);
        }
    }
    // TR and LDTR.
    let tr = area.tr.access_rights.0;
    rule(if area.ia32e { tr & 0xF == 11 } else { [3, 11].contains(&(tr & 0xF)) }, "TR type");
    rule(tr >> 4 & 1 == 0 && tr >> 7 & 1 != 0 && tr & 0xFFFF_0F00 == 0, "TR access rights");
    granularity(&area.tr, &mut rule);
    if !unusable(&area.ldtr) {
        let ldtr = area.ldtr.access_rights.0;
        rule(ldtr & 0xFFFE_0F9F == 0x82, "LDTR access rights");
        granularity(&area.ldtr, &mut rule);
    }
    rule(canonical(area.gdtr.base, bits) && canonical(area.idtr.base, bits), "descriptor table base");

    // RIP and RFLAGS.
    let long64 = area.ia32e && cs.access_rights.0 >> 13 & 1 != 0;
    if long64 {
        let upper = area.rip >> bits;
        rule(upper == 0 || upper == u64::MAX >> bits, "RIP");
    } else {
        rule(area.rip >> 32 == 0, "RIP of 32 bits");
    }
    rule(area.rflags & 0xFFFF_FFFF_FFC0_802A == 2, "RFLAGS, reserved");
    rule(!v86 || pe && !area.ia32e, "RFLAGS.VM");
    found
}

fn granularity(segment: &RawSegment, rule: &mut impl FnMut(bool, &str)) {
    let g = segment.access_rights.0 >> 15 & 1 != 0;
    rule(!g || segment.limit & 0xFFF == 0xFFF, "G with a limit of bytes");
    rule(g || segment.limit >> 20 == 0, "no G with a limit of pages");
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next() >> 32 < (1 << 32) / n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() >> 33) as usize % from.len()]
    }

    fn address(&mut self) -> u64 {
        let any = self.next();
        let bits = (self.next() >> 58) as u32;
        match self.next() >> 62 {
            0 => any,
            1 => any >> bits,
            2 => !(any >> bits),
            _ => 0,
        }
    }

    fn segment(&mut self) -> Segment {
        let attributes = match self.next() >> 62 {
            0 => 0,
            1 => self.next() as u16 & 0xFFF,
            _ => self.pick(&[0xA9B, 0xC9B, 0x09B, 0xAFB, 0xC93, 0xCF3, 0x093, 0x08B, 0x082, 0x0F3, 0xC97, 0x89B]),
        };
        let attributes = if self.one_in(4) { attributes ^ 1 << (self.next() >> 60) & 0xFFF } else { attributes };
        Segment {
            base: self.address(),
            limit: match self.next() >> 62 {
                0 => self.next() as u32,
                1 => self.next() as u32 & 0xF_FFFF,
                2 => self.next() as u32 | 0xFFF,
                _ => u32::MAX,
            },
            selector: self.next() as u16,
            attributes: SegmentAttributes(attributes),
        }
    }

    fn registers(&mut self) -> SystemRegs {
        let cr0 = self.pick(&[0x10, 0x11, 0x8000_0011, 0x8005_0033, 0x6000_0010, 0x8000_0010]);
        let efer = self.pick(&[0, 0, 0x100, 0x500, 0x500, 0xD01]);
        let noise = if self.one_in(8) { 1 << (self.next() >> 58) } else { 0 };
        SystemRegs {
            segments: core::array::from_fn(|_| self.segment()),
            ldtr: self.segment(),
            tr: self.segment(),
            gdtr: DescriptorTable { base: self.address(), limit: self.next() as u16 },
            idtr: DescriptorTable { base: self.address(), limit: self.next() as u16 },
            cr0: cr0 ^ noise,
            cr2: self.next(),
            cr3: self.address(),
            cr4: self.pick(&[0, 0x20, 0x20, 0x20, 0x2_0020, 0x10_06F0]),
            cr8: self.next() >> 61,
            efer,
            cpl: 0,
        }
    }

    fn rflags(&mut self) -> u64 {
        match self.next() >> 62 {
            0 => self.next(),
            1 => 0x2_0202,
            _ => 0x202,
        }
    }
}

#[test]
fn random_states_are_refused_or_enter() {
    let allowed = Allowed { cr4: u64::MAX, efer: 0xD01, physical_bits: 39 };
    let mut random = Random(0x5DEE_CE66_D1CE_4E5B);
    let mut entered = [0; 4];
    let mut nowhere = 0;
    for round in 0..200_000 {
        let regs = random.registers();
        let (rip, flags) = (random.address(), random.rflags());
        let bits = random.pick(&[48, 57]);
        if !check::system_regs_valid(&regs, &allowed) {
            continue;
        }
        let Some(area) = area(&regs, rip, flags, bits) else {
            nowhere += 1;
            continue;
        };
        let found = violations(&area, bits, allowed.physical_bits);
        assert!(found.is_empty(), "round {round}: {found:?}\n{regs:#x?} {flags:#x}\n{area:#x?}");
        entered[Context::new(&regs, flags, bits).mode as usize] += 1;
    }
    // Each mode had its share, and the checker can see what it is there for.
    assert!(entered.iter().all(|&count| count > 2_000), "{entered:?}");
    assert!(nowhere > 100, "{nowhere}");
}

/// Without the code under test, nearly nothing of the same states would enter: the checker sees.
#[test]
fn raw_random_states_do_not_enter() {
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    let mut good = 0;
    for _ in 0..10_000 {
        let regs = random.registers();
        let raw = |s: &Segment| RawSegment {
            selector: s.selector,
            base: s.base,
            limit: s.limit,
            access_rights: AccessRights::from_attributes(s.attributes),
        };
        let area = Area {
            segments: regs.segments.each_ref().map(raw),
            ldtr: raw(&regs.ldtr),
            tr: raw(&regs.tr),
            gdtr: regs.gdtr,
            idtr: regs.idtr,
            cr0: regs.cr0,
            cr3: regs.cr3,
            cr4: regs.cr4,
            efer: regs.efer,
            rip: random.address(),
            rflags: random.rflags(),
            ia32e: regs.efer & 0x400 != 0,
        };
        good += usize::from(violations(&area, 48, 39).is_empty());
    }
    assert!(good < 10, "{good}");
}

/// What a CPU is in already stays: what comes out goes in again as it is.
#[test]
fn valid_states_are_left_alone() {
    let allowed = Allowed { cr4: u64::MAX, efer: 0xD01, physical_bits: 39 };
    let mut random = Random(0xC0FF_EE00_DEAD_BEEF);
    let mut seen = 0;
    for _ in 0..50_000 {
        let regs = random.registers();
        let (rip, flags) = (random.address(), random.rflags());
        if !check::system_regs_valid(&regs, &allowed) {
            continue;
        }
        let Some(first) = area(&regs, rip, flags, 48) else { continue };
        let again = SystemRegs {
            segments: first.segments.each_ref().map(RawSegment::segment),
            ldtr: first.ldtr.segment(),
            tr: first.tr.segment(),
            gdtr: first.gdtr,
            idtr: first.idtr,
            cr3: first.cr3,
            ..regs
        };
        let second = area(&again, first.rip, first.rflags, 48).unwrap();
        assert_eq!(first.segments, second.segments);
        assert_eq!((first.ldtr, first.tr, first.gdtr, first.idtr), (second.ldtr, second.tr, second.gdtr, second.idtr));
        assert_eq!((first.cr3, first.rip, first.rflags), (second.cr3, second.rip, second.rflags));
        seen += 1;
    }
    assert!(seen > 10_000, "{seen}");
}

const LONG: Context = Context { mode: Mode::Long, cpl: 0, linear_bits: 48 };
const REAL: Context = Context { mode: Mode::Real, ..LONG };
const PROTECTED: Context = Context { mode: Mode::Protected, ..LONG };
const USER: Context = Context { mode: Mode::Long, cpl: 3, linear_bits: 48 };
const V86: Context = Context { mode: Mode::Virtual8086, ..USER };

#[test]
fn segments_that_users_set() {
    use SegmentName::{Cs, Ds, Es, Fs, Ss};
    for (what, context, name, attributes, wanted) in [
        ("64-bit kernel code", LONG, Cs, 0xA9B, 0xA09B),
        ("the same, not accessed", LONG, Cs, 0xA9A, 0xA09B),
        ("execute-only", LONG, Cs, 0xA98, 0xA099),
        ("64-bit user code", USER, Cs, 0xAFB, 0xA0FB),
        ("user code under a kernel's stack", LONG, Cs, 0xAFB, 0xA09B),
        ("kernel code under a user's stack", USER, Cs, 0xA9B, 0xA0FB),
        ("conforming kernel code for a user", USER, Cs, 0xA9F, 0xA09F),
        ("conforming user code for the kernel", LONG, Cs, 0xAFF, 0xA09F),
        ("L and D", LONG, Cs, 0xE9B, 0xA09B),
        ("32-bit code", PROTECTED, Cs, 0xC9B, 0xC09B),
        ("code out of reset", REAL, Cs, 0x09B, 0x009B),
        ("code as a data segment, from QEMU", REAL, Cs, 0x093, 0x0093),
        ("the same after CR0.PE", PROTECTED, Cs, 0x093, 0x0093),
        ("null code", LONG, Cs, 0x000, 0x0093),
        ("null code of a user", USER, Cs, 0x000, 0x00FB),
        ("flat data", LONG, Ds, 0xC93, 0xC093),
        ("not accessed", LONG, Ds, 0xC92, 0xC093),
        ("read-only, not accessed", PROTECTED, Es, 0x090, 0x0091),
        ("execute-only as data", PROTECTED, Es, 0x098, 0x009B),
        ("a system segment as data", PROTECTED, Fs, 0x082, 0x0093),
        ("null", LONG, Ds, 0x000, 0x1_0000),
        ("stack", LONG, Ss, 0xC93, 0xC093),
        ("read-only stack", PROTECTED, Ss, 0xC91, 0xC093),
        ("expand-down stack", PROTECTED, Ss, 0x097, 0x0097),
        ("code as a stack", PROTECTED, Ss, 0x09B, 0x0093),
        ("a user's null stack", USER, Ss, 0x000, 0x1_0060),
        ("real mode has no privilege levels", REAL, Ss, 0x0F3, 0x0093),
        ("virtual-8086 mode", V86, Cs, 0x09B, 0x00F3),
    ] {
        let segment = Segment { limit: u32::MAX, attributes: SegmentAttributes(attributes), ..Segment::default() };
        let raw = context.segment(name, &segment).access_rights.0;
        // A limit of 4 GiB has pages.
        let wanted = if context.mode == Mode::Virtual8086 { wanted } else { wanted | 0x8000 };
        assert_eq!(raw, wanted, "{what}: {raw:#x}");
    }
}

#[test]
fn tables_and_tasks_that_users_set() {
    let with = |attributes, selector, base| Segment {
        base,
        limit: 0xFFFF,
        selector,
        attributes: SegmentAttributes(attributes),
    };
    for (what, context, attributes, wanted) in [
        ("out of reset", REAL, 0x08B, 0x008B),
        ("not busy", LONG, 0x089, 0x008B),
        ("16 bits, not busy", PROTECTED, 0x081, 0x0083),
        ("16 bits in long mode", LONG, 0x083, 0x008B),
        ("all zero", LONG, 0x000, 0x008B),
        ("a data segment", PROTECTED, 0x093, 0x0083),
        ("not present", PROTECTED, 0x00B, 0x008B),
    ] {
        assert_eq!(context.tr(&with(attributes, 0, 0)).access_rights.0, wanted, "{what}");
    }
    for (what, attributes, wanted) in [
        ("out of reset", 0x082, 0x0082),
        ("null", 0x000, 0x1_0000),
        ("null with a type", 0x002, 0x1_0002),
        ("of another type", 0x093, 0x0082),
    ] {
        assert_eq!(LONG.ldtr(&with(attributes, 0, 0)).access_rights.0, wanted, "{what}");
    }
    assert_eq!(LONG.tr(&with(0x08B, 0x44, 0)).selector, 0x40);
    assert_eq!(LONG.ldtr(&with(0x082, 0x44, 0)).selector, 0x40);
    assert_eq!(LONG.ldtr(&with(0x000, 0x44, 0)).selector, 0x44, "nobody looks at a null register's selector");
    assert_eq!(LONG.tr(&with(0x08B, 0, 1 << 47)).base, 0xFFFF_8000_0000_0000);
    let table = DescriptorTable { base: 0x1234_8000_0000_0000, limit: 0x7F };
    assert_eq!(LONG.table(table).base, 0xFFFF_8000_0000_0000);
    assert_eq!(Context { linear_bits: 57, ..LONG }.table(table).base, 0x0034_8000_0000_0000);
}

#[test]
fn bases_and_limits() {
    let segment =
        |base, limit, attributes| Segment { base, limit, selector: 0x1234, attributes: SegmentAttributes(attributes) };
    let odd = segment(0xFFFF_8880_0000_1000, 0x1234_5678, 0x093);
    let data = LONG.segment(SegmentName::Ds, &odd);
    assert_eq!((data.base, data.limit, data.access_rights.0), (0x1000, 0x1234_5FFF, 0x8093));
    assert_eq!(LONG.segment(SegmentName::Gs, &odd).base, 0xFFFF_8880_0000_1000);
    let bytes = PROTECTED.segment(SegmentName::Ds, &segment(0, 0x1234, 0x893));
    assert_eq!((bytes.limit, bytes.access_rights.0), (0x1234, 0x0093), "pages cannot say this");
    let pages = PROTECTED.segment(SegmentName::Ds, &segment(0, 0x1FFF, 0x893));
    assert_eq!((pages.limit, pages.access_rights.0), (0x1FFF, 0x8093));
    let v86 = V86.segment(SegmentName::Ds, &odd);
    assert_eq!((v86.base, v86.limit, v86.selector), (0x1_2340, 0xFFFF, 0x1234));
}

#[test]
fn flags_and_addresses() {
    assert_eq!(LONG.rflags(u64::MAX), 0x003D_7FD7);
    assert_eq!(PROTECTED.rflags(u64::MAX), 0x003F_7FD7);
    assert_eq!(REAL.rflags(0), 2);
    assert_eq!(PROTECTED.cr3(0x1_2345_6000), 0x2345_6000);
    assert_eq!(LONG.cr3(0x1_2345_6000), 0x1_2345_6000);
    assert_eq!(REAL.rip(0x1_0000_FFF0, false), Some(0xFFF0));
    assert_eq!(LONG.rip(0x1_0000_FFF0, false), Some(0xFFF0), "compatibility mode");
    assert_eq!(
        LONG.rip(0x0000_8000_0000_0000, true),
        Some(0x0000_8000_0000_0000),
        "faults in the guest, not at the entry"
    );
    assert_eq!(LONG.rip(0xFFFF_0000_0000_0000, true), Some(0xFFFF_0000_0000_0000));
    assert_eq!(LONG.rip(0x0001_0000_0000_0000, true), None);
    assert_eq!(Context { linear_bits: 57, ..LONG }.rip(0x0001_0000_0000_0000, true), Some(0x0001_0000_0000_0000));
}

#[test]
fn modes() {
    let stack = SegmentAttributes(0xCF3);
    let of = |cr0, efer, flags| Context::of(cr0, efer, flags, stack, 48);
    assert_eq!((of(0x10, 0, 0x2_0002).mode, of(0x10, 0, 0).cpl), (Mode::Real, 0));
    assert_eq!((of(0x11, 0, 0x2_0002).mode, of(0x11, 0, 0).mode), (Mode::Virtual8086, Mode::Protected));
    assert_eq!((of(0x8000_0011, 0x500, 0x2_0002).mode, of(0x11, 0, 2).cpl), (Mode::Long, 3));
    assert!(of(0x8000_0011, 0x500, 2).ia32e() && !of(0x11, 0x100, 2).ia32e());
}
