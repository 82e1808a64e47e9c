// SPDX-License-Identifier: GPL-2.0
//! Memory as instructions see it: code fetch, segmentation, canonical addresses, page crossings, the stack.
//! SDM "Protection", "Segment Limit Checking" and "Canonical Addressing".
#![forbid(unsafe_code)]

use super::alu::mask;
use super::decode::{decode, DecodeError, Instruction, Mode, MAX_LENGTH, NO_REGISTER, RIP};
use super::exec::Exec;
use super::{prefix, Access, Cpu, Flow, NotRam, Step, GP, SS};
use crate::arch::addr::{is_canonical, PAGE_SIZE};
use crate::arch::cr::{cr0, cr4, rflags};
use crate::arch::segment::{Segment, SegmentName};
use crate::arch::{Gpa, Gva};
use crate::guest::event::vector as exception;
use crate::guest::Exception;

/// A place in a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub segment: SegmentName,
    pub offset: u64,
}

/// A translated operand: at most two pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    gpa: Gpa,
    /// Where the bytes past the page boundary are.
    next: Gpa,
    /// Bytes before the page boundary.
    first: usize,
    pub len: usize,
}

impl Span {
    /// First physical address, for operands that stay in one page.
    pub(super) fn one_page(&self) -> Option<Gpa> {
        (self.first == self.len).then_some(self.gpa)
    }
}

/// Whether `at` is canonical in this CPU's paging mode.
#[inline]
pub(super) fn canonical<C: Cpu>(cpu: &C, at: u64) -> bool {
    // Most addresses are canonical with 48 bits, and then with 57 as well.
    is_canonical(at, 48) || (cpu.cr(4) & cr4::LA57 != 0 && is_canonical(at, 57))
}

/// A decoded instruction and the code it was decoded from. Guests access a device from few places, so this spares most decoding.
#[derive(Debug)]
pub(super) struct Decoded {
    pub instruction: Instruction,
    pub mode: Mode,
    code: u128,
    /// Ones where `code` is the instruction.
    mask: u128,
}

impl Decoded {
    pub(super) const EMPTY: Self = Self { instruction: Instruction::EMPTY, mode: Mode::Real, code: 0, mask: 0 };

    /// Makes this the instruction at the start of `code`, of which `have` bytes count.
    #[inline]
    fn set(&mut self, code: &[u8; 16], have: usize, mode: Mode) -> Result<(), DecodeError> {
        let number = u128::from_le_bytes(*code);
        let known = self.instruction.length != 0 && self.instruction.length as usize <= have && self.mode == mode;
        if known && (number ^ self.code) & self.mask == 0 {
            return Ok(());
        }
        let instruction = decode(code.get(..have).unwrap_or_default(), mode)?;
        let unused = 16u32.saturating_sub(instruction.length as u32) * 8;
        *self = Self { instruction, mode, code: number, mask: u128::MAX.checked_shr(unused).unwrap_or_default() };
        Ok(())
    }

    /// Fetches and decodes the instruction at `rip`; `bytes` spare the fetch if they are enough.
    #[inline]
    pub(super) fn fetch<C: Cpu>(&mut self, cpu: &mut C, mode: Mode, rip: u64, bytes: Option<&[u8]>) -> Flow<()> {
        let mut code = [0u8; 16];
        if let Some(bytes) = bytes {
            match bytes.first_chunk() {
                Some(all) => code = *all,
                None => code.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from),
            }
            if self.set(&code, bytes.len().min(MAX_LENGTH), mode).is_ok() {
                return Ok(());
            }
        }
        // How many bytes the code segment allows, and where they are.
        let (linear, allowed) = if mode.is_long() {
            (rip, MAX_LENGTH)
        } else {
            let cs = cpu.segment(SegmentName::Cs);
            let allowed = (cs.limit as u64).wrapping_add(1).saturating_sub(rip).min(MAX_LENGTH as u64) as usize;
            (cs.base.wrapping_add(rip) & mask(4), allowed)
        };
        if allowed == 0 || (mode.is_long() && !canonical(cpu, rip)) {
            return Err(GP);
        }
        let have = allowed.min((PAGE_SIZE - Gva(linear).page_offset()) as usize);
        read_code(cpu, linear, code.get_mut(..have).unwrap_or_default())?;
        let mut result = self.set(&code, have, mode);
        if matches!(result, Err(DecodeError::Truncated)) && have < allowed {
            let next = linear.wrapping_add(have as u64);
            let next = if mode.is_long() { next } else { next & mask(4) };
            read_code(cpu, next, code.get_mut(have..allowed).unwrap_or_default())?;
            result = self.set(&code, allowed, mode);
        }
        // Too long, or past the limit of the code segment.
        result.map_err(|_| GP)
    }
}

#[inline]
fn read_code<C: Cpu>(cpu: &mut C, linear: u64, to: &mut [u8]) -> Flow<()> {
    let gpa = cpu.translate(Gva(linear), Access::Execute).map_err(Step::Fault)?;
    // Code in a device: nobody does that.
    cpu.read_ram(gpa, to).map_err(|NotRam| Step::Unsupported)
}

