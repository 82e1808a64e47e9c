// SPDX-License-Identifier: GPL-2.0
//! Events and IRET without hardware's help: the real-mode vector table, and gates of protected mode. SDM Vol. 3 "Interrupt and Exception
//! Handling", Vol. 2 "INT n", "IRET".
//!
//! For CPUs that cannot run a guest in its mode: an event's delivery is then software's, too. Not supported: another privilege level,
//! IRET to virtual-8086 mode, and long mode.
#![forbid(unsafe_code)]

use super::decode::{Instruction, Mode};
use super::descriptor::TASK_GATE;
use super::exec::Exec;
use super::opcodes::Op;
use super::{without_code, Cpu, Emulator, Flow, Step, Table, GP};
use crate::arch::cr::rflags::{AC, IF, NT, RF, TF, VM};
use crate::arch::segment::SegmentName;
use crate::guest::event::vector as exception;
use crate::guest::exit::TaskSource;
use crate::guest::Exception;

/// Bits of a gate's access byte.
const PRESENT: u16 = 1 << 7;
const DPL_SHIFT: u32 = 5;
/// Type of a task gate, of which the lower five bits say so.
const TASK_GATE_ACCESS: u16 = TASK_GATE as u16;

/// What leads through a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub vector: u8,
    /// Pushed in protected mode.
    pub error_code: Option<u32>,
    /// INT n, INT3 or INTO: the gate's privilege level counts.
    pub software: bool,
}

impl Emulator {
    /// Takes the vCPU to the handler of an event: [`Step::Done`], [`Step::Fault`] if the delivery failed (nothing has changed then),
    /// [`Step::TaskSwitch`] for a handler that is a task, or [`Step::Unsupported`].
    pub fn deliver<C: Cpu>(&mut self, cpu: &mut C, event: Delivery) -> Step {
        self.reset();
        let (mode, rip) = (cpu.mode(), cpu.rip());
        let mut exec = Exec::new(cpu, &mut self.io, &Instruction::EMPTY, mode, rip);
        let result = exec.handler(event).map(|()| exec.retire());
        match result {
            Ok(()) if self.io.queued == 0 => Step::Done,
            Err(step @ Step::Fault(_)) => without_code(step, mode),
            Err(step @ Step::TaskSwitch { .. }) => step,
            // A stack in a device.
            _ => {
                self.reset();
                Step::Unsupported
            }
        }
    }
}

impl<C: Cpu> Exec<'_, C> {
    /// Goes to the handler of `event`; [`Self::next_rip`] is where it will return to.
    pub(super) fn handler(&mut self, event: Delivery) -> Flow<()> {
        match self.mode {
            Mode::Real => self.interrupt(event.vector),
            Mode::Protected16 | Mode::Protected32 => self.through_gate(event),
            Mode::Vm86 | Mode::Long64 => Err(Step::Unsupported),
        }
    }

    fn through_gate(&mut self, event: Delivery) -> Flow<()> {
        let table = self.cpu.table(Table::Idt);
        let offset = u16::from(event.vector) * 8;
        // The error code names the gate, and whether the program asked for it.
        let refuse = |vector| {
            let code = u32::from(offset) | 2 | u32::from(!event.software);
            Err(Step::Fault(Exception::with_code(vector, code)))
        };
        if offset + 7 > table.limit {
            return refuse(exception::GP);
        }
        let mut words = [0; 4];
        for (word, n) in words.iter_mut().zip(0..) {
            *word = self.system_word(table.base.wrapping_add(u64::from(offset)).wrapping_add(2 * n))?;
        }
        let [low, selector, access, high] = words;
        let access = access >> 8;
        // Interrupt and trap gates of 16 and 32 bits.
        let size = match access & 0x1F {
            6 | 7 => Some(2),
            0xE | 0xF => Some(4),
            TASK_GATE_ACCESS => None,
            _ => return refuse(exception::GP),
        };
        let cpl = u16::from(self.cpu.cpl());
        if event.software && access >> DPL_SHIFT & 3 < cpl {
            return refuse(exception::GP);
        }
        if access & PRESENT == 0 {
            return refuse(exception::NP);
        }
        let Some(size) = size else { return Err(self.to_task(selector, TaskSource::Gate)) };
        let target = if size == 4 { u64::from(high) << 16 | u64::from(low) } else { low.into() };
        // The privilege level that the selector asks for does not matter here.
        let code = self.code_segment(selector & !3, target, false)?;
        let back = [self.rflags & !VM, self.cpu.segment(SegmentName::Cs).selector.into(), self.next_rip];
        match event.error_code {
            Some(error) => self.push(&[back[0], back[1], back[2], error.into()], size)?,
            None => self.push(&back, size)?,
        }
        self.rflags &= !(TF | NT | RF | VM);
        if access & 1 == 0 {
            self.rflags &= !IF;
        }
        self.cpu.set_segment(SegmentName::Cs, &code.segment);
        self.next_rip = target;
        Ok(())
    }

    /// IRET.
    pub(super) fn interrupt_return(&mut self, size: u8) -> Flow<()> {
        if self.rflags & NT != 0 && matches!(self.mode, Mode::Protected16 | Mode::Protected32) {
            return self.return_to_task();
        }
        let (offset, selector) = (self.peek(0, size)?, self.peek(1, size)? as u16);
        let flags = self.peek(2, size)?;
        match self.mode {
            Mode::Real => self.jump_far(selector, offset, size)?,
            Mode::Protected16 | Mode::Protected32 => {
                if size == 4 && flags & VM != 0 {
                    return Err(Step::Unsupported);
                }
                let code = self.code_segment(selector, offset, true)?;
                self.cpu.set_segment(SegmentName::Cs, &code.segment);
                self.next_rip = offset;
            }
            Mode::Vm86 | Mode::Long64 => return Err(Step::Unsupported),
        }
        self.move_stack(3 * i64::from(size));
        self.load_flags(flags, size);
        self.cpu.unmask_nmis();
        Ok(())
    }

    /// INT n, INT3 and INTO.
    pub(super) fn software_interrupt(&mut self) -> Flow<()> {
        let vector = match self.ins.op {
            Op::Int => self.ins.immediate as u8,
            Op::Int3 => exception::BP,
            _ => exception::OF,
        };
        self.handler(Delivery { vector, error_code: None, software: true })
    }

    /// A vector of real mode. SDM Vol. 3 "Interrupt and Exception Handling" of real-address mode.
    fn interrupt(&mut self, vector: u8) -> Flow<()> {
        let table = self.cpu.table(Table::Idt);
        let at = u64::from(vector) * 4;
        if at + 3 > table.limit.into() {
            return Err(GP);
        }
        let offset = u64::from(self.system_word(table.base.wrapping_add(at))?);
        let selector = self.system_word(table.base.wrapping_add(at + 2))?;
        let frame = [self.rflags, self.cpu.segment(SegmentName::Cs).selector.into(), self.next_rip];
        self.target(offset, 2)?;
        self.push(&frame, 2)?;
        self.rflags &= !(IF | TF | AC);
        self.jump_far(selector, offset, 2)
    }
}
