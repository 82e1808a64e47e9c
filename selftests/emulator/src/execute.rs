// SPDX-License-Identifier: GPL-2.0
//! The executor against `unicorn-engine`.

use krab_pure::arch::cr::rflags::{AF, CF, OF, PF, SF, ZF};
use krab_pure::emul::{prefix, Emulator, Form, Instruction, Mode, Op, Step};

use crate::engine::{Engine, Outcome, State};
use crate::generate::{case, Case, Layout, Random};
use crate::vcpu::Vcpu;
use crate::Tally;

/// Arithmetic flags that the manual leaves undefined after `ins`, or all bits if even the result is.
fn undefined_flags(ins: &Instruction, case: &Case) -> u64 {
    let width = ins.operand_size as u64 * 8;
    let raw = match ins.form {
        Form::RmOne => 1,
        Form::RmCl => case.gpr[1] & 0xFF,
        _ => ins.immediate as u64 & 0xFF,
    };
    let count = raw & if ins.operand_size == 8 { 63 } else { 31 };
    let not_one = if count > 1 { OF } else { 0 };
    match ins.op {
        Op::And | Op::Or | Op::Xor | Op::Test => AF,
        Op::Shl | Op::Sal | Op::Shr if count >= width => AF | OF | CF,
        Op::Shl | Op::Sal | Op::Shr | Op::Sar if count != 0 => AF | not_one,
        Op::Shld | Op::Shrd if count > width => u64::MAX,
        Op::Shld | Op::Shrd if count != 0 => AF | not_one,
        Op::Rol | Op::Ror | Op::Rcl | Op::Rcr => not_one,
        Op::Mul | Op::Imul | Op::ImulReg => SF | ZF | AF | PF,
        Op::Div | Op::Idiv => CF | OF | SF | ZF | AF | PF,
        Op::Bt | Op::Bts | Op::Btr | Op::Btc => OF | SF | AF | PF,
        Op::Bsf | Op::Bsr if ins.mandatory == 2 => OF | SF | AF | PF,
        Op::Bsf | Op::Bsr => CF | OF | SF | AF | PF,
        Op::Bswap if ins.operand_size == 2 => u64::MAX,
        _ => 0,
    }
}

/// Where the engine (QEMU 5.0 inside) is known to differ from the manuals, or they leave a choice.
fn engine_differs(ins: &Instruction, mode: Mode, ours: Outcome) -> bool {
    let undefined = ours == Outcome::Exception(6);
    match ins.op {
        // Takes 32 bits in 16-bit mode.
        Op::Movbe => mode == Mode::Real,
        // The same, and with 66 forgets REX.W.
        Op::Popcnt => mode == Mode::Real || (ins.has(prefix::OPERAND) && ins.operand_size == 8),
        // With LOCK has the flags of something else.
        Op::Neg => ins.has(prefix::LOCK),
        // With REX takes SPL for AH.
        Op::Lahf | Op::Sahf => ins.has(prefix::REX),
        // Intel ignores 66, AMD and the engine do not.
        Op::Ret if ins.immediate >= 0x8000 => true, // takes it as negative
        // Refuses the register forms of PREFETCHh and PREFETCHW.
        Op::Nop => matches!(ins.opcode, 0x0D | 0x18) && !ins.has_memory(),
        Op::Jcc | Op::Jmp | Op::JmpIndirect | Op::Call | Op::CallIndirect | Op::Ret | Op::Loop => {
            mode.is_long() && ins.has(prefix::OPERAND)
        }
        // 66 goes before F2 and F3 there; and it has register forms that do not exist.
        Op::Movnti => undefined,
        // With 66 the source has 16 bits on one vendor's CPUs and 32 on the other's.
        Op::Movsxd => ins.has(prefix::OPERAND),
        // REX.R does not extend an opcode, there it does.
        Op::Mov => ins.form == Form::RmImm && ins.reg() > 7,
        // Writes the accumulator, or a destination register, when they should stay: seen in the upper halves.
        Op::Cmpxchg => ins.operand_size == 4 && mode.is_long(),
        Op::VectorMove => undefined || (ins.has(prefix::OPERAND) && ins.has(prefix::REP | prefix::REPNE)),
        // Flushes without looking at the address.
        Op::Fence => ins.has_memory(),
        // Has no TEST at ModRM.reg 1.
        Op::Test => ins.form == Form::RmImm && (ins.modrm >> 3) & 7 == 1,
        _ => false,
    }
}

