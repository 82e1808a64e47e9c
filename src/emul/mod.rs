// SPDX-License-Identifier: GPL-2.0
//! Instruction emulator: for accesses to memory that is not RAM, for string I/O, and for CPUs that do not say how long an intercepted
//! instruction is or what its operands are. SDM Vol. 2, APM Vol. 3.
//!
//! # Use
//! The run loop owns one [`Emulator`] per vCPU and implements [`Cpu`]. After an exit that needs it, it calls [`Emulator::step`]:
//! - [`Step::Done`]: enter the guest again. RIP may be unchanged: a REP that has more to do, or a locked operation that lost a race.
//! - [`Step::MmioRead`]: read the device, call [`Emulator::complete_read`], then `step` again.
//! - [`Step::MmioWrite`]: the instruction is over, write the device; call `step` again only if [`Emulator::is_busy`].
//! - [`Step::PortIn`]: put the data where [`Cpu::read_port_data`] finds it, call [`Emulator::complete_port_in`], then `step`.
//! - [`Step::PortOut`]: the data is where [`Cpu::write_port_data`] put it; the instruction is over, or a REP has more to do.
//! - [`Step::TaskSwitch`]: nothing has changed yet, call [`Emulator::switch_task`].
//! - [`Step::Fault`]: inject. The registers are as before the instruction (or the iteration of a REP).
//! - [`Step::Unsupported`]: nothing changed; report an internal error.
//!
//! # How it resumes
//! Nothing of an instruction is committed before its reads are answered. A read that the caller must answer ends the step; the next
//! step executes the decoded instruction again from its start and takes the answers from a list, in order. (A plain load has nothing left to
//! do but to take its answer.) Writes to devices wait in
//! a queue and are handed out one a step after the instruction has committed. An access that crosses a page or exceeds eight
//! bytes is several accesses to the device.
//!
//! A REP commits each iteration, and hands back [`Step::Done`] with RIP unchanged and RF set after a device access or after
//! [`REP_BUDGET`] iterations, so that interrupts get in. INS and OUTS with REP move up to a page with one exit.
//!
//! # The caller's part
//! - If RFLAGS.TF was set before a step that completed an instruction or an iteration, #DB with DR6.BS is due. The emulator then does one
//!   iteration a step.
//! - A fault's saved RFLAGS image has RF set: the caller sets it when injecting, as for any other exception.
//! - Code and data breakpoints are not checked.
//! - A change of the vCPU's state from outside in the middle of an instruction: call [`Emulator::reset`].
//!
//! # Not supported ([`Step::Unsupported`])
//! x87 other than what looks for the unit, MMX, SSE and AVX other than moves, BMI, far transfers to another privilege level, ENTER with nesting, virtual-8086
//! extensions (VME, PVI), BCD instructions, and instructions that always are an exit of their own (CPUID, HLT, RDMSR and so on):
//! for those there is [`skip_length`].
#![forbid(unsafe_code)]

mod alu;
mod control;
mod decode;
mod descriptor;
mod device;
mod exec;
mod gate;
mod memory;
mod opcodes;
mod skip;
mod string;
mod system;
mod task;
#[cfg(test)]
mod tests;
mod vector;
mod x87;

pub use decode::{decode, prefix, DecodeError, Instruction, Map, Mode, MAX_LENGTH};
pub use device::{DeviceMove, Direction};
pub use gate::Delivery;
pub use opcodes::{Form, Op};
pub use skip::{intercepted, skip_length, Intercepted};
pub use task::Switched;

use crate::arch::cr::{cr0, efer, rflags};
use crate::arch::segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName};
use crate::arch::{Gpa, Gva};
use crate::guest::event::vector as exception;
use crate::guest::exit::TaskSwitch;
use crate::guest::Exception;
use alu::mask;
use exec::Exec;
use memory::Decoded;

/// Iterations of a REP between two chances for an interrupt.
pub const REP_BUDGET: u32 = 128;

