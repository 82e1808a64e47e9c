// SPDX-License-Identifier: GPL-2.0
//! `unicorn-engine` in one mode, with code and data mapped as the [`Layout`] says.

use krab_pure::emul::Mode;
use unicorn_engine::{Arch, Mode as EngineMode, Prot, RegisterX86, Unicorn, X86CpuModel};

use crate::generate::Layout;

const REGISTERS: [RegisterX86; 18] = [
    RegisterX86::RAX,
    RegisterX86::RCX,
    RegisterX86::RDX,
    RegisterX86::RBX,
    RegisterX86::RSP,
    RegisterX86::RBP,
    RegisterX86::RSI,
    RegisterX86::RDI,
    RegisterX86::RFLAGS,
    RegisterX86::RIP,
    RegisterX86::R8,
    RegisterX86::R9,
    RegisterX86::R10,
    RegisterX86::R11,
    RegisterX86::R12,
    RegisterX86::R13,
    RegisterX86::R14,
    RegisterX86::R15,
];
/// The same outside 64-bit mode.
const NARROW: [RegisterX86; 10] = [
    RegisterX86::EAX,
    RegisterX86::ECX,
    RegisterX86::EDX,
    RegisterX86::EBX,
    RegisterX86::ESP,
    RegisterX86::EBP,
    RegisterX86::ESI,
    RegisterX86::EDI,
    RegisterX86::EFLAGS,
    RegisterX86::EIP,
];
const XMM0: i32 = RegisterX86::XMM0 as i32;

/// Registers before or after an instruction.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
}

/// What an instruction came to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Outcome {
    Done,
    /// An exception with this vector.
    Exception(u8),
    SomeException,
    /// Memory that is not mapped: a page fault, to be.
    Unmapped,
    /// The engine gave up.
    Other,
}

pub struct Engine {
    unicorn: Unicorn<'static, Option<u32>>,
    layout: Layout,
    registers: &'static [RegisterX86],
}

impl Engine {
    pub fn new(layout: Layout) -> Self {
        let mode = match layout.mode {
            Mode::Long64 => EngineMode::MODE_64,
            Mode::Protected32 => EngineMode::MODE_32,
            _ => EngineMode::MODE_16,
        };
        let mut unicorn = Unicorn::new_with_data(Arch::X86, mode, None).expect("engine");
        // A model with MOVBE, LZCNT, TZCNT and POPCNT.
        unicorn.ctl_set_cpu_model(X86CpuModel::HASWELL as i32).expect("CPU model");
        unicorn.mem_map(layout.code, Layout::CODE_LEN, Prot::READ | Prot::WRITE | Prot::EXEC).expect("code");
        unicorn.mem_map(layout.data, Layout::DATA_LEN, Prot::READ | Prot::WRITE).expect("data");
        unicorn.mem_write(layout.code, &vec![0xF4; Layout::CODE_LEN as usize]).expect("code");
        unicorn
            .add_intr_hook(|unicorn, vector| {
                *unicorn.get_data_mut() = Some(vector);
                let _ = unicorn.emu_stop();
            })
            .expect("interrupt hook");
        let registers: &'static [RegisterX86] = if layout.mode.is_long() { &REGISTERS } else { &NARROW };
        Self { unicorn, layout, registers }
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.unicorn.mem_write(at, bytes).expect("mapped");
    }

    /// Writes code, and makes the engine forget what it translated there.
    pub fn write_code(&mut self, at: u64, bytes: &[u8]) {
        self.write(at, bytes);
        self.unicorn
            .ctl_remove_cache(at.saturating_sub(16).max(self.layout.code), at + bytes.len() as u64)
            .expect("cache");
    }

    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        self.unicorn.mem_read(at, bytes).expect("mapped");
    }

    pub fn write_vector(&mut self, number: usize, value: &[u8; 32]) {
        self.unicorn.reg_write_long(XMM0 + number as i32, &value[..16]).expect("XMM");
    }

    pub fn read_vector(&self, number: usize) -> [u8; 16] {
        let value = self.unicorn.reg_read_long(XMM0 + number as i32).expect("XMM");
        value[..16].try_into().expect("16 bytes")
    }

    /// Executes from `state.rip` to `until`.
    pub fn run(&mut self, state: &State, until: u64) -> (Outcome, State) {
        let mut values = [0u64; 18];
        values[..8].copy_from_slice(&state.gpr[..8]);
        values[8] = state.rflags;
        values[9] = state.rip;
        values[10..].copy_from_slice(&state.gpr[8..]);
        let count = self.registers.len();
        self.unicorn.reg_write_batch(self.registers, &values[..count], count as i32).expect("registers");
        *self.unicorn.get_data_mut() = None;
        // The limit is for an engine that goes elsewhere, perhaps for ever.
        let result = self.unicorn.emu_start(state.rip, until, 0, 200);
        let read = self.unicorn.reg_read_batch(&mut self.registers.to_vec(), count as i32).expect("registers");
        let mut after = State { rip: read[9], rflags: read[8], gpr: [0; 16] };
        after.gpr[..8].copy_from_slice(&read[..8]);
        if count > 10 {
            after.gpr[8..].copy_from_slice(&read[10..]);
        }
        if !self.layout.mode.is_long() {
            for value in after.gpr.iter_mut().chain([&mut after.rip, &mut after.rflags]) {
                *value = *value as u32 as u64;
            }
        }
        use unicorn_engine::uc_error as error;
        let outcome = match (*self.unicorn.get_data(), result) {
            // It never forgets an exception, so the next is a double fault to it, and the one after shuts it down in place.
            (Some(8), _) => Outcome::SomeException,
            (None, Ok(())) if after.rip == state.rip => Outcome::SomeException,
            (Some(vector), _) => Outcome::Exception(vector as u8),
            (None, Ok(())) => Outcome::Done,
            (None, Err(error::INSN_INVALID)) => Outcome::Exception(6),
            // The instruction was done: its successor is not there.
            (None, Err(error::FETCH_UNMAPPED | error::FETCH_PROT)) => Outcome::Done,
            (None, Err(error::READ_UNMAPPED | error::WRITE_UNMAPPED)) => Outcome::Unmapped,
            _ => Outcome::Other,
        };
        (outcome, after)
    }
}
