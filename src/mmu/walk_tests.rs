// SPDX-License-Identifier: GPL-2.0
//! The walker against tables of cases, and against a second walker that follows the manual sentence by sentence.
#![forbid(unsafe_code)]

use super::guest_mem::{GuestMem, Refused};
use super::nested_tests::Random;
use super::walk::{translate, walk, Access, AccessKind, Context, Translation, WalkError};
use crate::arch::cr::{cr0, cr4, efer, rflags};
use crate::arch::{Gpa, Gva};
use crate::guest::Exception;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec::Vec;

/// What another CPU does to an entry when the walker tries to change it.
type Race = fn(u64) -> u64;

/// Sparse memory that reads as zero; frames from `end` on are not RAM, those in `read_only` refuse writes.
#[derive(Clone, Default)]
struct Memory {
    /// What differs from `base`.
    words: RefCell<BTreeMap<u64, u32>>,
    base: Rc<Vec<u32>>,
    end: u64,
    read_only: Vec<u64>,
    race: Option<(Race, Cell<u32>)>,
    writes: Cell<u32>,
}

impl Memory {
    fn new() -> Self {
        Self { end: 1 << 40, ..Self::default() }
    }

    fn get(&self, gpa: u64) -> u64 {
        let words = self.words.borrow();
        let word = |at| {
            let base = || self.base.get(at as usize / 4).copied();
            u64::from(words.get(&at).copied().or_else(base).unwrap_or(0))
        };
        word(gpa) | (word(gpa + 4) << 32)
    }

    fn set32(&self, gpa: u64, value: u32) {
        self.words.borrow_mut().insert(gpa, value);
    }

    fn set(&self, gpa: u64, value: u64) {
        self.set32(gpa, value as u32);
        self.set32(gpa + 4, (value >> 32) as u32);
    }

    fn check(&self, gpa: Gpa, write: bool) -> Result<(), Refused> {
        if gpa.0 >= self.end {
            return Err(Refused::NotRam);
        }
        if write && self.read_only.contains(&(gpa.0 >> 12)) {
            return Err(Refused::ReadOnly);
        }
        Ok(())
    }

    fn interfere(&self, gpa: Gpa, now: u64) -> u64 {
        match &self.race {
            Some((race, times)) if times.get() > 0 => {
                times.set(times.get() - 1);
                self.set(gpa.0, race(now));
                race(now)
            }
            _ => now,
        }
    }
}