/// Instructions that an [`Emulator`] keeps decoded. A power of two.
const SLOTS: usize = 4;

/// The slot for the instruction at `rip`.
#[inline]
const fn slot_of(rip: u64) -> usize {
    (rip >> 2 ^ rip) as usize % SLOTS
}

/// Most device accesses that one instruction (or one iteration) makes in one direction.
const FRAGMENTS: usize = 8;

/// What an access to a linear address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read at the current privilege level.
    Read,
    /// Data write, or the read of a read-modify-write, at the current privilege level.
    Write,
    /// Instruction fetch at the current privilege level.
    Execute,
    /// The CPU's own read of a system table (TSS, IDT): supervisor, whatever the privilege level.
    SystemRead,
    /// The CPU's own write to a system table (a descriptor's accessed or busy bit).
    SystemWrite,
}

/// The address is not RAM (or, for a write, RAM that may not be written): a device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotRam;

/// What holds interrupts off for one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    None,
    Sti,
    MovSs,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Gdt,
    Idt,
}

/// Control and status word of the x87 unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87Words {
    pub control: u16,
    pub status: u16,
}

impl X87Words {
    /// After FNINIT.
    pub const INITIAL: Self = Self { control: 0x37F, status: 0 };
}

/// What the emulator needs of a vCPU.
pub trait Cpu {
    /// General-purpose register 0 to 15, all 64 bits. The emulator merges narrower writes.
    fn gpr(&self, register: usize) -> u64;
    fn set_gpr(&mut self, register: usize, value: u64);
    fn rip(&self) -> u64;
    fn set_rip(&mut self, value: u64);
    fn rflags(&self) -> u64;
    fn set_rflags(&mut self, value: u64);
    /// Called when an instruction completes, also with [`Shadow::None`].
    fn set_interrupt_shadow(&mut self, shadow: Shadow);

    fn segment(&self, name: SegmentName) -> Segment;
    fn set_segment(&mut self, name: SegmentName, value: &Segment);
    /// The task register.
    fn tss(&self) -> Segment;
    fn set_tss(&mut self, value: &Segment);
    /// LDTR.
    fn ldt(&self) -> Segment;
    fn set_ldt(&mut self, value: &Segment);
    fn table(&self, which: Table) -> DescriptorTable;
    fn set_table(&mut self, which: Table, value: DescriptorTable);

    /// Current privilege level, 0 to 3; 3 in virtual-8086 mode.
    fn cpl(&self) -> u8;
    fn set_cpl(&mut self, level: u8);
    fn efer(&self) -> u64;
    fn xcr0(&self) -> u64;
    /// CR0, CR2, CR3, CR4 or CR8.
    fn cr(&self, register: u8) -> u64;
    /// Writes a control register with everything that follows from it; `Err` is the exception for a value that is not allowed.
    fn set_cr(&mut self, register: u8, value: u64) -> Result<(), Exception>;
    /// DR0 to DR3, DR6 or DR7.
    fn dr(&self, register: u8) -> u64;
    fn set_dr(&mut self, register: u8, value: u64) -> Result<(), Exception>;
    fn invlpg(&mut self, at: Gva);
    /// IRET completed: the CPU takes NMIs again.
    fn unmask_nmis(&mut self) {}

    /// Walks the guest's page tables. `Err` is the page fault to inject, with error code and address.
    fn translate(&mut self, at: Gva, access: Access) -> Result<Gpa, Exception>;
    /// Reads RAM; never across a page.
    fn read_ram(&mut self, at: Gpa, to: &mut [u8]) -> Result<(), NotRam>;
    /// Writes RAM; never across a page.
    fn write_ram(&mut self, at: Gpa, from: &[u8]) -> Result<(), NotRam>;
    /// Writes `new` if the memory holds `old`, atomically; returns whether it did. 1, 2, 4, 8 or 16 bytes, never across a page; where
    /// the address is not aligned, the implementation may be less than atomic.
    fn compare_exchange_ram(&mut self, at: Gpa, old: &[u8], new: &[u8]) -> Result<bool, NotRam>;

