// SPDX-License-Identifier: GPL-2.0
//! A vCPU for tests: flat RAM with identity paging, a hole, and a device.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::vec;
use std::vec::Vec;

use crate::arch::cr::{cr0, cr4, efer, rflags, xcr0};
use crate::emul::*;

/// RAM is the first megabyte.
const RAM: usize = 1 << 20;
/// Not present: every access faults.
pub const HOLE: u64 = 0x8_0000;
/// Device memory starts here.
pub const DEVICE: u64 = 0xD000_0000;
/// Code is here unless a test says otherwise.
pub const CODE: u64 = 0x1000;

pub struct Mock {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: [Segment; 6],
    pub tss: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr: [u64; 9],
    pub dr: [u64; 8],
    pub efer: u64,
    pub cpl: u8,
    pub shadow: Shadow,
    pub vectors: [[u8; 32]; 16],
    pub x87: X87Words,
    pub port_data: Vec<u8>,
    pub ram: Vec<u8>,
    /// RAM that no write reaches.
    pub read_only: Range<usize>,
    pub translations: usize,
    pub lose_race: bool,
    pub invalidated: Option<Gva>,
}

impl Mock {
    pub fn new(mode: Mode) -> Self {
        let (cs, data) = match mode {
            Mode::Real | Mode::Vm86 => (0x93, 0x93),
            Mode::Protected16 => (0x9B, 0x93),
            Mode::Protected32 => (0xC9B, 0xC93),
            Mode::Long64 => (0xA9B, 0xC93),
        };
        let limit = if mode.is_real() || mode == Mode::Protected16 { 0xFFFF } else { u32::MAX };
        let segment = |kind| Segment { base: 0, limit, selector: 0, attributes: SegmentAttributes(kind) };
        let mut segments = [segment(data); 6];
        segments[SegmentName::Cs as usize] = segment(cs);
        let mut cr = [0; 9];
        cr[0] = if mode == Mode::Real { 0 } else { cr0::PE };
        cr[4] = cr4::OSFXSR | cr4::OSXSAVE;
        Self {
            gpr: [0; 16],
            rip: CODE,
            rflags: rflags::FIXED | if mode == Mode::Vm86 { rflags::VM } else { 0 },
            segments,
            tss: Segment::default(),
            ldt: Segment::default(),
            gdt: DescriptorTable::default(),
            idt: DescriptorTable { base: 0, limit: 0x3FF },
            cr,
            dr: [0; 8],
            efer: if mode == Mode::Long64 { efer::LMA | efer::LME } else { 0 },
            cpl: if mode == Mode::Vm86 { 3 } else { 0 },
            shadow: Shadow::None,
            vectors: [[0; 32]; 16],
            x87: X87Words::INITIAL,
            port_data: vec![0; 4096],
            ram: vec![0; RAM],
            read_only: 0..0,
            translations: 0,
            lose_race: false,
            invalidated: None,
        }
    }

