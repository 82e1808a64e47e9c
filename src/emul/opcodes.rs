// SPDX-License-Identifier: GPL-2.0
//! Opcode tables: for every opcode what it does, how its operands are encoded, and what immediate follows.
//!
//! Facts from SDM Vol. 2 "Opcode Map" and APM Vol. 3 "Opcode and Operand Encodings". The tables are built at compile time:
//! six bytes an entry. Opcodes that exist but are not emulated (most of x87, of SSE and AVX, far transfers of protected
//! mode) are [`Op::Unsupported`], and their length is still right; opcodes that do not exist are [`Op::Undefined`].
#![forbid(unsafe_code)]

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub enum Op {
    /// No such instruction: #UD.
    Undefined,
    /// It exists; the emulator does not execute it.
    Unsupported,
    /// Legacy prefix (only inside the one-byte table).
    Prefix,

    // The operation is in ModRM.reg; the decoder replaces these. In the order of `GROUPS`.
    Group1,
    Group1a,
    Group2,
    Group3,
    Group4,
    Group5,
    Group6,
    Group7,
    Group8,
    Group9,
    Group11,
    Group15,

    // In the order of ModRM.reg of group 1.
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    // In the order of ModRM.reg of group 2.
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    /// The other encoding of SHL, ModRM.reg = 6.
    Sal,
    Sar,

    Test,
    Inc,
    Dec,
    Not,
    Neg,
    Mul,
    Imul,
    Div,
    Idiv,
    /// Two- and three-operand IMUL.
    ImulReg,
    Shld,
    Shrd,
    Bt,
    Bts,
    Btr,
    Btc,
    /// BSF, or TZCNT with F3.
    Bsf,
    /// BSR, or LZCNT with F3.
    Bsr,
    /// POPCNT with F3, else undefined.
    Popcnt,

    Mov,
    Movzx8,
    Movzx16,
    Movsx8,
    Movsx16,
    /// MOVSXD in 64-bit mode, else ARPL.
    Movsxd,
    Movbe,
    Movnti,
    Lea,
    Xchg,
    /// XCHG of the accumulator with the register in the opcode; 90h is NOP.
    XchgAcc,
    Xadd,
    Cmpxchg,
    Cmpxchg8b,
    Bswap,
    Cmov,
    Setcc,
    Xlat,
    /// CBW, CWDE, CDQE.
    Cbw,
    /// CWD, CDQ, CQO.
    Cwd,

    Push,
    Pop,
    PushSeg,
    PopSeg,
    Pusha,
    Popa,
    Pushf,
    Popf,
    Enter,
    Leave,
    MovFromSeg,
    MovToSeg,
    /// LES, LDS, LSS, LFS, LGS.
    LoadFar,

    Jcc,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
    /// LOOPNE, LOOPE, LOOP, JCXZ.
    Loop,
    JmpFar,
    CallFar,
    JmpFarIndirect,
    CallFarIndirect,
    RetFar,
    Iret,
    Int,
    Int3,
    Into,

    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
    In,
    Out,

    /// CLC, STC, CLI, STI, CLD, STD.
    Flag,
    Cmc,
    Lahf,
    Sahf,
    /// NOP, PREFETCHh, ENDBR and other hints.
    Nop,
    Fence,

    MovFromCr,
    MovToCr,
    MovFromDr,
    MovToDr,
    Clts,
    Smsw,
    Lmsw,
    Sgdt,
    Sidt,
    Lgdt,
    Lidt,
    Sldt,
    Str,
    Lldt,
    Ltr,
    Invlpg,

    /// SSE and VEX moves.
    VectorMove,
    /// What `x87.rs` has; the decoder knows which.
    X87,
    Fwait,
}

/// How the operands are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Form {
    /// None, or the operation knows.
    None,
    /// r/m, register.
    RmReg,
    /// register, r/m.
    RegRm,
    /// r/m, immediate.
    RmImm,
    /// register, r/m, immediate.
    RegRmImm,
    /// r/m only.
    Rm,
    /// r/m, the number one.
    RmOne,
    /// r/m, CL.
    RmCl,
    /// accumulator, immediate.
    AccImm,
    /// register in the low opcode bits.
    OpReg,
    /// register in the low opcode bits, immediate.
    OpRegImm,
    /// accumulator, memory at an absolute offset.
    AccOffset,
    /// memory at an absolute offset, accumulator.
    OffsetAcc,
}

