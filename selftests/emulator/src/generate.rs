// SPDX-License-Identifier: GPL-2.0
//! Generated instructions, and registers that make them reach memory.

use krab_pure::emul::{decode, prefix, Form, Instruction, Map, Mode, Op};

/// A small generator of pseudo-random numbers (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to `limit` - 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((self.next() as u128 * limit as u128) >> 64) as u64
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }

    /// A register value: borders, small numbers, or anything.
    pub fn value(&mut self) -> u64 {
        let any = self.next();
        match any & 7 {
            0 => (any >> 8) & 0xFF,
            1 => ((any >> 8) & 0xFF).wrapping_neg(),
            2 => 1u64.rotate_left((any >> 8) as u32),
            3 => (1u64 << ((any >> 8) & 63)) - 1,
            4 => (any >> 32) as u32 as u64,
            _ => any,
        }
    }
}

/// Where code and data are in one mode. Everything else is not mapped.
#[derive(Clone, Copy)]
pub struct Layout {
    pub mode: Mode,
    pub code: u64,
    pub data: u64,
}

impl Layout {
    pub const CODE_LEN: u64 = 0x1000;
    pub const DATA_LEN: u64 = 0x4000;
    pub const ALL: [Self; 3] = [
        Self { mode: Mode::Real, code: 0x1000, data: 0x4000 },
        Self { mode: Mode::Protected32, code: 0x1000_1000, data: 0x2345_4000 },
        Self { mode: Mode::Long64, code: 0x5555_0000_1000, data: 0x1234_5678_4000 },
    ];
}

/// One instruction and the registers before it.
pub struct Case {
    pub bytes: Vec<u8>,
    pub instruction: Instruction,
    pub rip: u64,
    pub gpr: [u64; 16],
    pub rflags: u64,
    /// A word to put into memory before: address and value.
    pub plant: Option<(u64, u64)>,
}

/// Operations that the engine cannot judge: they need devices, tables, privilege or an x87 unit, or change its mode.
fn out_of_reach(op: Op) -> bool {
    use Op::*;
    matches!(
        op,
        Undefined | Unsupported | X87 | Fwait | Ins | Outs | In | Out | MovToSeg | PopSeg | LoadFar | JmpFar | CallFar
    ) || matches!(op, JmpFarIndirect | CallFarIndirect | RetFar | Iret | Int | Int3 | Into)
        || (op >= MovFromCr && op < VectorMove)
}

/// Random bytes that make an instruction krab executes. What does not exist is the business of `lengths`: the engine executes
/// much of that.
fn instruction(random: &mut Random, layout: &Layout) -> ([u8; 15], Instruction) {
    const PREFIXES: [u8; 12] = [0x66, 0x66, 0x66, 0x66, 0x67, 0x67, 0xF0, 0xF2, 0xF3, 0x3E, 0x64, 0x36];
    loop {
        let mut bytes = [0u8; 15];
        random.fill(&mut bytes);
        let mut at = 0;
        while random.chance(25) && at < 3 {
            bytes[at] = PREFIXES[random.below(12) as usize];
            at += 1;
        }
        if layout.mode.is_long() && random.chance(60) {
            bytes[at] = 0x40 | bytes[at] & 0xF;
            at += 1;
        }
        match random.below(20) {
            0..=10 => {}
            11..=18 => {
                bytes[at] = 0x0F;
                at += 1;
            }
            _ => {
                let last = if random.chance(80) { 0xF0 + random.below(2) as u8 } else { 0x2A };
                bytes[at..at + 3].copy_from_slice(&[0x0F, 0x38, last]);
            }
        }
        // Registers and memory as often as each other.
        if random.chance(40) {
            bytes[at + 1] |= 0xC0;
        }
        let Ok(instruction) = decode(&bytes, layout.mode) else { continue };
        if !out_of_reach(instruction.op) {
            return (bytes, instruction);
        }
    }
}

/// Width mask of an address.
fn address_mask(size: u8) -> u64 {
    if size == 8 {
        u64::MAX
    } else {
        (1 << (size * 8)) - 1
    }
}

/// An address in or near the data, often across a page border.
fn target(random: &mut Random, layout: &Layout) -> u64 {
    match random.below(20) {
        0 => layout.data.wrapping_sub(random.below(24)),
        1 => layout.data + Layout::DATA_LEN - random.below(24),
        2..=5 => layout.data + 0x1000 * (1 + random.below(3)) - random.below(16),
        6..=9 => layout.data + random.below(Layout::DATA_LEN / 16) * 16,
        _ => layout.data + random.below(Layout::DATA_LEN - 64),
    }
}

