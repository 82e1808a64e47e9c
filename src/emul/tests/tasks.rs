// SPDX-License-Identifier: GPL-2.0
//! Task switches.
#![forbid(unsafe_code)]

use std::vec;

use super::ex;
use super::mock::{Mock, HOLE};
use super::segments::pack;
use crate::arch::cr::{cr0, dr, rflags};
use crate::arch::segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName};
use crate::emul::*;
use crate::guest::exit::{TaskSource, TaskSwitch};
use crate::guest::Event;

const GDT: u64 = 0x2000;
const OLD: u16 = 0x08;
const NEW: u16 = 0x10;
const CODE: u16 = 0x18;
const DATA: u16 = 0x20;
const LOCAL: u16 = 0x28;
const USER_CODE: u16 = 0x30;
const USER_DATA: u16 = 0x38;
const ABSENT_CODE: u16 = 0x40;
const ABSENT_DATA: u16 = 0x48;

const OLD_TSS: u64 = 0x4000;
const NEW_TSS: u64 = 0x5000;
const LOCAL_TABLE: u64 = 0x3000;
const RESUME: u64 = 0x1005;

/// A busy segment of the old task, an available one of the new task; `wide`: 32 bits.
fn cpu(old_wide: bool, new_wide: bool) -> Mock {
    let mut cpu = Mock::new(Mode::Protected32);
    let kind = |wide| if wide { 0x89 } else { 0x81 };
    let table = [
        0,
        pack(OLD_TSS as u32, 0x67, kind(old_wide) | 2, 0),
        pack(NEW_TSS as u32, 0x67, kind(new_wide), 0),
        pack(0, 0xF_FFFF, 0x9A, 0xC0),
        pack(0, 0xF_FFFF, 0x92, 0xC0),
        pack(LOCAL_TABLE as u32, 0xF, 0x82, 0),
        pack(0, 0xF_FFFF, 0xFA, 0xC0),
        pack(0, 0xF_FFFF, 0xF2, 0xC0),
        pack(0, 0xF_FFFF, 0x1A, 0xC0),
        pack(0, 0xF_FFFF, 0x12, 0xC0),
    ];
    for (n, entry) in table.into_iter().enumerate() {
        cpu.set_ram(GDT + 8 * n as u64, &u64::to_le_bytes(entry));
    }
    cpu.set_ram(LOCAL_TABLE + 8, &pack(0x1_2000, 0xFFF, 0x92, 0).to_le_bytes());
    cpu.gdt = DescriptorTable { base: GDT, limit: 8 * table.len() as u16 - 1 };
    let attributes = SegmentAttributes(u16::from(kind(old_wide) | 2));
    cpu.tss = Segment { base: OLD_TSS, limit: 0x67, selector: OLD, attributes };
    for (n, segment) in cpu.segments.iter_mut().enumerate() {
        segment.selector = if n == SegmentName::Cs as usize { CODE } else { DATA };
    }
    for (n, gpr) in cpu.gpr.iter_mut().enumerate().take(8) {
        *gpr = 0x1111 * (n as u64 + 1);
    }
    cpu.rflags = rflags::FIXED | rflags::CF | rflags::RF;
    set_task(&mut cpu, new_wide, rflags::FIXED | rflags::ZF, [DATA, CODE, DATA, DATA, DATA, 0], LOCAL);
    cpu
}

/// The new task: EIP 0x8000, registers 0xA0, 0xA1 and so on, stack at 0x7000.
fn set_task(cpu: &mut Mock, wide: bool, flags: u64, selectors: [u16; 6], local: u16) {
    let mut words = vec![0x8000, flags];
    words.extend((0..8).map(|n| if n == 4 { 0x7000 } else { 0xA0 + n }));
    words.extend(selectors.iter().take(if wide { 6 } else { 4 }).map(|&s| u64::from(s)));
    words.push(local.into());
    let (first, width) = if wide { (0x20, 4) } else { (0x0E, 2) };
    for (n, word) in words.into_iter().enumerate() {
        cpu.set_ram(NEW_TSS + first + (width * n) as u64, &word.to_le_bytes()[..width]);
    }
}

fn access(cpu: &Mock, selector: u16) -> u8 {
    cpu.ram[(GDT + u64::from(selector)) as usize + 5]
}

fn word(cpu: &Mock, at: u64, width: u32) -> u64 {
    cpu.ram64(at) & (u64::MAX >> (64 - 8 * width))
}

fn switch(cpu: &mut Mock, source: TaskSource) -> Switched {
    Emulator::new().switch_task(cpu, TaskSwitch { selector: NEW, source }, None, RESUME)
}