/// What follows the ModRM part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Imm {
    None,
    /// One byte, sign-extended.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    Dword,
    /// Operand size, at most four bytes, sign-extended; one byte for a byte operation.
    Operand,
    /// Operand size, up to eight bytes (MOV B8 to BF).
    Full,
    /// Two bytes and one byte (ENTER).
    WordByte,
    /// Offset of operand size, then a selector.
    Far,
    /// Absolute memory offset of address size.
    Offset,
}

/// A ModRM byte follows.
pub const MODRM: u16 = 1 << 0;
/// Byte operands.
pub const BYTE: u16 = 1 << 1;
/// #UD in 64-bit mode.
pub const NO64: u16 = 1 << 2;
/// The operand size is 64 in 64-bit mode, or 16 with prefix 66.
pub const D64: u16 = 1 << 3;
/// The operand size is 64 in 64-bit mode, whatever the prefixes say.
pub const F64: u16 = 1 << 4;
/// LOCK is allowed when the destination is memory.
pub const LOCK: u16 = 1 << 5;
/// The register form is #UD.
pub const MEMORY: u16 = 1 << 6;
/// ModRM always names a register: ModRM.mod is ignored.
pub const REGISTER: u16 = 1 << 7;
/// #UD in real and virtual-8086 mode.
pub const PROTECTED: u16 = 1 << 8;

/// One table entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub op: Op,
    pub form: Form,
    pub imm: Imm,
    pub flags: u16,
}

const fn entry(op: Op, form: Form, imm: Imm, flags: u16) -> Entry {
    Entry { op, form, imm, flags }
}

/// No ModRM, no immediate.
const fn bare(op: Op) -> Entry {
    entry(op, Form::None, Imm::None, 0)
}

/// A ModRM operand and nothing else.
const fn modrm(op: Op, form: Form, flags: u16) -> Entry {
    entry(op, form, Imm::None, flags | MODRM)
}

impl Entry {
    pub const UNDEFINED: Self = bare(Op::Undefined);
    const UNSUPPORTED_RM: Self = modrm(Op::Unsupported, Form::None, 0);
}

/// Operations in the order of ModRM.reg of group 1, which is also bits 3 to 5 of the first 64 opcodes.
const ARITHMETIC: [Op; 8] = [Op::Add, Op::Or, Op::Adc, Op::Sbb, Op::And, Op::Sub, Op::Xor, Op::Cmp];

/// One-byte opcodes.
pub static ONE_BYTE: [Entry; 256] = one_byte();
/// Opcodes after 0F.
pub static TWO_BYTE: [Entry; 256] = two_byte();

