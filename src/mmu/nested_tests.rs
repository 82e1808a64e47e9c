// SPDX-License-Identifier: GPL-2.0
//! Nested tables against a model that knows only pages, with every single store checked as hardware would see it.
#![forbid(unsafe_code)]

use super::format::{Format, MemoryType, Prot};
use super::nested::{Catch, MapError, Mapped, NestedTable, Tables, TABLES_PER_MAP};
use super::{Ept, Npt};
use crate::arch::paging::{entry, ept, Level, ADDRESS};
use crate::arch::{Gfn, Hpa};
use core::marker::PhantomData;
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

/// A small random number generator (xorshift).
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// Host page, write, execute.
type Seen = Option<(u64, bool, bool)>;

/// What may be seen while an operation runs: for each watched frame, before or after.
#[derive(Default)]
struct Watch {
    root: u64,
    depth: u32,
    seen: BTreeMap<u64, (Seen, Seen)>,
}

struct Fake<F: Format> {
    pages: BTreeMap<u64, Vec<u64>>,
    retired: BTreeSet<u64>,
    linked: BTreeSet<u64>,
    stock: usize,
    next: u64,
    watch: Watch,
    random: Random,
    /// Hardware touches entries: a chance of one in this many before an exchange; 0 is never.
    hardware: u64,
    stores: usize,
    format: PhantomData<F>,
}

impl<F: Format> Fake<F> {
    fn new(seed: u64) -> Self {
        Self {
            pages: BTreeMap::new(),
            retired: BTreeSet::new(),
            linked: BTreeSet::new(),
            stock: usize::MAX,
            next: 0x7700_0000,
            watch: Watch::default(),
            random: Random(seed),
            hardware: 0,
            stores: 0,
            format: PhantomData,
        }
    }

    fn at(&self, table: u64, index: usize) -> u64 {
        assert!(!self.retired.contains(&table), "retired table {table:x} is used");
        self.pages[&table][index]
    }

    /// A walk as hardware does it, without this crate's helpers.
    fn walk(&self, root: u64, depth: u32, gfn: u64) -> Seen {
        let mut table = root;
        let mut level = depth;
        loop {
            let entry = self.at(table, (gfn >> (9 * (level - 1))) as usize % 512);
            if !F::present(entry) {
                return None;
            }
            if level == 1 || entry & 0x80 != 0 {
                assert!(level <= 3, "page too large");
                let size = 1u64 << (12 + 9 * (level - 1));
                let base = entry & 0xF_FFFF_FFFF_F000;
                assert_eq!(base % size, 0, "misaligned page");
                return Some((base | ((gfn << 12) % size), entry & F::WRITABLE != 0, F::executable(entry)));
            }
            assert!(entry & F::WRITABLE != 0 && F::executable(entry), "a table restricts its pages");
            table = entry & 0xF_FFFF_FFFF_F000;
            level -= 1;
        }
    }

    fn relink(&mut self) {
        let mut linked = BTreeSet::new();
        let mut todo = std::vec![(self.watch.root, self.watch.depth)];
        while let Some((table, level)) = todo.pop() {
            assert!(linked.insert(table), "table linked twice");
            assert!(!self.retired.contains(&table), "retired table linked");
            if level > 1 {
                for &e in self.pages[&table].iter().filter(|&&e| F::present(e) && e & 0x80 == 0) {
                    todo.push((e & ADDRESS, level - 1));
                }
            }
        }
        self.linked = linked;
    }

    fn store(&mut self, table: u64, index: usize, new: u64) {
        assert!(!self.retired.contains(&table), "store to a retired table");
        self.stores += 1;
        let old = std::mem::replace(&mut self.pages.get_mut(&table).unwrap()[index], new);
        if !self.linked.contains(&table) {
            return;
        }
        self.relink();
        for (&gfn, (before, after)) in &self.watch.seen {
            let now = self.walk(self.watch.root, self.watch.depth, gfn);
            assert!(
                now.is_none() || now == *before || now == *after,
                "{gfn:x}: {now:x?} seen, neither {before:x?} nor {after:x?}; {old:x} became {new:x}"
            );
        }
    }

