// SPDX-License-Identifier: GPL-2.0
//! Task switches of protected mode, from and to task state segments of 16 and 32 bits. SDM Vol. 3 "Task Management", APM Vol. 2 "Hardware
//! Task-Management".
//!
//! For CPUs that leave them to the hypervisor: what led to the new task has been checked as far as its gate goes. The emulator's own
//! instructions and events come here by way of [`Step::TaskSwitch`], after the same checks. Not supported: segments of
//! task state, descriptor tables or stacks that are not in RAM; shadow stacks. Long mode has no task switches.
#![forbid(unsafe_code)]

use super::decode::Instruction;
use super::descriptor::{fault, Descriptor, ACCESSED_BIT, LDT, RPL, TASK_GATE, TI, TSS_BUSY_BIT};
use super::exec::Exec;
use super::{Access, Cpu, Emulator, Flow, Mode, Shadow, Step, Table, Waiting};
use crate::arch::cr::rflags::{FIXED, NT, RF, VM};
use crate::arch::cr::{cr0, efer};
use crate::arch::segment::{Segment, SegmentAttributes, SegmentName};
use crate::guest::event::{vector as exception, Event};
use crate::guest::exit::{TaskSource, TaskSwitch};
use crate::guest::Exception;

/// Bytes of the larger of the two formats.
const LARGEST: usize = 0x68;
/// CR3 in the format of 32 bits.
const CR3: usize = 0x1C;
/// The byte whose lowest bit asks for a trap after the switch, in the format of 32 bits.
const TRAP: usize = 0x64;
/// What a task's flags may hold.
const FLAGS: u64 = 0x3F_7FD5;
/// Local breakpoints and the bit for their exactness.
const DR7_LOCAL: u64 = 0x155;
/// A segment of virtual-8086 mode.
const VM86_SEGMENT: SegmentAttributes = SegmentAttributes(0xF3);

const SEGMENTS: [SegmentName; 6] =
    [SegmentName::Es, SegmentName::Cs, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs];

/// What became of a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switched {
    Done,
    /// Done, and the new task is to begin with #DB, DR6.BT set.
    Trapped,
    /// An exception: in the old task as long as RIP is its, else in the new one.
    Fault(Exception),
    Unsupported,
}

/// How a task state segment looks: after the stacks of the other privilege levels come instruction pointer, flags, eight registers, the
/// segment registers, and LDTR, each `width` bytes.
struct Format {
    width: u8,
    first: usize,
    segments: usize,
    len: usize,
}

impl Format {
    const BITS_16: Self = Self { width: 2, first: 0x0E, segments: 4, len: 0x2C };
    const BITS_32: Self = Self { width: 4, first: 0x20, segments: 6, len: LARGEST };

    const fn of(tss: &Segment) -> &'static Self {
        if tss.attributes.kind() & 8 != 0 {
            &Self::BITS_32
        } else {
            &Self::BITS_16
        }
    }

    /// Bytes that a switch saves.
    const fn saved(&self) -> usize {
        self.width as usize * (10 + self.segments)
    }

    const fn fits(&self, tss: &Segment) -> bool {
        tss.limit as usize >= self.len - 1
    }

    /// Word `index` of those from `first` on.
    fn word(&self, image: &[u8; LARGEST], index: usize) -> u64 {
        let at = self.first + self.width as usize * index;
        let mut word = [0; 8];
        let from = image.get(at..at + self.width as usize).unwrap_or_default();
        word.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(word)
    }
}

impl Emulator {
    /// Takes the vCPU to another task. `event`: what was being delivered through a task gate, unless the program asked for it by INT n,
    /// INT3 or INTO. `resume_at`: where the old task goes on later.
    pub fn switch_task<C: Cpu>(
        &mut self,
        cpu: &mut C,
        switch: TaskSwitch,
        event: Option<Event>,
        resume_at: u64,
    ) -> Switched {
        self.reset();
        let mode = cpu.mode();
        if matches!(mode, Mode::Real | Mode::Long64) {
            return Switched::Unsupported;
        }
        let mut exec = Exec::new(cpu, &mut self.io, &Instruction::EMPTY, mode, resume_at);
        let result = exec.switch_task(switch, event, resume_at);
        let in_ram = self.io.queued == 0 && self.io.waiting == Waiting::Nothing;
        self.reset();
        match result {
            Ok(false) if in_ram => Switched::Done,
            Ok(true) if in_ram => Switched::Trapped,
            Err(Step::Fault(mut exception)) if in_ram => {
                let names_selector = exception.vector != exception::PF;
                if let (Some(code), true) = (&mut exception.error_code, names_selector && event.is_some()) {
                    // What led here was not the program.
                    *code |= 1;
                }
                Switched::Fault(exception)
            }
            _ => Switched::Unsupported,
        }
    }
}