const fn one_byte() -> [Entry; 256] {
    let mut t = [Entry::UNDEFINED; 256];
    let mut i = 0;
    while i < 8 {
        let op = ARITHMETIC[i];
        let lock = if i == 7 { 0 } else { LOCK };
        t[i * 8] = modrm(op, Form::RmReg, BYTE | lock);
        t[i * 8 + 1] = modrm(op, Form::RmReg, lock);
        t[i * 8 + 2] = modrm(op, Form::RegRm, BYTE);
        t[i * 8 + 3] = modrm(op, Form::RegRm, 0);
        t[i * 8 + 4] = entry(op, Form::AccImm, Imm::Operand, BYTE);
        t[i * 8 + 5] = entry(op, Form::AccImm, Imm::Operand, 0);
        if i < 4 {
            t[i * 8 + 6] = entry(Op::PushSeg, Form::None, Imm::None, NO64);
            t[i * 8 + 7] = entry(Op::PopSeg, Form::None, Imm::None, NO64);
        } else {
            t[i * 8 + 6] = bare(Op::Prefix);
            // DAA, DAS, AAA, AAS.
            t[i * 8 + 7] = entry(Op::Unsupported, Form::None, Imm::None, NO64);
        }
        // 40 to 5F: INC, DEC, PUSH, POP. The first two are REX in 64-bit mode.
        t[0x40 + i] = entry(Op::Inc, Form::OpReg, Imm::None, NO64);
        t[0x48 + i] = entry(Op::Dec, Form::OpReg, Imm::None, NO64);
        t[0x50 + i] = entry(Op::Push, Form::OpReg, Imm::None, D64);
        t[0x58 + i] = entry(Op::Pop, Form::OpReg, Imm::None, D64);
        t[0x90 + i] = entry(Op::XchgAcc, Form::OpReg, Imm::None, 0);
        t[0xB0 + i] = entry(Op::Mov, Form::OpRegImm, Imm::Operand, BYTE);
        t[0xB8 + i] = entry(Op::Mov, Form::OpRegImm, Imm::Full, 0);
        t[0xD8 + i] = Entry::UNSUPPORTED_RM; // x87
        i += 1;
    }
    i = 0;
    while i < 16 {
        t[0x70 + i] = entry(Op::Jcc, Form::None, Imm::Byte, F64);
        i += 1;
    }
    t[0x0F] = bare(Op::Undefined); // two-byte escape: the decoder takes it before looking here

    t[0x60] = entry(Op::Pusha, Form::None, Imm::None, NO64);
    t[0x61] = entry(Op::Popa, Form::None, Imm::None, NO64);
    t[0x62] = modrm(Op::Unsupported, Form::RegRm, NO64 | MEMORY); // BOUND; EVEX is the decoder's
    t[0x63] = modrm(Op::Movsxd, Form::RegRm, 0);
    t[0x64] = bare(Op::Prefix);
    t[0x65] = bare(Op::Prefix);
    t[0x66] = bare(Op::Prefix);
    t[0x67] = bare(Op::Prefix);
    t[0x68] = entry(Op::Push, Form::AccImm, Imm::Operand, D64);
    t[0x69] = entry(Op::ImulReg, Form::RegRmImm, Imm::Operand, MODRM);
    t[0x6A] = entry(Op::Push, Form::AccImm, Imm::Byte, D64);
    t[0x6B] = entry(Op::ImulReg, Form::RegRmImm, Imm::Byte, MODRM);
    t[0x6C] = entry(Op::Ins, Form::None, Imm::None, BYTE);
    t[0x6D] = bare(Op::Ins);
    t[0x6E] = entry(Op::Outs, Form::None, Imm::None, BYTE);
    t[0x6F] = bare(Op::Outs);

    t[0x80] = entry(Op::Group1, Form::RmImm, Imm::Byte, MODRM | BYTE);
    t[0x81] = entry(Op::Group1, Form::RmImm, Imm::Operand, MODRM);
    t[0x82] = entry(Op::Group1, Form::RmImm, Imm::Byte, MODRM | BYTE | NO64);
    t[0x83] = entry(Op::Group1, Form::RmImm, Imm::Byte, MODRM);
    t[0x84] = modrm(Op::Test, Form::RmReg, BYTE);
    t[0x85] = modrm(Op::Test, Form::RmReg, 0);
    t[0x86] = modrm(Op::Xchg, Form::RmReg, BYTE | LOCK);
    t[0x87] = modrm(Op::Xchg, Form::RmReg, LOCK);
    t[0x88] = modrm(Op::Mov, Form::RmReg, BYTE);
    t[0x89] = modrm(Op::Mov, Form::RmReg, 0);
    t[0x8A] = modrm(Op::Mov, Form::RegRm, BYTE);
    t[0x8B] = modrm(Op::Mov, Form::RegRm, 0);
    t[0x8C] = modrm(Op::MovFromSeg, Form::RmReg, 0);
    t[0x8D] = modrm(Op::Lea, Form::RegRm, MEMORY);
    t[0x8E] = modrm(Op::MovToSeg, Form::RegRm, 0);
    t[0x8F] = modrm(Op::Group1a, Form::Rm, D64);

    t[0x98] = bare(Op::Cbw);
    t[0x99] = bare(Op::Cwd);
    t[0x9A] = entry(Op::CallFar, Form::None, Imm::Far, NO64);
    t[0x9B] = bare(Op::Fwait);
    t[0x9C] = entry(Op::Pushf, Form::None, Imm::None, D64);
    t[0x9D] = entry(Op::Popf, Form::None, Imm::None, D64);
    t[0x9E] = bare(Op::Sahf);
    t[0x9F] = bare(Op::Lahf);

    t[0xA0] = entry(Op::Mov, Form::AccOffset, Imm::Offset, BYTE);
    t[0xA1] = entry(Op::Mov, Form::AccOffset, Imm::Offset, 0);
    t[0xA2] = entry(Op::Mov, Form::OffsetAcc, Imm::Offset, BYTE);
    t[0xA3] = entry(Op::Mov, Form::OffsetAcc, Imm::Offset, 0);
    t[0xA4] = entry(Op::Movs, Form::None, Imm::None, BYTE);
    t[0xA5] = bare(Op::Movs);
    t[0xA6] = entry(Op::Cmps, Form::None, Imm::None, BYTE);
    t[0xA7] = bare(Op::Cmps);
    t[0xA8] = entry(Op::Test, Form::AccImm, Imm::Operand, BYTE);
    t[0xA9] = entry(Op::Test, Form::AccImm, Imm::Operand, 0);
    t[0xAA] = entry(Op::Stos, Form::None, Imm::None, BYTE);
    t[0xAB] = bare(Op::Stos);
    t[0xAC] = entry(Op::Lods, Form::None, Imm::None, BYTE);
    t[0xAD] = bare(Op::Lods);
    t[0xAE] = entry(Op::Scas, Form::None, Imm::None, BYTE);
    t[0xAF] = bare(Op::Scas);

    t[0xC0] = entry(Op::Group2, Form::RmImm, Imm::Byte, MODRM | BYTE);
    t[0xC1] = entry(Op::Group2, Form::RmImm, Imm::Byte, MODRM);
    t[0xC2] = entry(Op::Ret, Form::None, Imm::Word, F64);
    t[0xC3] = entry(Op::Ret, Form::None, Imm::None, F64);
    t[0xC4] = modrm(Op::LoadFar, Form::RegRm, NO64 | MEMORY);
    t[0xC5] = modrm(Op::LoadFar, Form::RegRm, NO64 | MEMORY);
    t[0xC6] = entry(Op::Group11, Form::RmImm, Imm::Operand, MODRM | BYTE);
    t[0xC7] = entry(Op::Group11, Form::RmImm, Imm::Operand, MODRM);
    t[0xC8] = entry(Op::Enter, Form::None, Imm::WordByte, D64);
    t[0xC9] = entry(Op::Leave, Form::None, Imm::None, D64);
    t[0xCA] = entry(Op::RetFar, Form::None, Imm::Word, 0);
    t[0xCB] = bare(Op::RetFar);
    t[0xCC] = bare(Op::Int3);
    t[0xCD] = entry(Op::Int, Form::None, Imm::Byte, 0);
    t[0xCE] = entry(Op::Into, Form::None, Imm::None, NO64);
    t[0xCF] = bare(Op::Iret);

    t[0xD0] = modrm(Op::Group2, Form::RmOne, BYTE);
    t[0xD1] = modrm(Op::Group2, Form::RmOne, 0);
    t[0xD2] = modrm(Op::Group2, Form::RmCl, BYTE);
    t[0xD3] = modrm(Op::Group2, Form::RmCl, 0);
    t[0xD4] = entry(Op::Unsupported, Form::None, Imm::Byte, NO64); // AAM
    t[0xD5] = entry(Op::Unsupported, Form::None, Imm::Byte, NO64); // AAD
    t[0xD6] = entry(Op::Unsupported, Form::None, Imm::None, NO64); // SALC
    t[0xD7] = bare(Op::Xlat);

    t[0xE0] = entry(Op::Loop, Form::None, Imm::Byte, F64);
    t[0xE1] = entry(Op::Loop, Form::None, Imm::Byte, F64);
    t[0xE2] = entry(Op::Loop, Form::None, Imm::Byte, F64);
    t[0xE3] = entry(Op::Loop, Form::None, Imm::Byte, F64);
    t[0xE4] = entry(Op::In, Form::AccImm, Imm::Byte, BYTE);
    t[0xE5] = entry(Op::In, Form::AccImm, Imm::Byte, 0);
    t[0xE6] = entry(Op::Out, Form::AccImm, Imm::Byte, BYTE);
    t[0xE7] = entry(Op::Out, Form::AccImm, Imm::Byte, 0);
    t[0xE8] = entry(Op::Call, Form::None, Imm::Operand, F64);
    t[0xE9] = entry(Op::Jmp, Form::None, Imm::Operand, F64);
    t[0xEA] = entry(Op::JmpFar, Form::None, Imm::Far, NO64);
    t[0xEB] = entry(Op::Jmp, Form::None, Imm::Byte, F64);
    t[0xEC] = entry(Op::In, Form::None, Imm::None, BYTE);
    t[0xED] = bare(Op::In);
    t[0xEE] = entry(Op::Out, Form::None, Imm::None, BYTE);
    t[0xEF] = bare(Op::Out);

    t[0xF0] = bare(Op::Prefix);
    t[0xF1] = bare(Op::Unsupported); // INT1
    t[0xF2] = bare(Op::Prefix);
    t[0xF3] = bare(Op::Prefix);
    t[0xF4] = bare(Op::Unsupported); // HLT: always an exit of its own
    t[0xF5] = bare(Op::Cmc);
    t[0xF6] = modrm(Op::Group3, Form::Rm, BYTE);
    t[0xF7] = modrm(Op::Group3, Form::Rm, 0);
    t[0xF8] = bare(Op::Flag);
    t[0xF9] = bare(Op::Flag);
    t[0xFA] = bare(Op::Flag);
    t[0xFB] = bare(Op::Flag);
    t[0xFC] = bare(Op::Flag);
    t[0xFD] = bare(Op::Flag);
    t[0xFE] = modrm(Op::Group4, Form::Rm, BYTE);
    t[0xFF] = modrm(Op::Group5, Form::Rm, 0);
    t
}