    /// Hardware uses the entry.
    fn touch(&mut self, table: u64, index: usize) {
        if self.hardware == 0 || self.random.below(self.hardware) != 0 || !self.linked.contains(&table) {
            return;
        }
        let random = self.random.next();
        let entry = &mut self.pages.get_mut(&table).unwrap()[index];
        if F::present(*entry) {
            *entry |= F::ACCESSED;
            if *entry & F::WRITABLE != 0 && random & 1 != 0 {
                *entry |= F::DIRTY;
            }
        }
    }
}

impl<F: Format> Tables for Fake<F> {
    fn read(&self, table: Hpa, index: usize) -> u64 {
        self.at(table.0, index)
    }

    fn write(&mut self, table: Hpa, index: usize, entry: u64) {
        let old = self.at(table.0, index);
        let both = F::ACCESSED | F::DIRTY;
        let same_page = F::present(old) && F::present(entry) && (old ^ entry) & (ADDRESS | F::LARGE) == 0;
        if self.linked.contains(&table.0) && same_page {
            assert!(old & both == both, "a plain store could lose what hardware sets");
        }
        let splits = F::present(entry) && old & F::LARGE != 0 && entry & F::LARGE == 0;
        assert!(!splits || !self.linked.contains(&table.0), "a split could lose what hardware sets");
        self.store(table.0, index, entry);
    }

    fn compare_exchange(&mut self, table: Hpa, index: usize, old: u64, new: u64) -> Result<(), u64> {
        self.touch(table.0, index);
        match self.at(table.0, index) {
            now if now == old => {
                self.store(table.0, index, new);
                Ok(())
            }
            now => Err(now),
        }
    }

    fn alloc(&mut self) -> Option<Hpa> {
        self.stock = self.stock.checked_sub(1)?;
        self.next += 0x1000;
        self.pages.insert(self.next, std::vec![0; 512]);
        Some(Hpa(self.next))
    }

    fn retire(&mut self, table: Hpa) {
        assert!(!self.linked.contains(&table.0) || table.0 == self.watch.root, "a linked table is retired");
        assert!(self.retired.insert(table.0), "retired twice");
    }
}

fn fresh<F: Format>(depth: u32, seed: u64) -> (Fake<F>, NestedTable<F>) {
    let mut fake = Fake::new(seed);
    let tree = NestedTable::new(&mut fake, depth, false).unwrap();
    fake.watch.root = tree.root().0;
    fake.watch.depth = depth;
    fake.relink();
    (fake, tree)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    level: Level,
    hpa: u64,
    write: bool,
    execute: bool,
}

impl Page {
    /// Where hardware logs, only large pages lose their permission.
    fn catch_writes(&mut self, by: Catch) {
        self.write &= by == Catch::Log && self.level == Level::Page4K;
    }
}

/// The model: pages by first frame.
#[derive(Clone, Default)]
struct Model(BTreeMap<u64, Page>);

impl Model {
    fn holder(&self, gfn: u64) -> Option<(u64, Page)> {
        let (&base, &page) = self.0.range(..=gfn).next_back()?;
        (gfn - base < page.level.pages()).then_some((base, page))
    }

    fn overlapping(&self, start: u64, end: u64) -> Vec<u64> {
        self.0.iter().filter(|(&b, p)| b < end && b + p.level.pages() > start).map(|(&b, _)| b).collect()
    }

    fn seen(&self, gfn: u64) -> Seen {
        self.holder(gfn).map(|(base, page)| (page.hpa + ((gfn - base) << 12), page.write, page.execute))
    }

    fn map(&mut self, gfn: u64, hpa: u64, level: Level, write: bool, execute: bool) {
        let base = gfn & !(level.pages() - 1);
        let hpa = hpa & !(level.bytes() - 1);
        let mut new = Page { level, hpa, write, execute };
        while let Some((at, old)) = self.holder(base) {
            if old.level < level {
                break;
            }
            if old.hpa + ((base - at) << 12) == hpa {
                if old.level > level && (old.write || !write) && (old.execute || !execute) {
                    return;
                }
                if old.level == level {
                    new.write |= old.write;
                    new.execute |= old.execute;
                }
            }
            self.0.remove(&at);
            if old.level == level {
                break;
            }
            let smaller = if old.level == Level::Page1G { Level::Page2M } else { Level::Page4K };
            for n in 0..512 {
                self.0.insert(
                    at + n * smaller.pages(),
                    Page { level: smaller, hpa: old.hpa + n * smaller.bytes(), ..old },
                );
            }
        }
        for at in self.overlapping(base, base + level.pages()) {
            self.0.remove(&at);
        }
        self.0.insert(base, new);
    }
}

