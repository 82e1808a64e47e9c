// SPDX-License-Identifier: GPL-2.0
//! String instructions. SDM Vol. 1 "String Operations", Vol. 2 "REP/REPE/REPZ/REPNE/REPNZ".
//!
//! Each iteration commits, so that an interrupt or a fault finds the registers as the CPU would leave them. The destination
//! is translated before a device is read: a page fault must not cost the device's data.
#![forbid(unsafe_code)]

use super::alu::{self, mask};
use super::exec::Exec;
use super::memory::Place;
use super::opcodes::Op;
use super::{prefix, Access, Cpu, Flow, Shadow, Step, Waiting, REP_BUDGET};
use crate::arch::addr::PAGE_SIZE;
use crate::arch::cr::rflags::{DF, RF, TF, ZF};
use crate::arch::segment::SegmentName;

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// Bytes moved at once between memory and a port.
const CHUNK: usize = 64;

impl<C: Cpu> Exec<'_, C> {
    fn repeats(&self) -> bool {
        self.ins.has(prefix::REP | prefix::REPNE)
    }

    /// DS:rSI, or with another segment.
    fn source(&self) -> Place {
        Place { segment: self.ins.segment, offset: self.reg(RSI, self.ins.address_size) }
    }

    /// ES:rDI, always.
    fn destination(&self) -> Place {
        Place { segment: SegmentName::Es, offset: self.reg(RDI, self.ins.address_size) }
    }

    /// Moves an index register by `count` elements.
    fn advance(&mut self, register: usize, size: u8, count: u64) {
        let by = count.wrapping_mul(size as u64);
        let by = if self.rflags & DF != 0 { by.wrapping_neg() } else { by };
        let width = self.ins.address_size;
        let value = self.reg(register, width).wrapping_add(by);
        self.set_reg(register, width, value);
    }

    /// Commits what an unfinished REP changed, with RF so that a breakpoint here does not hit again.
    fn pause(&mut self) -> Step {
        self.cpu.set_rflags(self.rflags | RF);
        self.cpu.set_interrupt_shadow(Shadow::None);
        Step::Done
    }

    pub(super) fn string(&mut self, size: u8) -> Flow<()> {
        let repeats = self.repeats();
        let width = self.ins.address_size;
        if repeats && self.reg(RCX, width) == 0 {
            return Ok(());
        }
        let compares = matches!(self.ins.op, Op::Cmps | Op::Scas);
        let mut budget = if self.rflags & TF != 0 { 1 } else { REP_BUDGET };
        loop {
            self.iterate(size)?;
            if !repeats {
                return Ok(());
            }
            let count = self.reg(RCX, width).wrapping_sub(1) & mask(width);
            self.set_reg(RCX, width, count);
            let wanted = self.ins.has(prefix::REP);
            if count == 0 || (compares && (self.rflags & ZF != 0) != wanted) {
                return Ok(());
            }
            budget = budget.saturating_sub(1);
            if budget == 0 || self.io.used != 0 || self.io.queued != 0 {
                return Err(self.pause());
            }
            if compares {
                // The next iteration may fault.
                self.cpu.set_rflags(self.rflags | RF);
            }
        }
    }

    /// One element.
    #[inline]
    fn iterate(&mut self, size: u8) -> Flow<()> {
        let len = size as usize;
        match self.ins.op {
            Op::Movs => {
                let from = self.span(self.source(), len, Access::Read)?;
                let to = self.span(self.destination(), len, Access::Write)?;
                let value = self.load(&from)?;
                self.store(&to, value);
                self.advance(RSI, size, 1);
                self.advance(RDI, size, 1);
            }
            Op::Stos => {
                let to = self.span(self.destination(), len, Access::Write)?;
                let value = self.reg(0, size);
                self.store(&to, value);
                self.advance(RDI, size, 1);
            }
            Op::Lods => {
                let from = self.span(self.source(), len, Access::Read)?;
                let value = self.load(&from)?;
                self.set_reg(0, size, value);
                self.advance(RSI, size, 1);
            }
            Op::Cmps => {
                let a = self.span(self.source(), len, Access::Read)?;
                let b = self.span(self.destination(), len, Access::Read)?;
                let (a, b) = (self.load(&a)?, self.load(&b)?);
                self.set_arithmetic(alu::sub(size, a, b, 0).1);
                self.advance(RSI, size, 1);
                self.advance(RDI, size, 1);
            }
            _ => {
                let b = self.span(self.destination(), len, Access::Read)?;
                let b = self.load(&b)?;
                self.set_arithmetic(alu::sub(size, self.reg(0, size), b, 0).1);
                self.advance(RDI, size, 1);
            }
        }
        Ok(())
    }

    /// How many elements one exit moves: up to the end of the page, if that many may be accessed; one if not, or backwards.
    fn batch(&mut self, place: Place, size: u8, write: bool) -> Flow<u64> {
        let at = self.linear(place, size as usize, write)?;
        if !self.repeats() || self.rflags & (DF | TF) != 0 {
            return Ok(1);
        }
        let in_page = (PAGE_SIZE - at.page_offset()) / (size as u64).max(1);
        let count = self.reg(RCX, self.ins.address_size).min(in_page);
        // An index that wraps, or reaches the segment's end, goes one by one.
        let bytes = count.wrapping_mul(size as u64);
        let wraps = place.offset.wrapping_add(bytes) > mask(self.ins.address_size);
        if count == 0 || wraps || self.linear(place, bytes as usize, write).is_err() {
            return Ok(1);
        }
        Ok(count)
    }

    /// INS and OUTS.
    pub(super) fn port_string(&mut self, size: u8) -> Flow<()> {
        let port = self.cpu.gpr(2) as u16;
        self.check_port(port, size)?;
        if self.repeats() && self.reg(RCX, self.ins.address_size) == 0 {
            return Ok(());
        }
        if self.ins.op == Op::Ins {
            self.input(port, size)
        } else {
            self.output(port, size)
        }
    }

    fn input(&mut self, port: u16, size: u8) -> Flow<()> {
        let place = self.destination();
        let elements = self.io.port_elements as u64;
        if elements == 0 {
            let mut count = self.batch(place, size, true)?;
            let span = self.span(place, (count as usize).wrapping_mul(size as usize), Access::Write)?;
            // A device as the destination takes one element at a time.
            if count > 1 && !self.is_ram(&span) {
                count = 1;
            }
            self.io.waiting = Waiting::Port(count as u16);
            return Err(Step::PortIn { port, size, count: count as u16 });
        }
        // Userspace may have changed the count since it was asked.
        let elements = if self.repeats() { elements.min(self.reg(RCX, self.ins.address_size)) } else { elements };
        let bytes = (elements as usize).wrapping_mul(size as usize);
        self.span(place, bytes, Access::Write)?;
        let mut done = 0usize;
        let mut chunk = [0u8; CHUNK];
        while done < bytes {
            let part = bytes.wrapping_sub(done).min(CHUNK);
            let Some(data) = chunk.get_mut(..part) else { break };
            self.cpu.read_port_data(done, data);
            let at = Place { segment: place.segment, offset: place.offset.wrapping_add(done as u64) };
            let span = self.span(at, part, Access::Write)?;
            self.store_bytes(&span, data);
            done = done.wrapping_add(part);
        }
        self.advance(RDI, size, elements);
        if self.count_down(elements) {
            Ok(())
        } else {
            Err(self.pause())
        }
    }

    fn output(&mut self, port: u16, size: u8) -> Flow<()> {
        let place = self.source();
        let mut count = self.batch(place, size, false)?;
        let span = self.span(place, (count as usize).wrapping_mul(size as usize), Access::Read)?;
        if count > 1 && !self.is_ram(&span) {
            count = 1;
        }
        let bytes = (count as usize).wrapping_mul(size as usize);
        let mut done = 0usize;
        let mut chunk = [0u8; CHUNK];
        while done < bytes {
            let part = bytes.wrapping_sub(done).min(CHUNK);
            let Some(data) = chunk.get_mut(..part) else { break };
            let at = Place { segment: place.segment, offset: place.offset.wrapping_add(done as u64) };
            let span = self.span(at, part, Access::Read)?;
            self.load_bytes(&span, data)?;
            self.cpu.write_port_data(done, data);
            done = done.wrapping_add(part);
        }
        self.advance(RSI, size, count);
        if self.count_down(count) {
            self.retire();
        } else {
            self.pause();
        }
        Err(Step::PortOut { port, size, count: count as u16 })
    }

    /// Takes `done` off rCX; whether the instruction is over.
    fn count_down(&mut self, done: u64) -> bool {
        if !self.repeats() {
            return true;
        }
        let width = self.ins.address_size;
        let left = self.reg(RCX, width).saturating_sub(done);
        self.set_reg(RCX, width, left);
        left == 0
    }
}
