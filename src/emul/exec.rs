// SPDX-License-Identifier: GPL-2.0
//! Executor: registers, operands, and the integer instructions. SDM Vol. 2.
//!
//! The order inside every instruction: translate all operands, read, compute, write memory, write registers. What can
//! fail or leave the step comes before what cannot, so an instruction that leaves has changed nothing.
#![forbid(unsafe_code)]

use super::alu::{self, mask, sign_extend, Shift, ARITHMETIC};
use super::decode::{rex, Instruction, Mode};
use super::memory::{Place, Span};
use super::opcodes::{Form, Op};
use super::{prefix, Access, Cpu, Flow, Io, Shadow, Step, UD};
use crate::arch::cr::rflags::{CF, OF, RF, ZF};
use crate::guest::event::vector as exception;
use crate::guest::Exception;

const DE: Step = Step::Fault(Exception::plain(exception::DE));

/// One execution of one instruction.
pub(super) struct Exec<'a, C: Cpu> {
    pub cpu: &'a mut C,
    pub io: &'a mut Io,
    pub ins: &'a Instruction,
    pub mode: Mode,
    /// RFLAGS as the instruction leaves them; committed by [`Self::retire`].
    pub rflags: u64,
    /// RIP after the instruction; a branch changes it.
    pub next_rip: u64,
    pub shadow: Shadow,
}

/// Where an operand is.
#[derive(Clone, Copy)]
pub(super) enum Operand {
    Register(usize),
    Memory(Span),
}

impl<'a, C: Cpu> Exec<'a, C> {
    #[inline]
    pub(super) fn new(cpu: &'a mut C, io: &'a mut Io, ins: &'a Instruction, mode: Mode, rip: u64) -> Self {
        let rflags = cpu.rflags();
        let next = rip.wrapping_add(ins.length as u64);
        let next_rip = if mode.is_long() { next } else { next & mask(4) };
        Self { cpu, io, ins, mode, rflags, next_rip, shadow: Shadow::None }
    }

    /// Commits flags, RIP and interrupt shadow.
    #[inline]
    pub(super) fn retire(&mut self) {
        self.cpu.set_rflags(self.rflags & !RF);
        self.cpu.set_rip(self.next_rip);
        self.cpu.set_interrupt_shadow(self.shadow);
    }

    /// Register `number` cut to `size`; without REX, byte registers 4 to 7 are AH, CH, DH and BH.
    #[inline]
    pub(super) fn reg(&self, number: usize, size: u8) -> u64 {
        if size == 1 && number & 0xC == 4 && !self.ins.has(prefix::REX) {
            return (self.cpu.gpr(number & 3) >> 8) & 0xFF;
        }
        self.cpu.gpr(number & 15) & mask(size)
    }

    /// Writes register `number`: 32 bits clear the upper half, 8 and 16 bits keep the rest.
    #[inline]
    pub(super) fn set_reg(&mut self, number: usize, size: u8, value: u64) {
        let value = value & mask(size);
        match size {
            4 | 8 => self.cpu.set_gpr(number & 15, value),
            1 if number & 0xC == 4 && !self.ins.has(prefix::REX) => {
                let old = self.cpu.gpr(number & 3);
                self.cpu.set_gpr(number & 3, old & !0xFF00 | value << 8);
            }
            _ => {
                let old = self.cpu.gpr(number & 15);
                self.cpu.set_gpr(number & 15, old & !mask(size) | value);
            }
        }
    }

    /// The ModRM.rm operand of `size` bytes.
    #[inline]
    pub(super) fn rm(&mut self, size: u8, access: Access) -> Flow<Operand> {
        if self.ins.has_memory() {
            Ok(Operand::Memory(self.operand_span(size, access)?))
        } else {
            Ok(Operand::Register(self.ins.rm()))
        }
    }

    #[inline]
    pub(super) fn get(&mut self, operand: &Operand, size: u8) -> Flow<u64> {
        match operand {
            Operand::Register(number) => Ok(self.reg(*number, size)),
            Operand::Memory(span) => self.load(span),
        }
    }

