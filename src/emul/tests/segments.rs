// SPDX-License-Identifier: GPL-2.0
//! Segment loads of protected and long mode.
#![forbid(unsafe_code)]

use super::mock::{Mock, CODE};
use super::{ex, write};
use crate::arch::segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName};
use crate::emul::*;

const GDT: u64 = 0x2000;

const DATA: u16 = 0x08;
const CODE32: u16 = 0x10;
const CODE64: u16 = 0x18;
const ABSENT: u16 = 0x20;
const TASK: u16 = 0x28;
const LOCAL: u16 = 0x38;
const USER_DATA: u16 = 0x48;
const READ_ONLY: u16 = 0x50;

/// Base, limit (before scaling), access byte, flags (bits 7:4 of byte 6).
pub const fn pack(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    limit as u64 & 0xFFFF
        | (base as u64 & 0xFF_FFFF) << 16
        | (access as u64) << 40
        | (limit as u64 >> 16 & 0xF) << 48
        | (flags as u64) << 48
        | (base as u64 >> 24) << 56
}

fn cpu(mode: Mode, code: &[u8], selector: u16) -> Mock {
    let mut cpu = Mock::code(mode, code);
    let table = [
        0,
        pack(0x1234_5678, 0xF_FFFF, 0x92, 0xC0),
        pack(0, 0xF_FFFF, 0x9A, 0xC0),
        pack(0, 0xF_FFFF, 0x9A, 0xA0),
        pack(0, 0xFFFF, 0x12, 0),
        pack(0x8765_4321, 0x67, 0x89, 0),
        0xFFFF_8000,
        pack(0x3000, 0x17, 0x82, 0),
        0,
        pack(0, 0xFFFF, 0xF2, 0),
        pack(0, 0xFFFF, 0x90, 0),
    ];
    for (n, entry) in table.into_iter().enumerate() {
        cpu.set_ram(GDT + 8 * n as u64, &u64::to_le_bytes(entry));
    }
    cpu.gdt = DescriptorTable { base: GDT, limit: 8 * table.len() as u16 - 1 };
    cpu.gpr[0] = selector.into();
    cpu
}

fn access(cpu: &Mock, selector: u16) -> u8 {
    cpu.ram[(GDT + u64::from(selector)) as usize + 5]
}

fn refused(vector: u8, code: u16) -> Step {
    Step::Fault(Exception::with_code(vector, code.into()))
}

const MOV_DS: &[u8] = &[0x8E, 0xD8];
const MOV_SS: &[u8] = &[0x8E, 0xD0];

#[test]
fn data_segment() {
    let mut cpu = cpu(Mode::Protected32, MOV_DS, DATA);
    assert_eq!(cpu.step(), Step::Done);
    let wanted = Segment { base: 0x1234_5678, limit: u32::MAX, selector: DATA, attributes: SegmentAttributes(0xC93) };
    assert_eq!(cpu.segments[SegmentName::Ds as usize], wanted);
    assert_eq!((access(&cpu, DATA), cpu.rip), (0x93, CODE + 2));
    // A null selector makes it unusable.
    cpu.rip = CODE;
    cpu.gpr[0] = 3;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!(cpu.segments[SegmentName::Ds as usize], Segment { selector: 3, ..Segment::default() });
}

#[test]
fn refused_data_segments() {
    for (code, selector, wanted) in [
        (MOV_DS, ABSENT, refused(ex::NP, ABSENT)),
        (MOV_DS, TASK, refused(ex::GP, TASK)),
        (MOV_DS, 0x60, refused(ex::GP, 0x60)),
        (MOV_DS, 0xFFF8, refused(ex::GP, 0xFFF8)),
        (MOV_DS, 0x0C, refused(ex::GP, 0x0C)),
        (MOV_DS, DATA | 3, refused(ex::GP, DATA)),
        (MOV_SS, ABSENT, refused(ex::SS, ABSENT)),
        (MOV_SS, READ_ONLY, refused(ex::GP, READ_ONLY)),
        (MOV_SS, USER_DATA, refused(ex::GP, USER_DATA)),
        (MOV_SS, CODE32, refused(ex::GP, CODE32)),
        (MOV_SS, 0, refused(ex::GP, 0)),
        (&[0x8E, 0xC8], CODE32, Step::Fault(Exception::UD)),
    ] {
        let mut cpu = cpu(Mode::Protected32, code, selector);
        let before = cpu.segments;
        assert_eq!(cpu.step(), wanted, "{selector:#x}");
        assert!(cpu.segments == before && cpu.rip == CODE);
    }
    let mut user = cpu(Mode::Protected32, MOV_DS, DATA);
    user.cpl = 3;
    assert_eq!(user.step(), refused(ex::GP, DATA));
    user.gpr[0] = u64::from(USER_DATA | 3);
    assert_eq!(user.step(), Step::Done);
}