/// Whether F2 and F3 are both among the prefixes: the last one counts, the engine has its own preference.
fn has_both_repeats(bytes: &[u8]) -> bool {
    let prefixes = bytes.iter().take_while(|byte| {
        matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 | 0x40..=0x4F | 0x66 | 0x67 | 0xF0 | 0xF2 | 0xF3)
    });
    let seen: Vec<u8> = prefixes.copied().collect();
    seen.contains(&0xF2) && seen.contains(&0xF3)
}

/// One mode: both sides with their memory.
struct Bed {
    layout: Layout,
    vcpu: Vcpu,
    engine: Engine,
    /// The engine's data after an instruction.
    theirs: Vec<u8>,
}

pub fn run(seed: u64, count: u64) -> Tally {
    let mut random = Random::new(seed ^ 0xE7EC);
    let mut tally = Tally::default();
    let mut beds = Layout::ALL.map(|layout| {
        let mut vcpu = Vcpu::new(layout);
        random.fill(&mut vcpu.data);
        let mut engine = Engine::new(layout);
        engine.write(layout.data, &vcpu.data);
        for number in 0..16 {
            random.fill(&mut vcpu.xmm[number][..16]);
            if number < 8 || layout.mode == Mode::Long64 {
                engine.write_vector(number, &vcpu.xmm[number]);
            }
        }
        Bed { layout, vcpu, engine, theirs: vec![0; Layout::DATA_LEN as usize] }
    });
    for number in 0..count {
        let bed = &mut beds[(number % 3) as usize];
        let case = case(&mut random, &bed.layout);
        match bed.compare(&case) {
            Ok(true) => tally.passed += 1,
            Ok(false) => tally.skipped += 1,
            Err(what) => {
                let (mode, bytes) = (bed.layout.mode, &case.bytes);
                tally.fail(|| {
                    format!(
                        "execute seed {seed} number {number} {mode:?} {bytes:02x?} {:?}: {what}\n     before: rip {:x} rflags {:x} gpr {:x?}",
                        case.instruction.op, case.rip, case.rflags, case.gpr
                    )
                });
                bed.resynchronize();
            }
        }
    }
    tally
}

impl Bed {
    /// Executes on both sides. `Ok(false)`: not comparable.
    fn compare(&mut self, case: &Case) -> Result<bool, String> {
        let start = (case.rip - self.layout.code) as usize;
        let before = State { gpr: case.gpr, rip: case.rip, rflags: case.rflags };
        self.vcpu.code[start..start + case.bytes.len()].copy_from_slice(&case.bytes);
        self.engine.write_code(case.rip, &case.bytes);
        if let Some((at, value)) = case.plant {
            let mut value = value.to_le_bytes().to_vec();
            if self.layout.mode == Mode::Real {
                value.truncate(2);
            }
            if at >= self.layout.data && at + 8 <= self.layout.data + Layout::DATA_LEN {
                let offset = (at - self.layout.data) as usize;
                self.vcpu.data[offset..offset + value.len()].copy_from_slice(&value);
                self.engine.write(at, &value);
            }
        }
        (self.vcpu.gpr, self.vcpu.rip, self.vcpu.rflags) = (before.gpr, before.rip, before.rflags);
        let step = Emulator::new().step(&mut self.vcpu, None);
        let result = self.judge(case, &before, step);
        let len = case.bytes.len();
        self.vcpu.code[start..start + len].fill(0xF4);
        self.engine.write_code(case.rip, &[0xF4; 15][..len]);
        result
    }