    /// Writes an operand that was not read before.
    #[inline]
    pub(super) fn put(&mut self, operand: &Operand, size: u8, value: u64) {
        match operand {
            Operand::Register(number) => self.set_reg(*number, size, value),
            Operand::Memory(span) => self.store(span, value),
        }
    }

    /// Writes an operand that held `old`, in one piece with its read if there is a LOCK prefix or `locked`.
    #[inline]
    fn update(&mut self, operand: &Operand, size: u8, old: u64, new: u64, locked: bool) -> Flow<()> {
        match operand {
            Operand::Register(number) => {
                self.set_reg(*number, size, new);
                Ok(())
            }
            Operand::Memory(span) => {
                let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
                let (old, new) = (old.get(..span.len).unwrap_or(&old), new.get(..span.len).unwrap_or(&new));
                self.store_locked(span, old, new, locked)
            }
        }
    }

    /// The ModRM.rm operand, read at `size` bytes.
    #[inline]
    pub(super) fn read_rm(&mut self, size: u8) -> Flow<u64> {
        let operand = self.rm(size, Access::Read)?;
        self.get(&operand, size)
    }

    #[inline]
    pub(super) fn set_arithmetic(&mut self, flags: u64) {
        self.rflags = self.rflags & !ARITHMETIC | flags;
    }

    #[inline]
    pub(super) fn set_flag(&mut self, bit: u64, on: bool) {
        self.rflags = if on { self.rflags | bit } else { self.rflags & !bit };
    }

    /// Executes the instruction; `Ok` means it is to be retired.
    #[inline]
    pub(super) fn run(&mut self) -> Flow<()> {
        let size = self.ins.operand_size;
        match self.ins.op {
            Op::Mov => self.mov(size),
            Op::Movzx8 => self.extend(1, false),
            Op::Movzx16 => self.extend(2, false),
            Op::Movsx8 => self.extend(1, true),
            Op::Movsx16 => self.extend(2, true),
            Op::Add | Op::Or | Op::Adc | Op::Sbb | Op::And | Op::Sub | Op::Xor => self.arithmetic(size),
            Op::Cmp | Op::Test => self.compare(size),
            Op::Inc | Op::Dec | Op::Not | Op::Neg => self.unary(size),
            Op::Undefined | Op::Prefix => Err(UD),
            Op::Unsupported => Err(Step::Unsupported),
            _ => self.run_other(size),
        }
    }