    /// YMM register 0 to 15.
    fn vector(&mut self, register: usize) -> [u8; 32];
    /// Writes the low 16 bytes and keeps the rest, or with `vex` writes 32 and clears everything above.
    fn set_vector(&mut self, register: usize, value: &[u8; 32], vex: bool);

    fn x87_words(&self) -> X87Words;
    /// FNINIT: no data register holds anything, and the words are [`X87Words::INITIAL`].
    fn initialize_x87(&mut self);

    /// Data of the port access being completed, `offset` bytes in.
    fn read_port_data(&mut self, offset: usize, to: &mut [u8]);
    /// Data for the port access about to be handed out. Offset plus length never exceed 4096.
    fn write_port_data(&mut self, offset: usize, from: &[u8]);

    /// How the CPU reads code now. The default asks the registers; a vCPU that knows may be quicker.
    #[inline]
    fn mode(&self) -> Mode {
        let attributes = self.segment(SegmentName::Cs).attributes;
        if self.efer() & efer::LMA != 0 && attributes.long() {
            Mode::Long64
        } else if self.cr(0) & cr0::PE == 0 {
            Mode::Real
        } else if self.rflags() & rflags::VM != 0 {
            Mode::Vm86
        } else if attributes.0 & SegmentAttributes::DB != 0 {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }
}

/// What a step of the emulator came to; see the head of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Done,
    /// `len` is 1 to 8 bytes.
    MmioRead {
        gpa: Gpa,
        len: u8,
    },
    /// The first `len` of `data`, 1 to 8 bytes; the others are zero.
    MmioWrite {
        gpa: Gpa,
        data: [u8; 8],
        len: u8,
    },
    /// `count` elements of `size` (1, 2 or 4) bytes, together at most 4096.
    PortIn {
        port: u16,
        size: u8,
        count: u16,
    },
    PortOut {
        port: u16,
        size: u8,
        count: u16,
    },
    /// The instruction, or the event, leads to another task, where [`Emulator::switch_task`] goes. The old one is to go on at `resume_at`.
    TaskSwitch {
        switch: TaskSwitch,
        resume_at: u64,
    },
    Fault(Exception),
    Unsupported,
}

/// A result whose error ends the step. `Err(Step::Done)` is a step that stops early: RIP stays.
type Flow<T> = Result<T, Step>;

/// One access to a device.
#[derive(Clone, Copy, Debug)]
struct Fragment {
    gpa: Gpa,
    data: [u8; 8],
    len: u8,
}

impl Fragment {
    const EMPTY: Self = Self { gpa: Gpa(0), data: [0; 8], len: 0 };
}

/// What the caller owes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Nothing,
    /// The answer to read number `answered`.
    Read,
    /// This many elements from a port.
    Port(u16),
}

/// Device accesses of the instruction in progress.
#[derive(Debug)]
struct Io {
    /// The first `answered` hold data; the next one is the read being waited for.
    reads: [Fragment; FRAGMENTS],
    answered: u8,
    /// Answers that this execution of the instruction has used.
    used: u8,
    writes: [Fragment; FRAGMENTS],
    queued: u8,
    handed_out: u8,
    waiting: Waiting,
    /// Elements that came from a port, until the instruction has used them.
    port_elements: u16,
}

impl Io {
    /// Forgets the reads.
    #[inline]
    fn forget(&mut self) {
        self.answered = 0;
        self.used = 0;
        self.waiting = Waiting::Nothing;
        self.port_elements = 0;
    }

    /// The answer, if there was one read and that of `size` bytes.
    #[inline]
    fn only_answer(&self, size: u8) -> Option<u64> {
        let [fragment, ..] = &self.reads;
        (self.answered == 1 && fragment.len == size).then(|| u64::from_le_bytes(fragment.data))
    }