fn gate(cpu: &mut Mock, event: Event) -> Switched {
    let switch = TaskSwitch { selector: NEW, source: TaskSource::Gate };
    Emulator::new().switch_task(cpu, switch, Some(event), RESUME)
}

fn refused(vector: u8, code: u16) -> Switched {
    Switched::Fault(Exception::with_code(vector, code.into()))
}

#[test]
fn all_pairs_of_formats() {
    for (old_wide, new_wide) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut cpu = cpu(old_wide, new_wide);
        cpu.dr[7] = 0x7FF;
        assert_eq!(switch(&mut cpu, TaskSource::Jump), Switched::Done);
        // What was saved.
        let (first, width) = if old_wide { (0x20, 4) } else { (0x0E, 2) };
        let saved = |n: u64| word(&cpu, OLD_TSS + first + width * n, width as u32);
        assert_eq!((saved(0), saved(1)), (RESUME, rflags::FIXED | rflags::CF));
        for n in 0..8 {
            assert_eq!(saved(2 + n), 0x1111 * (n + 1));
        }
        assert_eq!((saved(10), saved(11), saved(12)), (DATA.into(), CODE.into(), DATA.into()));
        assert_eq!(saved(if old_wide { 16 } else { 14 }), 0, "LDTR is not saved");
        // What was loaded.
        assert_eq!((cpu.rip, cpu.rflags, cpu.gpr[4]), (0x8000, rflags::FIXED | rflags::ZF, 0x7000));
        assert_eq!((cpu.gpr[0], cpu.gpr[7]), (0xA0, 0xA7));
        let selectors = cpu.segments.map(|segment| segment.selector);
        assert_eq!(selectors, [DATA, CODE, DATA, DATA, if new_wide { DATA } else { 0 }, 0]);
        assert!(!cpu.segments[SegmentName::Gs as usize].attributes.present());
        assert_eq!((cpu.ldt.base, cpu.ldt.limit, cpu.cpl), (LOCAL_TABLE, 0xF, 0));
        assert_eq!((cpu.tss.selector, cpu.tss.base, cpu.tss.attributes.kind() & 2), (NEW, NEW_TSS, 2));
        assert_eq!((access(&cpu, OLD) & 2, access(&cpu, NEW) & 2), (0, 2));
        assert_eq!((access(&cpu, CODE), access(&cpu, DATA)), (0x9B, 0x93));
        assert_eq!((cpu.cr[0] & cr0::TS, cpu.dr[7], word(&cpu, NEW_TSS, 2)), (cr0::TS, 0x6AA, 0));
    }
}

#[test]
fn nesting_and_return() {
    let mut cpu = cpu(true, true);
    assert_eq!(switch(&mut cpu, TaskSource::Call), Switched::Done);
    assert_eq!((access(&cpu, OLD) & 2, access(&cpu, NEW) & 2, word(&cpu, NEW_TSS, 2)), (2, 2, OLD.into()));
    assert_eq!(cpu.rflags & rflags::NT, rflags::NT);
    // And back: the flag is neither saved nor kept.
    cpu.gpr[0] = 0x77;
    let back = TaskSwitch { selector: OLD, source: TaskSource::Iret };
    assert_eq!(Emulator::new().switch_task(&mut cpu, back, None, 0x9000), Switched::Done);
    assert_eq!((access(&cpu, OLD) & 2, access(&cpu, NEW) & 2), (2, 0));
    assert_eq!((cpu.rip, cpu.rflags, cpu.tss.selector), (RESUME, rflags::FIXED | rflags::CF, OLD));
    assert_eq!((word(&cpu, NEW_TSS + 0x24, 4) & rflags::NT, word(&cpu, NEW_TSS + 0x28, 4)), (0, 0x77));
}

#[test]
fn page_tables_come_only_with_paging() {
    for (cr0_bits, wanted) in [(0, 0x3000), (cr0::PG, 0x7000)] {
        let mut cpu = cpu(true, true);
        cpu.cr[0] |= cr0_bits;
        cpu.cr[3] = 0x3000;
        cpu.set_ram(NEW_TSS + 0x1C, &0x7000u32.to_le_bytes());
        assert_eq!(switch(&mut cpu, TaskSource::Jump), Switched::Done);
        assert_eq!(cpu.cr[3], wanted);
    }
}

