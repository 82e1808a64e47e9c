// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GDT, page tables and the special registers with which the first CPU enters a kernel.
//!
//! Selectors are those of Linux's boot protocol: code 0x10, data 0x18. There is no IDT: nothing may fault before the
//! kernel has its own.

use anyhow::Result;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Entry;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const PAGE_DIRECTORIES: u64 = 0xB000;
/// GiB that are mapped one to one; everything that is loaded lies below.
const MAPPED_GIB: u64 = 4;
const STACK_TOP: u64 = 0x8FF0;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const PTE_PRESENT_WRITE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;

/// Access rights of a descriptor as the GDT holds them in bits 40 to 55 (without the limit's upper bits).
const CODE_64: u16 = 0xA09B;
const CODE_32: u16 = 0xC09B;
const DATA: u16 = 0xC093;
const TSS_BUSY: u16 = 0x008B;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const TSS_LIMIT: u32 = 0x67;

/// The descriptor of a segment with base 0.
fn descriptor(rights: u16, limit: u32) -> u64 {
    let limit = if rights & 0x8000 != 0 { limit >> 12 } else { limit };
    u64::from(limit & 0xFFFF) | (u64::from(rights) << 40) | (u64::from((limit >> 16) & 0xF) << 48)
}

/// The same segment as it looks when it is loaded. `limit` is in bytes.
fn segment(selector: u16, rights: u16, limit: u32) -> kvm_segment {
    let bit = |n: u16| ((rights >> n) & 1) as u8;
    kvm_segment {
        base: 0,
        limit,
        selector,
        type_: (rights & 0xF) as u8,
        s: bit(4),
        dpl: ((rights >> 5) & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

/// Writes GDT and page tables for `entry` and puts the matching values into `sregs`.
pub fn set_up(memory: &GuestMemoryMmap, entry: Entry, sregs: &mut kvm_sregs) -> Result<()> {
    let code = match entry {
        Entry::Long { .. } => CODE_64,
        Entry::Pvh { .. } => CODE_32,
    };
    let gdt = [
        0,
        0,
        descriptor(code, u32::MAX),
        descriptor(DATA, u32::MAX),
        descriptor(TSS_BUSY, TSS_LIMIT),
        0, /* TSS, upper half */
    ];
    for (index, descriptor) in gdt.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    sregs.gdt = kvm_dtable { base: GDT, limit: (8 * gdt.len() - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cs = segment(CODE_SELECTOR, code, u32::MAX);
    let data = segment(DATA_SELECTOR, DATA, u32::MAX);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR, TSS_BUSY, TSS_LIMIT);
    match entry {
        Entry::Long { .. } => {
            write_page_tables(memory)?;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        Entry::Pvh { .. } => {
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.efer = 0;
        }
    }
    Ok(())
}

/// General registers for `entry`.
pub fn registers(entry: Entry) -> kvm_regs {
    let regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Long { rip, zero_page } => kvm_regs { rip, rsi: zero_page, rsp: STACK_TOP, rbp: STACK_TOP, ..regs },
        Entry::Pvh { rip, start_info } => kvm_regs { rip, rbx: start_info, ..regs },
    }
}

/// Maps the first [`MAPPED_GIB`] GiB one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<()> {
    memory.write_obj(PDPT | PTE_PRESENT_WRITE, GuestAddress(PML4))?;
    for gib in 0..MAPPED_GIB {
        let directory = PAGE_DIRECTORIES + gib * PAGE;
        memory.write_obj(directory | PTE_PRESENT_WRITE, GuestAddress(PDPT + 8 * gib))?;
        for index in 0..512 {
            let page = (gib * 512 + index) * LARGE_PAGE;
            memory.write_obj(page | PTE_LARGE | PTE_PRESENT_WRITE, GuestAddress(directory + 8 * index))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;

    #[test]
    fn descriptors_match_loaded_segments() {
        assert_eq!(descriptor(CODE_64, u32::MAX), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(CODE_32, u32::MAX), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(DATA, u32::MAX), 0x00CF_9300_0000_FFFF);
        assert_eq!(descriptor(TSS_BUSY, TSS_LIMIT), 0x0000_8B00_0000_0067);
        let code = segment(CODE_SELECTOR, CODE_64, u32::MAX);
        assert_eq!((code.type_, code.s, code.present, code.l, code.db, code.g), (0xB, 1, 1, 1, 0, 1));
        let tss = segment(TSS_SELECTOR, TSS_BUSY, TSS_LIMIT);
        assert_eq!((tss.type_, tss.s, tss.present, tss.g), (0xB, 0, 1, 0));
    }

    #[test]
    fn long_mode_maps_four_gib_one_to_one() {
        let memory = map_ram(16 << 20).unwrap();
        let mut sregs = kvm_sregs::default();
        set_up(&memory, Entry::Long { rip: 0, zero_page: 0 }, &mut sregs).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0, 0x1234_5678, 0xFEE0_0000, 0xFFFF_FFFFu64] {
            let pml4e = read(sregs.cr3 + 8 * ((address >> 39) & 511));
            let pdpte = read((pml4e & !0xFFF) + 8 * ((address >> 30) & 511));
            let pde = read((pdpte & !0xFFF) + 8 * ((address >> 21) & 511));
            assert_eq!(pde & !0x1F_FFFF, address & !0x1F_FFFF);
            assert_eq!(pde & 0xFFF, PTE_LARGE | PTE_PRESENT_WRITE);
        }
        assert_eq!(read(GDT + u64::from(CODE_SELECTOR)), descriptor(CODE_64, u32::MAX));
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
    }

    #[test]
    fn pvh_enters_without_paging() {
        let memory = map_ram(16 << 20).unwrap();
        let mut sregs = kvm_sregs { cr3: 1, cr4: 1, efer: 1, ..Default::default() };
        let entry = Entry::Pvh { rip: 0x100, start_info: 0x6000 };
        set_up(&memory, entry, &mut sregs).unwrap();
        assert_eq!((sregs.cr0 & (CR0_PE | CR0_PG), sregs.cr3, sregs.cr4, sregs.efer), (CR0_PE, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        let regs = registers(entry);
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100, 0x6000, 2));
    }
}
