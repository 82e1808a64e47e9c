// SPDX-License-Identifier: GPL-2.0
//! Events delivered by software, and the way back.
#![forbid(unsafe_code)]

use super::mock::*;
use crate::arch::cr::rflags;
use crate::emul::*;

const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const CODE32: u16 = 0x08;
const HANDLER: u16 = 0x4000;

/// Protected mode with a flat code segment, and a gate of `access` for vector 0x20.
fn guest(access: u8, code: &[u8]) -> Mock {
    let mut cpu = Mock::code(Mode::Protected32, code);
    cpu.gdt = DescriptorTable { base: GDT, limit: 0xF };
    cpu.idt = DescriptorTable { base: IDT, limit: 0x21 * 8 - 1 };
    cpu.set_ram(GDT + 8, &0x00CF_9B00_0000_FFFF_u64.to_le_bytes());
    let gate = u64::from(HANDLER) | u64::from(CODE32) << 16 | u64::from(access) << 40;
    cpu.set_ram(IDT + 0x20 * 8, &gate.to_le_bytes());
    cpu.segments[SegmentName::Cs as usize].selector = CODE32;
    cpu.rflags |= rflags::IF | rflags::TF | rflags::CF;
    cpu
}

fn deliver(cpu: &mut Mock, vector: u8, error_code: Option<u32>) -> Step {
    Emulator::new().deliver(cpu, Delivery { vector, error_code, software: false })
}

fn word(cpu: &Mock, at: u64) -> u32 {
    cpu.ram64(at) as u32
}

#[test]
fn through_an_interrupt_gate_and_back() {
    let mut cpu = guest(0x8E, &[]);
    cpu.set_ram(HANDLER.into(), &[0xCF]);
    let flags = cpu.rflags;
    assert_eq!(deliver(&mut cpu, 0x20, None), Step::Done);
    assert_eq!((cpu.rip, cpu.gpr[4]), (HANDLER.into(), 0x7000 - 12));
    assert_eq!(cpu.rflags & (rflags::IF | rflags::TF | rflags::CF), rflags::CF);
    let frame = [word(&cpu, 0x7000 - 12), word(&cpu, 0x7000 - 8), word(&cpu, 0x7000 - 4)];
    assert_eq!(frame, [CODE as u32, CODE32.into(), flags as u32]);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.gpr[4], cpu.rflags), (CODE, 0x7000, flags));
}

#[test]
fn traps_keep_interrupts_and_errors_are_pushed() {
    let mut cpu = guest(0x8F, &[]);
    assert_eq!(deliver(&mut cpu, 0x20, Some(0x1234)), Step::Done);
    assert_ne!(cpu.rflags & rflags::IF, 0);
    assert_eq!((word(&cpu, 0x7000 - 16), cpu.gpr[4]), (0x1234, 0x7000 - 16));
    // A gate of 16 bits pushes words.
    let mut cpu = guest(0x86, &[]);
    assert_eq!(deliver(&mut cpu, 0x20, None), Step::Done);
    assert_eq!(cpu.gpr[4], 0x7000 - 6);
}

#[test]
fn gates_that_lead_nowhere() {
    let fault = |vector, code| Step::Fault(Exception::with_code(vector, code));
    for (access, wanted) in [
        (0x0E, fault(exception::NP, 0x103)), // not present
        (0x8C, fault(exception::GP, 0x103)), // a call gate
        (0x05, fault(exception::NP, 0x103)), // a task gate that is not present
    ] {
        let mut cpu = guest(access, &[]);
        assert_eq!(deliver(&mut cpu, 0x20, None), wanted, "{access:#x}");
        assert_eq!((cpu.rip, cpu.gpr[4]), (CODE, 0x7000));
    }
    assert_eq!(deliver(&mut guest(0x8E, &[]), 0x21, None), fault(exception::GP, 0x10B), "beyond the table");
    // INT 0x20 of a program says so in its error code.
    assert_eq!(guest(0x0E, &[0xCD, 0x20]).step(), fault(exception::NP, 0x102));
    // No code segment.
    let mut cpu = guest(0x8E, &[]);
    cpu.set_ram(GDT + 8, &0x00CF_9300_0000_FFFF_u64.to_le_bytes());
    assert_eq!(deliver(&mut cpu, 0x20, None), fault(exception::GP, CODE32.into()));
    let mut cpu = Mock::code(Mode::Long64, &[]);
    assert_eq!(deliver(&mut cpu, 0x20, None), Step::Unsupported);
}

#[test]
fn int_n_returns_behind_itself() {
    let mut cpu = guest(0x8E, &[0xCD, 0x20]);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, word(&cpu, 0x7000 - 12)), (HANDLER.into(), CODE as u32 + 2));
    // INTO without overflow is nothing.
    let mut cpu = guest(0x8E, &[0xCE]);
    assert_eq!((cpu.step(), cpu.rip), (Step::Done, CODE + 1));
}

#[test]
fn a_real_mode_event() {
    let mut cpu = Mock::code(Mode::Real, &[]);
    cpu.set_ram(0x80, &[0x10, 0, 0, 2]);
    assert_eq!(deliver(&mut cpu, 0x20, Some(5)), Step::Done);
    assert_eq!((cpu.rip, cpu.segments[SegmentName::Cs as usize].base, cpu.gpr[4]), (0x10, 0x2000, 0x7000 - 6));
    // A table that ends before the vector: no error code in real mode.
    cpu.idt.limit = 0x7F;
    assert_eq!(deliver(&mut cpu, 0x20, None), Step::Fault(Exception::plain(exception::GP)));
}

#[test]
fn what_is_left_to_the_handlers_of_exits() {
    for (bytes, wanted) in [
        (&[0x0F, 0xA2][..], Some((Intercepted::Cpuid, 2))),
        (&[0xF4], Some((Intercepted::Hlt, 1))),
        (&[0x66, 0x0F, 0x30], Some((Intercepted::Wrmsr, 3))),
        (&[0x0F, 0x31], Some((Intercepted::Rdtsc, 2))),
        (&[0x0F, 0x01, 0xD1], Some((Intercepted::Xsetbv, 3))),
        (&[0x0F, 0x22, 0xC0], None),
        (&[0xB0, 0xF4], None),
        (&[0x90], None),
        (&[0x0F], None),
    ] {
        assert_eq!(intercepted(bytes, Mode::Real), wanted, "{bytes:x?}");
    }
}