    /// Everything that is rare on devices: kept out of the hot path.
    #[inline(never)]
    fn run_other(&mut self, size: u8) -> Flow<()> {
        match self.ins.op {
            Op::Rol | Op::Ror | Op::Rcl | Op::Rcr | Op::Shl | Op::Sal | Op::Shr | Op::Sar => self.shift(size),
            Op::Shld | Op::Shrd => self.double_shift(size),
            Op::Mul | Op::Imul => self.multiply(size),
            Op::Div | Op::Idiv => self.divide(size),
            Op::ImulReg => self.multiply_register(size),
            Op::Bt | Op::Bts | Op::Btr | Op::Btc => self.bit_test(size),
            Op::Bsf | Op::Bsr | Op::Popcnt => self.bit_scan(size),
            Op::Movsxd => self.movsxd(size),
            Op::Movbe => self.movbe(size),
            Op::Movnti => {
                if self.ins.mandatory != 0 {
                    return Err(UD);
                }
                // There is no form of 16 bits.
                let size = if self.ins.rex & rex::W != 0 { 8 } else { 4 };
                let span = self.operand_span(size, Access::Write)?;
                let value = self.reg(self.ins.reg(), size);
                self.store(&span, value);
                Ok(())
            }
            Op::Lea => {
                let offset = self.place().offset;
                self.set_reg(self.ins.reg(), size, offset);
                Ok(())
            }
            Op::Xchg => {
                let operand = self.rm(size, Access::Write)?;
                let old = self.get(&operand, size)?;
                let new = self.reg(self.ins.reg(), size);
                self.update(&operand, size, old, new, true)?;
                self.set_reg(self.ins.reg(), size, old);
                Ok(())
            }
            Op::XchgAcc => {
                // 90h without REX.B is NOP: it does not even clear the upper half of RAX.
                let other = self.ins.opcode_reg();
                if other != 0 {
                    let (a, b) = (self.reg(0, size), self.reg(other, size));
                    self.set_reg(0, size, b);
                    self.set_reg(other, size, a);
                }
                Ok(())
            }
            Op::Xadd => self.xadd(size),
            Op::Cmpxchg => self.cmpxchg(size),
            Op::Cmpxchg8b => self.cmpxchg8b(),
            Op::Bswap => {
                let number = self.ins.opcode_reg();
                let value = if size == 2 { 0 } else { swap(size, self.reg(number, size)) };
                self.set_reg(number, size, value);
                Ok(())
            }
            Op::Cmov => {
                let value = self.read_rm(size)?;
                let number = self.ins.reg();
                let value = if alu::condition(self.ins.opcode, self.rflags) { value } else { self.reg(number, size) };
                self.set_reg(number, size, value);
                Ok(())
            }
            Op::Setcc => {
                let operand = self.rm(1, Access::Write)?;
                self.put(&operand, 1, alu::condition(self.ins.opcode, self.rflags) as u64);
                Ok(())
            }
            Op::Cbw => {
                let value = sign_extend(size >> 1, self.reg(0, size >> 1));
                self.set_reg(0, size, value);
                Ok(())
            }
            Op::Cwd => {
                let value = sign_extend(size, self.reg(0, size)) as i64 >> 63;
                self.set_reg(2, size, value as u64);
                Ok(())
            }
            Op::Xlat => {
                let index = self.cpu.gpr(3).wrapping_add(self.reg(0, 1)) & mask(self.ins.address_size);
                let span = self.span(Place { segment: self.ins.segment, offset: index }, 1, Access::Read)?;
                let value = self.load(&span)?;
                self.set_reg(0, 1, value);
                Ok(())
            }
            Op::Nop => Ok(()),
            Op::Fence => {
                match (self.ins.has_memory(), (self.ins.modrm >> 3) & 7, self.ins.mandatory) {
                    // LFENCE, MFENCE, SFENCE.
                    (false, _, 0) => Ok(()),
                    // CLFLUSH, CLFLUSHOPT, CLWB: nothing to flush here, but the address must be good.
                    (true, 7, 0 | 1) | (true, 6, 1) => self.operand_span(1, Access::Read).map(|_| ()),
                    _ => Err(Step::Unsupported),
                }
            }
            Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas => self.string(size),
            Op::Ins | Op::Outs => self.port_string(size.min(4)),
            Op::In | Op::Out => self.port(size.min(4)),
            Op::VectorMove => self.vector_move(),
            Op::X87 => self.x87_control(),
            Op::Fwait => self.x87_wait(),
            op if op < Op::Jcc => self.stack_operation(size),
            op if op < Op::Movs => self.branch_operation(size),
            _ => self.system_operation(size),
        }
    }

    #[inline]
    fn mov(&mut self, size: u8) -> Flow<()> {
        match self.ins.form {
            Form::RmReg => {
                let operand = self.rm(size, Access::Write)?;
                let value = self.reg(self.ins.reg(), size);
                self.put(&operand, size, value);
            }
            Form::RegRm => {
                let value = self.read_rm(size)?;
                self.set_reg(self.ins.reg(), size, value);
            }
            Form::RmImm => {
                let operand = self.rm(size, Access::Write)?;
                self.put(&operand, size, self.ins.immediate as u64);
            }
            Form::OpRegImm => self.set_reg(self.ins.opcode_reg(), size, self.ins.immediate as u64),
            Form::AccOffset => {
                let span = self.operand_span(size, Access::Read)?;
                let value = self.load(&span)?;
                self.set_reg(0, size, value);
            }
            Form::OffsetAcc => {
                let span = self.operand_span(size, Access::Write)?;
                let value = self.reg(0, size);
                self.store(&span, value);
            }
            _ => return Err(Step::Unsupported),
        }
        Ok(())
    }