/// Opcodes after 0F that have neither ModRM nor immediate and are not emulated: SYSCALL, SYSRET, INVD, WBINVD, FEMMS,
/// WRMSR, RDTSC, RDMSR, RDPMC, SYSENTER, SYSEXIT, GETSEC, EMMS, CPUID, RSM.
const BARE_UNSUPPORTED: [u8; 15] =
    [0x05, 0x07, 0x08, 0x09, 0x0E, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x37, 0x77, 0xA2, 0xAA];
/// Opcodes after 0F that do not exist; UD2 is among them.
const BARE_UNDEFINED: [u8; 16] =
    [0x04, 0x0A, 0x0B, 0x0C, 0x24, 0x25, 0x26, 0x27, 0x36, 0x39, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0x38];
/// Vector moves that are emulated.
const VECTOR_MOVES: [u8; 16] =
    [0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2B, 0x6E, 0x6F, 0x7E, 0x7F, 0xD6, 0xE7, 0xF0];
/// Opcodes after 0F with ModRM and a byte, not emulated: 3DNow!, PSHUF, vector shifts, CMPPS, PINSRW, PEXTRW, SHUFPS.
const BYTE_UNSUPPORTED: [u8; 9] = [0x0F, 0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6];

const fn two_byte() -> [Entry; 256] {
    let mut t = [Entry::UNSUPPORTED_RM; 256];
    let mut i = 0;
    while i < BARE_UNSUPPORTED.len() {
        t[BARE_UNSUPPORTED[i] as usize] = bare(Op::Unsupported);
        i += 1;
    }
    i = 0;
    while i < BARE_UNDEFINED.len() {
        t[BARE_UNDEFINED[i] as usize] = Entry::UNDEFINED;
        i += 1;
    }
    i = 0;
    while i < VECTOR_MOVES.len() {
        t[VECTOR_MOVES[i] as usize] = modrm(Op::VectorMove, Form::None, 0);
        i += 1;
    }
    i = 0;
    while i < BYTE_UNSUPPORTED.len() {
        t[BYTE_UNSUPPORTED[i] as usize] = entry(Op::Unsupported, Form::None, Imm::Byte, MODRM);
        i += 1;
    }
    i = 0;
    while i < 16 {
        t[0x40 + i] = modrm(Op::Cmov, Form::RegRm, 0);
        t[0x80 + i] = entry(Op::Jcc, Form::None, Imm::Operand, F64);
        t[0x90 + i] = modrm(Op::Setcc, Form::Rm, BYTE);
        i += 1;
    }
    i = 0;
    while i < 8 {
        t[0x18 + i] = modrm(Op::Nop, Form::None, 0);
        t[0xC8 + i] = entry(Op::Bswap, Form::OpReg, Imm::None, 0);
        i += 1;
    }
    // MPX BNDLDX, BNDMOV and so on live in 1A and 1B: without MPX they are hints.
    t[0x0D] = modrm(Op::Nop, Form::None, 0); // PREFETCHW
    t[0x00] = modrm(Op::Group6, Form::Rm, PROTECTED);
    t[0x01] = modrm(Op::Group7, Form::Rm, 0);
    t[0x06] = bare(Op::Clts);
    t[0x20] = modrm(Op::MovFromCr, Form::RmReg, REGISTER | F64);
    t[0x21] = modrm(Op::MovFromDr, Form::RmReg, REGISTER | F64);
    t[0x22] = modrm(Op::MovToCr, Form::RegRm, REGISTER | F64);
    t[0x23] = modrm(Op::MovToDr, Form::RegRm, REGISTER | F64);
    t[0xA0] = entry(Op::PushSeg, Form::None, Imm::None, D64);
    t[0xA1] = entry(Op::PopSeg, Form::None, Imm::None, D64);
    t[0xA3] = modrm(Op::Bt, Form::RmReg, 0);
    t[0xA4] = entry(Op::Shld, Form::RmImm, Imm::Byte, MODRM);
    t[0xA5] = modrm(Op::Shld, Form::RmCl, 0);
    t[0xA6] = modrm(Op::Undefined, Form::None, 0);
    t[0xA7] = modrm(Op::Undefined, Form::None, 0);
    t[0xA8] = entry(Op::PushSeg, Form::None, Imm::None, D64);
    t[0xA9] = entry(Op::PopSeg, Form::None, Imm::None, D64);
    t[0xAB] = modrm(Op::Bts, Form::RmReg, LOCK);
    t[0xAC] = entry(Op::Shrd, Form::RmImm, Imm::Byte, MODRM);
    t[0xAD] = modrm(Op::Shrd, Form::RmCl, 0);
    t[0xAE] = modrm(Op::Group15, Form::None, 0);
    t[0xAF] = modrm(Op::ImulReg, Form::RegRm, 0);
    t[0xB0] = modrm(Op::Cmpxchg, Form::RmReg, BYTE | LOCK);
    t[0xB1] = modrm(Op::Cmpxchg, Form::RmReg, LOCK);
    t[0xB2] = modrm(Op::LoadFar, Form::RegRm, MEMORY);
    t[0xB3] = modrm(Op::Btr, Form::RmReg, LOCK);
    t[0xB4] = modrm(Op::LoadFar, Form::RegRm, MEMORY);
    t[0xB5] = modrm(Op::LoadFar, Form::RegRm, MEMORY);
    t[0xB6] = modrm(Op::Movzx8, Form::RegRm, 0);
    t[0xB7] = modrm(Op::Movzx16, Form::RegRm, 0);
    t[0xB8] = modrm(Op::Popcnt, Form::RegRm, 0);
    t[0xB9] = modrm(Op::Undefined, Form::None, 0); // UD1
    t[0xBA] = entry(Op::Group8, Form::RmImm, Imm::Byte, MODRM);
    t[0xBB] = modrm(Op::Btc, Form::RmReg, LOCK);
    t[0xBC] = modrm(Op::Bsf, Form::RegRm, 0);
    t[0xBD] = modrm(Op::Bsr, Form::RegRm, 0);
    t[0xBE] = modrm(Op::Movsx8, Form::RegRm, 0);
    t[0xBF] = modrm(Op::Movsx16, Form::RegRm, 0);
    t[0xC0] = modrm(Op::Xadd, Form::RmReg, BYTE | LOCK);
    t[0xC1] = modrm(Op::Xadd, Form::RmReg, LOCK);
    t[0xC3] = modrm(Op::Movnti, Form::RmReg, MEMORY);
    t[0xC7] = modrm(Op::Group9, Form::Rm, 0);
    t[0xFF] = modrm(Op::Undefined, Form::None, 0); // UD0
    t
}

