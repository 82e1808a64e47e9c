// SPDX-License-Identifier: GPL-2.0
//! Instruction decoder: prefixes, opcode, ModRM, SIB, displacement and immediate, after SDM Vol. 2 "Instruction Format".
//!
//! The length is right for every opcode of the legacy maps and for VEX, EVEX and XOP. A near branch with prefix 66 in 64-bit
//! mode is read as Intel reads it (the prefix is ignored). Not supported: REX2 and extended EVEX (APX), MVEX.
#![forbid(unsafe_code)]

use super::opcodes::{
    map_0f38, map_0f3a, resolve_group, Entry, Form, Imm, Op, BYTE, D64, F64, LOCK, MEMORY, MODRM, NO64, ONE_BYTE,
    PROTECTED, REGISTER, TWO_BYTE,
};
use crate::arch::segment::SegmentName;

/// Longest instruction, in bytes.
pub const MAX_LENGTH: usize = 15;

/// How the CPU reads code. Compatibility mode counts as protected mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    Real,
    Vm86,
    Protected16,
    Protected32,
    Long64,
}

impl Mode {
    /// Real or virtual-8086 mode: a segment is its selector times 16.
    #[inline]
    pub const fn is_real(self) -> bool {
        matches!(self, Self::Real | Self::Vm86)
    }

    /// 64-bit mode.
    #[inline]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Long64)
    }
}

/// Why there is no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The instruction goes on past the bytes given.
    Truncated,
    /// More than 15 bytes: #GP(0).
    TooLong,
}

/// Opcode map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Map {
    OneByte,
    M0f,
    M0f38,
    M0f3a,
    /// Another map of VEX, EVEX or XOP.
    Other,
}

/// Prefix bits of [`Instruction::prefixes`].
pub mod prefix {
    pub const LOCK: u8 = 1 << 0;
    /// F2 was the last of F2 and F3.
    pub const REPNE: u8 = 1 << 1;
    /// F3 was the last of F2 and F3.
    pub const REP: u8 = 1 << 2;
    /// 66.
    pub const OPERAND: u8 = 1 << 3;
    /// 67.
    pub const ADDRESS: u8 = 1 << 4;
    /// A REX that counts: SPL, BPL, SIL, DIL instead of AH, CH, DH, BH.
    pub const REX: u8 = 1 << 5;
    pub const VEX: u8 = 1 << 6;
    /// EVEX or XOP.
    pub const OTHER: u8 = 1 << 7;
}

/// REX bits of [`Instruction::rex`].
pub mod rex {
    pub const B: u8 = 1 << 0;
    pub const X: u8 = 1 << 1;
    pub const R: u8 = 1 << 2;
    pub const W: u8 = 1 << 3;
}

/// No register, in [`Instruction::base`] and [`Instruction::index`].
pub const NO_REGISTER: u8 = 0xFF;
/// RIP, in [`Instruction::base`].
pub const RIP: u8 = 16;

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    /// 1 to 15 bytes.
    pub length: u8,
    pub map: Map,
    /// Last opcode byte.
    pub opcode: u8,
    /// 0 when there is none.
    pub modrm: u8,
    pub op: Op,
    pub form: Form,
    /// Flags of the table entry.
    pub flags: u16,
    /// [`prefix`] bits.
    pub prefixes: u8,
    /// [`rex`] bits, also from VEX.
    pub rex: u8,
    /// 1, 2, 4 or 8 bytes.
    pub operand_size: u8,
    /// 2, 4 or 8 bytes.
    pub address_size: u8,
    /// Segment of the memory operand: the default of its base register, or the override.
    pub segment: SegmentName,
    /// Base register 0 to 15, [`RIP`] or [`NO_REGISTER`].
    pub base: u8,
    /// Index register 0 to 15, or [`NO_REGISTER`].
    pub index: u8,
    /// log2 of the index factor, 0 to 3.
    pub scale: u8,
    /// VEX.vvvv, not inverted: the extra register.
    pub vex_register: u8,
    /// VEX.L.
    pub vex_long: bool,
    /// VEX.pp or the mandatory prefix in its encoding: 0 none, 1 66, 2 F3, 3 F2.
    pub mandatory: u8,
    /// Second immediate: selector of a far pointer, nesting level of ENTER.
    pub second: u16,
    /// Displacement, sign-extended; or the absolute offset of a MOV A0 to A3.
    pub displacement: i64,
    /// Immediate, sign-extended.
    pub immediate: i64,
}

