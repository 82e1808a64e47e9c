// SPDX-License-Identifier: GPL-2.0
//! Segment loads of protected and long mode: descriptors are read, checked and marked as used. SDM Vol. 3 "Segment Descriptors",
//! "Privilege Levels", and the operation sections of MOV, JMP, CALL, RET, LLDT and LTR.
//!
//! Firmware needs it when its descriptor table is in read-only memory: marking a descriptor is a write that no RAM takes. Not
//! supported: call gates, and a far return to an outer privilege level.
#![forbid(unsafe_code)]

use super::exec::Exec;
use super::memory::canonical;
use super::opcodes::Op;
use super::{Access, Cpu, Flow, Shadow, Step, Table, GP, UD};
use crate::arch::cr::efer;
use crate::arch::segment::{Segment, SegmentAttributes, SegmentName};
use crate::arch::Gva;
use crate::guest::event::vector as exception;
use crate::guest::exit::TaskSource;
use crate::guest::Exception;

/// Bits of a selector.
pub(super) const RPL: u16 = 3;
pub(super) const TI: u16 = 1 << 2;

/// Types of system descriptors: SDM "System-Segment and Gate-Descriptor Types".
pub(super) const LDT: u8 = 2;
const TSS16_AVAILABLE: u8 = 1;
const TSS_AVAILABLE: u8 = 9;
pub(super) const TASK_GATE: u8 = 5;
pub(super) const TSS_BUSY_BIT: u8 = 2;

pub(super) const ACCESSED_BIT: u8 = 1;
const KIND_WRITABLE_DATA: u8 = 2;
const KIND_READABLE_CODE: u8 = 2;
const KIND_CONFORMING: u8 = 4;
const KIND_CODE: u8 = 8;

pub(super) fn fault(vector: u8, selector: u16) -> Step {
    Step::Fault(Exception::with_code(vector, u32::from(selector & !RPL)))
}

/// A descriptor and where its access byte is.
pub(super) struct Descriptor {
    pub(super) segment: Segment,
    pub(super) access_at: Gva,
}

impl Descriptor {
    pub(super) fn kind(&self) -> u8 {
        self.segment.attributes.kind()
    }

    pub(super) fn is_segment(&self) -> bool {
        self.segment.attributes.0 & SegmentAttributes::S != 0
    }

    pub(super) fn is_code(&self) -> bool {
        self.is_segment() && self.kind() & KIND_CODE != 0
    }

    /// Of code.
    pub(super) fn is_conforming(&self) -> bool {
        self.kind() & KIND_CONFORMING != 0
    }

    /// Data that can be written.
    pub(super) fn is_writable(&self) -> bool {
        self.is_segment() && self.kind() & (KIND_CODE | KIND_WRITABLE_DATA) == KIND_WRITABLE_DATA
    }

    /// Data, or code that can be read.
    pub(super) fn is_readable(&self) -> bool {
        self.is_segment() && self.kind() & (KIND_CODE | KIND_READABLE_CODE) != KIND_CODE
    }

    pub(super) fn dpl(&self) -> u8 {
        self.segment.attributes.dpl()
    }
}