#[test]
fn an_error_code_is_pushed_in_the_new_task() {
    for (wide, sp) in [(true, 0x6FFC), (false, 0x6FFE)] {
        let mut cpu = cpu(true, wide);
        assert_eq!(gate(&mut cpu, Event::Exception(Exception::with_code(ex::GP, 0x1234))), Switched::Done);
        assert_eq!((cpu.gpr[4], word(&cpu, sp, 2)), (sp, 0x1234));
        // The flags are as the CPU gave them.
        assert_eq!(word(&cpu, OLD_TSS + 0x24, 4) & rflags::RF, rflags::RF);
    }
    let mut plain = cpu(true, true);
    assert_eq!(gate(&mut plain, Event::Interrupt(0x30)), Switched::Done);
    assert_eq!(plain.gpr[4], 0x7000);
}

#[test]
fn a_task_may_begin_with_a_trap() {
    let mut cpu = cpu(true, true);
    cpu.ram[NEW_TSS as usize + 0x64] = 1;
    assert_eq!(switch(&mut cpu, TaskSource::Jump), Switched::Trapped);
    assert_eq!(dr::DR6_BT, 0x8000);
}

#[test]
fn user_tasks_and_virtual_8086_mode() {
    let mut user = cpu(true, true);
    set_task(&mut user, true, 2, [USER_DATA | 3, USER_CODE | 3, USER_DATA | 3, 0, 0xC | 3, 0], LOCAL);
    // The local table's segment is of privilege level 0.
    assert_eq!(switch(&mut user, TaskSource::Jump), refused(ex::TS, 0xC));
    assert_eq!((user.cpl, user.rip), (3, 0x8000), "in the new task");
    let mut old = cpu(true, true);
    set_task(&mut old, true, 2 | rflags::VM, [0x1234, 0x2345, 0, 0, 0, 0], 0);
    assert_eq!(switch(&mut old, TaskSource::Jump), Switched::Done);
    assert_eq!((old.cpl, old.segments[0].base, old.segments[1].base), (3, 0x1_2340, 0x2_3450));
    assert!(old.segments.iter().all(|s| (s.limit, s.attributes.0) == (0xFFFF, 0xF3)));
}

#[test]
fn refused_in_the_old_task() {
    type Change = fn(&mut Mock);
    let cases: [(TaskSource, Change, Switched); 8] = [
        (TaskSource::Jump, |cpu| cpu.ram[GDT as usize + 0x15] &= 0x7F, refused(ex::NP, NEW)),
        (TaskSource::Jump, |cpu| cpu.ram[GDT as usize + 0x10] = 0x66, refused(ex::TS, NEW)),
        (TaskSource::Call, |cpu| cpu.ram[GDT as usize + 0x15] |= 2, refused(ex::GP, NEW)),
        (TaskSource::Iret, |_| (), refused(ex::TS, NEW)),
        (TaskSource::Jump, |cpu| cpu.gdt.limit = 0x16, refused(ex::GP, NEW)),
        (TaskSource::Iret, |cpu| cpu.gdt.limit = 0x16, refused(ex::TS, NEW)),
        (TaskSource::Jump, |cpu| cpu.tss.limit = 0x66, refused(ex::TS, OLD)),
        (
            TaskSource::Jump,
            |cpu| cpu.set_ram(GDT + 0x10, &pack(HOLE as u32, 0x67, 0x89, 0).to_le_bytes()),
            Switched::Fault(Exception::page_fault(0, HOLE)),
        ),
    ];
    for (n, (source, change, wanted)) in cases.into_iter().enumerate() {
        let mut cpu = cpu(true, true);
        change(&mut cpu);
        let (ram, registers) = (cpu.ram.clone(), cpu.gpr);
        assert_eq!(switch(&mut cpu, source), wanted, "case {n}");
        assert!(cpu.ram == ram && cpu.gpr == registers && cpu.rip == super::mock::CODE, "case {n}");
        assert_eq!((cpu.tss.selector, cpu.cr[0] & cr0::TS), (OLD, 0));
    }
    let mut cpu = cpu(true, true);
    let local = TaskSwitch { selector: NEW | 4, source: TaskSource::Jump };
    assert_eq!(Emulator::new().switch_task(&mut cpu, local, None, RESUME), refused(ex::GP, NEW | 4));
}