impl<C: Cpu> Exec<'_, C> {
    /// Ends the step with a switch if a far jump or call (`source`) to `selector` leads to another task.
    pub(super) fn leave_task(&mut self, selector: u16, source: TaskSource) -> Flow<()> {
        if selector & !RPL == 0 || self.cpu.efer() & efer::LMA != 0 {
            return Ok(());
        }
        let target = self.descriptor(selector, false)?;
        let kind = target.kind();
        let gate = kind == TASK_GATE;
        // Types 1, 3, 9 and 11 are task state segments.
        if target.is_segment() || !gate && kind & 5 != 1 {
            return Ok(());
        }
        if u16::from(target.dpl()) < (selector & RPL).max(self.cpu.cpl().into()) {
            return Err(fault(exception::GP, selector));
        }
        if !gate {
            return Err(self.to_task(selector, source));
        }
        if !target.segment.attributes.present() {
            return Err(fault(exception::NP, selector));
        }
        // The selector of a gate is where a segment has the lower half of its base.
        Err(self.to_task(target.segment.base as u16, source))
    }

    /// The end of a step whose instruction, which is over, leads to another task.
    pub(super) fn to_task(&self, selector: u16, source: TaskSource) -> Step {
        Step::TaskSwitch { switch: TaskSwitch { selector, source }, resume_at: self.next_rip }
    }

    /// IRET of a nested task.
    pub(super) fn return_to_task(&mut self) -> Flow<()> {
        if self.cpu.efer() & efer::LMA != 0 {
            return Err(super::GP);
        }
        let link = self.system_word(self.cpu.tss().base)?;
        Err(self.to_task(link, TaskSource::Iret))
    }

    /// Whether the new task is to begin with a trap.
    fn switch_task(&mut self, switch: TaskSwitch, event: Option<Event>, resume_at: u64) -> Flow<bool> {
        let TaskSwitch { selector, source } = switch;
        let nests = matches!(source, TaskSource::Call | TaskSource::Gate);
        let returns = source == TaskSource::Iret;
        let old = self.cpu.tss();
        let mut new = self.task_descriptor(selector, returns)?;
        let (from, to) = (Format::of(&old), Format::of(&new.segment));
        if !from.fits(&old) {
            return Err(fault(exception::TS, old.selector));
        }
        // All that can fail in the old task comes before the first change.
        let saved = self.system_span(old.base.wrapping_add(from.first as u64), from.saved(), Access::SystemWrite)?;
        let loaded = self.system_span(new.segment.base, to.len, Access::SystemRead)?;
        let link = match nests {
            true => Some(self.system_span(new.segment.base, 2, Access::SystemWrite)?),
            false => None,
        };
        let ends_old = !nests && old.selector & !(RPL | TI) != 0;
        let old_access = match ends_old {
            true => {
                let at = self.cpu.table(Table::Gdt).base.wrapping_add(u64::from(old.selector & !(RPL | TI)) + 5);
                Some(self.system_span(at, 1, Access::SystemWrite)?)
            }
            false => None,
        };
        if !returns {
            self.cpu.translate(new.access_at, Access::SystemWrite).map_err(Step::Fault)?;
        }

        if let Some(at) = old_access {
            let mut access = [0];
            self.load_bytes(&at, &mut access)?;
            self.store_bytes(&at, &[access[0] & !TSS_BUSY_BIT]);
        }
        let mut image = [0; LARGEST];
        if let Some(part) = image.get_mut(..from.saved()) {
            // The upper halves of selectors stay as they are.
            self.load_bytes(&saved, part)?;
            self.save_task(part, from, returns, event.is_none(), resume_at);
            self.store_bytes(&saved, part);
        }
        if !returns {
            self.mark(&mut new, TSS_BUSY_BIT)?;
        }
        if let Some(part) = image.get_mut(..to.len) {
            self.load_bytes(&loaded, part)?;
        }
        if let Some(at) = link {
            self.store_bytes(&at, &old.selector.to_le_bytes());
        }
        new.segment.attributes.0 |= u16::from(TSS_BUSY_BIT);
        self.cpu.set_tss(&new.segment);
        self.load_task(&image, to, nests)?;
        if returns {
            self.cpu.unmask_nmis();
        }
        if let Some(Event::Exception(Exception { error_code: Some(code), .. })) = event {
            self.push(&[code.into()], to.width)?;
        }
        Ok(to.width == 4 && image[TRAP] & 1 != 0)
    }

    /// The descriptor of the new task's segment.
    fn task_descriptor(&mut self, selector: u16, returns: bool) -> Flow<Descriptor> {
        let wrong = || fault(if returns { exception::TS } else { exception::GP }, selector);
        if selector & TI != 0 || selector & !RPL == 0 {
            return Err(wrong());
        }
        let descriptor = self.descriptor(selector, false).map_err(|step| match step {
            Step::Fault(Exception { vector: exception::GP, .. }) => wrong(),
            other => other,
        })?;
        // Types 1, 3, 9 and 11: bit 1 tells a task that is busy, and it must be so for a return only.
        let kind = descriptor.kind();
        if descriptor.is_segment() || kind & 5 != 1 || (kind & TSS_BUSY_BIT != 0) != returns {
            return Err(wrong());
        }
        if !descriptor.segment.attributes.present() {
            return Err(fault(exception::NP, selector));
        }
        if !Format::of(&descriptor.segment).fits(&descriptor.segment) {
            return Err(fault(exception::TS, selector));
        }
        Ok(descriptor)
    }

    /// Puts the old task's registers into `part`, which begins at the format's first word.
    fn save_task(&self, part: &mut [u8], format: &Format, returns: bool, by_program: bool, resume_at: u64) {
        let mut flags = self.rflags;
        if returns {
            flags &= !NT;
        }
        if by_program {
            // The instruction is over.
            flags &= !RF;
        }
        let mut words = part.chunks_exact_mut(format.width.into());
        let registers = (0..8).map(|number| self.cpu.gpr(number));
        for (value, word) in [resume_at, flags].into_iter().chain(registers).zip(words.by_ref()) {
            word.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
        for (name, word) in SEGMENTS.into_iter().zip(words) {
            let selector = self.cpu.segment(name).selector.to_le_bytes();
            word.iter_mut().zip(selector).for_each(|(to, from)| *to = from);
        }
    }

    /// Makes the vCPU the one of the new task. What fails, fails there.
    fn load_task(&mut self, image: &[u8; LARGEST], format: &Format, nests: bool) -> Flow<()> {
        let word = |index| format.word(image, index);
        let paging = self.cpu.cr(0) & cr0::PG != 0;
        let task_switched = self.cpu.cr(0) | cr0::TS;
        self.cpu.set_cr(0, task_switched).map_err(Step::Fault)?;
        if paging && format.width == 4 {
            let mut bytes = [0; 4];
            bytes.iter_mut().zip(image.iter().skip(CR3)).for_each(|(to, from)| *to = *from);
            self.cpu.set_cr(3, u32::from_le_bytes(bytes).into()).map_err(Step::Fault)?;
        }
        let breakpoints = self.cpu.dr(7) & !DR7_LOCAL;
        self.cpu.set_dr(7, breakpoints).map_err(Step::Fault)?;
        let flags = word(1) & FLAGS | FIXED | if nests { NT } else { 0 };
        self.rflags = flags;
        self.cpu.set_rip(word(0));
        self.cpu.set_rflags(flags);
        self.cpu.set_interrupt_shadow(Shadow::None);
        for number in 0..8 {
            self.cpu.set_gpr(number, word(2 + number));
        }

        // First the selectors, then their descriptors. CS and SS stay usable in between: they belong to the privilege level.
        let mut selectors = [0; 6];
        for ((selector, name), index) in selectors.iter_mut().zip(SEGMENTS).zip(0..) {
            if index < format.segments {
                *selector = word(10 + index) as u16;
            }
            let kept = match name {
                SegmentName::Cs | SegmentName::Ss => self.cpu.segment(name),
                _ => Segment::default(),
            };
            self.cpu.set_segment(name, &Segment { selector: *selector, ..kept });
        }
        let local = word(10 + format.segments) as u16;
        self.cpu.set_ldt(&Segment { selector: local, ..Segment::default() });
        if flags & VM != 0 {
            for (selector, name) in selectors.into_iter().zip(SEGMENTS) {
                let base = u64::from(selector) << 4;
                self.cpu.set_segment(name, &Segment { base, limit: 0xFFFF, selector, attributes: VM86_SEGMENT });
            }
            self.cpu.set_cpl(3);
            self.load_task_ldt(local)?;
            self.mode = self.cpu.mode();
            return Ok(());
        }
        self.load_task_ldt(local)?;
        let [es, cs, ss, ds, fs, gs] = selectors;
        let cpl = (cs & RPL) as u8;
        let mut code = self.task_segment(cs, |descriptor, rpl| {
            let dpl = descriptor.dpl();
            descriptor.is_code() && if descriptor.is_conforming() { dpl <= rpl } else { dpl == rpl }
        })?;
        let mut stack = self
            .task_segment(ss, |descriptor, rpl| descriptor.is_writable() && rpl == cpl && descriptor.dpl() == cpl)
            .map_err(|step| match step {
                Step::Fault(Exception { vector: exception::NP, .. }) => fault(exception::SS, ss),
                other => other,
            })?;
        self.mark(&mut code, ACCESSED_BIT)?;
        self.mark(&mut stack, ACCESSED_BIT)?;
        self.cpu.set_segment(SegmentName::Cs, &code.segment);
        self.cpu.set_segment(SegmentName::Ss, &stack.segment);
        self.cpu.set_cpl(cpl);
        self.mode = self.cpu.mode();
        for (name, selector) in
            [(SegmentName::Ds, ds), (SegmentName::Es, es), (SegmentName::Fs, fs), (SegmentName::Gs, gs)]
        {
            if selector & !RPL == 0 {
                continue;
            }
            let mut data = self.task_segment(selector, |descriptor, rpl| {
                let conforming = descriptor.is_code() && descriptor.is_conforming();
                descriptor.is_readable() && (conforming || rpl.max(cpl) <= descriptor.dpl())
            })?;
            self.mark(&mut data, ACCESSED_BIT)?;
            self.cpu.set_segment(name, &data.segment);
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Flow<()> {
        if selector & !RPL == 0 {
            return Ok(());
        }
        let wrong = fault(exception::TS, selector);
        if selector & TI != 0 {
            return Err(wrong);
        }
        let table = self.descriptor(selector, false).map_err(as_task_fault)?;
        if table.is_segment() || table.kind() != LDT || !table.segment.attributes.present() {
            return Err(wrong);
        }
        self.cpu.set_ldt(&table.segment);
        Ok(())
    }

    /// A segment that the new task names; `allowed` is asked about its descriptor and the selector's privilege level.
    fn task_segment(&mut self, selector: u16, allowed: impl FnOnce(&Descriptor, u8) -> bool) -> Flow<Descriptor> {
        if selector & !RPL == 0 {
            return Err(fault(exception::TS, 0));
        }
        let descriptor = self.descriptor(selector, false).map_err(as_task_fault)?;
        if !descriptor.is_segment() || !allowed(&descriptor, (selector & RPL) as u8) {
            return Err(fault(exception::TS, selector));
        }
        if !descriptor.segment.attributes.present() {
            return Err(fault(exception::NP, selector));
        }
        Ok(descriptor)
    }
}

/// A selector that leads nowhere is the task's fault.
fn as_task_fault(step: Step) -> Step {
    match step {
        Step::Fault(Exception { vector: exception::GP, error_code, payload }) => {
            Step::Fault(Exception { vector: exception::TS, error_code, payload })
        }
        other => other,
    }
}
