// SPDX-License-Identifier: GPL-2.0
//! The decoder against `iced-x86`.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};
use krab_pure::arch::segment::SegmentName;
use krab_pure::emul::{decode, Cpu, Emulator, Map, Mode, Op, Step};
use krab_pure::guest::event::vector;
use krab_pure::guest::Exception;

use crate::generate::{Layout, Random};
use crate::vcpu::Vcpu;
use crate::Tally;

const MODES: [(Mode, u32); 3] = [(Mode::Protected16, 16), (Mode::Protected32, 32), (Mode::Long64, 64)];
const PREFIXES: [u8; 12] = [0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x48];

/// Random bytes, biased towards prefixes and the longer maps.
fn bytes(random: &mut Random) -> [u8; 15] {
    let mut bytes = [0u8; 15];
    random.fill(&mut bytes);
    let mut at = 0;
    while random.chance(35) && at < 5 {
        bytes[at] = PREFIXES[random.below(PREFIXES.len() as u64) as usize];
        at += 1;
    }
    match random.below(10) {
        0..=2 => bytes[at] = 0x0F,
        3 => (bytes[at], bytes[at + 1]) = (0x0F, 0x38),
        4 => (bytes[at], bytes[at + 1]) = (0x0F, 0x3A),
        5 => {
            bytes[at] = [0xC4, 0xC5, 0x62, 0x8F][random.below(4) as usize];
            // A map that exists.
            bytes[at + 1] = bytes[at + 1] & 0xE0 | (1 + random.below(3) as u8);
        }
        _ => {}
    }
    bytes
}

pub fn run(seed: u64, count: u64) -> Tally {
    let mut random = Random::new(seed);
    let mut tally = Tally::default();
    let mut theirs = Instruction::default();
    let mut vcpus = Vcpus(MODES.map(|(mode, _)| Vcpu::new(Layout { mode, code: 0x1000, data: 0x4000 })));
    for number in 0..count {
        let (mode, bits) = MODES[(number % 3) as usize];
        let bytes = bytes(&mut random);
        let mut decoder = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE);
        decoder.decode_out(&mut theirs);
        let ours = decode(&bytes, mode);
        let fail = |tally: &mut Tally, what: String| {
            tally.fail(|| format!("decode seed {seed} number {number} {mode:?} {bytes:02x?}: {what}"))
        };
        if decoder.last_error() == DecoderError::NoMoreBytes {
            match ours {
                Err(_) => tally.passed += 1,
                Ok(ours) if matches!(ours.op, Op::Undefined) => tally.skipped += 1,
                Ok(ours) => fail(&mut tally, format!("iced wants more bytes, krab has {} {:?}", ours.length, ours.op)),
            }
            continue;
        }
        if theirs.code() == Code::INVALID {
            match ours {
                // What does not exist may not be executed.
                Ok(ours) if !matches!(ours.op, Op::Undefined | Op::Unsupported) => match vcpus.refuses(mode, &bytes) {
                    true => tally.passed += 1,
                    false => fail(&mut tally, format!("iced has no such instruction, krab executes {:?}", ours.op)),
                },
                _ => tally.passed += 1,
            }
            continue;
        }
        let Ok(ours) = ours else {
            fail(&mut tally, format!("iced has {theirs}, krab {ours:?}"));
            continue;
        };
        if ours.length as usize != theirs.len() {
            fail(
                &mut tally,
                format!("iced has {theirs} of {} bytes, krab {:?} of {}", theirs.len(), ours.op, ours.length),
            );
        } else if ours.op == Op::Undefined && !undefined_anyway(&ours, &theirs) {
            fail(&mut tally, format!("iced has {theirs}, krab says undefined"));
        } else if let Some(what) = operand_difference(&ours, &theirs) {
            fail(&mut tally, format!("iced has {theirs}: {what}"));
        } else {
            tally.passed += 1;
        }
    }
    tally
}

/// A vCPU in each mode, to see what the executor makes of an instruction.
struct Vcpus([Vcpu; 3]);

impl Vcpus {
    /// Whether the executor refuses the instruction: as undefined, or as something that it does not know.
    fn refuses(&mut self, mode: Mode, bytes: &[u8]) -> bool {
        let Some(vcpu) = self.0.iter_mut().find(|vcpu| vcpu.mode() == mode) else { return false };
        let step = Emulator::new().step(vcpu, Some(bytes));
        vcpu.rip = 0;
        matches!(step, Step::Unsupported | Step::Fault(Exception { vector: vector::UD, .. }))
    }
}

/// Instructions that iced names and CPUs refuse.
fn undefined_anyway(ours: &krab_pure::emul::Instruction, theirs: &Instruction) -> bool {
    use iced_x86::Mnemonic::*;
    // LKGS comes with FRED. 0F A6 and 0F A7 are another vendor's cryptography.
    matches!(theirs.mnemonic(), Ud0 | Ud1 | Ud2 | Lkgs) || (ours.map == Map::M0f && matches!(ours.opcode, 0xA6 | 0xA7))
}

/// Base, index, scale, displacement and segment, for what krab executes.
fn operand_difference(ours: &krab_pure::emul::Instruction, theirs: &Instruction) -> Option<String> {
    if matches!(ours.op, Op::Undefined | Op::Unsupported) || !ours.has_memory() {
        return None;
    }
    if (0..theirs.op_count()).all(|operand| theirs.op_kind(operand) != OpKind::Memory) {
        // Hints whose memory operand nobody reads.
        return (ours.op != Op::Nop).then(|| "no memory operand".to_string());
    }
    let number = |register: Register| match register {
        Register::None => 0xFF,
        Register::RIP | Register::EIP => 16,
        other => other.number() as u8,
    };
    let wanted = (number(theirs.memory_base()), number(theirs.memory_index()), 1u32 << (ours.scale & 3));
    let found = (ours.base, ours.index, theirs.memory_index_scale());
    let found = if ours.index == 0xFF { (found.0, found.1, wanted.2) } else { found };
    if wanted != found {
        return Some(format!("base, index, scale: {wanted:?} and {found:?}"));
    }
    let mask = if ours.address_size == 8 { u64::MAX } else { (1u64 << (ours.address_size * 8)) - 1 };
    let mut displacement = ours.displacement as u64;
    if ours.base == 16 {
        displacement = displacement.wrapping_add(ours.length as u64);
    }
    if displacement & mask != theirs.memory_displacement64() & mask {
        return Some(format!("displacement {:#x} and {:#x}", theirs.memory_displacement64(), ours.displacement));
    }
    let segment = match theirs.memory_segment() {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => SegmentName::Ds,
    };
    // In 64-bit mode only FS and GS matter, and iced reports overrides that the CPU ignores.
    let matters = |name: SegmentName| matches!(name, SegmentName::Fs | SegmentName::Gs);
    let long = theirs.code_size() == iced_x86::CodeSize::Code64;
    if segment != ours.segment && !(long && !matters(segment) && !matters(ours.segment)) {
        return Some(format!("segment {segment:?} and {:?}", ours.segment));
    }
    None
}