    /// MOVZX and MOVSX.
    #[inline]
    fn extend(&mut self, from: u8, signed: bool) -> Flow<()> {
        let value = self.read_rm(from)?;
        let value = if signed { sign_extend(from, value) } else { value };
        self.set_reg(self.ins.reg(), self.ins.operand_size, value);
        Ok(())
    }

    /// Destination and source of a two-operand instruction; the destination is translated for `access`.
    #[inline]
    fn operands(&mut self, size: u8, access: Access) -> Flow<(Operand, u64, u64)> {
        let (target, source) = match self.ins.form {
            Form::RmReg => (self.rm(size, access)?, self.reg(self.ins.reg(), size)),
            Form::RegRm => (Operand::Register(self.ins.reg()), self.read_rm(size)?),
            Form::RmImm => (self.rm(size, access)?, self.ins.immediate as u64 & mask(size)),
            _ => (Operand::Register(0), self.ins.immediate as u64 & mask(size)),
        };
        let value = self.get(&target, size)?;
        Ok((target, value, source))
    }

    #[inline]
    fn arithmetic(&mut self, size: u8) -> Flow<()> {
        let (target, a, b) = self.operands(size, Access::Write)?;
        let carry = self.rflags & CF;
        let (result, flags) = match self.ins.op {
            Op::Add => alu::add(size, a, b, 0),
            Op::Adc => alu::add(size, a, b, carry),
            Op::Sub => alu::sub(size, a, b, 0),
            Op::Sbb => alu::sub(size, a, b, carry),
            Op::And => alu::logic(size, a & b),
            Op::Or => alu::logic(size, a | b),
            _ => alu::logic(size, a ^ b),
        };
        self.set_arithmetic(flags);
        self.update(&target, size, a, result, false)
    }

    #[inline]
    fn compare(&mut self, size: u8) -> Flow<()> {
        let (_, a, b) = self.operands(size, Access::Read)?;
        let (_, flags) = if self.ins.op == Op::Cmp { alu::sub(size, a, b, 0) } else { alu::logic(size, a & b) };
        self.set_arithmetic(flags);
        Ok(())
    }

    fn unary(&mut self, size: u8) -> Flow<()> {
        let target = if self.ins.form == Form::OpReg {
            Operand::Register(self.ins.opcode_reg())
        } else {
            self.rm(size, Access::Write)?
        };
        let old = self.get(&target, size)?;
        let carry = self.rflags & CF;
        let new = match self.ins.op {
            Op::Not => !old & mask(size),
            Op::Neg => {
                let (new, flags) = alu::sub(size, 0, old, 0);
                self.set_arithmetic(flags);
                new
            }
            op => {
                // INC and DEC keep the carry.
                let (new, flags) = if op == Op::Inc { alu::add(size, old, 1, 0) } else { alu::sub(size, old, 1, 0) };
                self.set_arithmetic(flags & !CF | carry);
                new
            }
        };
        self.update(&target, size, old, new, false)
    }

    /// The count of a shift.
    fn count(&self) -> u64 {
        match self.ins.form {
            Form::RmOne => 1,
            Form::RmCl => self.reg(1, 1),
            _ => self.ins.immediate as u64 & 0xFF,
        }
    }

    fn shift(&mut self, size: u8) -> Flow<()> {
        let target = self.rm(size, Access::Write)?;
        let old = self.get(&target, size)?;
        let which = match self.ins.op {
            Op::Rol => Shift::Rol,
            Op::Ror => Shift::Ror,
            Op::Rcl => Shift::Rcl,
            Op::Rcr => Shift::Rcr,
            Op::Shr => Shift::Shr,
            Op::Sar => Shift::Sar,
            _ => Shift::Shl,
        };
        let (new, flags) = alu::shift(which, size, old, self.count(), self.rflags);
        self.rflags = flags;
        self.update(&target, size, old, new, false)
    }

    fn double_shift(&mut self, size: u8) -> Flow<()> {
        let target = self.rm(size, Access::Write)?;
        let old = self.get(&target, size)?;
        let fill = self.reg(self.ins.reg(), size);
        let (new, flags) = alu::double_shift(self.ins.op == Op::Shld, size, old, fill, self.count(), self.rflags);
        self.rflags = flags;
        self.update(&target, size, old, new, false)
    }