/// Puts `wanted` where the instruction's displacement is, if it has one of full width.
fn patch_displacement(bytes: &mut [u8; 15], ins: &Instruction, mode: Mode, wanted: u64) {
    let width =
        if ins.modrm != 0 || ins.map != Map::OneByte { ins.address_size.min(4) } else { ins.address_size } as usize;
    let old = ins.displacement.to_le_bytes();
    let new = wanted.to_le_bytes();
    let Some(at) =
        (1..(ins.length as usize + 1).saturating_sub(width)).find(|at| bytes[*at..*at + width] == old[..width])
    else {
        return;
    };
    let mut changed = *bytes;
    changed[at..at + width].copy_from_slice(&new[..width]);
    if decode(&changed, mode).is_ok_and(|again| again.length == ins.length && again.op == ins.op) {
        *bytes = changed;
    }
}

pub fn case(random: &mut Random, layout: &Layout) -> Case {
    let (mut bytes, mut ins) = instruction(random, layout);
    let rip = layout.code + random.below(Layout::CODE_LEN / 2);
    let mut gpr = [0u64; 16];
    let registers = if layout.mode.is_long() { 16 } else { 8 };
    for value in &mut gpr[..registers] {
        *value = random.value();
        if !layout.mode.is_long() {
            *value = *value as u32 as u64;
        }
    }
    // Carry, parity, adjust, zero, sign, overflow at random; direction sometimes.
    let mut rflags = 2 | random.next() & 0x8D5;
    if random.chance(30) {
        rflags |= 1 << 10;
    }

    gpr[4] = target(random, layout) & !7;
    if matches!(ins.op, Op::Leave | Op::Enter) {
        gpr[5] = target(random, layout);
    }
    let counter = address_mask(ins.address_size);
    let string = matches!(ins.op, Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas);
    if string {
        gpr[6] = target(random, layout);
        gpr[7] = target(random, layout);
        if ins.has(prefix::REP | prefix::REPNE) {
            gpr[1] = gpr[1] & !counter | random.below(40);
        }
    }
    if ins.op == Op::Xlat {
        gpr[3] = target(random, layout).wrapping_sub(gpr[0] & 0xFF);
    }
    if matches!(ins.op, Op::Bt | Op::Bts | Op::Btr | Op::Btc) && ins.form == Form::RmReg && random.chance(80) {
        gpr[ins.reg()] = random.below(4000).wrapping_sub(2000);
    }
    if matches!(ins.op, Op::Div | Op::Idiv) && random.chance(60) {
        gpr[2] = random.below(3).wrapping_sub(1);
    }

    let wanted = target(random, layout);
    let offset_form = matches!(ins.form, Form::AccOffset | Form::OffsetAcc);
    if (ins.has_memory() || offset_form) && random.chance(96) {
        let mask = address_mask(ins.address_size);
        let mut rest = wanted.wrapping_sub(ins.displacement as u64);
        match (ins.base, ins.index) {
            (0xFF, 0xFF) => patch_displacement(&mut bytes, &ins, layout.mode, wanted),
            (16, _) => {
                let next = rip.wrapping_add(ins.length as u64);
                patch_displacement(&mut bytes, &ins, layout.mode, wanted.wrapping_sub(next));
            }
            (0xFF, index) => gpr[index as usize] = (rest & mask) >> ins.scale,
            (base, index) => {
                if index != 0xFF && index != base {
                    rest = rest.wrapping_sub(gpr[index as usize] << ins.scale);
                } else if index == base {
                    rest /= 1 + (1 << ins.scale);
                }
                let high = if random.chance(50) { 0 } else { gpr[base as usize] & !mask };
                gpr[base as usize] = rest & mask | high;
            }
        }
        ins = decode(&bytes, layout.mode).unwrap_or(ins);
    }

    // Branch targets that exist.
    let place = layout.code + random.below(Layout::CODE_LEN);
    let mut plant = None;
    match ins.op {
        Op::Ret => plant = Some((gpr[4], place)),
        Op::JmpIndirect | Op::CallIndirect if ins.has_memory() => plant = Some((wanted, place)),
        Op::JmpIndirect | Op::CallIndirect => gpr[ins.rm()] = place,
        _ => {}
    }
    if !layout.mode.is_long() {
        for value in &mut gpr {
            *value = *value as u32 as u64;
        }
    }
    Case { bytes: bytes[..ins.length as usize].to_vec(), instruction: ins, rip, gpr, rflags, plant }
}