/// Frames where something can go wrong: ends of pages and of tables, in three places of the address space.
fn interesting(depth: u32) -> Vec<u64> {
    let top = 1u64 << (9 * depth);
    let mut frames = BTreeSet::new();
    for base in [0, 0x40000, 0x8000000, top - 0x40000, top - 0x400] {
        for offset in [0, 1, 62, 63, 64, 511, 512, 513, 1023, 1024, 0x3FE00, 0x3FFFF] {
            frames.insert((base + offset) % top);
        }
    }
    frames.into_iter().collect()
}

fn random_operations<F: Format>(depth: u32, seed: u64, steps: u32) {
    let (mut fake, mut tree) = fresh::<F>(depth, seed);
    let frames = interesting(depth);
    let mut model = Model::default();
    let mut random = Random(seed ^ 0x5555);
    fake.hardware = 3;
    for step in 0..steps {
        let gfn = frames[random.below(frames.len() as u64) as usize];
        let before: BTreeMap<u64, Seen> = frames.iter().map(|&g| (g, model.seen(g))).collect();
        let choice = random.below(10);
        let count = [1, 2, 64, 512, 1024, 0x40000, 0x100000, u64::MAX][random.below(8) as usize];
        let mask = random.next() & random.next();
        let by = if random.below(2) == 0 { Catch::Fault } else { Catch::Log };
        let level = [Level::Page4K, Level::Page4K, Level::Page2M, Level::Page1G][random.below(4) as usize];
        let hpa = ((gfn & 0xFFFF_FFFF) << 12) + ((1 + random.below(2)) << 46);
        let prot = Prot {
            write: random.below(2) == 0,
            execute: random.below(2) == 0,
            accessed: random.below(2) == 0,
            dirty: random.below(2) == 0,
            memory_type: MemoryType::WriteBack,
        };
        let end = gfn.saturating_add(count).min(1 << (9 * depth));
        match choice {
            0..=4 => model.map(gfn, hpa, level, prot.write, prot.execute),
            5 => {
                for n in 0..16 {
                    if (gfn + n) / 512 == gfn / 512 && model.holder(gfn + n).is_none() && n % 3 != 1 {
                        let Prot { write, execute, .. } = prot;
                        model.0.insert(gfn + n, Page { level: Level::Page4K, hpa: hpa + (n << 12), write, execute });
                    }
                }
            }
            6 | 7 => {
                for at in model.overlapping(gfn, end) {
                    model.0.remove(&at);
                }
            }
            8 => {
                for at in model.overlapping(gfn, end) {
                    model.0.get_mut(&at).unwrap().catch_writes(by);
                }
            }
            _ => {
                for n in (0..64).filter(|n| (mask >> n) & 1 != 0) {
                    if let Some((at, _)) = model.holder(gfn + n) {
                        model.0.get_mut(&at).unwrap().catch_writes(by);
                    }
                }
            }
        }
        fake.watch.seen = frames.iter().map(|&g| (g, (before[&g], model.seen(g)))).collect();
        let (retired, tables) = (fake.retired.len(), fake.pages.len());
        let flush = match choice {
            0..=4 => tree.map(&mut fake, Gfn(gfn), Hpa(hpa), level, prot).unwrap().flush,
            5 => {
                let pages: Vec<_> = (0..16).map(|n| (n % 3 != 1).then_some(Hpa(hpa + (n << 12)))).collect();
                tree.map_around(&mut fake, Gfn(gfn), &pages, prot).unwrap();
                false
            }
            6 => tree.unmap_range(&mut fake, Gfn(gfn), count),
            7 => {
                let (mut flush, mut next, mut rounds) = (false, Some(Gfn(gfn)), 0);
                while let Some(at) = next {
                    let some = tree.unmap_some(&mut fake, at, end - at.0, 1 + (mask % 7) as usize);
                    assert!(rounds == 0 || at.0 >= gfn && at.0 < end);
                    (next, rounds) = (some.next, rounds + 1);
                    flush |= some.flush;
                    assert!(rounds < 20_000);
                }
                flush
            }
            8 => tree.catch_writes_in_range(&mut fake, Gfn(gfn), count, by),
            _ => tree.catch_writes(&mut fake, Gfn(gfn), mask, by),
        };
        assert!(fake.pages.len() - tables <= TABLES_PER_MAP);
        let lost = frames.iter().any(|g| match (before[g], model.seen(*g)) {
            (Some((page, write, execute)), Some((now, w, x))) => page != now || (write && !w) || (execute && !x),
            (Some(_), None) => true,
            (None, _) => false,
        });
        assert!(flush || !lost, "step {step}: a flush is owed");
        assert!(flush || retired == fake.retired.len(), "step {step}: a flush is owed before tables are freed");
        for &g in &frames {
            assert_eq!(fake.walk(tree.root().0, depth, g), model.seen(g), "step {step}, choice {choice}, {g:x}");
            let leaf = tree.lookup(&fake, Gfn(g));
            assert_eq!(leaf.map(|leaf| (leaf.hpa.0, leaf.write, leaf.execute)), model.seen(g));
            assert_eq!(leaf.map(|leaf| leaf.level), model.holder(g).map(|(_, page)| page.level));
            assert!(
                leaf.is_none_or(|leaf| leaf.write || !leaf.dirty),
                "who gives write permission back would miss a write"
            );
        }
    }
    assert_eq!(count_pages::<F>(&fake, tree.root().0, depth), model.0.len());
    fake.watch.seen.clear();
    let mut rounds = 0;
    while !tree.destroy(&mut fake, 5) {
        rounds += 1;
        assert!(rounds < 100_000);
    }
    assert_eq!(fake.retired.len(), fake.pages.len(), "a table leaked");
}

