// SPDX-License-Identifier: GPL-2.0
//! The vCPU that krab's emulator drives: flat segments, and two mapped stretches of memory.

use krab_pure::arch::cr::{cr0, cr4, efer};
use krab_pure::arch::segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName};
use krab_pure::arch::{Gpa, Gva};
use krab_pure::emul::{Access, Cpu, Mode, NotRam, Shadow, Table, X87Words};
use krab_pure::guest::Exception;

use crate::generate::Layout;

pub struct Vcpu {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub xmm: [[u8; 32]; 16],
    pub code: Vec<u8>,
    pub data: Vec<u8>,
    layout: Layout,
}

impl Vcpu {
    pub fn new(layout: Layout) -> Self {
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 2,
            xmm: [[0; 32]; 16],
            // HLT, so that the engine stops wherever it strays.
            code: vec![0xF4; Layout::CODE_LEN as usize],
            data: vec![0; Layout::DATA_LEN as usize],
            layout,
        }
    }

    /// The bytes of memory at `at`, which stay in one mapping.
    fn memory(&mut self, at: u64, len: usize) -> Result<&mut [u8], NotRam> {
        let (base, memory) = if at >= self.layout.data && at < self.layout.data + Layout::DATA_LEN {
            (self.layout.data, &mut self.data)
        } else {
            (self.layout.code, &mut self.code)
        };
        let start = at.checked_sub(base).ok_or(NotRam)? as usize;
        memory.get_mut(start..start + len).ok_or(NotRam)
    }

    fn maps(&self, at: u64) -> bool {
        at.wrapping_sub(self.layout.code) < Layout::CODE_LEN || at.wrapping_sub(self.layout.data) < Layout::DATA_LEN
    }
}

impl Cpu for Vcpu {
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
    fn set_interrupt_shadow(&mut self, _: Shadow) {}
    fn segment(&self, name: SegmentName) -> Segment {
        let (limit, big) = match self.layout.mode {
            Mode::Real | Mode::Protected16 => (0xFFFF, 0),
            _ => (u32::MAX, SegmentAttributes::DB),
        };
        let kind = match (name, self.layout.mode) {
            (SegmentName::Cs, Mode::Long64) => 0x9B | SegmentAttributes::L,
            (SegmentName::Cs, _) => 0x9B | big,
            _ => 0x93 | big,
        };
        Segment { base: 0, limit, selector: 0, attributes: SegmentAttributes(kind) }
    }
    fn set_segment(&mut self, _: SegmentName, _: &Segment) {}
    fn tss(&self) -> Segment {
        Segment::default()
    }
    fn set_tss(&mut self, _: &Segment) {}
    fn ldt(&self) -> Segment {
        Segment::default()
    }
    fn set_ldt(&mut self, _: &Segment) {}
    fn table(&self, _: Table) -> DescriptorTable {
        DescriptorTable::default()
    }
    fn set_table(&mut self, _: Table, _: DescriptorTable) {}
    fn cpl(&self) -> u8 {
        0
    }
    fn set_cpl(&mut self, _: u8) {}
    fn efer(&self) -> u64 {
        if self.layout.mode.is_long() {
            efer::LMA | efer::LME
        } else {
            0
        }
    }
    fn xcr0(&self) -> u64 {
        0
    }
    fn cr(&self, register: u8) -> u64 {
        match register {
            0 if self.layout.mode == Mode::Real => 0,
            0 => cr0::PE,
            // As the engine starts.
            4 if self.layout.mode != Mode::Real => cr4::OSFXSR,
            _ => 0,
        }
    }
    fn set_cr(&mut self, _: u8, _: u64) -> Result<(), Exception> {
        Err(Exception::GP0)
    }
    fn dr(&self, _: u8) -> u64 {
        0
    }
    fn set_dr(&mut self, _: u8, _: u64) -> Result<(), Exception> {
        Err(Exception::GP0)
    }
    fn x87_words(&self) -> X87Words {
        X87Words::INITIAL
    }
    fn initialize_x87(&mut self) {}
    fn invlpg(&mut self, _: Gva) {}
    fn translate(&mut self, at: Gva, access: Access) -> Result<Gpa, Exception> {
        if self.maps(at.0) {
            Ok(Gpa(at.0))
        } else {
            Err(Exception::page_fault(if access == Access::Write { 2 } else { 0 }, at.0))
        }
    }
    fn read_ram(&mut self, at: Gpa, to: &mut [u8]) -> Result<(), NotRam> {
        to.copy_from_slice(self.memory(at.0, to.len())?);
        Ok(())
    }
    fn write_ram(&mut self, at: Gpa, from: &[u8]) -> Result<(), NotRam> {
        self.memory(at.0, from.len())?.copy_from_slice(from);
        Ok(())
    }
    fn compare_exchange_ram(&mut self, at: Gpa, old: &[u8], new: &[u8]) -> Result<bool, NotRam> {
        let memory = self.memory(at.0, old.len())?;
        let same = memory == old;
        if same {
            memory.copy_from_slice(new);
        }
        Ok(same)
    }
    fn vector(&mut self, register: usize) -> [u8; 32] {
        self.xmm[register]
    }
    fn set_vector(&mut self, register: usize, value: &[u8; 32], vex: bool) {
        let len = if vex { 32 } else { 16 };
        self.xmm[register][..len].copy_from_slice(&value[..len]);
    }
    fn read_port_data(&mut self, _: usize, _: &mut [u8]) {}
    fn write_port_data(&mut self, _: usize, _: &[u8]) {}
}