/// Whether `segment` of protected mode may be accessed at `offset` to `last`.
fn segment_allows(segment: &Segment, real: bool, offset: u64, last: u64, write: bool) -> bool {
    let limit = segment.limit as u64;
    if real {
        return last <= limit;
    }
    let attributes = segment.attributes;
    let kind = attributes.kind();
    if !attributes.present() {
        return false;
    }
    let (code, bit1) = (kind & 8 != 0, kind & 2 != 0);
    // Bit 1: readable code, or writable data.
    let permitted = if code { bit1 && !write } else { bit1 || !write };
    if !permitted {
        return false;
    }
    if !code && kind & 4 != 0 {
        let top = if attributes.big() { 0xFFFF_FFFF } else { 0xFFFF };
        return offset > limit && last <= top;
    }
    last <= limit
}

impl<C: Cpu> Exec<'_, C> {
    /// Offset of the memory operand in its segment.
    #[inline]
    pub(super) fn place(&self) -> Place {
        let ins = self.ins;
        let mut offset = ins.displacement as u64;
        if ins.base == RIP {
            offset = offset.wrapping_add(self.next_rip);
        } else if ins.base != NO_REGISTER {
            offset = offset.wrapping_add(self.cpu.gpr((ins.base & 15) as usize));
        }
        if ins.index != NO_REGISTER {
            offset = offset.wrapping_add(self.cpu.gpr((ins.index & 15) as usize) << (ins.scale & 3));
        }
        Place { segment: ins.segment, offset: offset & mask(ins.address_size) }
    }

    /// The linear address of `len` (at least 1) bytes at `place`, after the checks of segmentation.
    #[inline]
    pub(super) fn linear(&self, place: Place, len: usize, write: bool) -> Flow<Gva> {
        let fault = if place.segment == SegmentName::Ss { SS } else { GP };
        let further = (len as u64).wrapping_sub(1);
        if self.mode.is_long() {
            let mut at = place.offset;
            if matches!(place.segment, SegmentName::Fs | SegmentName::Gs) {
                at = at.wrapping_add(self.cpu.segment(place.segment).base);
            }
            if !canonical(self.cpu, at) || !canonical(self.cpu, at.wrapping_add(further)) {
                return Err(fault);
            }
            return Ok(Gva(at));
        }
        let segment = self.cpu.segment(place.segment);
        let last = place.offset.wrapping_add(further);
        if !segment_allows(&segment, self.mode.is_real(), place.offset, last, write) {
            return Err(fault);
        }
        Ok(Gva(segment.base.wrapping_add(place.offset) & mask(4)))
    }

    /// Translates `len` (at least 1, at most a page) bytes at `place`.
    #[inline]
    pub(super) fn span(&mut self, place: Place, len: usize, access: Access) -> Flow<Span> {
        let at = self.linear(place, len, access == Access::Write)?;
        if self.rflags & rflags::AC != 0 {
            self.check_alignment(at, len)?;
        }
        self.translate_span(at, len, access)
    }

    /// Translates `len` (at least 1, at most a page) bytes of a system table.
    pub(super) fn system_span(&mut self, at: u64, len: usize, access: Access) -> Flow<Span> {
        let at = self.system_address(at);
        self.translate_span(at, len, access)
    }

    #[inline]
    fn translate_span(&mut self, at: Gva, len: usize, access: Access) -> Flow<Span> {
        let in_page = (PAGE_SIZE - at.page_offset()) as usize;
        let gpa = self.cpu.translate(at, access).map_err(Step::Fault)?;
        let mut next = gpa;
        if in_page < len {
            let mut boundary = at.0.wrapping_add(in_page as u64);
            if !self.mode.is_long() {
                boundary &= mask(4);
            }
            next = self.cpu.translate(Gva(boundary), access).map_err(Step::Fault)?;
        }
        Ok(Span { gpa, next, first: in_page.min(len), len })
    }

    /// #AC. SDM "Alignment Check Exception".
    #[cold]
    fn check_alignment(&self, at: Gva, len: usize) -> Flow<()> {
        let unaligned = len.is_power_of_two() && at.0 & (len.min(8) as u64).wrapping_sub(1) != 0;
        if unaligned && self.cpu.cpl() == 3 && self.cpu.cr(0) & cr0::AM != 0 {
            return Err(Step::Fault(Exception::with_code(exception::AC, 0)));
        }
        Ok(())
    }

    /// Translates the memory operand of ModRM.
    #[inline]
    pub(super) fn operand_span(&mut self, size: u8, access: Access) -> Flow<Span> {
        let place = self.place();
        self.span(place, size as usize, access)
    }

    /// Reads `to.len()` bytes, which is `span.len` or less.
    pub(super) fn load_bytes(&mut self, span: &Span, to: &mut [u8]) -> Flow<()> {
        let (first, second) = to.split_at_mut_checked(span.first).unwrap_or_default();
        if first.is_empty() {
            return self.load_part(span.gpa, to);
        }
        self.load_part(span.gpa, first)?;
        self.load_part(span.next, second)
    }

    /// Whether the operand, which stays in one page, is RAM.
    pub(super) fn is_ram(&mut self, span: &Span) -> bool {
        self.cpu.read_ram(span.gpa, &mut [0]).is_ok()
    }

    /// Reads a part that stays in one page.
    #[inline]
    fn load_part(&mut self, gpa: Gpa, to: &mut [u8]) -> Flow<()> {
        if to.is_empty() || self.cpu.read_ram(gpa, to).is_ok() {
            return Ok(());
        }
        let mut at = gpa;
        for part in to.chunks_mut(8) {
            self.io.read(at, part)?;
            at = at.wrapping_add(8);
        }
        Ok(())
    }

    /// Reads a number of up to eight bytes.
    #[inline]
    pub(super) fn load(&mut self, span: &Span) -> Flow<u64> {
        let mut data = [0u8; 8];
        let to = data.get_mut(..span.len).ok_or(Step::Unsupported)?;
        if span.first == span.len {
            self.load_part(span.gpa, to)?;
        } else {
            self.load_bytes(span, to)?;
        }
        Ok(u64::from_le_bytes(data))
    }

    /// Writes `span.len` bytes. Nothing can fail any more: devices get theirs after the instruction.
    pub(super) fn store_bytes(&mut self, span: &Span, from: &[u8]) {
        let Some((first, second)) = from.split_at_checked(span.first) else { return };
        self.store_part(span.gpa, first);
        self.store_part(span.next, second);
    }

    #[inline]
    pub(super) fn store_part(&mut self, gpa: Gpa, from: &[u8]) {
        if from.is_empty() || self.cpu.write_ram(gpa, from).is_ok() {
            return;
        }
        let mut at = gpa;
        for part in from.chunks(8) {
            self.io.write(at, part);
            at = at.wrapping_add(8);
        }
    }

    /// Writes a number of up to eight bytes.
    #[inline]
    pub(super) fn store(&mut self, span: &Span, value: u64) {
        let data = value.to_le_bytes();
        let Some(from) = data.get(..span.len) else { return };
        if span.first != span.len {
            self.store_bytes(span, from);
        } else if self.cpu.write_ram(span.gpa, from).is_err() {
            self.io.write_number(span.gpa, span.len as u8, value);
        }
    }

    /// Writes `new` where `old` was read, in one piece if the instruction is locked. When another CPU was quicker, the step
    /// ends and the guest executes the instruction again. A locked access that crosses a page is not atomic.
    #[inline]
    pub(super) fn store_locked(&mut self, span: &Span, old: &[u8], new: &[u8], locked: bool) -> Flow<()> {
        if locked || self.ins.has(prefix::LOCK) {
            if let Some(gpa) = span.one_page() {
                match self.cpu.compare_exchange_ram(gpa, old, new) {
                    Ok(true) => return Ok(()),
                    Ok(false) => return Err(Step::Done),
                    Err(NotRam) => {}
                }
            }
        }
        self.store_bytes(span, new);
        Ok(())
    }

    /// Width of the stack pointer, in bytes. SDM "Stack Address Size".
    #[inline]
    pub(super) fn stack_size(&self) -> u8 {
        if self.mode.is_long() {
            8
        } else if self.cpu.segment(SegmentName::Ss).attributes.big() {
            4
        } else {
            2
        }
    }

    /// The stack slot `offset` bytes from the stack pointer.
    #[inline]
    pub(super) fn stack_place(&self, offset: i64) -> Place {
        let sp = self.cpu.gpr(4).wrapping_add(offset as u64);
        Place { segment: SegmentName::Ss, offset: sp & mask(self.stack_size()) }
    }

    /// Moves the stack pointer.
    #[inline]
    pub(super) fn move_stack(&mut self, by: i64) {
        let size = self.stack_size();
        let sp = self.cpu.gpr(4).wrapping_add(by as u64);
        self.set_reg(4, size.max(2), sp & mask(size));
    }

    /// Pushes `values` in order, each of `size` bytes; all or none.
    pub(super) fn push(&mut self, values: &[u64], size: u8) -> Flow<()> {
        let step = size as i64;
        let mut offset = 0i64;
        if values.len() > 1 {
            for _ in values {
                offset = offset.wrapping_sub(step);
                let place = self.stack_place(offset);
                self.span(place, size as usize, Access::Write)?;
            }
        }
        offset = 0;
        for value in values {
            offset = offset.wrapping_sub(step);
            let place = self.stack_place(offset);
            let span = self.span(place, size as usize, Access::Write)?;
            self.store(&span, *value);
        }
        self.move_stack(offset);
        Ok(())
    }

    /// Reads the stack slot `index` slots of `size` bytes up; the stack pointer stays.
    #[inline]
    pub(super) fn peek(&mut self, index: i64, size: u8) -> Flow<u64> {
        let place = self.stack_place(index.wrapping_mul(size as i64));
        let span = self.span(place, size as usize, Access::Read)?;
        self.load(&span)
    }
}