fn count_pages<F: Format>(fake: &Fake<F>, table: u64, level: u32) -> usize {
    fake.pages[&table]
        .iter()
        .filter(|&&e| F::present(e))
        .map(|&e| if level == 1 || e & 0x80 != 0 { 1 } else { count_pages(fake, e & ADDRESS, level - 1) })
        .sum()
}

#[test]
fn random_operations_npt4() {
    for seed in 1..=6 {
        random_operations::<Npt>(4, seed * 0x9E37_79B9, 400);
    }
}

#[test]
fn random_operations_npt5() {
    for seed in 1..=4 {
        random_operations::<Npt>(5, seed * 0x1234_5678_9ABD, 400);
    }
}

#[test]
fn random_operations_ept4() {
    for seed in 1..=6 {
        random_operations::<Ept>(4, seed * 0xDEAD_BEEF, 400);
    }
}

#[test]
fn entries_have_the_layout_of_the_manuals() {
    let prot = Prot::touched(true, true);
    assert_eq!(Npt::leaf(Hpa(0x12345000), Level::Page4K, prot), 0x12345067);
    assert_eq!(Npt::leaf(Hpa(0x40000000), Level::Page1G, Prot::touched(false, false)), 0x8000_0000_4000_00A5);
    assert_eq!(Npt::table(Hpa(0x5000)), 0x5027);
    assert_eq!(Ept::leaf(Hpa(0x12345000), Level::Page4K, prot), 0x12345377);
    assert_eq!(Ept::leaf(Hpa(0x200000), Level::Page2M, Prot::touched(false, false)), 0x2001F1);
    assert_eq!(Ept::table(Hpa(0x5000)), 0x5107);
    let device = Prot { memory_type: MemoryType::Uncached, ..prot };
    assert_eq!(Npt::leaf(Hpa(0xFEE00000), Level::Page4K, device), 0xFEE0_007F);
    assert_eq!(Ept::leaf(Hpa(0xFEE00000), Level::Page4K, device), 0xFEE0_0307);
    let read_only = Prot { dirty: true, ..Prot::touched(false, true) };
    assert_eq!(Npt::leaf(Hpa(0), Level::Page4K, read_only) & Npt::DIRTY, 0);
    assert_eq!(Ept::leaf(Hpa(0), Level::Page4K, read_only) & Ept::DIRTY, 0);
    assert_eq!(entry::NX, 1 << 63);
    assert_eq!(ept::TYPE_WB, 6);
}

