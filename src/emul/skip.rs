// SPDX-License-Identifier: GPL-2.0
//! Lengths of intercepted instructions, for CPUs that do not save the next RIP. The usual encoding is compared in one piece;
//! prefixes and operands go through the decoder.
#![forbid(unsafe_code)]

use super::decode::{decode, Map, Mode};

/// Which instruction was intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Intercepted {
    Cpuid,
    Hlt,
    /// VMCALL or VMMCALL.
    Hypercall,
    Rdmsr,
    Wrmsr,
    Rdtsc,
    Rdtscp,
    Rdpmc,
    Invd,
    /// WBINVD or WBNOINVD.
    Wbinvd,
    Monitor,
    Mwait,
    Pause,
    Xsetbv,
    Clts,
    Rsm,
    Iret,
    Int3,
    Into,
    Icebp,
    /// INT n.
    Int,
    Pushf,
    Popf,
    /// IN, OUT, INS or OUTS.
    Port,
    /// MOV to or from a control or debug register.
    MoveRegister,
    /// LMSW or SMSW.
    MachineStatus,
    Invlpg,
    Invpcid,
    /// SGDT, SIDT, LGDT or LIDT.
    DescriptorTable,
    /// SLDT, STR, LLDT or LTR.
    SystemSegment,
    /// VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA.
    Svm,
}

/// The common encoding: the first four bytes, little-endian, under a mask, and its length. A mask of 0 means there is none.
struct Usual {
    mask: u32,
    value: u32,
    length: u8,
}

const fn one(byte: u8) -> Usual {
    Usual { mask: 0xFF, value: byte as u32, length: 1 }
}

const fn two(first: u8, second: u8) -> Usual {
    Usual { mask: 0xFFFF, value: first as u32 | (second as u32) << 8, length: 2 }
}

const fn three(third: u8) -> Usual {
    Usual { mask: 0xFF_FFFF, value: 0x010F | (third as u32) << 16, length: 3 }
}

impl Intercepted {
    #[inline]
    const fn usual(self) -> Usual {
        match self {
            Self::Cpuid => two(0x0F, 0xA2),
            Self::Hlt => one(0xF4),
            // VMMCALL: CPUs of the other vendor always save the length.
            Self::Hypercall => three(0xD9),
            Self::Rdmsr => two(0x0F, 0x32),
            Self::Wrmsr => two(0x0F, 0x30),
            Self::Rdtsc => two(0x0F, 0x31),
            Self::Rdtscp => three(0xF9),
            Self::Rdpmc => two(0x0F, 0x33),
            Self::Invd => two(0x0F, 0x08),
            Self::Wbinvd => two(0x0F, 0x09),
            Self::Monitor => three(0xC8),
            Self::Mwait => three(0xC9),
            Self::Pause => two(0xF3, 0x90),
            Self::Xsetbv => three(0xD1),
            Self::Clts => two(0x0F, 0x06),
            Self::Rsm => two(0x0F, 0xAA),
            Self::Iret => one(0xCF),
            Self::Int3 => one(0xCC),
            Self::Into => one(0xCE),
            Self::Icebp => one(0xF1),
            Self::Int => Usual { mask: 0xFF, value: 0xCD, length: 2 },
            Self::Pushf => one(0x9C),
            Self::Popf => one(0x9D),
            // IN and OUT through DX: EC to EF.
            Self::Port => Usual { mask: 0xFC, value: 0xEC, length: 1 },
            // Opcodes 20 to 23; ModRM always names a register.
            Self::MoveRegister => Usual { mask: 0xFCFF, value: 0x200F, length: 3 },
            _ => Usual { mask: 0, value: 1, length: 0 },
        }
    }