    fn multiply(&mut self, size: u8) -> Flow<()> {
        let b = self.read_rm(size)?;
        let a = self.reg(0, size);
        let (low, high, wide) =
            if self.ins.op == Op::Mul { alu::multiply(size, a, b) } else { alu::multiply_signed(size, a, b) };
        if size == 1 {
            self.set_reg(0, 2, high << 8 | low);
        } else {
            self.set_reg(0, size, low);
            self.set_reg(2, size, high);
        }
        self.set_arithmetic(alu::szp(size, low) | if wide { CF | OF } else { 0 });
        Ok(())
    }

    fn multiply_register(&mut self, size: u8) -> Flow<()> {
        let a = self.read_rm(size)?;
        let b = if self.ins.form == Form::RegRmImm {
            self.ins.immediate as u64 & mask(size)
        } else {
            self.reg(self.ins.reg(), size)
        };
        let (low, _, wide) = alu::multiply_signed(size, a, b);
        self.set_reg(self.ins.reg(), size, low);
        self.set_arithmetic(alu::szp(size, low) | if wide { CF | OF } else { 0 });
        Ok(())
    }

    fn divide(&mut self, size: u8) -> Flow<()> {
        let divisor = self.read_rm(size)?;
        let low = self.reg(0, size);
        let high = if size == 1 { (self.cpu.gpr(0) >> 8) & 0xFF } else { self.reg(2, size) };
        let result = if self.ins.op == Op::Div {
            alu::divide(size, high, low, divisor)
        } else {
            alu::divide_signed(size, high, low, divisor)
        };
        let (quotient, remainder) = result.ok_or(DE)?;
        if size == 1 {
            self.set_reg(0, 2, remainder << 8 | quotient);
        } else {
            self.set_reg(0, size, quotient);
            self.set_reg(2, size, remainder);
        }
        Ok(())
    }

    fn bit_test(&mut self, size: u8) -> Flow<()> {
        let access = if self.ins.op == Op::Bt { Access::Read } else { Access::Write };
        let width = alu::bits(size) as u64;
        let by_register = self.ins.form == Form::RmReg;
        let index = if by_register {
            sign_extend(size, self.reg(self.ins.reg(), size))
        } else {
            self.ins.immediate as u64 & (width - 1)
        };
        let target = if self.ins.has_memory() {
            // A register counts bits from the operand's address, both ways, in steps of the operand size.
            let mut place = self.place();
            let units = (index as i64) >> width.trailing_zeros();
            let offset = place.offset.wrapping_add(units.wrapping_mul(size as i64) as u64);
            place.offset = offset & mask(self.ins.address_size);
            Operand::Memory(self.span(place, size as usize, access)?)
        } else {
            Operand::Register(self.ins.rm())
        };
        let old = self.get(&target, size)?;
        let bit = 1u64 << (index & (width - 1));
        let new = match self.ins.op {
            Op::Bts => old | bit,
            Op::Btr => old & !bit,
            Op::Btc => old ^ bit,
            _ => {
                self.set_flag(CF, old & bit != 0);
                return Ok(());
            }
        };
        self.set_flag(CF, old & bit != 0);
        self.update(&target, size, old, new, false)
    }

    /// BSF, BSR, TZCNT, LZCNT, POPCNT.
    fn bit_scan(&mut self, size: u8) -> Flow<()> {
        let counting = self.ins.mandatory == 2;
        if self.ins.op == Op::Popcnt && !counting {
            return Err(UD); // JMPE of Itanium
        }
        let value = self.read_rm(size)?;
        let number = self.ins.reg();
        let trailing = value.trailing_zeros().min(alu::bits(size)) as u64;
        let leading = (value.leading_zeros().wrapping_add(alu::bits(size)).wrapping_sub(64)) as u64;
        let result = match (self.ins.op, counting) {
            (Op::Popcnt, _) => {
                self.set_arithmetic(if value == 0 { ZF } else { 0 });
                value.count_ones() as u64
            }
            (op, true) => {
                let result = if op == Op::Bsf { trailing } else { leading };
                self.set_flag(CF, value == 0);
                self.set_flag(ZF, result == 0);
                result
            }
            (op, false) => {
                self.set_flag(ZF, value == 0);
                if value == 0 {
                    return Ok(()); // the destination stays
                }
                if op == Op::Bsf {
                    trailing
                } else {
                    (alu::bits(size) as u64).wrapping_sub(1).wrapping_sub(leading)
                }
            }
        };
        self.set_reg(number, size, result);
        Ok(())
    }