#[test]
fn mapping_refuses_what_it_cannot_do() {
    let (mut fake, mut tree) = fresh::<Npt>(4, 7);
    let prot = Prot::touched(true, true);
    let beyond = Gfn(1 << 36);
    assert_eq!(tree.map(&mut fake, beyond, Hpa(0), Level::Page4K, prot), Err(MapError::BeyondRoot));
    assert_eq!(tree.map(&mut fake, Gfn(u64::MAX), Hpa(!0xFFF), Level::Page4K, prot), Err(MapError::BeyondRoot));
    assert_eq!(tree.map_around(&mut fake, beyond, &[Some(Hpa(0))], prot), Err(MapError::BeyondRoot));
    assert_eq!(tree.map(&mut fake, Gfn(0x201), Hpa(0x202000), Level::Page2M, prot), Err(MapError::Misaligned));
    assert_eq!(tree.lookup(&fake, beyond), None);
    assert!(!tree.unmap_range(&mut fake, beyond, 1));
    assert!(!tree.unmap_range(&mut fake, Gfn(u64::MAX), u64::MAX));
    for by in [Catch::Fault, Catch::Log] {
        assert!(!tree.catch_writes(&mut fake, Gfn(u64::MAX), !0, by));
        assert!(!tree.catch_writes_in_range(&mut fake, Gfn(0), u64::MAX, by));
    }
    assert_eq!(fake.stores, 0);
    // Every failure for want of tables leaves the tree as good as before, and a retry goes on from there.
    for stock in 0..3 {
        fake.stock = 1;
        assert_eq!(
            tree.map(&mut fake, Gfn(5), Hpa(0x5000), Level::Page4K, prot),
            Err(MapError::OutOfTables),
            "{stock}"
        );
        assert_eq!(tree.lookup(&fake, Gfn(5)), None);
        if stock == 1 {
            break;
        }
    }
    fake.stock = 1;
    let done = tree.map(&mut fake, Gfn(5), Hpa(0x5000), Level::Page4K, prot);
    assert_eq!(done, Ok(Mapped { changed: true, flush: false }));
    // A split without a table to split into.
    tree.map(&mut fake, Gfn(0x200), Hpa(0x200000), Level::Page2M, Prot::touched(false, true)).unwrap();
    let refused = tree.map(&mut fake, Gfn(0x201), Hpa(0x201000), Level::Page4K, prot);
    assert_eq!(refused, Err(MapError::OutOfTables));
    assert_eq!(tree.lookup(&fake, Gfn(0x201)).map(|leaf| leaf.level), Some(Level::Page2M));
}

#[test]
fn spurious_and_widening_faults() {
    let (mut fake, mut tree) = fresh::<Ept>(4, 9);
    let read = Prot::touched(false, true);
    let write = Prot::touched(true, true);
    assert!(tree.map(&mut fake, Gfn(3), Hpa(0x9000), Level::Page4K, read).unwrap().changed);
    let stores = fake.stores;
    assert_eq!(tree.map(&mut fake, Gfn(3), Hpa(0x9000), Level::Page4K, read), Ok(Mapped::default()));
    assert_eq!(fake.stores, stores);
    let widened = tree.map(&mut fake, Gfn(3), Hpa(0x9000), Level::Page4K, write).unwrap();
    assert_eq!(widened, Mapped { changed: true, flush: false });
    // A late read fault does not take the permission away again; another host page does replace it.
    assert!(!tree.map(&mut fake, Gfn(3), Hpa(0x9000), Level::Page4K, read).unwrap().changed);
    assert!(tree.map(&mut fake, Gfn(3), Hpa(0xA000), Level::Page4K, read).unwrap().flush);
    assert!(!tree.lookup(&fake, Gfn(3)).unwrap().write);
    // A small fault inside a large page that already allows it, even with its accessed bit cleared by aging.
    tree.map(&mut fake, Gfn(0x200), Hpa(0x200000), Level::Page2M, write).unwrap();
    assert!(tree.clear_accessed(&mut fake, Gfn(0x3FF), 1));
    assert_eq!(tree.map(&mut fake, Gfn(0x234), Hpa(0x234000), Level::Page4K, write), Ok(Mapped::default()));
}

