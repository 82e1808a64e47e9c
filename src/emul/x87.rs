// SPDX-License-Identifier: GPL-2.0
//! The x87 instructions with which software finds out whether there is an x87 unit, and brings it into its first state: FNINIT, FNSTSW,
//! FNSTCW, and FWAIT before them. SDM Vol. 2.
//!
//! No arithmetic, no data registers, and no exception that waits for FWAIT.
#![forbid(unsafe_code)]

use super::exec::Exec;
use super::{Access, Cpu, Flow, Step};
use crate::arch::cr::cr0;
use crate::guest::event::vector as exception;
use crate::guest::Exception;

/// An exception is pending, in the status word.
const ES: u16 = 1 << 7;

/// What an opcode means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Initialize,
    StatusWord,
    /// FNSTSW AX.
    StatusToAx,
    ControlWord,
}

const fn kind(opcode: u8, modrm: u8) -> Option<Kind> {
    let memory = modrm < 0xC0;
    Some(match (opcode, memory, modrm >> 3 & 7) {
        (0xD9, true, 7) => Kind::ControlWord,
        (0xDD, true, 7) => Kind::StatusWord,
        (0xDB, false, _) if modrm == 0xE3 => Kind::Initialize,
        (0xDF, false, _) if modrm == 0xE0 => Kind::StatusToAx,
        _ => return None,
    })
}

/// Whether the emulator has the instruction with this opcode, D8h to DFh.
pub(super) const fn is_control(opcode: u8, modrm: u8) -> bool {
    kind(opcode, modrm).is_some()
}

impl<C: Cpu> Exec<'_, C> {
    pub(super) fn x87_control(&mut self) -> Flow<()> {
        let what = kind(self.ins.opcode, self.ins.modrm).ok_or(Step::Unsupported)?;
        self.x87_usable(cr0::EM | cr0::TS, 0)?;
        let value = match what {
            Kind::Initialize => {
                self.cpu.initialize_x87();
                return Ok(());
            }
            Kind::ControlWord => self.cpu.x87_words().control,
            Kind::StatusWord | Kind::StatusToAx => self.cpu.x87_words().status,
        };
        if what == Kind::StatusToAx {
            self.set_reg(0, 2, value.into());
        } else {
            let span = self.operand_span(2, Access::Write)?;
            self.store(&span, value.into());
        }
        Ok(())
    }

    /// FWAIT, or WAIT.
    pub(super) fn x87_wait(&mut self) -> Flow<()> {
        self.x87_usable(0, cr0::MP | cr0::TS)?;
        if self.cpu.x87_words().status & ES != 0 {
            return Err(Step::Unsupported);
        }
        Ok(())
    }

    /// #NM if CR0 has one of the bits `any`, or all of `all` where that is not empty.
    fn x87_usable(&self, any: u64, all: u64) -> Flow<()> {
        let cr0 = self.cpu.cr(0);
        if cr0 & any != 0 || all != 0 && cr0 & all == all {
            return Err(Step::Fault(Exception::plain(exception::NM)));
        }
        Ok(())
    }
}