    fn movsxd(&mut self, size: u8) -> Flow<()> {
        if !self.mode.is_long() {
            return Err(if self.mode.is_real() { UD } else { Step::Unsupported });
            // ARPL
        }
        let from = size.min(4);
        let value = self.read_rm(from)?;
        self.set_reg(self.ins.reg(), size, sign_extend(from, value));
        Ok(())
    }

    fn movbe(&mut self, size: u8) -> Flow<()> {
        if self.ins.form == Form::RegRm {
            let value = self.read_rm(size)?;
            self.set_reg(self.ins.reg(), size, swap(size, value));
        } else {
            let operand = self.rm(size, Access::Write)?;
            let value = swap(size, self.reg(self.ins.reg(), size));
            self.put(&operand, size, value);
        }
        Ok(())
    }

    fn xadd(&mut self, size: u8) -> Flow<()> {
        let target = self.rm(size, Access::Write)?;
        let old = self.get(&target, size)?;
        let (sum, flags) = alu::add(size, old, self.reg(self.ins.reg(), size), 0);
        self.set_arithmetic(flags);
        match target {
            // The same register twice holds the sum in the end.
            Operand::Register(number) => {
                self.set_reg(self.ins.reg(), size, old);
                self.set_reg(number, size, sum);
            }
            Operand::Memory(_) => {
                self.update(&target, size, old, sum, false)?;
                self.set_reg(self.ins.reg(), size, old);
            }
        }
        Ok(())
    }

    fn cmpxchg(&mut self, size: u8) -> Flow<()> {
        let target = self.rm(size, Access::Write)?;
        let old = self.get(&target, size)?;
        let (_, flags) = alu::sub(size, self.reg(0, size), old, 0);
        self.set_arithmetic(flags);
        if flags & ZF != 0 {
            let new = self.reg(self.ins.reg(), size);
            return self.update(&target, size, old, new, false);
        }
        if let Operand::Memory(_) = target {
            // The destination is written either way: a device sees it.
            self.update(&target, size, old, old, false)?;
        }
        self.set_reg(0, size, old);
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    fn cmpxchg8b(&mut self) -> Flow<()> {
        let half = if self.ins.rex & rex::W != 0 { 8 } else { 4 };
        let place = self.place();
        let size = 2 * half as usize;
        if half == 8 && self.linear(place, size, true)?.0 & 15 != 0 {
            return Err(super::GP);
        }
        let span = self.span(place, size, Access::Write)?;
        let mut buffer = [0u8; 16];
        let old = buffer.get_mut(..size).ok_or(Step::Unsupported)?;
        self.load_bytes(&span, old)?;
        let joined = |high: u64, low: u64| (high as u128) << alu::bits(half) | low as u128;
        let wanted = joined(self.reg(2, half), self.reg(0, half));
        let found = u128::from_le_bytes(buffer);
        if found != wanted {
            let old = buffer.get(..size).unwrap_or(&buffer);
            self.store_locked(&span, old, old, false)?;
            self.set_flag(ZF, false);
            self.set_reg(0, half, found as u64);
            self.set_reg(2, half, (found >> alu::bits(half)) as u64);
            return Ok(());
        }
        let new = joined(self.reg(1, half), self.reg(3, half)).to_le_bytes();
        let (old, new) = (buffer.get(..size).unwrap_or(&buffer), new.get(..size).unwrap_or(&new));
        self.set_flag(ZF, true);
        self.store_locked(&span, old, new, false)
    }
}

/// `value` of `size` bytes with its bytes in the other order.
fn swap(size: u8, value: u64) -> u64 {
    value.swap_bytes() >> (64 - alu::bits(size))
}
