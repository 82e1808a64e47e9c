// SPDX-License-Identifier: GPL-2.0
//! Memory slots: the rules of KVM_SET_USER_MEMORY_REGION one by one, then random histories against a plain model.
#![forbid(unsafe_code)]

use super::nested_tests::Random;
use super::slots::*;
use crate::arch::{Gfn, Hva, Level};
use std::collections::BTreeMap;
use std::vec::Vec;

const LIMITS: Limits = Limits { end: Gfn(1 << 40), user_end: Hva(0x7FFF_FFFF_F000) };

fn slot(id: u16, base: u64, pages: u64, flags: u32) -> Slot<()> {
    Slot { base: Gfn(base), pages, hva: Hva(0x1000_0000 + (base << 12)), id, flags, attachment: () }
}

fn request(slot: u32, gpa: u64, size: u64, hva: u64, flags: u32) -> Request {
    Request { slot, flags, guest_phys_addr: gpa, memory_size: size, userspace_addr: hva }
}

impl Table<()> for Vec<Slot<()>> {
    fn with_id(&self, id: u16) -> Option<&Slot<()>> {
        self.iter().find(|slot| slot.id == id)
    }

    fn around(&self, base: Gfn) -> [Option<&Slot<()>>; 2] {
        [self.iter().rfind(|slot| slot.base < base), self.iter().find(|slot| slot.base >= base)]
    }
}

/// Does to the table what `change` says.
fn apply(slots: &mut Vec<Slot<()>>, request: &Request, change: Change) {
    match change {
        Change::Nothing => return,
        Change::Create => {}
        Change::FlagsOnly => slots.retain(|slot| u32::from(slot.id) != request.slot),
        Change::Delete { from } | Change::Move { from } => slots.retain(|slot| slot.base != from),
    }
    if request.memory_size != 0 {
        slots.push(slot_of(request, ()));
        slots.sort_by_key(|slot| slot.base);
    }
}

#[test]
fn rules() {
    let slots =
        Vec::from([slot(0, 0, 0xA0, 0), slot(5, 0x100, 0x1000, flags::LOG_DIRTY_PAGES), slot(2, 0x2000, 0x10, 0)]);
    let hva = 0x1010_0000;
    let (invalid, overlap) = (Err(SlotError::Invalid), Err(SlotError::Overlap));
    #[rustfmt::skip]
    let rows = [
        (request(7, 0xA_0000, 0x6_0000, 0x5000, 0), Ok(Change::Create)),
        (request(7, 0x201_0000, 0x1000, 0x5000, flags::READONLY), Ok(Change::Create)),
        (request(32763, 0x201_0000, 0x1000, 0, 3), Ok(Change::Create)),
        (request(32764, 0x201_0000, 0x1000, 0x5000, 0), invalid),
        (request(1 << 16, 0x201_0000, 0x1000, 0x5000, 0), invalid),
        (request(u32::MAX, 0x201_0000, 0x1000, 0x5000, 0), invalid),
        (request(7, 0x201_0000, 0x1000, 0x5000, 4), invalid),
        (request(7, 0x201_0800, 0x1000, 0x5000, 0), invalid),
        (request(7, 0x201_0000, 0x1001, 0x5000, 0), invalid),
        (request(7, 0x201_0000, 0x1000, 0x5001, 0), invalid),
        // Past the user half: by one page, by wrapping, in the kernel half.
        (request(7, 0x201_0000, 0x1000, 0x7FFF_FFFF_E000, 0), Ok(Change::Create)),
        (request(7, 0x201_0000, 0x2000, 0x7FFF_FFFF_E000, 0), invalid),
        (request(7, 0x201_0000, 0x1000, 0xFFFF_FFFF_FFFF_F000, 0), invalid),
        (request(7, 0x201_0000, 0x1000, 0xFFFF_8000_0000_0000, 0), invalid),
        // Past the guest's address space: at all, by one page, by wrapping.
        (request(7, (1 << 52) - 0x1000, 0x1000, 0x5000, 0), Ok(Change::Create)),
        (request(7, (1 << 52) - 0x1000, 0x2000, 0x5000, 0), invalid),
        (request(7, 0xFFFF_FFFF_FFFF_F000, 0x1000, 0x5000, 0), invalid),
        // Too many pages.
        (request(7, 1 << 44, ((1 << 31) - 1) << 12, 0x5000, 0), Ok(Change::Create)),
        (request(7, 1 << 44, 1 << 43, 0x5000, 0), invalid),
        // Overlap on the left, on the right, inside, around.
        (request(7, 0x9_F000, 0x1000, 0x5000, 0), overlap),
        (request(7, 0xF_F000, 0x2000, 0x5000, 0), overlap),
        (request(7, 0x20_0000, 0x1000, 0x5000, 0), overlap),
        (request(7, 0x110_0000, 0x1000_0000, 0x5000, 0), overlap),
        // Deletion.
        (request(5, 0, 0, 0, 0), Ok(Change::Delete { from: Gfn(0x100) })),
        (request(5, 0, 0, 0, 4), invalid),
        (request(7, 0, 0, 0, 0), invalid),
        // Changes: nothing, flags, another size, address, write permission.
        (request(5, 0x10_0000, 0x100_0000, hva, 1), Ok(Change::Nothing)),
        (request(5, 0x10_0000, 0x100_0000, hva, 0), Ok(Change::FlagsOnly)),
        (request(5, 0x10_0000, 0x100_1000, hva, 1), invalid),
        (request(5, 0x10_0000, 0x100_0000, hva + 0x1000, 1), invalid),
        (request(5, 0x10_0000, 0x100_0000, hva, 2), invalid),
        (request(5, 0x10_0000, 0x100_0000, hva, 3), invalid),
        // Moves: over itself, past a neighbour, to the front of one, onto one, past the end.
        (request(5, 0x10_1000, 0x100_0000, hva, 1), Ok(Change::Move { from: Gfn(0x100) })),
        (request(5, 0x0F_F000, 0x100_0000, hva, 0), Ok(Change::Move { from: Gfn(0x100) })),
        (request(5, 0x300_0000, 0x100_0000, hva, 1), Ok(Change::Move { from: Gfn(0x100) })),
        (request(2, 0xA_0000, 0x1_0000, 0x1200_0000, 0), Ok(Change::Move { from: Gfn(0x2000) })),
        (request(5, 0x9_F000, 0x100_0000, hva, 1), overlap),
        (request(5, 0x101_0000, 0x100_0000, hva, 1), overlap),
        (request(5, (1 << 52) - 0xFF_F000, 0x100_0000, hva, 1), invalid),
    ];
    for (n, (request, wanted)) in rows.into_iter().enumerate() {
        assert_eq!(plan(&slots, &request, &LIMITS), wanted, "row {n}: {request:x?}");
    }
}