    fn judge(&mut self, case: &Case, before: &State, step: Step) -> Result<bool, String> {
        let ins = &case.instruction;
        let ours = match step {
            Step::Done => Outcome::Done,
            Step::Fault(fault) if fault.vector == 14 => Outcome::Unmapped,
            Step::Fault(fault) => Outcome::Exception(fault.vector),
            _ => Outcome::Other,
        };
        let string = matches!(ins.op, Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas);
        if has_both_repeats(&case.bytes) || ours == Outcome::Other || engine_differs(ins, self.layout.mode, ours) {
            self.resynchronize();
            return Ok(false);
        }
        // Neither limits nor canonical addresses exist in the engine.
        if matches!(ours, Outcome::Exception(12 | 13)) {
            self.resynchronize(); // a REP may have come some way
            return Ok(false);
        }
        let until = if ours == Outcome::Done { self.vcpu.rip } else { case.rip + case.bytes.len() as u64 };
        if until == case.rip {
            return Ok(false);
        }
        let (theirs, after) = self.engine.run(before, until);
        let excused = theirs == Outcome::SomeException && matches!(ours, Outcome::Exception(_));
        if ours != theirs && !excused {
            return Err(format!("krab {ours:?} ({step:?}), engine {theirs:?} rip {:x}", after.rip));
        }
        let undefined = undefined_flags(ins, case);
        if undefined == u64::MAX {
            self.resynchronize();
            return Ok(false);
        }
        if matches!(ins.op, Op::Bsf | Op::Bsr) && ins.mandatory != 2 && self.vcpu.rflags & ZF != 0 {
            return Ok(false); // the register is undefined
        }
        let found = State { gpr: self.vcpu.gpr, rip: self.vcpu.rip, rflags: self.vcpu.rflags };
        if theirs != Outcome::Done {
            // A fault changes nothing, but a REP keeps what it has done.
            self.resynchronize();
            let repeats = string && ins.has(prefix::REP | prefix::REPNE);
            let wanted = if repeats { after.gpr } else { before.gpr };
            return if found.gpr == wanted && found.rip == before.rip {
                Ok(true)
            } else {
                Err(format!("after {ours:?} krab has {found:x?}"))
            };
        }
        for number in 0..16 {
            if found.gpr[number] != after.gpr[number] {
                return Err(format!("register {number}: krab {:x}, engine {:x}", found.gpr[number], after.gpr[number]));
            }
        }
        if found.rip != after.rip {
            return Err(format!("rip: krab {:x}, engine {:x}", found.rip, after.rip));
        }
        if (found.rflags ^ after.rflags) & !undefined != 0 {
            return Err(format!("rflags: krab {:x}, engine {:x}", found.rflags, after.rflags));
        }
        self.engine.read(self.layout.data, &mut self.theirs);
        if self.theirs != self.vcpu.data {
            let at = self.theirs.iter().zip(&self.vcpu.data).position(|(a, b)| a != b).unwrap_or(0);
            return Err(format!(
                "memory at {:x}: krab {:02x}, engine {:02x}",
                self.layout.data + at as u64,
                self.vcpu.data[at],
                self.theirs[at]
            ));
        }
        if ins.op == Op::VectorMove {
            for number in [ins.reg(), ins.rm()] {
                let theirs = self.engine.read_vector(number);
                if self.vcpu.xmm[number][..16] != theirs {
                    return Err(format!(
                        "xmm{number}: krab {:02x?}, engine {theirs:02x?}",
                        &self.vcpu.xmm[number][..16]
                    ));
                }
            }
        }
        Ok(true)
    }

    /// Gives the engine krab's memory and vector registers.
    fn resynchronize(&mut self) {
        self.engine.write(self.layout.data, &self.vcpu.data);
        // Code is data as well: a store may have hit it.
        self.engine.write(self.layout.code, &self.vcpu.code);
        let registers = if self.layout.mode == Mode::Long64 { 16 } else { 8 };
        for number in 0..registers {
            self.engine.write_vector(number, &self.vcpu.xmm[number]);
        }
    }
}