    /// Whether a decoded instruction is this one.
    fn is(self, map: Map, opcode: u8, modrm: u8, rep: bool) -> bool {
        let wide = |second: u8| map == Map::M0f && opcode == second;
        let narrow = |only: u8| map == Map::OneByte && opcode == only;
        let group = |second: u8, members: u8| wide(second) && members & (1 << ((modrm >> 3) & 7)) != 0;
        let memory = modrm < 0xC0;
        match self {
            Self::Hypercall => wide(1) && matches!(modrm, 0xC1 | 0xD9),
            Self::Rdtscp => wide(1) && modrm == 0xF9,
            Self::Monitor => wide(1) && matches!(modrm, 0xC8 | 0xFA),
            Self::Mwait => wide(1) && matches!(modrm, 0xC9 | 0xFB),
            Self::Xsetbv => wide(1) && modrm == 0xD1,
            Self::Svm => wide(1) && matches!(modrm, 0xD8 | 0xDA..=0xDF),
            Self::Pause => narrow(0x90) && rep,
            Self::Port => map == Map::OneByte && matches!(opcode, 0x6C..=0x6F | 0xE4..=0xE7 | 0xEC..=0xEF),
            Self::MoveRegister => map == Map::M0f && matches!(opcode, 0x20..=0x23),
            Self::MachineStatus => group(1, 1 << 4 | 1 << 6),
            Self::Invlpg => group(1, 1 << 7) && memory,
            Self::DescriptorTable => group(1, 0xF) && memory,
            Self::SystemSegment => group(0, 0xF),
            Self::Invpcid => map == Map::M0f38 && opcode == 0x82,
            _ => {
                let usual = self.usual();
                let [first, second, ..] = usual.value.to_le_bytes();
                if first == 0x0F {
                    wide(second)
                } else {
                    narrow(first)
                }
            }
        }
    }
}

/// Instructions that are an exit of their own, which the emulator leaves to the handlers of exits.
const LEFT_TO_HANDLERS: [Intercepted; 13] = [
    Intercepted::Cpuid,
    Intercepted::Hlt,
    Intercepted::Hypercall,
    Intercepted::Rdmsr,
    Intercepted::Wrmsr,
    Intercepted::Rdtsc,
    Intercepted::Rdtscp,
    Intercepted::Rdpmc,
    Intercepted::Invd,
    Intercepted::Wbinvd,
    Intercepted::Monitor,
    Intercepted::Mwait,
    Intercepted::Xsetbv,
];

/// Which of the instructions that the emulator does not execute, because they always make a guest exit, is at the start of `bytes`; and
/// its length.
pub fn intercepted(bytes: &[u8], mode: Mode) -> Option<(Intercepted, u8)> {
    // Only these opcodes come into question, whatever is before them.
    if !bytes.iter().any(|byte| matches!(byte, 0x0F | 0xF4)) {
        return None;
    }
    let ins = decode(bytes, mode).ok()?;
    let legacy = !ins.has(super::prefix::VEX | super::prefix::OTHER);
    let which = LEFT_TO_HANDLERS.into_iter().find(|one| one.is(ins.map, ins.opcode, ins.modrm, false))?;
    legacy.then_some((which, ins.length))
}

/// Length of the instruction `expect` at the start of `bytes`, 1 to 15 bytes; `None` if `bytes` do not hold that
/// instruction, or not all of it.
#[inline]
pub fn skip_length(bytes: &[u8], mode: Mode, expect: Intercepted) -> Option<u8> {
    if let Some(first) = bytes.first_chunk::<4>() {
        let usual = expect.usual();
        if u32::from_le_bytes(*first) & usual.mask == usual.value {
            return Some(usual.length);
        }
    }
    decoded_length(bytes, mode, expect)
}

#[cold]
fn decoded_length(bytes: &[u8], mode: Mode, expect: Intercepted) -> Option<u8> {
    let ins = decode(bytes, mode).ok()?;
    let legacy = !ins.has(super::prefix::VEX | super::prefix::OTHER);
    let same = legacy && expect.is(ins.map, ins.opcode, ins.modrm, ins.has(super::prefix::REP));
    same.then_some(ins.length)
}