#[test]
fn refused_in_the_new_task() {
    let good = [DATA, CODE, DATA, DATA, DATA, 0];
    let with = |at: SegmentName, selector: u16| {
        let mut selectors = good;
        selectors[at as usize] = selector;
        selectors
    };
    for (selectors, local, wanted) in [
        (with(SegmentName::Cs, ABSENT_CODE), 0, refused(ex::NP, ABSENT_CODE)),
        (with(SegmentName::Cs, DATA), 0, refused(ex::TS, DATA)),
        (with(SegmentName::Cs, 0), 0, refused(ex::TS, 0)),
        (with(SegmentName::Cs, USER_CODE), 0, refused(ex::TS, USER_CODE)),
        (with(SegmentName::Cs, 0xFFF8), 0, refused(ex::TS, 0xFFF8)),
        (with(SegmentName::Ss, ABSENT_DATA), 0, refused(ex::SS, ABSENT_DATA)),
        (with(SegmentName::Ss, CODE), 0, refused(ex::TS, CODE)),
        (with(SegmentName::Ss, USER_DATA | 3), 0, refused(ex::TS, USER_DATA)),
        (with(SegmentName::Ss, 0), 0, refused(ex::TS, 0)),
        (with(SegmentName::Ds, ABSENT_DATA), 0, refused(ex::NP, ABSENT_DATA)),
        (with(SegmentName::Es, NEW), 0, refused(ex::TS, NEW)),
        (with(SegmentName::Fs, DATA | 4), 0, refused(ex::TS, DATA | 4)),
        (good, DATA, refused(ex::TS, DATA)),
        (good, LOCAL | 4, refused(ex::TS, LOCAL | 4)),
    ] {
        let mut cpu = cpu(true, true);
        set_task(&mut cpu, true, 2, selectors, local);
        assert_eq!(switch(&mut cpu, TaskSource::Jump), wanted, "{selectors:x?} {local:x}");
        assert_eq!((cpu.rip, cpu.tss.selector, cpu.cr[0] & cr0::TS), (0x8000, NEW, cr0::TS));
    }
    // An event from outside is told apart.
    let mut cpu = cpu(true, true);
    set_task(&mut cpu, true, 2, with(SegmentName::Ds, ABSENT_DATA), 0);
    assert_eq!(gate(&mut cpu, Event::Nmi), refused(ex::NP, ABSENT_DATA | 1));
}

#[test]
fn not_where_there_are_no_tasks() {
    for mode in [Mode::Real, Mode::Long64] {
        assert_eq!(switch(&mut Mock::new(mode), TaskSource::Jump), Switched::Unsupported);
    }
    // State in a device.
    let mut cpu = cpu(true, true);
    cpu.tss.base = super::mock::DEVICE;
    assert_eq!(switch(&mut cpu, TaskSource::Jump), Switched::Unsupported);
}

const GATE: u16 = 0x50;
const ABSENT_GATE: u16 = 0x58;
const CALL_GATE: u16 = 0x60;

/// With gates, and the stack at 0x7000.
fn program(code: &[u8]) -> Mock {
    let mut cpu = cpu(true, true);
    let gate = |access: u64| u64::from(NEW) << 16 | access << 40;
    for (selector, access) in [(GATE, 0x85), (ABSENT_GATE, 0x05), (CALL_GATE, 0x8C)] {
        cpu.set_ram(GDT + u64::from(selector), &gate(access).to_le_bytes());
    }
    cpu.gdt.limit = CALL_GATE + 7;
    cpu.idt = DescriptorTable { base: IDT, limit: 0x17 };
    for (vector, access) in [(0, 0x85), (1, 0xE5), (2, 0x05)] {
        cpu.set_ram(IDT + 8 * vector, &gate(access).to_le_bytes());
    }
    cpu.set_ram(super::mock::CODE, code);
    cpu.gpr[4] = 0x7000;
    cpu
}

const IDT: u64 = 0x3800;

fn leads(source: TaskSource, length: u64) -> Step {
    let resume_at = super::mock::CODE + length;
    Step::TaskSwitch { switch: TaskSwitch { selector: NEW, source }, resume_at }
}

fn stops(vector: u8, code: u16) -> Step {
    Step::Fault(Exception::with_code(vector, code.into()))
}