    /// Queues a write of 1 to 8 bytes. An instruction makes no more than fit; what does not is dropped.
    #[inline]
    fn write(&mut self, gpa: Gpa, from: &[u8]) {
        let mut data = [0; 8];
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        self.write_number(gpa, from.len() as u8, u64::from_le_bytes(data));
    }

    /// Queues a write of a number's low `len` bytes, 1 to 8.
    #[inline]
    fn write_number(&mut self, gpa: Gpa, len: u8, value: u64) {
        let Some(fragment) = self.writes.get_mut(self.queued as usize) else { return };
        *fragment = Fragment { gpa, len, data: (value & mask(len)).to_le_bytes() };
        self.queued = self.queued.wrapping_add(1);
    }

    /// Reads 1 to 8 bytes: from the answers, or by leaving the step.
    #[inline]
    fn read(&mut self, gpa: Gpa, to: &mut [u8]) -> Flow<()> {
        let len = to.len() as u8;
        let Some(fragment) = self.reads.get_mut(self.used as usize) else { return Err(Step::Unsupported) };
        // The guest may have changed its page tables meanwhile: an answer counts for the address it was asked for.
        if self.used < self.answered && fragment.gpa == gpa && fragment.len == len {
            for (to, from) in to.iter_mut().zip(fragment.data) {
                *to = from;
            }
            self.used = self.used.wrapping_add(1);
            return Ok(());
        }
        self.answered = self.used;
        *fragment = Fragment { gpa, data: [0; 8], len };
        self.waiting = Waiting::Read;
        Err(Step::MmioRead { gpa, len })
    }

    /// The next write to hand out.
    #[inline]
    fn next_write(&mut self) -> Option<Step> {
        if self.handed_out >= self.queued {
            return None;
        }
        let Fragment { gpa, data, len } = *self.writes.get(self.handed_out as usize)?;
        self.handed_out = self.handed_out.wrapping_add(1);
        if self.handed_out >= self.queued {
            (self.queued, self.handed_out) = (0, 0);
        }
        Some(Step::MmioWrite { gpa, data, len })
    }
}

/// The emulator of one vCPU, about 800 bytes.
#[derive(Debug)]
pub struct Emulator {
    io: Io,
    /// The last instructions, each in the slot of its address.
    decoded: [Decoded; SLOTS],
    /// Where the instruction in progress is.
    rip: u64,
    /// An answer came: the next step resumes the instruction in progress.
    resume: bool,
    /// A REP stopped early.
    repeating: bool,
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

impl Emulator {
    pub const fn new() -> Self {
        Self {
            io: Io {
                reads: [Fragment::EMPTY; FRAGMENTS],
                answered: 0,
                used: 0,
                writes: [Fragment::EMPTY; FRAGMENTS],
                queued: 0,
                handed_out: 0,
                waiting: Waiting::Nothing,
                port_elements: 0,
            },
            decoded: [Decoded::EMPTY; SLOTS],
            rip: 0,
            resume: false,
            repeating: false,
        }
    }

    /// Drops whatever is open.
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// An instruction is not finished: an answer is owed or has come, or writes are waiting. `step` must be called before the guest runs.
    #[inline]
    pub fn is_busy(&self) -> bool {
        self.resume || self.io.queued != 0 || self.io.waiting != Waiting::Nothing
    }

    /// The instruction at RIP is a REP that was cut short by a device access: unless an interrupt is due, calling `step` again is quicker than
    /// entering the guest, which would exit at once.
    #[inline]
    pub fn is_repeating(&self) -> bool {
        self.repeating
    }

