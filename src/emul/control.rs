// SPDX-License-Identifier: GPL-2.0
//! Stack operations and branches. SDM Vol. 1 "Procedure Calls, Interrupts, and Exceptions", Vol. 3 "8086 Emulation".
//!
//! Software interrupts and IRET are in `gate.rs`, segments of protected mode in `descriptor.rs`.
#![forbid(unsafe_code)]

use super::alu::{bits, condition, mask};
use super::decode::{segment_name, Map, Mode};
use super::exec::Exec;
use super::memory::{canonical, Place};
use super::opcodes::{Form, Op};
use super::{Access, Cpu, Flow, Shadow, Step, GP, UD};
use crate::arch::cr::cr4;
use crate::arch::cr::rflags::{AC, AF, CF, DF, FIXED, ID, IF, IOPL, NT, OF, PF, RF, SF, TF, VM, ZF};
use crate::arch::segment::SegmentName;

/// RFLAGS bits that POPF and IRET write at privilege level 0.
const WRITABLE: u64 = CF | PF | AF | ZF | SF | TF | IF | DF | OF | IOPL | NT | AC | ID;

impl<C: Cpu> Exec<'_, C> {
    /// The current I/O privilege level.
    #[inline]
    pub(super) fn iopl(&self) -> u8 {
        ((self.rflags & IOPL) >> 12) as u8
    }

    pub(super) fn stack_operation(&mut self, size: u8) -> Flow<()> {
        match self.ins.op {
            Op::Push => {
                let value = match self.ins.form {
                    Form::OpReg => self.reg(self.ins.opcode_reg(), size),
                    Form::Rm => self.read_rm(size)?,
                    _ => self.ins.immediate as u64,
                };
                self.push(&[value], size)
            }
            Op::Pop => self.pop(size),
            Op::PushSeg => {
                let name = self.segment_in_opcode().ok_or(UD)?;
                let selector = self.cpu.segment(name).selector as u64;
                self.push(&[selector], size)
            }
            Op::PopSeg => {
                let name = self.segment_in_opcode().ok_or(UD)?;
                let selector = self.peek(0, size)? as u16;
                // The stack's width is that of the old SS.
                let width = self.stack_size();
                self.load_segment(name, selector)?;
                let sp = self.cpu.gpr(4).wrapping_add(size.into());
                self.set_reg(4, width, sp & mask(width));
                Ok(())
            }
            Op::Pusha => {
                let mut values = [0u64; 8];
                for (number, value) in values.iter_mut().enumerate() {
                    *value = self.reg(number, size);
                }
                self.push(&values, size)
            }
            Op::Popa => {
                let mut values = [0u64; 8];
                for (index, value) in values.iter_mut().rev().enumerate() {
                    *value = self.peek(index as i64, size)?;
                }
                self.move_stack(8 * size as i64);
                for (number, value) in values.into_iter().enumerate() {
                    if number != 4 {
                        self.set_reg(number, size, value);
                    }
                }
                Ok(())
            }
            Op::Pushf => {
                self.check_flag_stack()?;
                let value = self.rflags & !(VM | RF);
                self.push(&[value], size)
            }
            Op::Popf => {
                self.check_flag_stack()?;
                let value = self.peek(0, size)?;
                self.move_stack(size as i64);
                self.load_flags(value, size);
                Ok(())
            }
            Op::Enter => self.enter(size),
            Op::Leave => {
                // SP becomes BP, then BP is popped; the stack pointer is committed only if that works.
                let width = self.stack_size();
                let frame = self.cpu.gpr(5) & mask(width);
                let span = self.span(Place { segment: SegmentName::Ss, offset: frame }, size as usize, Access::Read)?;
                let value = self.load(&span)?;
                self.set_reg(4, width, frame.wrapping_add(size as u64));
                self.set_reg(5, size, value);
                Ok(())
            }
            Op::MovFromSeg => {
                let name = segment_name((self.ins.modrm >> 3) & 7).ok_or(UD)?;
                let selector = self.cpu.segment(name).selector as u64;
                // Memory gets 16 bits, a register as many as the operand size says.
                let size = if self.ins.has_memory() { 2 } else { size };
                let operand = self.rm(size, Access::Write)?;
                self.put(&operand, size, selector);
                Ok(())
            }
            Op::MovToSeg => {
                let name = segment_name((self.ins.modrm >> 3) & 7).ok_or(UD)?;
                if name == SegmentName::Cs {
                    return Err(UD);
                }
                let selector = self.read_rm(2)? as u16;
                self.load_segment(name, selector)
            }
            Op::LoadFar => self.load_far_pointer(size),
            _ => Err(Step::Unsupported),
        }
    }

    /// POP r/m and POP register.
    fn pop(&mut self, size: u8) -> Flow<()> {
        let value = self.peek(0, size)?;
        if self.ins.form == Form::OpReg {
            self.move_stack(size as i64);
            self.set_reg(self.ins.opcode_reg(), size, value);
            return Ok(());
        }
        if !self.ins.has_memory() {
            self.move_stack(size as i64);
            self.set_reg(self.ins.rm(), size, value);
            return Ok(());
        }
        // An address based on the stack pointer uses the value after the pop.
        let mut place = self.place();
        if self.ins.base == 4 {
            place.offset = place.offset.wrapping_add(size as u64) & mask(self.ins.address_size);
        }
        let span = self.span(place, size as usize, Access::Write)?;
        self.move_stack(size as i64);
        self.store(&span, value);
        Ok(())
    }

    fn enter(&mut self, size: u8) -> Flow<()> {
        if self.ins.second & 31 != 0 {
            return Err(Step::Unsupported);
        }
        let width = self.stack_size();
        let frame = self.cpu.gpr(4).wrapping_sub(size as u64) & mask(width);
        let value = self.reg(5, size);
        self.push(&[value], size)?;
        self.set_reg(5, size, frame);
        self.move_stack(self.ins.immediate.wrapping_neg());
        Ok(())
    }

    /// PUSHF and POPF in virtual-8086 mode need I/O privilege, or VME.
    fn check_flag_stack(&self) -> Flow<()> {
        if self.mode == Mode::Vm86 && self.iopl() < 3 {
            return Err(if self.cpu.cr(4) & cr4::VME != 0 { Step::Unsupported } else { GP });
        }
        Ok(())
    }

    /// Writes what a popped flags image may change.
    pub(super) fn load_flags(&mut self, value: u64, size: u8) {
        let mut writable = WRITABLE;
        let cpl = if self.mode == Mode::Real { 0 } else { self.cpu.cpl() };
        if cpl != 0 {
            writable &= !IOPL;
        }
        if cpl > self.iopl() {
            writable &= !IF;
        }
        writable &= mask(size);
        self.rflags = (self.rflags & !(writable | RF)) | (value & writable) | FIXED;
    }

    /// The segment register of PUSH and POP, and of LES and so on, in the opcode.
    fn segment_in_opcode(&self) -> Option<SegmentName> {
        segment_name((self.ins.opcode >> 3) & if self.ins.map == Map::OneByte { 3 } else { 7 })
    }

    /// Loads a segment register other than CS.
    fn load_segment(&mut self, name: SegmentName, selector: u16) -> Flow<()> {
        if self.mode.is_real() {
            self.load_real_segment(name, selector);
            return Ok(());
        }
        self.load_data_segment(name, selector)
    }

    /// Loads a segment register in real or virtual-8086 mode: limit and attributes stay.
    fn load_real_segment(&mut self, name: SegmentName, selector: u16) {
        let mut segment = self.cpu.segment(name);
        segment.selector = selector;
        segment.base = (selector as u64) << 4;
        self.cpu.set_segment(name, &segment);
        if name == SegmentName::Ss {
            self.shadow = Shadow::MovSs;
        }
    }

    /// Offset and selector of the far pointer in memory.
    fn far_pointer(&mut self, size: u8) -> Flow<(u64, u16)> {
        let place = self.place();
        let span = self.span(place, size as usize + 2, Access::Read)?;
        let mut data = [0u8; 16];
        self.load_bytes(&span, data.get_mut(..size as usize + 2).unwrap_or_default())?;
        let value = u128::from_le_bytes(data);
        Ok((value as u64 & mask(size), (value >> bits(size)) as u16))
    }

    fn load_far_pointer(&mut self, size: u8) -> Flow<()> {
        let name = match (self.ins.map, self.ins.opcode) {
            (Map::OneByte, 0xC4) => SegmentName::Es,
            (Map::OneByte, _) => SegmentName::Ds,
            (_, 0xB2) => SegmentName::Ss,
            (_, 0xB4) => SegmentName::Fs,
            _ => SegmentName::Gs,
        };
        let (offset, selector) = self.far_pointer(size)?;
        self.load_segment(name, selector)?;
        self.set_reg(self.ins.reg(), size, offset);
        Ok(())
    }

    /// Checks a branch target and cuts it to the operand size.
    pub(super) fn target(&self, target: u64, size: u8) -> Flow<u64> {
        let target = target & mask(size);
        let good = if self.mode.is_long() {
            canonical(self.cpu, target)
        } else {
            target <= self.cpu.segment(SegmentName::Cs).limit as u64
        };
        if good {
            Ok(target)
        } else {
            Err(GP)
        }
    }

    fn relative(&mut self, size: u8) -> Flow<()> {
        self.next_rip = self.target(self.next_rip.wrapping_add(self.ins.immediate as u64), size)?;
        Ok(())
    }

    pub(super) fn branch_operation(&mut self, size: u8) -> Flow<()> {
        match self.ins.op {
            Op::Jcc if condition(self.ins.opcode, self.rflags) => self.relative(size),
            Op::Jcc => Ok(()),
            Op::Jmp => self.relative(size),
            Op::Call => {
                let back = self.next_rip;
                self.relative(size)?;
                self.push(&[back], size)
            }
            Op::JmpIndirect => {
                let target = self.read_rm(size)?;
                self.next_rip = self.target(target, size)?;
                Ok(())
            }
            Op::CallIndirect => {
                let target = self.read_rm(size)?;
                let back = self.next_rip;
                self.next_rip = self.target(target, size)?;
                self.push(&[back], size)
            }
            Op::Ret => {
                let target = self.peek(0, size)?;
                self.next_rip = self.target(target, size)?;
                self.move_stack((size as i64).wrapping_add(self.ins.immediate));
                Ok(())
            }
            Op::Loop => self.loop_count(size),
            _ => self.far_operation(size),
        }
    }

    /// LOOPNE, LOOPE, LOOP and JCXZ: the counter has the address size.
    fn loop_count(&mut self, size: u8) -> Flow<()> {
        let width = self.ins.address_size;
        let count = self.reg(1, width);
        let zero = self.rflags & ZF != 0;
        if self.ins.opcode == 0xE3 {
            return if count == 0 { self.relative(size) } else { Ok(()) };
        }
        let count = count.wrapping_sub(1) & mask(width);
        let taken = count != 0
            && match self.ins.opcode {
                0xE0 => !zero,
                0xE1 => zero,
                _ => true,
            };
        if taken {
            self.relative(size)?;
        }
        self.set_reg(1, width, count);
        Ok(())
    }

    fn far_operation(&mut self, size: u8) -> Flow<()> {
        // A register operand of a far branch was refused by the decoder.
        match self.ins.op {
            Op::JmpFar => self.jump_far(self.ins.second, self.ins.immediate as u64, size),
            Op::CallFar => self.call_far(self.ins.second, self.ins.immediate as u64, size),
            Op::JmpFarIndirect => {
                let (offset, selector) = self.far_pointer(size)?;
                self.jump_far(selector, offset, size)
            }
            Op::CallFarIndirect => {
                let (offset, selector) = self.far_pointer(size)?;
                self.call_far(selector, offset, size)
            }
            Op::RetFar if !self.mode.is_real() => self.return_to_segment(size, self.ins.immediate),
            Op::RetFar => {
                let (offset, selector) = (self.peek(0, size)?, self.peek(1, size)?);
                self.jump_far(selector as u16, offset, size)?;
                self.move_stack((2 * size as i64).wrapping_add(self.ins.immediate));
                Ok(())
            }
            Op::Iret => self.interrupt_return(size),
            Op::Into if self.rflags & OF == 0 && !self.mode.is_long() => Ok(()),
            Op::Int | Op::Int3 | Op::Into => self.software_interrupt(),
            _ => Err(Step::Unsupported),
        }
    }

    pub(super) fn jump_far(&mut self, selector: u16, offset: u64, size: u8) -> Flow<()> {
        if !self.mode.is_real() {
            return self.jump_to_segment(selector, offset & mask(size));
        }
        self.next_rip = self.target(offset, size)?;
        self.load_real_segment(SegmentName::Cs, selector);
        Ok(())
    }

    fn call_far(&mut self, selector: u16, offset: u64, size: u8) -> Flow<()> {
        if !self.mode.is_real() {
            return self.call_segment(selector, offset & mask(size), size);
        }
        self.target(offset, size)?;
        let back = [self.cpu.segment(SegmentName::Cs).selector as u64, self.next_rip];
        self.push(&back, size)?;
        self.jump_far(selector, offset, size)
    }

    /// CLC, STC, CLI, STI, CLD, STD by their opcode.
    pub(super) fn flag_operation(&mut self) -> Flow<()> {
        let on = self.ins.opcode & 1 != 0;
        let bit = match self.ins.opcode & 6 {
            0 => CF,
            4 => DF,
            _ => {
                let cpl = if self.mode == Mode::Real { 0 } else { self.cpu.cpl() };
                if cpl > self.iopl() {
                    // Virtual interrupts of VME and PVI.
                    let cr4 = self.cpu.cr(4);
                    let virtual_if = if self.mode == Mode::Vm86 { cr4::VME } else { cr4::PVI };
                    return Err(if cpl == 3 && cr4 & virtual_if != 0 { Step::Unsupported } else { GP });
                }
                if on && self.rflags & IF == 0 {
                    self.shadow = Shadow::Sti;
                }
                IF
            }
        };
        self.set_flag(bit, on);
        Ok(())
    }
}