#[test]
fn stack_segment_and_pop() {
    let mut loaded = cpu(Mode::Protected32, MOV_SS, DATA);
    assert_eq!((loaded.step(), loaded.shadow), (Step::Done, Shadow::MovSs));
    // A null SS is for 64-bit mode below privilege level 3 only.
    let mut null = cpu(Mode::Long64, MOV_SS, 0);
    assert_eq!(null.step(), Step::Done);
    null = cpu(Mode::Long64, MOV_SS, 3);
    null.cpl = 3;
    assert_eq!(null.step(), refused(ex::GP, 0));
    // pop es, from a stack with another width afterwards
    let mut popped = cpu(Mode::Protected32, &[0x07], 0);
    popped.set_ram(0x7000, &u32::from(DATA).to_le_bytes());
    assert_eq!(popped.step(), Step::Done);
    assert_eq!((popped.segments[SegmentName::Es as usize].selector, popped.gpr[4]), (DATA, 0x7004));
    // les ebx, [eax]
    let mut far = cpu(Mode::Protected32, &[0xC4, 0x18], 0);
    far.gpr[0] = 0x6000;
    far.set_ram(0x6000, &[0x78, 0x56, 0x34, 0x12, DATA as u8, 0]);
    assert_eq!(far.step(), Step::Done);
    assert_eq!((far.segments[SegmentName::Es as usize].selector, far.gpr[3]), (DATA, 0x1234_5678));
}

#[test]
fn local_table() {
    let mut cpu = cpu(Mode::Protected32, &[0x0F, 0x00, 0xD0, 0x8E, 0xD8], LOCAL);
    cpu.set_ram(0x3008, &pack(0x1000, 0xFF, 0x92, 0).to_le_bytes());
    assert_eq!(cpu.step(), Step::Done); // lldt ax
    assert_eq!((cpu.ldt.base, cpu.ldt.limit, cpu.ldt.selector), (0x3000, 0x17, LOCAL));
    cpu.gpr[0] = 0x0C;
    assert_eq!(cpu.step(), Step::Done); // mov ds, ax
    assert_eq!(cpu.segments[SegmentName::Ds as usize].base, 0x1000);
    // Past its limit.
    cpu.rip = CODE + 3;
    cpu.gpr[0] = 0x1C;
    assert_eq!(cpu.step(), refused(ex::GP, 0x1C));
    // None, and not a table.
    cpu.rip = CODE;
    cpu.gpr[0] = 0;
    assert_eq!((cpu.step(), cpu.ldt.attributes.present()), (Step::Done, false));
    cpu.rip = CODE;
    cpu.gpr[0] = TASK.into();
    assert_eq!(cpu.step(), refused(ex::GP, TASK));
}

#[test]
fn task_register_out_of_rom() {
    // ltr ax
    const LTR: &[u8] = &[0x0F, 0x00, 0xD8];
    let mut cpu32 = cpu(Mode::Protected32, LTR, TASK);
    cpu32.read_only = GDT as usize..GDT as usize + 0x100;
    let mut emulator = Emulator::new();
    // The busy bit goes to whoever has the memory.
    assert_eq!(emulator.step(&mut cpu32, None), write(GDT + u64::from(TASK) + 5, 0x8B, 1));
    assert_eq!((cpu32.tss.base, cpu32.tss.limit, cpu32.tss.attributes.0), (0x8765_4321, 0x67, 0x8B));
    assert_eq!((cpu32.rip, access(&cpu32, TASK)), (CODE + 3, 0x89));
    // In long mode the descriptor is twice as long.
    let mut cpu64 = cpu(Mode::Long64, LTR, TASK);
    assert_eq!(cpu64.step(), Step::Done);
    assert_eq!((cpu64.tss.base, access(&cpu64, TASK)), (0xFFFF_8000_8765_4321, 0x8B));
    // Busy now.
    cpu64.rip = CODE;
    assert_eq!(cpu64.step(), refused(ex::GP, TASK));
    for (selector, wanted) in [(0, 0), (LOCAL, LOCAL), (TASK | 4, TASK | 4), (DATA, DATA)] {
        assert_eq!(cpu(Mode::Protected32, LTR, selector).step(), refused(ex::GP, wanted));
    }
    let mut user = cpu(Mode::Protected32, LTR, TASK);
    user.cpl = 3;
    assert_eq!(user.step(), refused(ex::GP, 0));
    assert_eq!(cpu(Mode::Real, LTR, TASK).step(), Step::Fault(Exception::UD));
}

