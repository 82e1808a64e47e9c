// SPDX-License-Identifier: GPL-2.0
//! Control and debug registers, descriptor tables, ports, and the flag instructions. SDM Vol. 3 "System Architecture Overview",
//! Vol. 1 "Input/Output".
#![forbid(unsafe_code)]

use super::alu::{bits, mask, ARITHMETIC};
use super::exec::Exec;
use super::opcodes::Op;
use super::{Access, Cpu, Flow, Mode, Step, Table, Waiting, GP, UD};
use crate::arch::cr::rflags::{CF, OF};
use crate::arch::cr::{cr0, cr4, dr, rflags};
use crate::arch::segment::DescriptorTable;
use crate::arch::Gva;
use crate::guest::event::vector as exception;
use crate::guest::Exception;

impl<C: Cpu> Exec<'_, C> {
    pub(super) fn system_operation(&mut self, size: u8) -> Flow<()> {
        match self.ins.op {
            Op::Flag => return self.flag_operation(),
            Op::Cmc => self.rflags ^= CF,
            Op::Lahf => {
                let value = (self.rflags & (ARITHMETIC & !OF)) | rflags::FIXED;
                self.set_high_a(value);
            }
            Op::Sahf => {
                let kept = ARITHMETIC & !OF;
                self.rflags = self.rflags & !kept | (self.cpu.gpr(0) >> 8) & kept;
            }
            Op::Smsw | Op::Sldt | Op::Str | Op::Sgdt | Op::Sidt => return self.store_system(size),
            Op::MovFromCr | Op::MovToCr | Op::MovFromDr | Op::MovToDr => {
                self.privileged()?;
                return self.move_register();
            }
            Op::Clts => {
                self.privileged()?;
                let value = self.cpu.cr(0) & !cr0::TS;
                self.cpu.set_cr(0, value).map_err(Step::Fault)?;
            }
            Op::Lmsw => {
                self.privileged()?;
                let source = self.read_rm(2)?;
                // It writes PE, MP, EM and TS, and cannot clear PE.
                let old = self.cpu.cr(0);
                let value = old & !(cr0::MP | cr0::EM | cr0::TS) | source & 0xF;
                self.cpu.set_cr(0, value).map_err(Step::Fault)?;
            }
            Op::Lldt | Op::Ltr => return self.load_system_segment(),
            Op::Lgdt | Op::Lidt => {
                self.privileged()?;
                return self.load_table();
            }
            Op::Invlpg => {
                self.privileged()?;
                let place = self.place();
                let mut at = place.offset;
                if !self.mode.is_long() || place.segment as u8 >= 4 {
                    at = at.wrapping_add(self.cpu.segment(place.segment).base);
                }
                self.cpu.invlpg(Gva(if self.mode.is_long() { at } else { at & mask(4) }));
            }
            _ => return Err(Step::Unsupported),
        }
        Ok(())
    }

    /// AH, whatever the REX prefix.
    fn set_high_a(&mut self, value: u64) {
        let old = self.cpu.gpr(0);
        self.cpu.set_gpr(0, old & !0xFF00 | (value & 0xFF) << 8);
    }

    /// #GP(0) unless at privilege level 0.
    fn privileged(&self) -> Flow<()> {
        if self.mode != Mode::Real && self.cpu.cpl() != 0 {
            return Err(GP);
        }
        Ok(())
    }

    /// SMSW, SLDT, STR, SGDT and SIDT: anybody's, unless UMIP forbids.
    fn store_system(&mut self, size: u8) -> Flow<()> {
        if self.mode != Mode::Real && self.cpu.cpl() != 0 && self.cpu.cr(4) & cr4::UMIP != 0 {
            return Err(GP);
        }
        let word = match self.ins.op {
            Op::Smsw => Some(self.cpu.cr(0)),
            Op::Sldt => Some(self.cpu.ldt().selector.into()),
            Op::Str => Some(self.cpu.tss().selector.into()),
            _ => None,
        };
        if let Some(value) = word {
            let size = if self.ins.has_memory() { 2 } else { size };
            let operand = self.rm(size, Access::Write)?;
            self.put(&operand, size, value);
            return Ok(());
        }
        let table = self.cpu.table(if self.ins.op == Op::Sgdt { Table::Gdt } else { Table::Idt });
        let len = if self.mode.is_long() { 10 } else { 6 };
        let place = self.place();
        let span = self.span(place, len, Access::Write)?;
        let data = ((table.base as u128) << 16 | table.limit as u128).to_le_bytes();
        self.store_bytes(&span, data.get(..len).unwrap_or_default());
        Ok(())
    }

    fn load_table(&mut self) -> Flow<()> {
        let len = if self.mode.is_long() { 10 } else { 6 };
        let place = self.place();
        let span = self.span(place, len, Access::Read)?;
        let mut data = [0u8; 16];
        self.load_bytes(&span, data.get_mut(..len).unwrap_or_default())?;
        let value = u128::from_le_bytes(data);
        let mut base = (value >> 16) as u64;
        if self.mode.is_long() {
            if !super::memory::canonical(self.cpu, base) {
                return Err(GP);
            }
        } else if self.ins.operand_size == 2 {
            base &= 0xFF_FFFF;
        }
        let which = if self.ins.op == Op::Lgdt { Table::Gdt } else { Table::Idt };
        self.cpu.set_table(which, DescriptorTable { base, limit: value as u16 });
        Ok(())
    }

    /// MOV to and from control and debug registers; 64 bits wide in 64-bit mode, else 32.
    fn move_register(&mut self) -> Flow<()> {
        let size = if self.mode.is_long() { 8 } else { 4 };
        let (number, gpr) = (self.ins.reg() as u8, self.ins.rm());
        match self.ins.op {
            Op::MovFromCr | Op::MovToCr => {
                if !matches!(number, 0 | 2 | 3 | 4 | 8) {
                    return Err(UD);
                }
                if self.ins.op == Op::MovFromCr {
                    let value = self.cpu.cr(number);
                    self.set_reg(gpr, size, value);
                } else {
                    let value = self.reg(gpr, size);
                    self.cpu.set_cr(number, value).map_err(Step::Fault)?;
                }
            }
            op => {
                // DR4 and DR5 are other names of DR6 and DR7, unless debug extensions forbid.
                if number > 7 || (matches!(number, 4 | 5) && self.cpu.cr(4) & cr4::DE != 0) {
                    return Err(UD);
                }
                let number = if matches!(number, 4 | 5) { number + 2 } else { number };
                if self.cpu.dr(7) & dr::DR7_GD != 0 {
                    let fault = Exception { vector: exception::DB, error_code: None, payload: Some(dr::DR6_BD) };
                    return Err(Step::Fault(fault));
                }
                if op == Op::MovFromDr {
                    let value = self.cpu.dr(number);
                    self.set_reg(gpr, size, value);
                } else {
                    let value = self.reg(gpr, size);
                    if number >= 6 && value >> 32 != 0 {
                        return Err(GP);
                    }
                    self.cpu.set_dr(number, value).map_err(Step::Fault)?;
                }
            }
        }
        Ok(())
    }

    /// IN and OUT.
    pub(super) fn port(&mut self, size: u8) -> Flow<()> {
        let immediate = self.ins.opcode & 8 == 0;
        let port = if immediate { self.ins.immediate as u16 & 0xFF } else { self.cpu.gpr(2) as u16 };
        self.check_port(port, size)?;
        let mut data = [0u8; 8];
        if self.ins.op == Op::In {
            if self.io.port_elements == 0 {
                self.io.waiting = Waiting::Port(1);
                return Err(Step::PortIn { port, size, count: 1 });
            }
            self.cpu.read_port_data(0, data.get_mut(..size as usize).unwrap_or_default());
            self.set_reg(0, size, u64::from_le_bytes(data));
            return Ok(());
        }
        data = self.reg(0, size).to_le_bytes();
        self.cpu.write_port_data(0, data.get(..size as usize).unwrap_or_default());
        self.retire();
        Err(Step::PortOut { port, size, count: 1 })
    }

    /// I/O privilege, and past it the permission bitmap in the TSS. SDM Vol. 1 "I/O Permission Bit Map".
    pub(super) fn check_port(&mut self, port: u16, size: u8) -> Flow<()> {
        if self.mode == Mode::Real || (self.mode != Mode::Vm86 && self.cpu.cpl() <= self.iopl()) {
            return Ok(());
        }
        let tss = self.cpu.tss();
        let limit = tss.limit as u64;
        // Types 9 and 11 are the TSS with 32-bit (or wider) layout, the only ones with a bitmap.
        if !tss.attributes.present() || !matches!(tss.attributes.kind(), 9 | 11) || limit < 103 {
            return Err(GP);
        }
        let map = self.system_word(tss.base.wrapping_add(102))? as u64;
        let at = map + (port >> 3) as u64;
        // The CPU always reads two bytes.
        if at + 1 > limit {
            return Err(GP);
        }
        let denied = self.system_word(tss.base.wrapping_add(at))? >> (port & 7);
        if denied as u64 & mask_bits(size) != 0 {
            return Err(GP);
        }
        Ok(())
    }

    /// Two bytes of a system table.
    pub(super) fn system_word(&mut self, at: u64) -> Flow<u16> {
        let mut word = [0u8; 2];
        for (index, byte) in word.iter_mut().enumerate() {
            let at = at.wrapping_add(index as u64);
            let linear = Gva(if self.mode.is_long() { at } else { at & mask(4) });
            let gpa = self.cpu.translate(linear, Access::SystemRead).map_err(Step::Fault)?;
            self.cpu.read_ram(gpa, core::slice::from_mut(byte)).map_err(|_| Step::Unsupported)?;
        }
        Ok(u16::from_le_bytes(word))
    }
}

/// As many ones as there are ports in an access of `size` bytes.
const fn mask_bits(size: u8) -> u64 {
    (1 << (bits(size) / 8)) - 1
}