impl Instruction {
    pub(super) const EMPTY: Self = Self {
        length: 0,
        map: Map::OneByte,
        opcode: 0,
        modrm: 0,
        op: Op::Undefined,
        form: Form::None,
        flags: 0,
        prefixes: 0,
        rex: 0,
        operand_size: 4,
        address_size: 4,
        segment: SegmentName::Ds,
        base: NO_REGISTER,
        index: NO_REGISTER,
        scale: 0,
        vex_register: 0,
        vex_long: false,
        mandatory: 0,
        second: 0,
        displacement: 0,
        immediate: 0,
    };

    /// Register in ModRM.reg, 0 to 15.
    #[inline]
    pub const fn reg(&self) -> usize {
        (((self.modrm >> 3) & 7) | ((self.rex & rex::R) << 1)) as usize
    }

    /// Register in ModRM.rm, 0 to 15.
    #[inline]
    pub const fn rm(&self) -> usize {
        ((self.modrm & 7) | ((self.rex & rex::B) << 3)) as usize
    }

    /// Register in the low bits of the opcode, 0 to 15.
    #[inline]
    pub const fn opcode_reg(&self) -> usize {
        ((self.opcode & 7) | ((self.rex & rex::B) << 3)) as usize
    }

    /// Whether ModRM names memory.
    #[inline]
    pub const fn has_memory(&self) -> bool {
        self.flags & (MODRM | REGISTER) == MODRM && self.modrm < 0xC0
    }

    /// MOV from memory to a register.
    #[inline]
    pub fn is_load(&self) -> bool {
        self.op == Op::Mov && self.form == Form::RegRm && self.has_memory()
    }