    /// Answers the last [`Step::MmioRead`], with the first as many bytes of `data` (little-endian) as it asked for.
    #[inline]
    pub fn complete_read(&mut self, data: u64) {
        if self.io.waiting != Waiting::Read {
            return;
        }
        self.io.waiting = Waiting::Nothing;
        if let Some(fragment) = self.io.reads.get_mut(self.io.answered as usize) {
            // One to eight bytes.
            let unused_bits = 64u32.wrapping_sub(u32::from(fragment.len) * 8) & 63;
            fragment.data = (data & u64::MAX >> unused_bits).to_le_bytes();
            self.io.answered = self.io.answered.wrapping_add(1);
            self.resume = true;
        }
    }

    /// Answers the last [`Step::PortIn`]: its data can be read from [`Cpu::read_port_data`] until the next step returns.
    pub fn complete_port_in(&mut self) {
        if let Waiting::Port(count) = self.io.waiting {
            self.io.waiting = Waiting::Nothing;
            self.io.port_elements = count;
            self.resume = true;
        }
    }

    /// Ends the instruction at RIP if it is a load that has nothing left to do but to take its answer, as most reads of devices have.
    /// Whether it was; [`step`](Self::step) does the same.
    #[inline]
    pub fn finish_load<C: Cpu>(&mut self, cpu: &mut C) -> bool {
        let rip = cpu.rip();
        if !self.resume || self.rip != rip || self.io.queued != 0 {
            return false;
        }
        let Decoded { instruction, mode, .. } = &self.decoded[slot_of(rip)];
        let Some(value) = self.io.only_answer(instruction.operand_size).filter(|_| instruction.is_load()) else {
            return false;
        };
        self.resume = false;
        self.repeating = false;
        self.io.forget();
        let mut exec = Exec::new(cpu, &mut self.io, instruction, *mode, rip);
        exec.set_reg(instruction.reg(), instruction.operand_size, value);
        exec.retire();
        true
    }

    /// Executes the instruction at RIP, or goes on with it. `bytes` are its first bytes where the CPU delivers them with the exit;
    /// if they are too few, or without them, the instruction is fetched.
    pub fn step<C: Cpu>(&mut self, cpu: &mut C, bytes: Option<&[u8]>) -> Step {
        if let Some(write) = self.io.next_write() {
            return write;
        }
        if self.finish_load(cpu) {
            return Step::Done;
        }
        let rip = cpu.rip();
        let decoded = &mut self.decoded[slot_of(rip)];
        if self.resume && self.rip == rip {
            self.io.used = 0;
        } else {
            self.io.forget();
            self.rip = rip;
            let mode = cpu.mode();
            if let Err(step) = decoded.fetch(cpu, mode, rip, bytes) {
                return without_code(step, mode);
            }
        }
        let (instruction, mode) = (&decoded.instruction, decoded.mode);
        self.resume = false;
        self.repeating = false;

        let mut exec = Exec::new(cpu, &mut self.io, instruction, mode, rip);
        let result = exec.run().map(|()| exec.retire());
        if let Err(step @ (Step::MmioRead { .. } | Step::PortIn { .. })) = result {
            return step;
        }
        self.io.forget();
        match result {
            Err(step @ (Step::Fault(_) | Step::Unsupported)) => {
                (self.io.queued, self.io.handed_out) = (0, 0);
                without_code(step, mode)
            }
            result => {
                self.repeating = cpu.rip() == rip && instruction.has(prefix::REP | prefix::REPNE);
                match result {
                    Ok(()) | Err(Step::Done) => self.io.next_write().unwrap_or(Step::Done),
                    Err(step) => step,
                }
            }
        }
    }
}

/// Faults have no error code in real mode.
fn without_code(step: Step, mode: Mode) -> Step {
    match step {
        Step::Fault(fault) if mode == Mode::Real => Step::Fault(Exception { error_code: None, ..fault }),
        other => other,
    }
}

/// #GP(0) as the end of a step.
const GP: Step = Step::Fault(Exception::GP0);
/// #UD as the end of a step.
const UD: Step = Step::Fault(Exception::UD);
/// #SS(0) as the end of a step.
const SS: Step = Step::Fault(Exception::with_code(exception::SS, 0));