    pub fn code(mode: Mode, code: &[u8]) -> Self {
        let mut mock = Self::new(mode);
        mock.ram[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
        mock.gpr[4] = 0x7000;
        mock
    }

    pub fn ram64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.ram[at as usize..at as usize + 8].try_into().unwrap())
    }

    pub fn set_ram(&mut self, at: u64, bytes: &[u8]) {
        self.ram[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn step(&mut self) -> Step {
        Emulator::new().step(self, None)
    }
}

impl Cpu for Mock {
    fn gpr(&self, register: usize) -> u64 {
        self.gpr[register]
    }
    fn set_gpr(&mut self, register: usize, value: u64) {
        self.gpr[register] = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, value: u64) {
        self.rflags = value;
    }
    fn set_interrupt_shadow(&mut self, shadow: Shadow) {
        self.shadow = shadow;
    }
    fn segment(&self, name: SegmentName) -> Segment {
        self.segments[name as usize]
    }
    fn set_segment(&mut self, name: SegmentName, value: &Segment) {
        self.segments[name as usize] = *value;
    }
    fn tss(&self) -> Segment {
        self.tss
    }
    fn set_tss(&mut self, value: &Segment) {
        self.tss = *value;
    }
    fn ldt(&self) -> Segment {
        self.ldt
    }
    fn set_ldt(&mut self, value: &Segment) {
        self.ldt = *value;
    }
    fn table(&self, which: Table) -> DescriptorTable {
        match which {
            Table::Gdt => self.gdt,
            Table::Idt => self.idt,
        }
    }
    fn set_table(&mut self, which: Table, value: DescriptorTable) {
        match which {
            Table::Gdt => self.gdt = value,
            Table::Idt => self.idt = value,
        }
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn set_cpl(&mut self, level: u8) {
        self.cpl = level;
    }
    fn efer(&self) -> u64 {
        self.efer
    }
    fn xcr0(&self) -> u64 {
        xcr0::X87 | xcr0::SSE | xcr0::AVX
    }
    fn cr(&self, register: u8) -> u64 {
        self.cr[register as usize]
    }
    fn set_cr(&mut self, register: u8, value: u64) -> Result<(), Exception> {
        if register == 4 && value == u64::MAX {
            return Err(Exception::GP0);
        }
        self.cr[register as usize] = value;
        Ok(())
    }
    fn dr(&self, register: u8) -> u64 {
        self.dr[register as usize]
    }
    fn set_dr(&mut self, register: u8, value: u64) -> Result<(), Exception> {
        self.dr[register as usize] = value;
        Ok(())
    }
    fn invlpg(&mut self, at: Gva) {
        self.invalidated = Some(at);
    }
    fn translate(&mut self, at: Gva, access: Access) -> Result<Gpa, Exception> {
        self.translations += 1;
        if at.0 & !0xFFF == HOLE {
            return Err(Exception::page_fault(if access == Access::Write { 2 } else { 0 }, at.0));
        }
        Ok(Gpa(at.0 & 0xF_FFFF_FFFF_FFFF))
    }
    fn read_ram(&mut self, at: Gpa, to: &mut [u8]) -> Result<(), NotRam> {
        assert!(at.page_offset() as usize + to.len() <= 4096, "access crosses a page");
        let at = at.0 as usize;
        to.copy_from_slice(self.ram.get(at..at + to.len()).ok_or(NotRam)?);
        Ok(())
    }
    fn write_ram(&mut self, at: Gpa, from: &[u8]) -> Result<(), NotRam> {
        assert!(at.page_offset() as usize + from.len() <= 4096, "access crosses a page");
        let at = at.0 as usize;
        if self.read_only.contains(&at) {
            return Err(NotRam);
        }
        self.ram.get_mut(at..at + from.len()).ok_or(NotRam)?.copy_from_slice(from);
        Ok(())
    }
    fn compare_exchange_ram(&mut self, at: Gpa, old: &[u8], new: &[u8]) -> Result<bool, NotRam> {
        assert!(old.len() == new.len() && at.page_offset() as usize + old.len() <= 4096);
        let range = at.0 as usize..at.0 as usize + old.len();
        let memory = self.ram.get_mut(range).ok_or(NotRam)?;
        if self.lose_race {
            return Ok(false);
        }
        let same = memory == old;
        if same {
            memory.copy_from_slice(new);
        }
        Ok(same)
    }
    fn vector(&mut self, register: usize) -> [u8; 32] {
        self.vectors[register]
    }
    fn set_vector(&mut self, register: usize, value: &[u8; 32], vex: bool) {
        let len = if vex { 32 } else { 16 };
        self.vectors[register][..len].copy_from_slice(&value[..len]);
    }
    fn x87_words(&self) -> X87Words {
        self.x87
    }
    fn initialize_x87(&mut self) {
        self.x87 = X87Words::INITIAL;
    }
    fn read_port_data(&mut self, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.port_data[offset..offset + to.len()]);
    }
    fn write_port_data(&mut self, offset: usize, from: &[u8]) {
        self.port_data[offset..offset + from.len()].copy_from_slice(from);
    }
}