    /// Whether any of `bits` of [`prefix`] is there.
    #[inline]
    pub const fn has(&self, bits: u8) -> bool {
        self.prefixes & bits != 0
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    /// The error for bytes that are not there.
    #[cold]
    fn missing(&self) -> DecodeError {
        if self.bytes.len() >= MAX_LENGTH {
            DecodeError::TooLong
        } else {
            DecodeError::Truncated
        }
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = *self.bytes.get(self.at).ok_or_else(|| self.missing())?;
        self.at = self.at.wrapping_add(1);
        Ok(byte)
    }

    #[inline]
    fn peek(&self) -> Result<u8, DecodeError> {
        self.bytes.get(self.at).copied().ok_or_else(|| self.missing())
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let chunk = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let chunk = *chunk.ok_or_else(|| self.missing())?;
        self.at = self.at.wrapping_add(N);
        Ok(chunk)
    }

    /// A sign-extended little-endian number of 1, 2, 4 or 8 bytes.
    #[inline]
    fn signed(&mut self, size: u8) -> Result<i64, DecodeError> {
        Ok(match size {
            1 => self.byte()? as i8 as i64,
            2 => i16::from_le_bytes(self.take()?) as i64,
            4 => i32::from_le_bytes(self.take()?) as i64,
            _ => i64::from_le_bytes(self.take()?),
        })
    }
}

/// Segment names by their number; 6 and 7 do not exist.
pub(super) const fn segment_name(number: u8) -> Option<SegmentName> {
    Some(match number {
        0 => SegmentName::Es,
        1 => SegmentName::Cs,
        2 => SegmentName::Ss,
        3 => SegmentName::Ds,
        4 => SegmentName::Fs,
        5 => SegmentName::Gs,
        _ => return None,
    })
}

/// Base, index and default segment of 16-bit addressing, by ModRM.rm. SDM Vol. 2 "16-Bit Addressing Forms".
const ADDRESS16: [(u8, u8, SegmentName); 8] = [
    (3, 6, SegmentName::Ds),
    (3, 7, SegmentName::Ds),
    (5, 6, SegmentName::Ss),
    (5, 7, SegmentName::Ss),
    (6, NO_REGISTER, SegmentName::Ds),
    (7, NO_REGISTER, SegmentName::Ds),
    (5, NO_REGISTER, SegmentName::Ss),
    (3, NO_REGISTER, SegmentName::Ds),
];

/// Decodes the instruction at the start of `bytes`; bytes after it, and past the fifteenth, are ignored. An instruction that does
/// not exist has a length all the same, and [`Op::Undefined`].
pub fn decode(bytes: &[u8], mode: Mode) -> Result<Instruction, DecodeError> {
    let mut cursor = Cursor { bytes: bytes.get(..MAX_LENGTH).unwrap_or(bytes), at: 0 };
    let mut instruction = Instruction::EMPTY;
    let ins = &mut instruction;
    let long = mode.is_long();
    let mut segment = None;

    let mut entry = loop {
        let byte = cursor.byte()?;
        if long && byte & 0xF0 == 0x40 {
            ins.prefixes |= prefix::REX;
            ins.rex = byte & 0xF;
            continue;
        }
        let entry = ONE_BYTE[byte as usize];
        if entry.op != Op::Prefix {
            ins.opcode = byte;
            break entry;
        }
        // A REX counts only right before the opcode.
        ins.prefixes &= !prefix::REX;
        ins.rex = 0;
        match byte {
            0x66 => ins.prefixes |= prefix::OPERAND,
            0x67 => ins.prefixes |= prefix::ADDRESS,
            0xF0 => ins.prefixes |= prefix::LOCK,
            0xF2 => ins.prefixes = ins.prefixes & !prefix::REP | prefix::REPNE,
            0xF3 => ins.prefixes = ins.prefixes & !prefix::REPNE | prefix::REP,
            0x64 => segment = Some(SegmentName::Fs),
            0x65 => segment = Some(SegmentName::Gs),
            _ if !long => segment = segment_name((byte >> 3) & 3),
            _ => {}
        }
    };

    match ins.opcode {
        0x0F => {
            let second = cursor.byte()?;
            match second {
                0x38 => {
                    ins.map = Map::M0f38;
                    ins.opcode = cursor.byte()?;
                    entry = map_0f38(ins.opcode);
                }
                0x3A => {
                    ins.map = Map::M0f3a;
                    ins.opcode = cursor.byte()?;
                    entry = map_0f3a();
                }
                _ => {
                    ins.map = Map::M0f;
                    ins.opcode = second;
                    entry = TWO_BYTE[second as usize];
                }
            }
            ins.mandatory = if ins.has(prefix::REPNE) {
                3
            } else if ins.has(prefix::REP) {
                2
            } else if ins.has(prefix::OPERAND) {
                1
            } else {
                0
            };
        }
        0xC4 | 0xC5 | 0x62 if long || cursor.peek()? >= 0xC0 => entry = extended(ins, &mut cursor, mode)?,
        0x8F if cursor.peek()? & 0x1F >= 8 => entry = extended(ins, &mut cursor, mode)?,
        _ => {}
    }

    if entry.flags & MODRM != 0 {
        ins.modrm = cursor.byte()?;
        entry = refine(resolve_group(entry, ins.modrm), ins);
    }
    ins.op = entry.op;
    ins.form = entry.form;
    ins.flags = entry.flags;

    let wide_prefix = ins.has(prefix::OPERAND);
    let other_address = ins.has(prefix::ADDRESS);
    let (operand, address) = match mode {
        Mode::Long64 => {
            let operand = if ins.rex & rex::W != 0 || entry.flags & F64 != 0 {
                8
            } else if wide_prefix {
                2
            } else if entry.flags & D64 != 0 {
                8
            } else {
                4
            };
            (operand, if other_address { 4 } else { 8 })
        }
        Mode::Protected32 => (if wide_prefix { 2 } else { 4 }, if other_address { 2 } else { 4 }),
        _ => (if wide_prefix { 4 } else { 2 }, if other_address { 4 } else { 2 }),
    };
    ins.operand_size = if entry.flags & BYTE != 0 { 1 } else { operand };
    ins.address_size = address;

    if ins.has_memory() {
        memory_operand(ins, &mut cursor, long)?;
    }
    if let Some(segment) = segment {
        ins.segment = segment;
    }

    match entry.imm {
        Imm::None => {}
        Imm::Byte => ins.immediate = cursor.signed(1)?,
        Imm::Word => ins.immediate = cursor.signed(2)? & 0xFFFF,
        Imm::Dword => ins.immediate = cursor.signed(4)?,
        Imm::Operand => ins.immediate = cursor.signed(ins.operand_size.min(4))?,
        Imm::Full => ins.immediate = cursor.signed(ins.operand_size)?,
        Imm::WordByte => {
            ins.immediate = cursor.signed(2)? & 0xFFFF;
            ins.second = cursor.byte()? as u16;
        }
        Imm::Far => {
            ins.immediate = cursor.signed(operand.min(4))?;
            ins.second = u16::from_le_bytes(cursor.take()?);
        }
        Imm::Offset => ins.displacement = cursor.signed(ins.address_size)?,
    }
    ins.length = cursor.at as u8;

    let lock_wrong = ins.has(prefix::LOCK) && (entry.flags & LOCK == 0 || !ins.has_memory());
    let register_wrong = entry.flags & MEMORY != 0 && ins.modrm >= 0xC0;
    let mode_wrong = (long && entry.flags & NO64 != 0) || (mode.is_real() && entry.flags & PROTECTED != 0);
    if lock_wrong || register_wrong || mode_wrong {
        ins.op = Op::Undefined;
    }
    Ok(instruction)
}

/// Opcodes whose meaning depends on more than the group: on ModRM.mod or on a mandatory prefix.
#[inline]
fn refine(mut entry: Entry, ins: &Instruction) -> Entry {
    let register = ins.modrm >= 0xC0;
    match entry.op {
        // VMCALL, MONITOR, XGETBV, SWAPGS and so on.
        Op::Sgdt | Op::Sidt | Op::Lgdt | Op::Lidt | Op::Invlpg if register => entry.op = Op::Unsupported,
        Op::Movbe if ins.has(prefix::REPNE) => {
            // CRC32: register or memory source, the first one of a byte.
            entry.op = Op::Unsupported;
            entry.flags &= !MEMORY;
        }
        // ADCX and ADOX are 0F38 F6; F0 and F1 with F3 are undefined.
        Op::Movbe if ins.has(prefix::REP) => entry.op = Op::Undefined,
        Op::Unsupported if ins.map == Map::OneByte && super::x87::is_control(ins.opcode, ins.modrm) => {
            entry.op = Op::X87
        }
        // EXTRQ and INSERTQ have two bytes.
        Op::Unsupported if ins.map == Map::M0f && ins.opcode == 0x78 && (ins.mandatory == 1 || ins.mandatory == 3) => {
            entry.imm = Imm::Word;
        }
        _ => {}
    }
    entry
}

/// The rest of a VEX, EVEX or XOP prefix and the opcode after it. `ins.opcode` is the first prefix byte.
fn extended(ins: &mut Instruction, cursor: &mut Cursor<'_>, mode: Mode) -> Result<Entry, DecodeError> {
    // None of these goes with LOCK, 66, F2, F3 or REX, nor with real mode.
    let clash = prefix::LOCK | prefix::OPERAND | prefix::REP | prefix::REPNE | prefix::REX;
    let bad = ins.has(clash) || mode.is_real();
    let first = ins.opcode;
    let payload = cursor.byte()?;
    let vex = matches!(first, 0xC4 | 0xC5);
    ins.prefixes |= if vex { prefix::VEX } else { prefix::OTHER };
    // R, X and B are stored inverted in bits 7 to 5.
    ins.rex = if first == 0xC5 { (!payload >> 5) & rex::R } else { (!payload >> 5) & 7 };
    let last = if first == 0xC5 { payload } else { cursor.byte()? };
    if first != 0xC5 && last & 0x80 != 0 {
        ins.rex |= rex::W;
    }
    let map = match first {
        0xC5 => 1,
        0x62 => payload & 7,
        _ => payload & 0x1F,
    };
    if first == 0x62 {
        cursor.byte()?;
    }
    ins.mandatory = last & 3;
    ins.vex_long = last & 4 != 0;
    ins.vex_register = (!last >> 3) & 0xF;
    if !mode.is_long() {
        ins.rex &= rex::W;
        ins.vex_register &= 7;
    }
    ins.opcode = cursor.byte()?;
    ins.map = match map {
        1 => Map::M0f,
        2 => Map::M0f38,
        3 => Map::M0f3a,
        _ => Map::Other,
    };

    let mut entry = map_0f3a();
    entry.imm = match ins.map {
        Map::M0f if matches!(ins.opcode, 0x70..=0x73 | 0xC2 | 0xC4..=0xC6) => Imm::Byte,
        Map::M0f3a => Imm::Byte,
        Map::Other if first == 0x8F && map == 8 => Imm::Byte,
        Map::Other if first == 0x8F && map == 10 => Imm::Dword,
        _ => Imm::None,
    };
    if vex {
        match ins.map {
            // VZEROUPPER and VZEROALL.
            Map::M0f if ins.opcode == 0x77 => entry.flags = 0,
            Map::M0f if TWO_BYTE[ins.opcode as usize].op == Op::VectorMove => entry.op = Op::VectorMove,
            Map::M0f38 => entry.op = map_0f38(ins.opcode).op,
            _ => {}
        }
        if entry.op != Op::VectorMove {
            entry.op = Op::Unsupported;
        }
    }
    if bad {
        entry.op = Op::Undefined;
    }
    Ok(entry)
}

/// SIB and displacement of the ModRM byte in `ins`, which names memory.
#[inline]
fn memory_operand(ins: &mut Instruction, cursor: &mut Cursor<'_>, long: bool) -> Result<(), DecodeError> {
    let (mode, rm) = (ins.modrm >> 6, ins.modrm & 7);
    if ins.address_size == 2 {
        let (base, index, segment) = ADDRESS16[rm as usize];
        if mode == 0 && rm == 6 {
            ins.displacement = cursor.signed(2)?;
            return Ok(());
        }
        (ins.base, ins.index, ins.segment) = (base, index, segment);
        if mode != 0 {
            ins.displacement = cursor.signed(mode)?;
        }
        return Ok(());
    }

    let mut base = rm;
    if rm == 4 {
        let sib = cursor.byte()?;
        let index = ((sib >> 3) & 7) | ((ins.rex & rex::X) << 2);
        if index != 4 {
            ins.index = index;
            ins.scale = sib >> 6;
        }
        base = sib & 7;
    }
    if base == 5 && mode == 0 {
        ins.displacement = cursor.signed(4)?;
        if long && rm == 5 {
            ins.base = RIP;
        }
        return Ok(());
    }
    base |= (ins.rex & rex::B) << 3;
    ins.base = base;
    if base == 4 || base == 5 {
        ins.segment = SegmentName::Ss;
    }
    match mode {
        1 => ins.displacement = cursor.signed(1)?,
        2 => ins.displacement = cursor.signed(4)?,
        _ => {}
    }
    Ok(())
}
