// SPDX-License-Identifier: GPL-2.0
//! The usual access to a device, in one piece: MOV or MOVZX of 64-bit code between a register and memory, once the CPU has found the address
//! and checked the guest's rights. What the emulator does for such an instruction, without its resumable state; everything else is
//! left to it.
#![forbid(unsafe_code)]

use crate::{
    arch::segment::SegmentName,
    guest::{Gpr, Regs},
};

use super::{
    alu::mask,
    decode::{decode, prefix, Instruction, Mode, NO_REGISTER, RIP},
    opcodes::{Form, Op},
};

/// What an instruction moves to or from a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMove {
    /// Bytes that the device sees, 1, 2, 4 or 8.
    pub size: u8,
    /// Bytes of the instruction.
    pub length: u8,
    pub direction: Direction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The value goes to the device; above its size it is zero.
    Store(u64),
    /// The device's answer goes to the low `size` bytes of the register, zero-extended.
    Load { register: u8, size: u8 },
}

impl DeviceMove {
    /// The move that 64-bit code, which begins with `code`, makes at offset `offset` of a page, in the direction that the CPU says. `None` if
    /// it is something else, crosses into another page, or needs what `regs` need not have: RSP.
    pub fn of(code: &[u8], regs: &Regs, offset: u64, write: bool) -> Option<Self> {
        const RSP: u8 = Gpr::Rsp as u8;
        let ins = decode(code, Mode::Long64).ok()?;
        let odd = prefix::LOCK | prefix::REP | prefix::REPNE | prefix::ADDRESS | prefix::VEX | prefix::OTHER;
        let based = matches!(ins.segment, SegmentName::Fs | SegmentName::Gs);
        if !ins.has_memory() || ins.has(odd) || based || ins.base == RSP {
            return None;
        }
        let register = ins.reg() as u8;
        // AH to BH are not worth it.
        let plain = register != RSP && (register & 0xC != 4 || ins.operand_size != 1 || ins.has(prefix::REX));
        let load = |size| plain.then_some((size, Direction::Load { register, size: ins.operand_size }));
        let store = |value| (ins.operand_size, Direction::Store(value & mask(ins.operand_size)));
        let (size, direction) = match (ins.op, ins.form) {
            (Op::Mov, Form::RmReg) if plain => store(*regs.gpr.get(usize::from(register))?),
            (Op::Mov, Form::RmImm) => store(ins.immediate as u64),
            (Op::Mov, Form::RegRm) => load(ins.operand_size)?,
            (Op::Movzx8, Form::RegRm) => load(1)?,
            (Op::Movzx16, Form::RegRm) => load(2)?,
            _ => return None,
        };
        // Of two pages that the instruction touches, the CPU may have found the second.
        let first = offset_in_page(&ins, regs)? == offset & 0xFFF;
        let inside = (offset & 0xFFF).wrapping_add(size.into()) <= 4096;
        let same = write == matches!(direction, Direction::Store(_));
        (first && inside && same).then_some(Self { size, length: ins.length, direction })
    }

    /// Puts the device's answer into the register that a load is for.
    pub fn answer(&self, value: u64, regs: &mut Regs) {
        let Direction::Load { register, size } = self.direction else { return };
        if let Some(register) = regs.gpr.get_mut(usize::from(register)) {
            let kept = if size < 4 { *register & !mask(size) } else { 0 };
            *register = kept | value & mask(self.size);
        }
    }
}

/// Where in its page the memory operand begins.
fn offset_in_page(ins: &Instruction, regs: &Regs) -> Option<u64> {
    let register = |number: u8| regs.gpr.get(usize::from(number)).copied();
    let base = match ins.base {
        NO_REGISTER => 0,
        RIP => regs.rip.wrapping_add(ins.length.into()),
        base => register(base)?,
    };
    let index = match ins.index {
        NO_REGISTER => 0,
        index => register(index)? << (ins.scale & 3),
    };
    Some(base.wrapping_add(index).wrapping_add(ins.displacement as u64) & 0xFFF)
}