#[test]
fn large_pages_stay_unexecutable_under_the_erratum() {
    let mut fake = Fake::<Ept>::new(3);
    let mut tree = NestedTable::<Ept>::new(&mut fake, 4, true).unwrap();
    let prot = Prot::touched(true, true);
    tree.map(&mut fake, Gfn(0x200), Hpa(0x200000), Level::Page2M, prot).unwrap();
    assert!(!tree.lookup(&fake, Gfn(0x234)).unwrap().execute);
    assert_eq!(tree.fault_level(Level::Page2M, true), Level::Page4K);
    assert_eq!(tree.fault_level(Level::Page2M, false), Level::Page2M);
    tree.map(&mut fake, Gfn(0x234), Hpa(0x234000), Level::Page4K, prot).unwrap();
    assert!(tree.lookup(&fake, Gfn(0x234)).unwrap().execute);
    assert!(!tree.lookup(&fake, Gfn(0x235)).unwrap().execute);
    assert!(tree.lookup(&fake, Gfn(0x235)).unwrap().write);
}

#[test]
fn aging_and_dirty_bits() {
    let (mut fake, mut tree) = fresh::<Npt>(4, 11);
    let mut fresh_page = Prot::touched(true, true);
    (fresh_page.accessed, fresh_page.dirty) = (false, false);
    for gfn in [10, 20] {
        tree.map(&mut fake, Gfn(gfn), Hpa(gfn << 12), Level::Page4K, fresh_page).unwrap();
    }
    tree.map(&mut fake, Gfn(0x400), Hpa(0x400000), Level::Page2M, Prot::touched(true, true)).unwrap();
    assert!(!tree.test_accessed(&mut fake, Gfn(0), 0x400));
    assert!(tree.maps_any(&mut fake, Gfn(0), 0x401) && !tree.maps_any(&mut fake, Gfn(0), 0));
    assert!(tree.test_accessed(&mut fake, Gfn(0), 0x401));
    assert!(tree.clear_accessed(&mut fake, Gfn(0), 0x500));
    assert!(!tree.clear_accessed(&mut fake, Gfn(0), 0x500));
    // Pages of 4 KiB without a dirty bit are caught already; the large one loses both.
    assert!(!tree.catch_writes_in_range(&mut fake, Gfn(0), 0x400, Catch::Log));
    assert!(tree.catch_writes_in_range(&mut fake, Gfn(0), 0x401, Catch::Log));
    let large = tree.lookup(&fake, Gfn(0x400)).unwrap();
    assert!(!large.write && !large.dirty && tree.lookup(&fake, Gfn(10)).unwrap().write);
    tree.map(&mut fake, Gfn(10), Hpa(10 << 12), Level::Page4K, Prot::touched(true, true)).unwrap();
    assert!(tree.lookup(&fake, Gfn(10)).unwrap().dirty);
    assert!(tree.catch_writes(&mut fake, Gfn(10), 0x401, Catch::Log));
    assert!(!tree.catch_writes(&mut fake, Gfn(10), 0x401, Catch::Log));
    let small = tree.lookup(&fake, Gfn(10)).unwrap();
    assert!(small.write && !small.dirty);
}