impl<C: Cpu> Exec<'_, C> {
    fn cpl(&self) -> u8 {
        self.cpu.cpl()
    }

    /// A linear address of the CPU's own.
    pub(super) fn system_address(&self, at: u64) -> Gva {
        Gva(if self.mode.is_long() { at } else { at & 0xFFFF_FFFF })
    }

    /// Reads the descriptor of a selector that is not null. `wide`: it has 16 bytes.
    pub(super) fn descriptor(&mut self, selector: u16, wide: bool) -> Flow<Descriptor> {
        let (base, limit) = if selector & TI == 0 {
            let table = self.cpu.table(Table::Gdt);
            (table.base, u32::from(table.limit))
        } else {
            let table = self.cpu.ldt();
            if !table.attributes.present() {
                return Err(fault(exception::GP, selector));
            }
            (table.base, table.limit)
        };
        let offset = selector & !(RPL | TI);
        if u32::from(offset) + if wide { 15 } else { 7 } > limit {
            return Err(fault(exception::GP, selector));
        }
        let at = base.wrapping_add(offset.into());
        let mut low = [0u16; 4];
        for (word, n) in low.iter_mut().zip(0..) {
            *word = self.system_word(at.wrapping_add(2 * n))?;
        }
        let mut segment = unpack(low, selector);
        if wide {
            let high = u64::from(self.system_word(at.wrapping_add(8))?);
            let high = high | u64::from(self.system_word(at.wrapping_add(10))?) << 16;
            segment.base |= high << 32;
        }
        Ok(Descriptor { segment, access_at: self.system_address(at.wrapping_add(5)) })
    }

    /// Sets bits of the access byte, in memory and in the cached descriptor.
    pub(super) fn mark(&mut self, descriptor: &mut Descriptor, bits: u8) -> Flow<()> {
        let old = descriptor.segment.attributes.0 as u8;
        if old & bits != bits {
            let gpa = self.cpu.translate(descriptor.access_at, Access::SystemWrite).map_err(Step::Fault)?;
            self.store_part(gpa, &[old | bits]);
            descriptor.segment.attributes.0 |= u16::from(bits);
        }
        Ok(())
    }

    /// MOV, POP and the far pointer loads to DS, ES, FS, GS and SS.
    pub(super) fn load_data_segment(&mut self, name: SegmentName, selector: u16) -> Flow<()> {
        let stack = name == SegmentName::Ss;
        let (cpl, rpl) = (self.cpl(), (selector & RPL) as u8);
        if selector & !RPL == 0 {
            if stack && !(self.mode.is_long() && cpl < 3 && rpl == cpl) {
                return Err(GP);
            }
            // A null SS of 64-bit mode keeps its privilege level.
            let attributes = SegmentAttributes(if stack { u16::from(cpl) << 5 } else { 0 });
            self.cpu.set_segment(name, &Segment { selector, attributes, ..Segment::default() });
        } else {
            let mut descriptor = self.descriptor(selector, false)?;
            let (kind, dpl) = (descriptor.kind(), descriptor.segment.attributes.dpl());
            let code = descriptor.is_code();
            let allowed = if stack {
                !code && kind & KIND_WRITABLE_DATA != 0 && rpl == cpl && dpl == cpl
            } else {
                let conforming = code && kind & KIND_CONFORMING != 0;
                (!code || kind & KIND_READABLE_CODE != 0) && (conforming || rpl.max(cpl) <= dpl)
            };
            if !descriptor.is_segment() || !allowed {
                return Err(fault(exception::GP, selector));
            }
            if !descriptor.segment.attributes.present() {
                return Err(fault(if stack { exception::SS } else { exception::NP }, selector));
            }
            self.mark(&mut descriptor, ACCESSED_BIT)?;
            self.cpu.set_segment(name, &descriptor.segment);
        }
        if stack {
            self.shadow = Shadow::MovSs;
        }
        Ok(())
    }

    /// The code segment of a far branch within the privilege level, checked together with the target.
    pub(super) fn code_segment(&mut self, selector: u16, offset: u64, returning: bool) -> Flow<Descriptor> {
        if selector & !RPL == 0 {
            return Err(GP);
        }
        let (cpl, rpl) = (self.cpl(), (selector & RPL) as u8);
        if returning && rpl > cpl {
            return Err(Step::Unsupported);
        }
        let mut descriptor = self.descriptor(selector, false)?;
        if !descriptor.is_segment() {
            // Call gates.
            return Err(if returning { fault(exception::GP, selector) } else { Step::Unsupported });
        }
        let (kind, dpl) = (descriptor.kind(), descriptor.segment.attributes.dpl());
        let conforming = kind & KIND_CONFORMING != 0;
        let allowed = match (conforming, returning) {
            (true, true) => dpl <= rpl,
            (true, false) => dpl <= cpl,
            (false, true) => dpl == rpl,
            (false, false) => dpl == cpl && rpl <= cpl,
        };
        let attributes = descriptor.segment.attributes;
        let long = self.cpu.efer() & efer::LMA != 0 && attributes.long();
        if !descriptor.is_code() || !allowed || returning && rpl < cpl || long && attributes.big() {
            return Err(fault(exception::GP, selector));
        }
        if !attributes.present() {
            return Err(fault(exception::NP, selector));
        }
        let inside = if long { canonical(self.cpu, offset) } else { offset <= descriptor.segment.limit.into() };
        if !inside {
            return Err(GP);
        }
        descriptor.segment.selector = selector & !RPL | u16::from(cpl);
        self.mark(&mut descriptor, ACCESSED_BIT)?;
        Ok(descriptor)
    }

    /// JMP to another code segment; `offset` is cut to the operand size.
    pub(super) fn jump_to_segment(&mut self, selector: u16, offset: u64) -> Flow<()> {
        self.leave_task(selector, TaskSource::Jump)?;
        let code = self.code_segment(selector, offset, false)?;
        self.cpu.set_segment(SegmentName::Cs, &code.segment);
        self.next_rip = offset;
        Ok(())
    }

    /// CALL of another code segment.
    pub(super) fn call_segment(&mut self, selector: u16, offset: u64, size: u8) -> Flow<()> {
        self.leave_task(selector, TaskSource::Call)?;
        let code = self.code_segment(selector, offset, false)?;
        let back = [self.cpu.segment(SegmentName::Cs).selector as u64, self.next_rip];
        self.push(&back, size)?;
        self.cpu.set_segment(SegmentName::Cs, &code.segment);
        self.next_rip = offset;
        Ok(())
    }

    /// RET from a far call, `release` more bytes of stack.
    pub(super) fn return_to_segment(&mut self, size: u8, release: i64) -> Flow<()> {
        let (offset, selector) = (self.peek(0, size)?, self.peek(1, size)? as u16);
        let code = self.code_segment(selector, offset, true)?;
        // The stack's width is that of the mode before the return.
        self.move_stack((2 * i64::from(size)).wrapping_add(release));
        self.cpu.set_segment(SegmentName::Cs, &code.segment);
        self.next_rip = offset;
        Ok(())
    }

    /// LLDT and LTR.
    pub(super) fn load_system_segment(&mut self) -> Flow<()> {
        if self.mode.is_real() {
            return Err(UD);
        }
        if self.cpl() != 0 {
            return Err(GP);
        }
        let task = self.ins.op == Op::Ltr;
        let selector = self.read_rm(2)? as u16;
        if selector & !RPL == 0 {
            if task {
                return Err(GP);
            }
            self.cpu.set_ldt(&Segment { selector, ..Segment::default() });
            return Ok(());
        }
        if selector & TI != 0 {
            return Err(fault(exception::GP, selector));
        }
        let wide = self.cpu.efer() & efer::LMA != 0;
        let mut descriptor = self.descriptor(selector, wide)?;
        let kind = descriptor.kind();
        let right = match task {
            true => kind == TSS_AVAILABLE || kind == TSS16_AVAILABLE && !wide,
            false => kind == LDT,
        };
        if descriptor.is_segment() || !right {
            return Err(fault(exception::GP, selector));
        }
        if !descriptor.segment.attributes.present() {
            return Err(fault(exception::NP, selector));
        }
        if task {
            self.mark(&mut descriptor, TSS_BUSY_BIT)?;
            self.cpu.set_tss(&descriptor.segment);
        } else {
            self.cpu.set_ldt(&descriptor.segment);
        }
        Ok(())
    }
}

/// The eight bytes of a descriptor, as four words.
fn unpack(words: [u16; 4], selector: u16) -> Segment {
    let [limit_low, base_low, middle, high] = words;
    let base = u32::from(base_low) | u32::from(middle & 0xFF) << 16 | u32::from(high & 0xFF00) << 16;
    let attributes = SegmentAttributes(middle >> 8 | (high & 0xF0) << 4);
    let limit = u32::from(limit_low) | u32::from(high & 0xF) << 16;
    let scaled = if attributes.0 & SegmentAttributes::G != 0 { limit << 12 | 0xFFF } else { limit };
    Segment { base: base.into(), limit: scaled, selector, attributes }
}