#[test]
fn instructions_that_lead_to_a_task() {
    for (selector, opcode, source) in [
        (NEW, 0xEA, TaskSource::Jump),
        (NEW, 0x9A, TaskSource::Call),
        (GATE, 0xEA, TaskSource::Jump),
        (GATE, 0x9A, TaskSource::Call),
    ] {
        // The offset does not matter.
        let mut cpu = program(&[opcode, 0xFF, 0xFF, 0xFF, 0xFF, selector as u8, 0]);
        assert_eq!(cpu.step(), leads(source, 7), "{selector:#x}");
        assert_eq!((cpu.rip, cpu.gpr[4], access(&cpu, NEW)), (super::mock::CODE, 0x7000, 0x89), "nothing has changed");
    }
    // jmp far [0x3900]
    let mut cpu = program(&[0xFF, 0x2D, 0, 0x39, 0, 0]);
    cpu.set_ram(0x3900, &[0, 0, 0, 0, NEW as u8, 0]);
    assert_eq!(cpu.step(), leads(TaskSource::Jump, 6));
    assert_eq!(program(&[0xCD, 0]).step(), leads(TaskSource::Gate, 2));
    // Of the nested task, whose link is in its segment. Its stack does not matter.
    let mut cpu = program(&[0xCF]);
    cpu.rflags |= rflags::NT;
    cpu.gpr[4] = HOLE;
    cpu.set_ram(OLD_TSS, &NEW.to_le_bytes());
    assert_eq!(cpu.step(), leads(TaskSource::Iret, 1));
}

#[test]
fn events_that_lead_to_a_task() {
    let deliver = |cpu: &mut Mock, vector| {
        Emulator::new().deliver(cpu, Delivery { vector, error_code: Some(1), software: false })
    };
    let mut cpu = program(&[0x90]);
    assert_eq!(deliver(&mut cpu, 0), leads(TaskSource::Gate, 0));
    assert_eq!((cpu.rip, cpu.gpr[4]), (super::mock::CODE, 0x7000));
    assert_eq!(deliver(&mut program(&[]), 2), stops(ex::NP, 0x13));
}

#[test]
fn the_way_to_a_task_is_stops() {
    let jump = |selector: u16| program(&[0xEA, 0, 0, 0, 0, selector as u8, 0]);
    assert_eq!(jump(ABSENT_GATE).step(), stops(ex::NP, ABSENT_GATE));
    // Gate and segment are for privilege level 0, which the selector gives up.
    assert_eq!(jump(GATE | 3).step(), stops(ex::GP, GATE));
    assert_eq!(jump(NEW | 3).step(), stops(ex::GP, NEW));
    assert_eq!(jump(CALL_GATE).step(), Step::Unsupported);
    // A user's.
    for (code, wanted) in [
        (&[0xEA, 0, 0, 0, 0, GATE as u8, 0][..], stops(ex::GP, GATE)),
        (&[0x9A, 0, 0, 0, 0, NEW as u8, 0], stops(ex::GP, NEW)),
        (&[0xCD, 0], stops(ex::GP, 2)),
        (&[0xCD, 1], leads(TaskSource::Gate, 2)),
    ] {
        let mut cpu = program(code);
        cpu.cpl = 3;
        assert_eq!(cpu.step(), wanted, "{code:x?}");
        assert_eq!(cpu.rip, super::mock::CODE);
    }
    // In IA-32e mode there are no tasks, and IRET of one that claims to be nested is #GP.
    let mut cpu = program(&[0xCF]);
    cpu.efer = crate::arch::cr::efer::LMA;
    cpu.rflags |= rflags::NT;
    assert_eq!(cpu.step(), stops(ex::GP, 0));
    // A segment of task state that cannot be read.
    let mut cpu = program(&[0xCF]);
    cpu.rflags |= rflags::NT;
    cpu.tss.base = HOLE;
    assert!(matches!(cpu.step(), Step::Fault(Exception { vector: ex::PF, .. })));
}

/// A step and the switch that it asks for.
#[test]
fn there_and_back() {
    let mut cpu = program(&[0x9A, 0, 0, 0, 0, GATE as u8, 0]);
    let mut emulator = Emulator::new();
    let Step::TaskSwitch { switch, resume_at } = emulator.step(&mut cpu, None) else { panic!() };
    assert_eq!(emulator.switch_task(&mut cpu, switch, None, resume_at), Switched::Done);
    assert_eq!((cpu.tss.selector, cpu.rip, cpu.rflags & rflags::NT), (NEW, 0x8000, rflags::NT));
    assert_eq!((access(&cpu, OLD), access(&cpu, NEW)), (0x8B, 0x8B));
    cpu.set_ram(0x8000, &[0xCF]);
    let Step::TaskSwitch { switch, resume_at } = emulator.step(&mut cpu, None) else { panic!() };
    assert_eq!((switch, resume_at), (TaskSwitch { selector: OLD, source: TaskSource::Iret }, 0x8001));
    assert_eq!(emulator.switch_task(&mut cpu, switch, None, resume_at), Switched::Done);
    assert_eq!((cpu.tss.selector, cpu.rip, cpu.rflags & rflags::NT), (OLD, super::mock::CODE + 7, 0));
    assert_eq!((access(&cpu, OLD), access(&cpu, NEW)), (0x8B, 0x89));
}