#[test]
fn histories() {
    let mut random = Random(77);
    let mut seen = BTreeMap::<_, u32>::new();
    for _ in 0..50 {
        let mut slots = Vec::new();
        let mut model = BTreeMap::<u32, Request>::new();
        for _ in 0..400 {
            let id = random.below(20) as u32;
            let old = model.get(&id).copied();
            let size = if random.below(4) == 0 { 0 } else { (1 + random.below(8)) << 12 };
            let mut asked = request(id, random.below(100) << 12, size, (1 + random.below(3)) << 12, 0);
            asked.flags = random.below(4) as u32;
            if let Some(old) = old.filter(|_| size != 0 && random.below(4) != 0) {
                asked = Request { slot: id, guest_phys_addr: asked.guest_phys_addr, flags: asked.flags, ..old };
                if random.below(2) == 0 {
                    asked.guest_phys_addr = old.guest_phys_addr;
                }
            }
            let overlaps = model.values().any(|other| {
                other.slot != id
                    && other.guest_phys_addr < asked.guest_phys_addr + asked.memory_size
                    && asked.guest_phys_addr < other.guest_phys_addr + other.memory_size
            });
            let wanted = match old {
                None if asked.memory_size == 0 => "invalid",
                Some(_) if asked.memory_size == 0 => "delete",
                None if overlaps => "overlap",
                None => "create",
                Some(old)
                    if Request { flags: 0, guest_phys_addr: 0, ..old }
                        != (Request { flags: 0, guest_phys_addr: 0, ..asked })
                        || (old.flags ^ asked.flags) & 2 != 0 =>
                {
                    "invalid"
                }
                Some(old) if old == asked => "nothing",
                Some(old) if old.guest_phys_addr == asked.guest_phys_addr => "flags",
                Some(_) if overlaps => "overlap",
                Some(_) => "move",
            };
            let planned = plan(&slots, &asked, &LIMITS);
            let got = match planned {
                Ok(Change::Create) => "create",
                Ok(Change::Delete { .. }) => "delete",
                Ok(Change::Move { .. }) => "move",
                Ok(Change::FlagsOnly) => "flags",
                Ok(Change::Nothing) => "nothing",
                Err(SlotError::Invalid) => "invalid",
                Err(SlotError::Overlap) => "overlap",
            };
            assert_eq!(got, wanted, "{asked:x?} {slots:x?}");
            *seen.entry(got).or_default() += 1;
            if let Ok(change) = planned {
                apply(&mut slots, &asked, change);
                model.insert(id, asked);
                if matches!(change, Change::Delete { .. }) {
                    model.remove(&id);
                }
            }
            assert!(slots.windows(2).all(|pair| pair[0].end() <= pair[1].base), "{slots:x?}");
            let gfn = random.below(110);
            let holder = model.values().find(|slot| {
                slot.guest_phys_addr >> 12 <= gfn && gfn < (slot.guest_phys_addr + slot.memory_size) >> 12
            });
            let found = find(&slots, Gfn(gfn), random.below(20) as usize);
            assert_eq!(found.map(|at| u32::from(slots[at].id)), holder.map(|slot| slot.slot));
        }
    }
    assert!(seen.len() == 7 && seen.values().all(|&n| n > 100), "{seen:?}");
}