impl GuestMem for Memory {
    fn read_u64(&self, gpa: Gpa) -> Result<u64, Refused> {
        assert_eq!(gpa.0 % 8, 0);
        self.check(gpa, false).map(|()| self.get(gpa.0))
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, Refused> {
        assert_eq!(gpa.0 % 4, 0);
        self.check(gpa, false).map(|()| self.get(gpa.0) as u32)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Refused> {
        self.check(gpa, true)?;
        assert_ne!(old, new, "a needless locked operation");
        self.writes.set(self.writes.get() + 1);
        let same = self.interfere(gpa, self.get(gpa.0)) == old;
        if same {
            self.set(gpa.0, new);
        }
        Ok(same)
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Refused> {
        self.check(gpa, true)?;
        assert_ne!(old, new, "a needless locked operation");
        self.writes.set(self.writes.get() + 1);
        let same = self.get(gpa.0) as u32 == old;
        if same {
            self.set32(gpa.0, new);
        }
        Ok(same)
    }

    fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), Refused> {
        Err(Refused::NotNow)
    }

    fn write(&self, _: Gpa, _: &[u8]) -> Result<(), Refused> {
        Err(Refused::NotNow)
    }
}

const ALL: [Access; 6] = [
    Access::READ,
    Access::WRITE,
    Access::EXECUTE,
    Access::SYSTEM_READ,
    Access::SYSTEM_WRITE,
    Access { kind: AccessKind::Execute, implicit: true },
];

fn long_mode() -> Context {
    Context {
        cr0: cr0::PE | cr0::PG | cr0::WP,
        cr3: 0x1000,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA | efer::NXE,
        physical_bits: 40,
        pages_1g: true,
        ..Context::default()
    }
}

fn fault(code: u32, address: u64) -> Result<Translation, WalkError> {
    Err(WalkError::Fault(Exception::page_fault(code, address)))
}

/// A second walker: first collects the entries, then judges. Sets bits in `memory` directly.
fn reference(m: &Memory, c: &Context, gva: u64, access: Option<Access>) -> Result<Translation, WalkError> {
    let set = |value: u64, bit: u32| (value >> bit) & 1 == 1;
    let page =
        |gpa, bits, w, u, x| Ok(Translation { gpa: Gpa(gpa), page_bits: bits, writable: w, user: u, executable: x });
    if !set(c.cr0, 31) {
        return page(gva, 12, true, true, true);
    }
    let user = access.is_some_and(|a| c.cpl == 3 && !a.implicit);
    let implicit = access.is_some_and(|a| a.implicit);
    let write = access.is_some_and(|a| a.kind == AccessKind::Write);
    let fetch = access.is_some_and(|a| a.kind == AccessKind::Execute);
    let (smep, smap, pke, nxe) = (set(c.cr4, 20), set(c.cr4, 21), set(c.cr4, 22), set(c.efer, 11));
    let pf = |present: bool, rsvd: bool, pk: bool| {
        let id = fetch && (smep || (nxe && set(c.cr4, 5)));
        let bits = [present, write, user, rsvd, id, pk];
        fault(bits.iter().enumerate().map(|(n, &b)| u32::from(b) << n).sum(), gva)
    };
    // Level, index shift, whether the entry is 64 bits wide; the first is the highest.
    let long = set(c.efer, 10);
    let wide = set(c.cr4, 5);
    let shifts: &[u32] = match (long, set(c.cr4, 12), wide) {
        (true, true, _) => &[48, 39, 30, 21, 12],
        (true, false, _) => &[39, 30, 21, 12],
        (false, _, true) => &[30, 21, 12],
        (false, _, false) => &[22, 12],
    };
    if long {
        let top = shifts[0] + 8;
        let sign = gva >> top;
        if sign != 0 && sign != u64::MAX >> top {
            return Err(WalkError::NonCanonical);
        }
    }
    let linear = if long { gva } else { gva & 0xFFFF_FFFF };
    let mut table = match (long, wide) {
        (true, _) => c.cr3 & 0xF_FFFF_FFFF_F000,
        (false, true) => c.cr3 & 0xFFFF_FFE0,
        (false, false) => c.cr3 & 0xFFFF_F000,
    };
    let (mut all_w, mut all_u, mut any_nx) = (true, true, false);
    for &shift in shifts {
        let (size, mask) = if wide { (8, 511) } else { (4, 1023) };
        let at = table + ((linear >> shift) & mask) * size;
        if at >= m.end {
            return Err(WalkError::Tables(Gpa(at), Refused::NotRam));
        }
        let e = if wide { m.get(at) } else { m.get(at) & 0xFFFF_FFFF };
        let pointer = wide && !long && shift == 30;
        let can_be_large = match shift {
            30 => long && c.pages_1g,
            22 => set(c.cr4, 4),
            21 => true,
            _ => false,
        };
        let large = can_be_large && set(e, 7);
        if !set(e, 0) {
            return pf(false, false, false);
        }
        let mut reserved = Vec::new();
        if wide {
            reserved.extend(u32::from(c.physical_bits)..52);
            if !nxe || pointer {
                reserved.push(63);
            }
            if !long {
                reserved.extend(52..63);
            }
            match shift {
                48 | 39 => reserved.push(7),
                30 if pointer => reserved.extend([1, 2, 6, 7, 8]),
                30 if large => reserved.extend(13..30),
                30 => reserved.push(7),
                21 if large => reserved.extend(13..21),
                _ => {}
            }
            if c.upper_global_reserved && shift >= 39 {
                reserved.push(8);
            }
        } else if large {
            reserved.push(21);
            let width = u32::from(c.physical_bits).min(40);
            reserved.extend((32..40).filter(|&b| b >= width).map(|b| b - 19));
        }
        if reserved.into_iter().any(|bit| set(e, bit)) {
            return pf(true, true, false);
        }
        if !pointer {
            all_w &= set(e, 1);
            all_u &= set(e, 2);
            any_nx |= wide && set(e, 63);
        }
        let last = large || shift == 12;
        let mut marks = if access.is_some() && !pointer { 0x20 } else { 0 };
        if last && access.is_some() {
            let key = (e >> 59) as u32 & 15;
            let rights = (c.pkru >> (2 * key)) & 3;
            let keyed = pke && long && all_u && !fetch;
            let pk = keyed && (rights & 1 == 1 || (rights & 2 == 2 && write && (user || set(c.cr0, 16))));
            let allowed = match (user, fetch, write) {
                (true, true, _) => all_u && !any_nx,
                (true, false, true) => all_u && all_w,
                (true, false, false) => all_u,
                (false, true, _) => !(any_nx || smep && all_u),
                (false, false, w) => {
                    let smap_ok = !all_u || !smap || (set(c.rflags, 18) && !implicit);
                    smap_ok && (!w || all_w || !set(c.cr0, 16))
                }
            };
            if pk || !allowed {
                return pf(true, false, pk);
            }
            marks |= if write { 0x40 } else { 0 };
        }
        if e | marks != e && !m.read_only.contains(&(at >> 12)) {
            if wide {
                m.set(at, e | marks);
            } else {
                m.set32(at, (e | marks) as u32);
            }
        }
        if last {
            let offset = linear & ((1 << shift) - 1);
            let mut base = e & 0xF_FFFF_FFFF_F000 & !((1 << shift) - 1);
            if !wide {
                base &= 0xFFFF_FFFF;
                if large {
                    base |= ((e >> 13) & 0xFF) << 32;
                }
            }
            return page(base | offset, shift, all_w, all_u, !any_nx);
        }
        table = if wide { e & 0xF_FFFF_FFFF_F000 } else { e & 0xFFFF_F000 };
    }
    unreachable!()
}

/// Random memory of 16 frames: 12 hold tables, the last two of these are read-only; the rest is not RAM.
fn random_memory(random: &mut Random, mode: u32) -> Memory {
    let mut base = Vec::new();
    while base.len() < 0x3000 {
        let r = random.next();
        let one_in = |n: u64, salt: u32| r.rotate_right(salt) % n == 0;
        let mut e = (r & 0x176) | (random.below(13) << 12) | u64::from(!one_in(24, 3));
        if random.below(3) != 0 {
            e |= 6;
        }
        if one_in(5, 7) {
            // Large: mostly with an address that fits.
            e = (e & 0xFFF) | 0x80 | ((random.below(512) << 30) & 0xFF_FFFF_FFFF) | (random.below(2) << 21);
        }
        if one_in(6, 11) {
            e |= 1 << 63;
        }
        if one_in(40, 13) {
            e |= 1 << random.below(64);
        }
        if mode != 1 && random.below(2) == 0 {
            e |= (random.next() & 0xF) << 59;
        }
        if mode == 1 && random.below(3) == 0 {
            // Fit for a page-directory pointer.
            e &= 0xF019;
        }
        if mode != 0 {
            base.extend([e as u32, (e >> 32) as u32]);
        } else {
            base.push(e as u32 ^ if one_in(30, 17) { 1 << random.below(32) } else { 0 });
        }
    }
    Memory { base: Rc::new(base), end: 0xC000, read_only: std::vec![10, 11], ..Memory::default() }
}

#[test]
fn agrees_with_the_reference() {
    let mut random = Random(0xFEED_5EED);
    let mut seen = BTreeMap::<std::string::String, u32>::new();
    for round in 0..400_u32 {
        let mode = round % 5;
        let wide = mode != 0;
        let pristine = random_memory(&mut random, mode);
        for _ in 0..500 {
            let bits = random.next();
            let on = |bit: u32, mask: u64| if (bits >> bit) & 1 == 1 { mask } else { 0 };
            let often = |bit: u32, mask: u64| if (bits >> bit) & 7 != 0 { mask } else { 0 };
            let access = match random.below(8) {
                n @ 0..=5 => Some(ALL[n as usize]),
                6 => Some(Access::WRITE),
                _ => None,
            };
            let context = Context {
                cr0: cr0::PE | if mode == 4 && on(0, 1) == 0 { 0 } else { cr0::PG } | on(1, cr0::WP),
                cr3: (random.below(13) << 12) | if mode == 1 { random.below(128) << 5 } else { 0 },
                cr4: on(2, cr4::PSE)
                    | on(4, cr4::SMEP)
                    | on(5, cr4::SMAP)
                    | on(6, cr4::PKE)
                    | if wide { cr4::PAE } else { 0 }
                    | if mode == 3 { cr4::LA57 } else { 0 },
                efer: often(8, efer::NXE) | if mode >= 2 { efer::LMA } else { 0 },
                rflags: on(12, rflags::AC),
                pkru: random.next() as u32 & random.next() as u32,
                cpl: if on(13, 1) != 0 { 3 } else { ((bits >> 14) & 3) as u8 },
                physical_bits: [32, 36, 40, 46, 52][random.below(5) as usize],
                pages_1g: often(20, 1) != 0,
                upper_global_reserved: on(24, 1) != 0,
            };
            let mut gva = random.next();
            if mode >= 2 && random.below(16) != 0 {
                let unused = if mode == 3 { 7 } else { 16 };
                gva = ((gva << unused) as i64 >> unused) as u64;
            }
            if mode < 2 {
                gva &= 0xFFFF_FFFF;
            }
            let (left, right) = (pristine.clone(), pristine.clone());
            let got = match access {
                Some(access) => walk(&left, &context, Gva(gva), access),
                None => translate(&left, &context, Gva(gva)),
            };
            let wanted = reference(&right, &context, gva, access);
            assert_eq!(got, wanted, "{context:x?} {access:?} {gva:x}");
            assert!(left.words == right.words, "memory differs: {context:x?} {access:?} {gva:x}");
            if access.is_none() {
                assert!(left.words.borrow().is_empty());
            }
            let class = match got {
                Ok(found) => std::format!("{mode} ok {}", found.page_bits),
                Err(WalkError::Fault(e)) => std::format!("{mode} fault {:02x}", e.error_code.unwrap()),
                Err(other) => std::format!("{mode} {}", std::format!("{other:?}").split('(').next().unwrap()),
            };
            *seen.entry(class).or_default() += 1;
        }
    }
    // The test is worth something only if it gets everywhere.
    for wanted in [
        "0 ok 22",
        "0 ok 12",
        "0 fault 00",
        "0 fault 01",
        "0 fault 09",
        "0 fault 11",
        "0 Tables",
        "1 ok 21",
        "1 ok 12",
        "1 fault 09",
        "1 fault 15",
        "1 Tables",
        "2 ok 12",
        "2 ok 21",
        "2 ok 30",
        "2 fault 21",
        "2 fault 25",
        "2 fault 27",
        "2 fault 0b",
        "2 NonCanonical",
        "3 ok 12",
        "3 ok 30",
        "3 fault 1d",
        "3 NonCanonical",
        "4 ok 12",
    ] {
        assert!(seen.get(wanted).is_some_and(|&n| n >= 5), "{wanted} is rare: {seen:#?}");
    }
}

#[test]
fn four_levels() {
    let memory = Memory::new();
    let gva = 0xFFFF_8123_4567_89AB_u64;
    let index = |level: u32| ((gva >> (12 + 9 * level)) & 511) * 8;
    memory.set(0x1000 + index(3), 0x2007);
    memory.set(0x2000 + index(2), 0x3007);
    memory.set(0x3000 + index(1), 0x4007);
    memory.set(0x4000 + index(0), 0x7_7777_7007);
    let mut context = long_mode();
    let found = Translation { gpa: Gpa(0x7_7777_79AB), page_bits: 12, writable: true, user: true, executable: true };
    assert_eq!(translate(&memory, &context, Gva(gva)), Ok(found));
    assert_eq!(memory.get(0x4000 + index(0)), 0x7_7777_7007);
    assert_eq!(walk(&memory, &context, Gva(gva), Access::READ), Ok(found));
    assert_eq!(memory.writes.get(), 4);
    assert_eq!(memory.get(0x1000 + index(3)), 0x2027);
    assert_eq!(memory.get(0x4000 + index(0)), 0x7_7777_7027);
    assert_eq!(walk(&memory, &context, Gva(gva), Access::WRITE), Ok(found));
    assert_eq!(memory.get(0x4000 + index(0)), 0x7_7777_7067);
    assert_eq!(memory.get(0x3000 + index(1)), 0x4027, "no dirty bit in a table entry");
    // All set: nothing more is written.
    walk(&memory, &context, Gva(gva), Access::WRITE).unwrap();
    assert_eq!(memory.writes.get(), 5);
    assert_eq!(walk(&memory, &context, Gva(0x8000_0000_0000), Access::READ), Err(WalkError::NonCanonical));
    // The same address is canonical with five levels, but the tables are not there.
    context.cr4 |= cr4::LA57;
    assert_eq!(walk(&memory, &context, Gva(0x8000_0000_0000), Access::READ), fault(0, 0x8000_0000_0000));
    context.cr3 = 1 << 40;
    let refused = Err(WalkError::Tables(Gpa((1 << 40) + 511 * 8), Refused::NotRam));
    assert_eq!(walk(&memory, &context, Gva(u64::MAX), Access::READ), refused);
}

/// One 2 MiB user page with key 3 at linear address 0, its entry given; what each access gives.
#[test]
fn permissions() {
    let base = 0x20_0000_u64 | (3 << 59);
    let smap = cr4::SMAP | cr4::SMEP;
    // (entry bits, CR0.WP, more CR4, PKRU, CPL, RFLAGS.AC) and the error code of read, write, execute, implicit read.
    type Row = (u64, bool, u64, u32, u8, bool, [Option<u32>; 4]);
    let rows: [Row; 15] = [
        (0x87, true, 0, 0, 3, false, [None; 4]),
        (0x85, true, 0, 0, 3, false, [None, Some(7), None, None]),
        (0x85, true, 0, 0, 0, false, [None, Some(3), None, None]),
        (0x85, false, 0, 0, 0, false, [None; 4]),
        (0x85, false, 0, 0, 3, false, [None, Some(7), None, None]),
        (0x83, true, 0, 0, 3, false, [Some(5), Some(7), Some(0x15), None]),
        (0x87 | (1 << 63), true, 0, 0, 0, false, [None, None, Some(0x11), None]),
        (0x87, true, smap, 0, 0, false, [Some(1), Some(3), Some(0x11), Some(1)]),
        (0x87, true, smap, 0, 0, true, [None, None, Some(0x11), Some(1)]),
        (0x87, true, smap, 0, 3, true, [None, None, None, Some(1)]),
        (0x83, true, smap, 0, 0, false, [None; 4]),
        (0x87, true, cr4::PKE, 1 << 6, 3, false, [Some(0x25), Some(0x27), None, Some(0x21)]),
        (0x87, true, cr4::PKE, 2 << 6, 0, false, [None, Some(0x23), None, None]),
        (0x87, false, cr4::PKE, 2 << 6, 0, false, [None; 4]),
        (0x87, true, cr4::PKE, !(3 << 6), 3, false, [None; 4]),
    ];
    for (n, (bits, wp, more, pkru, cpl, ac, wanted)) in rows.into_iter().enumerate() {
        for (access, code) in
            [Access::READ, Access::WRITE, Access::EXECUTE, Access::SYSTEM_READ].into_iter().zip(wanted)
        {
            let memory = Memory::new();
            memory.set(0x1000, 0x2007);
            memory.set(0x2000, 0x3007);
            memory.set(0x3000, base | bits);
            let mut context = long_mode();
            context.cr0 = cr0::PE | cr0::PG | if wp { cr0::WP } else { 0 };
            context.cr4 |= more;
            context.rflags = if ac { rflags::AC } else { 0 };
            (context.pkru, context.cpl) = (pkru, cpl);
            let got = walk(&memory, &context, Gva(0x1234), access);
            match code {
                None => assert_eq!(got.map(|t| t.gpa), Ok(Gpa(0x20_1234)), "row {n} {access:?}"),
                Some(code) => {
                    assert_eq!(got, fault(code, 0x1234), "row {n} {access:?}");
                    assert_eq!(memory.get(0x3000), base | bits, "a refused access marks the page");
                }
            }
        }
    }
}

#[test]
fn reserved_bits() {
    // (table address of the entry, entry) with MAXPHYADDR 40, NXE on, 1 GiB pages.
    for (at, bits) in [
        (0x1000, 0x2007 | 0x80),
        (0x1000, 0x2007 | (1 << 40)),
        (0x1000, 0x2007 | (1 << 51)),
        (0x2000, 0x4000_0087 | (1 << 13)),
        (0x2000, 0x4000_0087 | (1 << 29)),
        (0x3000, 0x20_0087 | (1 << 20)),
        (0x4000, 0x5007 | (1 << 45)),
    ] {
        let memory = Memory::new();
        for level in 1..=4 {
            memory.set(level << 12, ((level + 1) << 12) | 7);
        }
        assert!(walk(&memory, &long_mode(), Gva(0x77), Access::READ).is_ok());
        memory.set(at, bits);
        assert_eq!(walk(&memory, &long_mode(), Gva(0x77), Access::READ), fault(9, 0x77), "{at:x} {bits:x}");
        assert_eq!(memory.get(at), bits);
    }
    // Bits 52 to 62 are free for software, and NX counts only with NXE.
    let memory = Memory::new();
    memory.set(0x1000, 0x2007 | (0x7FF << 52));
    memory.set(0x2000, 0x87 | (1 << 63) | (1 << 12));
    let mut context = long_mode();
    assert!(walk(&memory, &context, Gva(0), Access::READ).is_ok());
    context.efer &= !efer::NXE;
    assert_eq!(walk(&memory, &context, Gva(0), Access::READ), fault(9, 0));
    context = Context { pages_1g: false, ..long_mode() };
    assert_eq!(walk(&memory, &context, Gva(0), Access::READ), fault(9, 0));
}

#[test]
fn legacy_modes() {
    let memory = Memory::new();
    let mut context = Context { cr0: cr0::PE, cr3: 0x1000, physical_bits: 40, ..Context::default() };
    assert_eq!(walk(&memory, &context, Gva(0x1_2345_6789), Access::WRITE).map(|t| t.gpa), Ok(Gpa(0x1_2345_6789)));
    context.cr0 |= cr0::PG;
    // A 4 MiB page above 4 GiB, but only with CR4.PSE; without it the same entry refers to a table.
    memory.set32(0x1000 + 4, 0x0080_0000 | (0x12 << 13) | 0x83);
    context.cr4 = cr4::PSE;
    let large = walk(&memory, &context, Gva(0x40_1234), Access::WRITE).unwrap();
    assert_eq!((large.gpa, large.page_bits), (Gpa(0x12_0080_1234), 22));
    assert_eq!(memory.get(0x1004) as u32, 0x0082_40E3);
    context.cr4 = 0;
    memory.set32(0x0082_4000 + 4, 0x5003);
    assert_eq!(walk(&memory, &context, Gva(0x40_1234), Access::READ).map(|t| t.gpa), Ok(Gpa(0x5234)));
    context.cr4 = cr4::PSE;
    memory.set32(0x1004, 0x0080_0083 | (1 << 21));
    assert_eq!(walk(&memory, &context, Gva(0x40_1234), Access::READ), fault(9, 0x40_1234));
    // PAE: the pointer table is 32-byte aligned, its entries have neither permissions nor accessed bits.
    context.cr4 = cr4::PAE;
    context.cr3 = 0x6020;
    context.cpl = 3;
    memory.set(0x6020 + 3 * 8, 0x7001);
    memory.set(0x7000 + 511 * 8, 0xA0_0000 | 0x87);
    assert_eq!(walk(&memory, &context, Gva(0xFFFF_FFFF), Access::WRITE).map(|t| t.gpa), Ok(Gpa(0xBF_FFFF)));
    assert_eq!(memory.get(0x6020 + 3 * 8), 0x7001);
    memory.set(0x6020 + 3 * 8, 0x7021);
    let with_bit_5 = walk(&memory, &context, Gva(0xFFFF_FFFF), Access::READ);
    assert_eq!(with_bit_5.map(|t| t.gpa), Ok(Gpa(0xBF_FFFF)), "QEMU's CPU sets it");
    for reserved in [1, 2, 6, 8, 40, 52, 63] {
        memory.set(0x6020 + 3 * 8, 0x7001 | (1 << reserved));
        assert_eq!(walk(&memory, &context, Gva(0xFFFF_FFFF), Access::READ), fault(0xD, 0xFFFF_FFFF), "{reserved}");
    }
    // Bits 62 to 52 are reserved in PAE entries, too.
    memory.set(0x6020 + 3 * 8, 0x7001);
    memory.set(0x7000 + 511 * 8, 0xA0_0000 | 0x87 | (1 << 60));
    assert_eq!(walk(&memory, &context, Gva(0xFFFF_FFFF), Access::READ), fault(0xD, 0xFFFF_FFFF));
}

#[test]
fn other_cpus_change_the_tables() {
    let memory = |race: Race, times| {
        let memory = Memory { race: Some((race, Cell::new(times))), ..Memory::new() };
        memory.set(0x1000, 0x2027);
        memory.set(0x2000, 0x4000_0087);
        memory
    };
    let go = |memory: &Memory| walk(memory, &long_mode(), Gva(0x55), Access::WRITE);
    // The entry goes away, loses W, or moves, between the read and the update: the walk uses what it is now.
    assert_eq!(go(&memory(|_| 0, 1)), fault(2, 0x55));
    assert_eq!(go(&memory(|e| e & !2, 1)), fault(3, 0x55));
    assert_eq!(go(&memory(|e| e ^ 0xC000_0000, 1)).map(|t| t.gpa), Ok(Gpa(0x8000_0055)));
    // Another CPU sets the bits: nothing left to do.
    let marked = memory(|e| e | 0x60, 1);
    assert_eq!(go(&marked).map(|t| t.gpa), Ok(Gpa(0x4000_0055)));
    assert_eq!(marked.writes.get(), 1);
    // Somebody who never stops is not waited for.
    assert_eq!(go(&memory(|e| e ^ 0x200, 1000)), Err(WalkError::Contended));
}

#[test]
fn tables_in_read_only_memory() {
    let mut memory = Memory::new();
    memory.set(0x1000, 0x2007);
    memory.set(0x2000, 0x4000_0087);
    memory.read_only = std::vec![1, 2];
    assert_eq!(walk(&memory, &long_mode(), Gva(0x55), Access::WRITE).map(|t| t.gpa), Ok(Gpa(0x4000_0055)));
    assert_eq!(memory.get(0x2000), 0x4000_0087);
}