/// A guest that writes, and a log that is harvested: what was written since the last harvest is in the next one.
fn every_write_is_logged<F: Format>(by: Catch, seed: u64) {
    let (mut fake, mut tree) = fresh::<F>(4, seed);
    let mut random = Random(seed);
    let (mut log, mut written) = (BTreeSet::new(), BTreeSet::new());
    tree.map(&mut fake, Gfn(0x200), Hpa(0x200000), Level::Page2M, Prot::touched(true, true)).unwrap();
    tree.catch_writes_in_range(&mut fake, Gfn(0), 0x1000, by);
    for step in 0..20_000 {
        let gfn = 0x1C0 + random.below(128);
        let hpa = Hpa(gfn << 12);
        match random.below(16) {
            0 => {
                assert!(written.is_subset(&log), "step {step}: {written:x?}, but {log:x?} was logged");
                for base in [0x1C0, 0x200] {
                    let bits =
                        log.iter().filter(|page| (base..base + 64).contains(*page)).map(|page| 1u64 << (page - base));
                    tree.catch_writes(&mut fake, Gfn(base), bits.sum(), by);
                }
                (log, written) = Default::default();
            }
            1 => {
                tree.unmap_range(&mut fake, Gfn(gfn), 1);
            }
            // A read, or a fetch, may give write permission where hardware logs.
            2..=4 => {
                let prot = Prot { write: by == Catch::Log, dirty: false, ..Prot::touched(true, random.below(2) == 0) };
                tree.map(&mut fake, Gfn(gfn), hpa, Level::Page4K, prot).unwrap();
            }
            _ => {
                written.insert(gfn);
                match tree.lookup(&fake, Gfn(gfn)) {
                    Some(leaf) if leaf.write && leaf.dirty => {}
                    Some(leaf) if leaf.write => {
                        assert_eq!((leaf.level, by), (Level::Page4K, Catch::Log));
                        log.insert(gfn);
                        tree.map(&mut fake, Gfn(gfn), hpa, Level::Page4K, Prot::touched(true, false)).unwrap();
                    }
                    _ => {
                        tree.map(&mut fake, Gfn(gfn), hpa, Level::Page4K, Prot::touched(true, false)).unwrap();
                        log.insert(gfn);
                    }
                }
            }
        }
    }
}

#[test]
fn writes_are_logged_by_faults_and_by_hardware() {
    every_write_is_logged::<Npt>(Catch::Fault, 21);
    every_write_is_logged::<Ept>(Catch::Fault, 22);
    every_write_is_logged::<Ept>(Catch::Log, 23);
}

/// Hardware that writes at the worst moments: no dirty bit may be lost by changing permissions or splitting.
#[test]
fn hardware_dirty_bits_survive_changes() {
    let (mut fake, mut tree) = fresh::<Npt>(4, 13);
    let mut clean = Prot::touched(true, false);
    clean.dirty = false;
    clean.accessed = false;
    for round in 0..200u64 {
        tree.map(&mut fake, Gfn(0x200), Hpa(0x200000), Level::Page2M, clean).unwrap();
        fake.hardware = 1;
        let dirty_before = tree.lookup(&fake, Gfn(0x234)).unwrap().dirty;
        if round % 2 == 0 {
            let other = Prot { execute: true, ..clean };
            tree.map(&mut fake, Gfn(0x234), Hpa(0x234000), Level::Page4K, other).unwrap();
        } else {
            tree.clear_accessed(&mut fake, Gfn(0x200), 1);
        }
        // Whatever hardware set in the entry that was replaced is in every entry that replaces it.
        let dirty: Vec<bool> =
            [0x200, 0x233, 0x3FF].map(|g| tree.lookup(&fake, Gfn(g)).unwrap().dirty).into_iter().collect();
        assert!(dirty.iter().all(|&d| d == dirty[0]) && (dirty[0] || !dirty_before));
        fake.hardware = 0;
        tree.unmap_range(&mut fake, Gfn(0), 0x400);
    }
}

#[test]
fn unmapping_in_steps_is_bounded_and_frees_tables() {
    let (mut fake, mut tree) = fresh::<Npt>(4, 17);
    let prot = Prot::touched(true, true);
    for n in 0..200 {
        tree.map(&mut fake, Gfn(n * 0x200), Hpa(n << 21), Level::Page4K, prot).unwrap();
    }
    let tables = fake.pages.len();
    let first = tree.unmap_some(&mut fake, Gfn(0), 1 << 36, 10);
    assert_eq!(first.next, Some(Gfn(10 * 0x200)));
    assert_eq!(fake.retired.len(), 10);
    let rest = tree.unmap_some(&mut fake, first.next.unwrap(), 1 << 36, usize::MAX);
    assert_eq!(rest.next, None);
    // All but the root are gone, also those that no single step covered.
    assert_eq!(fake.retired.len(), tables - 1);
}