#[test]
fn far_branches() {
    // jmp 10:00004567
    const JUMP: &[u8] = &[0xEA, 0x67, 0x45, 0, 0, CODE32 as u8, 0];
    let mut jumped = cpu(Mode::Protected32, JUMP, 0);
    assert_eq!(jumped.step(), Step::Done);
    let code = jumped.segments[SegmentName::Cs as usize];
    assert_eq!((jumped.rip, code.selector, code.attributes.0), (0x4567, CODE32, 0xC9B));
    // call 10:4567 and back
    let mut called = cpu(Mode::Protected32, &[0x9A, 0x67, 0x45, 0, 0, CODE32 as u8, 0], 0);
    called.segments[SegmentName::Cs as usize].selector = CODE32;
    called.set_ram(0x4567, &[0xCB]);
    assert_eq!((called.step(), called.gpr[4]), (Step::Done, 0x6FF8));
    assert_eq!((called.step(), called.gpr[4], called.rip), (Step::Done, 0x7000, CODE + 7));
    // To 64-bit code: with EFER.LMA alone.
    let mut long = cpu(Mode::Protected32, &[0xEA, 0x67, 0x45, 0, 0, CODE64 as u8, 0], 0);
    long.efer = crate::arch::cr::efer::LMA;
    assert_eq!(long.step(), Step::Done);
    assert_eq!(long.mode(), Mode::Long64);
    for (selector, wanted) in [
        (0, refused(ex::GP, 0)),
        (DATA, refused(ex::GP, DATA)),
        (ABSENT, refused(ex::GP, ABSENT)),
        (CODE32 | 3, refused(ex::GP, CODE32)),
    ] {
        let mut cpu = cpu(Mode::Protected32, &[0xEA, 0, 0, 0, 0, selector as u8, 0], 0);
        assert_eq!(cpu.step(), wanted, "{selector:#x}");
        assert_eq!(cpu.rip, CODE);
    }
    // A return to an outer level is not emulated.
    let mut outer = cpu(Mode::Protected32, &[0xCB], 0);
    outer.set_ram(0x7004, &[CODE32 as u8 | 3]);
    assert_eq!(outer.step(), Step::Unsupported);
}

#[test]
fn selectors_of_system_segments() {
    // str eax; sldt eax; str [bx] and so on: a register gets all of its bits, memory 16.
    for (code, wanted) in [([0x0F, 0x00, 0xC8], 0x28), ([0x0F, 0x00, 0xC0], 0x1234)] {
        let with = |mode| {
            let mut cpu = Mock::code(mode, &code);
            (cpu.tss.selector, cpu.ldt.selector) = (0x28, 0x1234);
            cpu.gpr[0] = u64::MAX;
            cpu
        };
        for mode in [Mode::Protected32, Mode::Long64] {
            let mut cpu = with(mode);
            assert_eq!((cpu.step(), cpu.gpr[0]), (Step::Done, wanted));
        }
        for mode in [Mode::Real, Mode::Vm86] {
            assert_eq!(with(mode).step(), Step::Fault(Exception::UD));
        }
        let mut user = with(Mode::Protected32);
        (user.cpl, user.cr[4]) = (3, crate::arch::cr::cr4::UMIP);
        assert_eq!((user.step(), user.gpr[0]), (refused(ex::GP, 0), u64::MAX));
        let mut memory = with(Mode::Protected32);
        memory.ram[CODE as usize + 2] -= 0xC0;
        memory.gpr[0] = 0x2000;
        memory.set_ram(0x2000, &[0xEE; 8]);
        assert_eq!((memory.step(), memory.ram64(0x2000)), (Step::Done, 0xEEEE_EEEE_EEEE_0000 | wanted));
    }
}