/// The entry of an opcode after 0F 38.
pub const fn map_0f38(opcode: u8) -> Entry {
    match opcode {
        0xF0 => modrm(Op::Movbe, Form::RegRm, MEMORY),
        0xF1 => modrm(Op::Movbe, Form::RmReg, MEMORY),
        0x2A => modrm(Op::VectorMove, Form::None, MEMORY),
        _ => Entry::UNSUPPORTED_RM,
    }
}

/// The entry of an opcode after 0F 3A.
pub const fn map_0f3a() -> Entry {
    entry(Op::Unsupported, Form::None, Imm::Byte, MODRM)
}

const UNDEFINED: Entry = modrm(Op::Undefined, Form::None, 0);
const UNSUPPORTED: Entry = Entry::UNSUPPORTED_RM;

const fn same(op: Op, flags: u16) -> Entry {
    modrm(op, Form::None, flags)
}

/// Members of the groups by ModRM.reg, in the order of `Op::Group1` and so on. A member adds its flags to those of the
/// group's opcode, and keeps the opcode's operand form and immediate unless it has its own.
static GROUPS: [[Entry; 8]; 12] = [
    [
        same(Op::Add, LOCK),
        same(Op::Or, LOCK),
        same(Op::Adc, LOCK),
        same(Op::Sbb, LOCK),
        same(Op::And, LOCK),
        same(Op::Sub, LOCK),
        same(Op::Xor, LOCK),
        same(Op::Cmp, 0),
    ],
    [same(Op::Pop, 0), UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED],
    [
        same(Op::Rol, 0),
        same(Op::Ror, 0),
        same(Op::Rcl, 0),
        same(Op::Rcr, 0),
        same(Op::Shl, 0),
        same(Op::Shr, 0),
        same(Op::Sal, 0),
        same(Op::Sar, 0),
    ],
    [
        entry(Op::Test, Form::RmImm, Imm::Operand, MODRM),
        entry(Op::Test, Form::RmImm, Imm::Operand, MODRM),
        same(Op::Not, LOCK),
        same(Op::Neg, LOCK),
        same(Op::Mul, 0),
        same(Op::Imul, 0),
        same(Op::Div, 0),
        same(Op::Idiv, 0),
    ],
    [same(Op::Inc, LOCK), same(Op::Dec, LOCK), UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED],
    [
        same(Op::Inc, LOCK),
        same(Op::Dec, LOCK),
        same(Op::CallIndirect, F64),
        same(Op::CallFarIndirect, MEMORY),
        same(Op::JmpIndirect, F64),
        same(Op::JmpFarIndirect, MEMORY),
        same(Op::Push, D64),
        UNDEFINED,
    ],
    // SLDT, STR, LLDT, LTR, VERR, VERW.
    [
        same(Op::Sldt, PROTECTED),
        same(Op::Str, PROTECTED),
        same(Op::Lldt, 0),
        same(Op::Ltr, 0),
        UNSUPPORTED,
        UNSUPPORTED,
        UNDEFINED,
        UNDEFINED,
    ],
    // The register forms of 0 to 3, 5 and 7 are other instructions: the decoder turns them into `Unsupported`.
    [
        same(Op::Sgdt, 0),
        same(Op::Sidt, 0),
        same(Op::Lgdt, 0),
        same(Op::Lidt, 0),
        same(Op::Smsw, 0),
        UNSUPPORTED,
        same(Op::Lmsw, 0),
        same(Op::Invlpg, 0),
    ],
    [
        UNDEFINED,
        UNDEFINED,
        UNDEFINED,
        UNDEFINED,
        same(Op::Bt, 0),
        same(Op::Bts, LOCK),
        same(Op::Btr, LOCK),
        same(Op::Btc, LOCK),
    ],
    // 1: CMPXCHG8B; the others are XSAVES, VMPTRLD, RDRAND and so on.
    [
        UNDEFINED,
        same(Op::Cmpxchg8b, LOCK | MEMORY),
        UNDEFINED,
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
    ],
    // 7: XABORT and XBEGIN.
    [same(Op::Mov, 0), UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNDEFINED, UNSUPPORTED],
    // FXSAVE and so on; the register forms of 5 to 7 are the fences, the memory form of 7 is CLFLUSH.
    [
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
        UNSUPPORTED,
        same(Op::Fence, 0),
        same(Op::Fence, 0),
        same(Op::Fence, 0),
    ],
];

/// Replaces a group entry by the member that `modrm` selects; other entries come back as they are.
#[inline]
pub fn resolve_group(entry: Entry, modrm: u8) -> Entry {
    let group = (entry.op as u8).wrapping_sub(Op::Group1 as u8);
    let Some(members) = GROUPS.get(group as usize) else { return entry };
    let member = &members[((modrm >> 3) & 7) as usize];
    Entry {
        op: member.op,
        form: if matches!(member.form, Form::None) { entry.form } else { member.form },
        imm: if matches!(member.imm, Imm::None) { entry.imm } else { member.imm },
        flags: entry.flags | member.flags,
    }
}