#[test]
fn lookups() {
    let slots = [slot(0, 0, 0xA0, 0), slot(1, 0x100, 0x10, 0)];
    assert_eq!(find(&slots, Gfn(0x9F), 1), Some(0));
    assert_eq!(find(&slots, Gfn(0xA0), 0), None);
    assert_eq!(find(&slots, Gfn(0x10F), usize::MAX), Some(1));
    assert_eq!(find(&slots, Gfn(0x110), 1), None);
    assert_eq!(find(&slots, Gfn(u64::MAX), 1), None);
    assert_eq!(find::<()>(&[], Gfn(0), 0), None);
    assert_eq!(slots[1].index(Gfn(0x10F)), Some(0xF));
    assert_eq!(slots[1].index(Gfn(0xFF)), None);
    assert_eq!(slots[1].hva_of(Gfn(0x10F)), Some(Hva(0x1010_F000)));
}

#[test]
fn host_ranges() {
    let slot = slot(1, 0x100, 0x10, 0);
    let frames = |start, end| slot.frames_in(Hva(start), Hva(end)).map(|(gfn, count)| (gfn.0, count));
    assert_eq!(frames(0, u64::MAX), Some((0x100, 0x10)));
    assert_eq!(frames(0x1010_1000, 0x1010_3000), Some((0x101, 2)));
    assert_eq!(frames(0x1010_1FFF, 0x1010_2001), Some((0x101, 2)));
    assert_eq!(frames(0x1010_F000, 0x1011_F000), Some((0x10F, 1)));
    assert_eq!(frames(0x1011_0000, u64::MAX), None);
    assert_eq!(frames(0, 0x1010_0000), None);
    assert_eq!(frames(0x1010_5000, 0x1010_5000), None);
    assert_eq!(frames(0x1010_5000, 0x1010_4000), None);
}

#[test]
fn levels() {
    let big = |base, pages, hva, flags| Slot { base: Gfn(base), pages, hva: Hva(hva), id: 0, flags, attachment: () };
    let aligned = big(0x40000, 0x80000, 0x4000_0000, 0);
    assert_eq!(aligned.max_level(Gfn(0x40000)), Level::Page1G);
    assert_eq!(aligned.max_level(Gfn(0xBFFFF)), Level::Page1G);
    assert_eq!(aligned.max_level(Gfn(0xC0000)), Level::Page4K, "not in the slot");
    assert_eq!(big(0x40000, 0x7FFFF, 0x4000_0000, 0).max_level(Gfn(0xBFE00)), Level::Page4K, "past the end");
    assert_eq!(big(0x40000, 0x7FFFF, 0x4000_0000, 0).max_level(Gfn(0xBFDFF)), Level::Page2M);
    assert_eq!(big(0x40000, 0x80000, 0x4020_0000, 0).max_level(Gfn(0x40000)), Level::Page2M, "congruent to 2 MiB");
    assert_eq!(big(0x40000, 0x80000, 0x4000_1000, 0).max_level(Gfn(0x40000)), Level::Page4K, "not congruent");
    assert_eq!(big(0x401, 0x3FF, 0x1000, 0).max_level(Gfn(0x5FF)), Level::Page4K, "before the start");
    assert_eq!(big(0x401, 0x3FF, 0x1000, 0).max_level(Gfn(0x600)), Level::Page2M);
    assert_eq!(big(0x40000, 0x80000, 0x4000_0000, flags::LOG_DIRTY_PAGES).max_level(Gfn(0x40000)), Level::Page4K);
    assert_eq!(big(0x40000, 0x80000, 0x4000_0000, flags::READONLY).max_level(Gfn(0x40000)), Level::Page1G);
}
