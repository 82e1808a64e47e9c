// SPDX-License-Identifier: GPL-2.0
//! SSE and VEX moves between registers and memory: what drivers and compilers use on device memory and frame buffers. SDM Vol. 2.
//!
//! MMX registers, EVEX and moves that shuffle (MOVDDUP and so on) are not supported.
#![forbid(unsafe_code)]

use super::decode::{rex, Map};
use super::exec::Exec;
use super::{prefix, Access, Cpu, Flow, Step, GP, UD};
use crate::arch::cr::{cr0, cr4, xcr0};
use crate::guest::event::vector as exception;
use crate::guest::Exception;

/// What a move does with its `len` bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Whole registers, any alignment.
    Full,
    /// Whole registers; memory must be aligned.
    Aligned,
    /// Whole registers, aligned, memory only.
    Stream,
    /// Whole registers, any alignment, memory only.
    MemoryFull,
    /// A scalar: a load from memory clears the rest of the register, one from a register keeps it.
    Scalar(u8),
    /// MOVQ: a load clears the rest, also from a register.
    Quad,
    /// The low half; memory only.
    Low,
    /// The high half; memory only.
    High,
    /// A general-purpose register or memory.
    General,
}

/// Kind of the move and whether it stores, by opcode and mandatory prefix.
fn classify(map: Map, opcode: u8, mandatory: u8) -> Option<(Kind, bool)> {
    if map == Map::M0f38 {
        return (mandatory == 1).then_some((Kind::Stream, false)); // MOVNTDQA
    }
    Some(match (opcode, mandatory) {
        (0x10 | 0x11, 0 | 1) => (Kind::Full, opcode == 0x11),
        (0x10 | 0x11, 2) => (Kind::Scalar(4), opcode == 0x11),
        (0x10 | 0x11, _) => (Kind::Scalar(8), opcode == 0x11),
        (0x12 | 0x13, 0 | 1) => (Kind::Low, opcode == 0x13),
        (0x16 | 0x17, 0 | 1) => (Kind::High, opcode == 0x17),
        (0x28 | 0x29, 0 | 1) => (Kind::Aligned, opcode == 0x29),
        (0x2B, 0 | 1) => (Kind::Stream, true),
        (0x6E | 0x7E, 1) => (Kind::General, opcode == 0x7E),
        (0x6F | 0x7F, 1) => (Kind::Aligned, opcode == 0x7F),
        (0x6F | 0x7F, 2) => (Kind::Full, opcode == 0x7F),
        (0x7E, 2) => (Kind::Quad, false),
        (0xD6, 1) => (Kind::Quad, true),
        (0xE7, 1) => (Kind::Stream, true),
        (0xF0, 3) => (Kind::MemoryFull, false),
        _ => return None,
    })
}

impl<C: Cpu> Exec<'_, C> {
    /// Whether the vector unit may be used. SDM Vol. 2 "Exception Conditions".
    fn check_vector_unit(&self, vex: bool) -> Flow<()> {
        let (cr0, cr4) = (self.cpu.cr(0), self.cpu.cr(4));
        let off = if vex {
            let needed = xcr0::SSE | xcr0::AVX;
            cr4 & cr4::OSXSAVE == 0 || self.cpu.xcr0() & needed != needed
        } else {
            cr0 & cr0::EM != 0 || cr4 & cr4::OSFXSR == 0
        };
        if off {
            return Err(UD);
        }
        if cr0 & cr0::TS != 0 {
            return Err(Step::Fault(Exception::plain(exception::NM)));
        }
        Ok(())
    }

    pub(super) fn vector_move(&mut self) -> Flow<()> {
        let ins = self.ins;
        let vex = ins.has(prefix::VEX);
        let (kind, store) = classify(ins.map, ins.opcode, ins.mandatory).ok_or(Step::Unsupported)?;
        self.check_vector_unit(vex)?;
        let memory = ins.has_memory();
        let whole = matches!(kind, Kind::Full | Kind::Aligned | Kind::Stream | Kind::MemoryFull);
        // VEX.vvvv names a register only where a load merges with it.
        let merges = !store && (matches!(kind, Kind::Low | Kind::High) || (matches!(kind, Kind::Scalar(_)) && !memory));
        if vex && ((!whole && ins.vex_long && !matches!(kind, Kind::Scalar(_))) || (ins.vex_register != 0 && !merges)) {
            return Err(UD);
        }
        if !memory && matches!(kind, Kind::Stream | Kind::MemoryFull) {
            return Err(UD);
        }
        if !memory && (matches!(kind, Kind::Low | Kind::High) || (vex && matches!(kind, Kind::Scalar(_)))) {
            // MOVHLPS and MOVLHPS for the loads of form 0F, nothing for the others.
            let exists = matches!(kind, Kind::Scalar(_)) || (!store && ins.mandatory == 0);
            return Err(if exists { Step::Unsupported } else { UD });
        }
        let len: usize = match kind {
            Kind::Scalar(len) => len as usize,
            Kind::Quad | Kind::Low | Kind::High => 8,
            Kind::General if ins.rex & rex::W != 0 && self.mode.is_long() => 8,
            Kind::General => 4,
            _ if vex && ins.vex_long => 32,
            _ => 16,
        };
        let access = if store { Access::Write } else { Access::Read };
        let span = if memory {
            let place = self.place();
            let aligned = matches!(kind, Kind::Aligned | Kind::Stream);
            if aligned && self.linear(place, len, store)?.0 & (len as u64).wrapping_sub(1) != 0 {
                return Err(GP);
            }
            Some(self.span(place, len, access)?)
        } else {
            None
        };

        let half = if kind == Kind::High { 8 } else { 0 };
        if store {
            let value = self.cpu.vector(ins.reg());
            let part = value.get(half..half + len).unwrap_or(&value);
            match (span, kind) {
                (Some(span), _) => self.store_bytes(&span, part),
                (None, Kind::General) => {
                    let value = u128::from_le_bytes(*value.first_chunk().unwrap_or(&[0; 16])) as u64;
                    self.set_reg(ins.rm(), len as u8, value);
                }
                (None, _) => self.write_vector(ins.rm(), part, kind, vex, false),
            }
            return Ok(());
        }

        let mut data = [0u8; 32];
        match (span, kind) {
            (Some(span), _) => self.load_bytes(&span, data.get_mut(..len).unwrap_or_default())?,
            (None, Kind::General) => {
                let value = self.reg(ins.rm(), len as u8).to_le_bytes();
                copy(&mut data, 0, &value);
            }
            (None, _) => data = self.cpu.vector(ins.rm()),
        }
        let part = data.get(..len).unwrap_or(&data);
        self.write_vector(ins.reg(), part, kind, vex, span.is_some());
        Ok(())
    }

    /// Writes `part` to a register: the rest is cleared, except where the move merges.
    fn write_vector(&mut self, register: usize, part: &[u8], kind: Kind, vex: bool, from_memory: bool) {
        let merges = match kind {
            Kind::Low | Kind::High => true,
            Kind::Scalar(_) => !from_memory,
            _ => false,
        };
        let mut value = [0u8; 32];
        if merges {
            let rest = if vex { self.ins.vex_register as usize } else { register };
            let low = self.cpu.vector(rest & 15);
            copy(&mut value, 0, low.get(..16).unwrap_or_default());
        }
        copy(&mut value, if kind == Kind::High { 8 } else { 0 }, part);
        self.cpu.set_vector(register & 15, &value, vex);
    }
}

fn copy(to: &mut [u8; 32], at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}
