// SPDX-License-Identifier: GPL-2.0
//! Tests of the emulator against a mock vCPU.
#![forbid(unsafe_code)]

mod devices;
mod gates;
mod mock;
mod segments;
mod tasks;
mod x87;

use super::*;
use crate::arch::cr::{cr0, cr4, rflags};
use crate::guest::event::vector as ex;
use mock::{Mock, CODE, DEVICE, HOLE};

fn write(gpa: u64, value: u64, len: u8) -> Step {
    Step::MmioWrite { gpa: Gpa(gpa), data: value.to_le_bytes(), len }
}

fn read(gpa: u64, len: u8) -> Step {
    Step::MmioRead { gpa: Gpa(gpa), len }
}

#[test]
fn mov_to_device() {
    // mov [rax], ebx
    let mut cpu = Mock::code(Mode::Long64, &[0x89, 0x18]);
    (cpu.gpr[0], cpu.gpr[3]) = (DEVICE, 0x1_1234_5678);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, 0x1234_5678, 4));
    assert!(!emulator.is_busy());
    assert_eq!(cpu.rip, CODE + 2);
    // One walk for the code, one for the data.
    assert_eq!(cpu.translations, 2);
}

#[test]
fn writes_leave_nothing_behind() {
    // mov [rax], rbx; mov [rax], bh
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x89, 0x18, 0x88, 0x38]);
    (cpu.gpr[0], cpu.gpr[3]) = (DEVICE, u64::MAX);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, u64::MAX, 8));
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, 0xFF, 1), "what matches data looks at all of it");
}

#[test]
fn mov_from_device_resumes() {
    // mov ebx, [rax + 4]
    let mut cpu = Mock::code(Mode::Long64, &[0x8B, 0x58, 0x04]);
    (cpu.gpr[0], cpu.gpr[3]) = (DEVICE, u64::MAX);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 4, 4));
    assert_eq!((cpu.rip, cpu.gpr[3]), (CODE, u64::MAX));
    assert!(emulator.is_busy());
    // Without an answer the same question comes again.
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 4, 4));
    emulator.complete_read(0x0403_0201);
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.rip, cpu.gpr[3]), (CODE + 3, 0x0403_0201));
    assert!(!emulator.is_busy());
}

#[test]
fn answers_do_not_outlive_the_instruction() {
    // mov ebx, [rax]; add ebx, [rax]
    let mut cpu = Mock::code(Mode::Long64, &[0x8B, 0x18, 0x03, 0x18]);
    cpu.gpr[0] = DEVICE;
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE, 4));
    emulator.complete_read(0x0707_0707);
    // Somebody moved RIP meanwhile: the answer is not for the other instruction.
    cpu.rip += 2;
    cpu.gpr[0] = DEVICE + 8;
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 8, 4));
    // An answer for another address does not count either.
    emulator.complete_read(0x0707_0707);
    cpu.gpr[0] = DEVICE + 16;
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 16, 4));
}

#[test]
fn device_access_across_a_page() {
    // mov rbx, [rax]; mov [rax], rbx
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x8B, 0x18, 0x48, 0x89, 0x18]);
    cpu.gpr[0] = DEVICE + 0xFFD;
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 0xFFD, 3));
    emulator.complete_read(0x55_0003_0201);
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 0x1000, 5));
    emulator.complete_read(0x08_0706_0504);
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!(cpu.gpr[3], 0x0807_0605_0403_0201);
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE + 0xFFD, 0x03_0201, 3));
    assert!(emulator.is_busy());
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE + 0x1000, 0x08_0706_0504, 5));
    assert!(!emulator.is_busy());
    assert_eq!(cpu.rip, CODE + 6);
}

#[test]
fn read_modify_write_of_a_device() {
    // lock or dword [rax], 2
    let mut cpu = Mock::code(Mode::Long64, &[0xF0, 0x83, 0x08, 0x02]);
    cpu.gpr[0] = DEVICE;
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE, 4));
    emulator.complete_read(1);
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, 3, 4));
    assert_eq!(cpu.rip, CODE + 4);
}

#[test]
fn sixteen_bytes_to_and_from_a_device() {
    // movups xmm1, [rax]; movups [rax], xmm1; vmovdqu ymm2, [rax]
    let code = [0x0F, 0x10, 0x08, 0x0F, 0x11, 0x08, 0xC5, 0xFE, 0x6F, 0x10];
    let mut cpu = Mock::code(Mode::Long64, &code);
    cpu.gpr[0] = DEVICE;
    cpu.vectors[1] = [0xAA; 32];
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE, 8));
    emulator.complete_read(0x0101_0101_0101_0101);
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + 8, 8));
    emulator.complete_read(0x0202_0202_0202_0202);
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.vectors[1][0], cpu.vectors[1][15], cpu.vectors[1][16]), (1, 2, 0xAA));
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, 0x0101_0101_0101_0101, 8));
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE + 8, 0x0202_0202_0202_0202, 8));
    for part in 0..4u8 {
        assert_eq!(emulator.step(&mut cpu, None), read(DEVICE + part as u64 * 8, 8));
        emulator.complete_read(u64::from_le_bytes([part; 8]));
    }
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.vectors[2][0], cpu.vectors[2][31]), (0, 3));
}

#[test]
fn vector_unit_off() {
    let mut cpu = Mock::code(Mode::Long64, &[0x0F, 0x10, 0x08]);
    cpu.cr[0] |= cr0::TS;
    assert_eq!(cpu.step(), Step::Fault(Exception::plain(ex::NM)));
    cpu.cr[4] = 0;
    assert_eq!(cpu.step(), UD);
    // movaps wants 16 byte alignment.
    let mut cpu = Mock::code(Mode::Long64, &[0x0F, 0x28, 0x08]);
    cpu.gpr[0] = 0x2008;
    assert_eq!(cpu.step(), GP);
}

#[test]
fn faults_leave_no_trace() {
    // add [rax], rbx across the border into the hole
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x01, 0x18]);
    (cpu.gpr[0], cpu.gpr[3]) = (HOLE - 4, u64::MAX);
    assert_eq!(cpu.step(), Step::Fault(Exception::page_fault(2, HOLE)));
    assert_eq!((cpu.rip, cpu.ram64(HOLE - 8)), (CODE, 0));
    // A read-modify-write faults as a write, a read as a read.
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x03, 0x18]);
    cpu.gpr[0] = HOLE;
    assert_eq!(cpu.step(), Step::Fault(Exception::page_fault(0, HOLE)));
    // pusha whose last slot faults writes nothing
    let mut cpu = Mock::code(Mode::Protected32, &[0x60]);
    cpu.gpr = [0x1111; 16];
    cpu.gpr[4] = HOLE + 0x1000 + 16;
    assert_eq!(cpu.step(), Step::Fault(Exception::page_fault(2, HOLE + 0xFFC)));
    assert_eq!(cpu.ram64(HOLE + 0x1000), 0);
    assert_eq!(cpu.gpr[4], HOLE + 0x1000 + 16);
}

#[test]
fn code_fetch() {
    // The instruction's second byte is in the hole.
    let mut cpu = Mock::new(Mode::Long64);
    cpu.rip = HOLE - 1;
    cpu.ram[HOLE as usize - 1] = 0x8B;
    assert_eq!(cpu.step(), Step::Fault(Exception::page_fault(0, HOLE)));
    // One that ends at the border does not touch the next page.
    cpu.ram[HOLE as usize - 1] = 0x90;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!(cpu.rip, HOLE);
    // Too long, past the limit, not canonical.
    let mut cpu = Mock::code(Mode::Long64, &[0x66; 16]);
    assert_eq!(cpu.step(), GP);
    let mut cpu = Mock::new(Mode::Protected16);
    (cpu.rip, cpu.ram[0xFFFF]) = (0xFFFF, 0x8B);
    assert_eq!(cpu.step(), GP);
    let mut cpu = Mock::new(Mode::Long64);
    cpu.rip = 1 << 47;
    assert_eq!(cpu.step(), GP);
    // Bytes from the CPU spare the fetch.
    let mut cpu = Mock::new(Mode::Long64);
    assert_eq!(Emulator::new().step(&mut cpu, Some(&[0xB0, 0x55])), Step::Done);
    assert_eq!((cpu.gpr[0], cpu.translations), (0x55, 0));
}

#[test]
fn segmentation() {
    // mov al, [bx] past the limit; mov al, [bp] likewise
    let mut cpu = Mock::code(Mode::Protected16, &[0x8A, 0x07, 0x8A, 0x46, 0x00]);
    cpu.segments[SegmentName::Ds as usize].limit = 0xFF;
    cpu.segments[SegmentName::Ss as usize].limit = 0xFF;
    (cpu.gpr[3], cpu.gpr[5]) = (0x100, 0x100);
    assert_eq!(cpu.step(), GP);
    cpu.rip += 2;
    assert_eq!(cpu.step(), SS);
    // In real mode the same has no error code.
    let mut cpu = Mock::code(Mode::Real, &[0x66, 0x8B, 0x07]);
    cpu.gpr[3] = 0xFFFD;
    assert_eq!(cpu.step(), Step::Fault(Exception::plain(ex::GP)));
    // Expand-down: above the limit is inside.
    let mut cpu = Mock::code(Mode::Protected16, &[0x8A, 0x07]);
    cpu.segments[SegmentName::Ds as usize].attributes = SegmentAttributes(0x97);
    cpu.segments[SegmentName::Ds as usize].limit = 0xFF;
    cpu.gpr[3] = 0x100;
    assert_eq!(cpu.step(), Step::Done);
    (cpu.rip, cpu.gpr[3]) = (CODE, 0xFF);
    assert_eq!(cpu.step(), GP);
    // Read-only data, null segment.
    let mut cpu = Mock::code(Mode::Protected32, &[0x88, 0x03]);
    cpu.segments[SegmentName::Ds as usize].attributes = SegmentAttributes(0xC91);
    assert_eq!(cpu.step(), GP);
    cpu.segments[SegmentName::Ds as usize].attributes = SegmentAttributes(0);
    assert_eq!(cpu.step(), GP);
    // FS base in 64-bit mode; DS base is ignored there.
    let mut cpu = Mock::code(Mode::Long64, &[0x64, 0x8A, 0x03]);
    cpu.segments[SegmentName::Fs as usize].base = DEVICE;
    cpu.segments[SegmentName::Ds as usize].base = 0x5000;
    cpu.gpr[3] = 5;
    assert_eq!(cpu.step(), read(DEVICE + 5, 1));
}

#[test]
fn canonical_addresses() {
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x8B, 0x03, 0x48, 0x8B, 0x45, 0x00]);
    cpu.gpr[3] = (1 << 47) - 4;
    assert_eq!(cpu.step(), GP);
    (cpu.rip, cpu.gpr[5]) = (CODE + 3, 1 << 47);
    assert_eq!(cpu.step(), SS);
    cpu.cr[4] |= cr4::LA57;
    assert_eq!(cpu.step(), read(1 << 47, 8));
}

#[test]
fn lock_prefix() {
    for code in [&[0xF0, 0x89, 0x03][..], &[0xF0, 0x01, 0xC3], &[0xF0, 0x03, 0x03], &[0xF0, 0x39, 0x03], &[0xF0, 0x90]]
    {
        let mut cpu = Mock::code(Mode::Long64, code);
        assert_eq!(cpu.step(), UD, "{code:x?}");
    }
    // A lost race: nothing happened, the guest tries again.
    let mut cpu = Mock::code(Mode::Long64, &[0xF0, 0x01, 0x03]);
    (cpu.gpr[0], cpu.gpr[3], cpu.lose_race) = (5, 0x3000, true);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.ram64(0x3000)), (CODE, 0));
    cpu.lose_race = false;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.ram64(0x3000)), (CODE + 3, 5));
    // XCHG is locked without a prefix.
    let mut cpu = Mock::code(Mode::Long64, &[0x87, 0x03]);
    (cpu.gpr[0], cpu.gpr[3], cpu.lose_race) = (5, 0x3000, true);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.gpr[0]), (CODE, 5));
    // CMPXCHG16B wants alignment.
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0x0F, 0xC7, 0x0B]);
    cpu.gpr[3] = 0x3008;
    assert_eq!(cpu.step(), GP);
}

#[test]
fn rep_stos_to_a_device() {
    let mut cpu = Mock::code(Mode::Long64, &[0xF3, 0xAB]);
    (cpu.gpr[0], cpu.gpr[1], cpu.gpr[7]) = (0xAABB_CCDD, 2, DEVICE);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE, 0xAABB_CCDD, 4));
    assert_eq!((cpu.rip, cpu.gpr[1], cpu.gpr[7]), (CODE, 1, DEVICE + 4));
    assert!(cpu.rflags & rflags::RF != 0 && emulator.is_repeating() && !emulator.is_busy());
    assert_eq!(emulator.step(&mut cpu, None), write(DEVICE + 4, 0xAABB_CCDD, 4));
    assert_eq!((cpu.rip, cpu.gpr[1]), (CODE + 2, 0));
    assert!(cpu.rflags & rflags::RF == 0 && !emulator.is_repeating());
}

#[test]
fn rep_movs_from_a_device_into_the_hole() {
    // The destination faults: the device has not been read.
    let mut cpu = Mock::code(Mode::Long64, &[0xF3, 0xA4]);
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (4, DEVICE, HOLE - 1);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), read(DEVICE, 1));
    emulator.complete_read(0x77);
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.ram[HOLE as usize - 1]), (3, 0x77));
    assert_eq!(emulator.step(&mut cpu, None), Step::Fault(Exception::page_fault(2, HOLE)));
    assert_eq!((cpu.gpr[1], cpu.gpr[6], cpu.rip), (3, DEVICE + 1, CODE));
}

#[test]
fn rep_stops_for_interrupts() {
    let mut cpu = Mock::code(Mode::Long64, &[0xF3, 0xA4]);
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (1000, 0x2000, 0x4000);
    let mut emulator = Emulator::new();
    let mut steps = 0;
    while cpu.rip == CODE {
        assert_eq!(emulator.step(&mut cpu, None), Step::Done);
        steps += 1;
    }
    assert_eq!((steps, cpu.gpr[1], cpu.gpr[7]), (8, 0, 0x4000 + 1000));
    // With the trap flag one iteration a step.
    let mut cpu = Mock::code(Mode::Long64, &[0xF3, 0xA4]);
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (3, 0x2000, 0x4000);
    cpu.rflags |= rflags::TF;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.rip), (2, CODE));
}

#[test]
fn rep_with_32_bit_addresses() {
    // rep movsb with prefix 67: ECX, ESI, EDI; a count of zero changes nothing
    let mut cpu = Mock::code(Mode::Long64, &[0x67, 0xF3, 0xA4]);
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (1 << 32, u64::MAX, u64::MAX);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.gpr[6], cpu.rip), (1 << 32, u64::MAX, CODE + 3));
    (cpu.rip, cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (CODE, 1, 0xF_0000_2000, 0xF_0000_3000);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]), (0, 0x2001, 0x3001));
}

#[test]
fn repe_cmps_stops_at_a_difference() {
    let mut cpu = Mock::code(Mode::Protected32, &[0xF3, 0xA6]);
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (10, 0x2000, 0x3000);
    cpu.ram[0x3003] = 1;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.gpr[6], cpu.rip), (6, 0x2004, CODE + 2));
    assert_eq!(cpu.rflags & (rflags::ZF | rflags::CF), rflags::CF);
}

#[test]
fn rep_ins_fills_a_page_at_once() {
    // rep insw: 300 words, of which 248 fit the page
    let mut cpu = Mock::code(Mode::Long64, &[0xF3, 0x66, 0x6D]);
    (cpu.gpr[1], cpu.gpr[2], cpu.gpr[7]) = (300, 0x1F0, 0x4E10);
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), Step::PortIn { port: 0x1F0, size: 2, count: 248 });
    assert!(emulator.is_busy());
    for (index, byte) in cpu.port_data.iter_mut().enumerate() {
        *byte = index as u8;
    }
    emulator.complete_port_in();
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.gpr[7], cpu.rip), (52, 0x5000, CODE));
    assert!((0..496).all(|i| cpu.ram[0x4E10 + i] == i as u8));
    assert_eq!(emulator.step(&mut cpu, None), Step::PortIn { port: 0x1F0, size: 2, count: 52 });
    emulator.complete_port_in();
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.gpr[1], cpu.rip), (0, CODE + 3));
    // The destination faults before the port is read.
    cpu.rip = CODE;
    (cpu.gpr[1], cpu.gpr[7]) = (1, HOLE);
    assert_eq!(emulator.step(&mut cpu, None), Step::Fault(Exception::page_fault(2, HOLE)));
}

#[test]
fn rep_outs_and_plain_ports() {
    let mut cpu = Mock::code(Mode::Real, &[0xF3, 0x6E, 0xE4, 0x71, 0xE7, 0x80]);
    (cpu.gpr[1], cpu.gpr[2], cpu.gpr[6]) = (0x1_0003, 0x3F8, 0x2000);
    cpu.set_ram(0x2000, b"abc");
    let mut emulator = Emulator::new();
    assert_eq!(emulator.step(&mut cpu, None), Step::PortOut { port: 0x3F8, size: 1, count: 3 });
    assert_eq!(&cpu.port_data[..3], b"abc");
    assert_eq!((cpu.rip, cpu.gpr[1]), (CODE + 2, 0x1_0000));
    assert_eq!(emulator.step(&mut cpu, None), Step::PortIn { port: 0x71, size: 1, count: 1 });
    cpu.port_data[0] = 0x26;
    emulator.complete_port_in();
    assert_eq!(emulator.step(&mut cpu, None), Step::Done);
    assert_eq!((cpu.gpr[0], cpu.rip), (0x26, CODE + 4));
    cpu.gpr[0] = 0x1234;
    assert_eq!(emulator.step(&mut cpu, None), Step::PortOut { port: 0x80, size: 2, count: 1 });
    assert_eq!((&cpu.port_data[..2], cpu.rip), (&[0x34, 0x12][..], CODE + 6));
}

#[test]
fn port_permission() {
    // in al, dx at privilege level 3
    let mut cpu = Mock::code(Mode::Long64, &[0xEC]);
    (cpu.cpl, cpu.gpr[2]) = (3, 0x60);
    assert_eq!(cpu.step(), GP);
    cpu.tss = Segment { base: 0x6000, limit: 0x100, selector: 8, attributes: SegmentAttributes(0x8B) };
    cpu.set_ram(0x6000 + 102, &0x68u16.to_le_bytes());
    assert_eq!(cpu.step(), Step::PortIn { port: 0x60, size: 1, count: 1 });
    cpu.ram[0x6000 + 0x68 + 12] = 1;
    assert_eq!(cpu.step(), GP);
    cpu.rflags |= 3 << 12;
    assert_eq!(cpu.step(), Step::PortIn { port: 0x60, size: 1, count: 1 });
    // The map ends at the limit.
    (cpu.rflags, cpu.gpr[2]) = (rflags::FIXED, 0xFFFF);
    assert_eq!(cpu.step(), GP);
}

#[test]
fn system_registers() {
    // mov cr3, rbx; mov rax, cr8; clts; lmsw cx; smsw eax; invlpg [rdx]
    let code =
        [0x0F, 0x22, 0xDB, 0x44, 0x0F, 0x20, 0xC0, 0x0F, 0x06, 0x0F, 0x01, 0xF1, 0x0F, 0x01, 0xE0, 0x0F, 0x01, 0x3A];
    let mut cpu = Mock::code(Mode::Long64, &code);
    (cpu.gpr[3], cpu.gpr[1], cpu.gpr[2], cpu.cr[8]) = (0x9000, 0xE, 0x1234_5000, 5);
    cpu.cr[0] = cr0::PE | cr0::PG | cr0::TS;
    assert_eq!((cpu.step(), cpu.cr[3]), (Step::Done, 0x9000));
    assert_eq!((cpu.step(), cpu.gpr[0]), (Step::Done, 5));
    assert_eq!((cpu.step(), cpu.cr[0] & cr0::TS), (Step::Done, 0));
    // LMSW sets MP, EM and TS here, and leaves PE.
    assert_eq!((cpu.step(), cpu.cr[0]), (Step::Done, cr0::PG | 0xF));
    assert_eq!((cpu.step(), cpu.gpr[0]), (Step::Done, cr0::PG | 0xF));
    assert_eq!((cpu.step(), cpu.invalidated), (Step::Done, Some(Gva(0x1234_5000))));
    assert_eq!(cpu.rip, CODE + code.len() as u64);
    // CR1 does not exist, and nobody but the kernel may.
    assert_eq!(Mock::code(Mode::Long64, &[0x0F, 0x20, 0xC8]).step(), UD);
    cpu.cpl = 3;
    for offset in [0, 3, 7, 9, 15] {
        cpu.rip = CODE + offset;
        assert_eq!(cpu.step(), GP);
    }
    cpu.cr[4] |= cr4::UMIP;
    cpu.rip = CODE + 12;
    assert_eq!(cpu.step(), GP);
    // A value that the vCPU refuses.
    let mut cpu = Mock::code(Mode::Long64, &[0x0F, 0x22, 0xE3]);
    cpu.gpr[3] = u64::MAX;
    assert_eq!((cpu.step(), cpu.rip), (GP, CODE));
}

#[test]
fn debug_registers() {
    // mov dr7, rbx; mov rax, dr5
    let mut cpu = Mock::code(Mode::Long64, &[0x0F, 0x23, 0xFB, 0x0F, 0x21, 0xE8]);
    cpu.gpr[3] = 0x401;
    assert_eq!((cpu.step(), cpu.dr[7]), (Step::Done, 0x401));
    assert_eq!((cpu.step(), cpu.gpr[0]), (Step::Done, 0x401));
    cpu.rip = CODE + 3;
    cpu.cr[4] |= cr4::DE;
    assert_eq!(cpu.step(), UD);
    cpu.rip = CODE;
    cpu.gpr[3] = 1 << 32;
    assert_eq!(cpu.step(), GP);
    cpu.dr[7] |= 1 << 13;
    assert!(matches!(cpu.step(), Step::Fault(Exception { vector: ex::DB, payload: Some(0x2000), .. })));
}

#[test]
fn real_mode_control_flow() {
    // int 0x10, whose handler is at 0200:0010
    let mut cpu = Mock::code(Mode::Real, &[0xCD, 0x10]);
    cpu.set_ram(0x40, &[0x10, 0, 0, 2]);
    cpu.set_ram(0x2010, &[0xCF]);
    cpu.rflags |= rflags::IF | rflags::CF;
    cpu.segments[SegmentName::Cs as usize].selector = 0;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.segments[SegmentName::Cs as usize].base), (0x10, 0x2000));
    assert_eq!(cpu.rflags & rflags::IF, 0);
    assert_eq!(cpu.gpr[4], 0x7000 - 6);
    assert_eq!(cpu.step(), Step::Done); // iret
    assert_eq!((cpu.rip, cpu.segments[SegmentName::Cs as usize].base), (CODE + 2, 0));
    assert!(cpu.rflags & rflags::IF != 0 && cpu.gpr[4] == 0x7000);
    // jmp 0F00:0123, mov ss, ax
    let mut cpu = Mock::code(Mode::Real, &[0xEA, 0x23, 0x01, 0x00, 0x0F]);
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!((cpu.rip, cpu.segments[SegmentName::Cs as usize].selector), (0x123, 0xF00));
    let mut cpu = Mock::code(Mode::Real, &[0x8E, 0xD0]);
    cpu.gpr[0] = 0x1234;
    assert_eq!((cpu.step(), cpu.shadow), (Step::Done, Shadow::MovSs));
    assert_eq!(cpu.segments[SegmentName::Ss as usize].base, 0x12340);
    assert_eq!(Mock::code(Mode::Long64, &[0xCD, 0x10]).step(), Step::Unsupported);
    assert_eq!(Mock::code(Mode::Long64, &[0x8E, 0xC8]).step(), UD);
}

#[test]
fn interrupt_flag_rules() {
    let mut cpu = Mock::code(Mode::Long64, &[0xFB, 0xFB, 0xFA]);
    assert_eq!((cpu.step(), cpu.shadow), (Step::Done, Shadow::Sti));
    assert_eq!((cpu.step(), cpu.shadow), (Step::Done, Shadow::None));
    cpu.cpl = 3;
    assert_eq!(cpu.step(), GP);
    cpu.rflags |= 3 << 12;
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!(cpu.rflags & rflags::IF, 0);
    // POPF at level 3 changes neither IF nor IOPL.
    let mut cpu = Mock::code(Mode::Long64, &[0x9D]);
    cpu.cpl = 3;
    cpu.set_ram(0x7000, &(rflags::IF | rflags::IOPL | rflags::CF | rflags::RF).to_le_bytes());
    assert_eq!(cpu.step(), Step::Done);
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF);
    // Virtual-8086 mode without I/O privilege.
    assert_eq!(Mock::code(Mode::Vm86, &[0x9C]).step(), GP);
}

#[test]
fn undefined_and_unsupported() {
    for code in [&[0x0F, 0x0B][..], &[0x06], &[0xFE, 0xF8], &[0x8D, 0xC0], &[0x0F, 0xBA, 0xC0, 1], &[0x0F, 0xB8, 0xC0]]
    {
        assert_eq!(Mock::code(Mode::Long64, code).step(), UD, "{code:x?}");
    }
    for code in [&[0xD9, 0x00][..], &[0x0F, 0xAE, 0x00], &[0xF4], &[0x0F, 0xA2], &[0xC8, 0, 0, 1]] {
        let mut cpu = Mock::code(Mode::Long64, code);
        assert_eq!(cpu.step(), Step::Unsupported, "{code:x?}");
        assert_eq!(cpu.rip, CODE);
    }
}

#[test]
fn cache_flushes() {
    // clflush, clflushopt, clwb
    for code in [&[0x0F, 0xAE, 0x38][..], &[0x66, 0x0F, 0xAE, 0x38], &[0x66, 0x0F, 0xAE, 0x30]] {
        let mut cpu = Mock::code(Mode::Long64, code);
        cpu.gpr[0] = DEVICE;
        assert_eq!((cpu.step(), cpu.rip), (Step::Done, CODE + code.len() as u64));
        (cpu.rip, cpu.gpr[0]) = (CODE, HOLE);
        assert_eq!(cpu.step(), Step::Fault(Exception::page_fault(0, HOLE)));
    }
}

#[test]
fn decoded_instructions_follow_the_code() {
    // The same place holds another instruction, then is read in another mode.
    let mut cpu = Mock::code(Mode::Long64, &[0x48, 0xB8, 1, 0, 0, 0, 0, 0, 0, 0]);
    let mut emulator = Emulator::new();
    assert_eq!((emulator.step(&mut cpu, None), cpu.gpr[0]), (Step::Done, 1));
    cpu.rip = CODE;
    cpu.ram[CODE as usize + 2] = 2;
    assert_eq!((emulator.step(&mut cpu, None), cpu.gpr[0], cpu.rip), (Step::Done, 2, CODE + 10));
    (cpu.rip, cpu.efer) = (CODE, 0);
    cpu.segments[SegmentName::Cs as usize].attributes = SegmentAttributes(0xC9B);
    assert_eq!((emulator.step(&mut cpu, None), cpu.gpr[0], cpu.rip), (Step::Done, 1, CODE + 1)); // dec eax
                                                                                                 // Fewer bytes than the known instruction has are not enough.
    cpu.rip = HOLE - 4;
    cpu.set_ram(HOLE - 4, &[0xB8, 2, 0, 0]);
    assert_eq!(emulator.step(&mut cpu, None), Step::Fault(Exception::page_fault(0, HOLE)));
}

#[test]
fn division_by_zero() {
    let mut cpu = Mock::code(Mode::Long64, &[0xF7, 0xF3]);
    assert_eq!(cpu.step(), Step::Fault(Exception::plain(ex::DE)));
}

#[test]
fn lengths_of_intercepted_instructions() {
    use Intercepted::*;
    let table: &[(&[u8], Mode, Intercepted, Option<u8>)] = &[
        (&[0x0F, 0xA2, 0, 0], Mode::Long64, Cpuid, Some(2)),
        (&[0x0F, 0xA2], Mode::Long64, Cpuid, Some(2)),
        (&[0x66, 0x0F, 0xA2], Mode::Long64, Cpuid, Some(3)),
        (&[0x0F, 0xA3, 0, 0], Mode::Long64, Cpuid, None),
        (&[0x0F], Mode::Long64, Cpuid, None),
        (&[0x0F, 0x01, 0xD9, 0], Mode::Long64, Hypercall, Some(3)),
        (&[0x0F, 0x01, 0xC1, 0], Mode::Long64, Hypercall, Some(3)),
        (&[0x0F, 0x01, 0xC9, 0], Mode::Long64, Hypercall, None),
        (&[0x0F, 0x01, 0xC9, 0], Mode::Long64, Mwait, Some(3)),
        (&[0xF3, 0x90, 0, 0], Mode::Real, Pause, Some(2)),
        (&[0x90, 0x90, 0, 0], Mode::Real, Pause, None),
        (&[0xEC, 0, 0, 0], Mode::Real, Port, Some(1)),
        (&[0xE4, 0, 0, 0], Mode::Real, Port, Some(2)),
        (&[0xF3, 0x66, 0x6D, 0], Mode::Long64, Port, Some(3)),
        (&[0x44, 0x0F, 0x22, 0xC0], Mode::Long64, MoveRegister, Some(4)),
        (&[0x0F, 0x20, 0xC0, 0], Mode::Long64, MoveRegister, Some(3)),
        (&[0x0F, 0x01, 0x3D, 0, 0, 0, 0], Mode::Long64, Invlpg, Some(7)),
        (&[0x0F, 0x01, 0xF9, 0], Mode::Long64, Invlpg, None),
        (&[0x0F, 0x01, 0xF9, 0], Mode::Long64, Rdtscp, Some(3)),
        (&[0xF3, 0x0F, 0x09, 0], Mode::Long64, Wbinvd, Some(3)),
        (&[0x66, 0x0F, 0x38, 0x82, 0x08], Mode::Long64, Invpcid, Some(5)),
        (&[0xCD, 0x80, 0, 0], Mode::Protected32, Int, Some(2)),
    ];
    for (bytes, mode, expect, length) in table {
        assert_eq!(skip_length(bytes, *mode, *expect), *length, "{bytes:x?} {expect:?}");
    }
}

/// A small generator of pseudo-random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Below `n`.
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// Whatever the bytes and registers, nothing panics, overflows, crosses a page or goes on for ever.
#[test]
fn random_bytes_never_panic() {
    const MODES: [Mode; 5] = [Mode::Real, Mode::Vm86, Mode::Protected16, Mode::Protected32, Mode::Long64];
    let mut random = Random(0x4B52_4142);
    let mut cpus = MODES.map(Mock::new);
    let fresh = MODES.map(Mock::new);
    let (mut done, mut exits, mut faults) = (0u32, 0u32, 0u32);
    for round in 0..1_000_000u32 {
        let which = round as usize % MODES.len();
        let cpu = &mut cpus[which];
        let mut code = [0u8; 16];
        code[..8].copy_from_slice(&random.next().to_le_bytes());
        code[8..].copy_from_slice(&random.next().to_le_bytes());
        if random.next() & 1 != 0 {
            code[0] = [0x0F, 0xF3, 0xF0, 0x66, 0x48, 0xC5, 0x67, 0x8B][random.next() as usize & 7];
        }
        if let Ok(instruction) = decode(&code, MODES[which]) {
            assert!((1..=15).contains(&instruction.length));
        }
        for register in 0..16 {
            let value = random.next();
            cpu.gpr[register] = match value & 7 {
                0..=2 => value & 0xF_FFFF,
                3 => DEVICE | value >> 52,
                4 => value >> 32,
                5 => HOLE + 0xFF8 + (value >> 60),
                6 => value >> 52,
                _ => value,
            };
        }
        cpu.segments = fresh[which].segments;
        (cpu.cr, cpu.efer) = (fresh[which].cr, fresh[which].efer);
        cpu.rflags = fresh[which].rflags | random.next() & 0xCD5;
        cpu.cpl = if MODES[which] == Mode::Vm86 { 3 } else { (random.next() & 3) as u8 };
        cpu.rip = CODE;
        let mut emulator = Emulator::new();
        let mut turns = 0;
        loop {
            match emulator.step(cpu, Some(&code)) {
                Step::MmioRead { .. } => emulator.complete_read(random.next()),
                Step::PortIn { .. } => emulator.complete_port_in(),
                Step::MmioWrite { .. } | Step::PortOut { .. } => exits += 1,
                Step::Done => done += 1,
                Step::Fault(_) => faults += 1,
                Step::TaskSwitch { switch, resume_at } => {
                    emulator.switch_task(cpu, switch, None, resume_at);
                }
                Step::Unsupported => {}
            }
            turns += 1;
            assert!(turns < 32, "{code:x?} does not end");
            if !emulator.is_busy() {
                break;
            }
        }
    }
    // The generator must reach all of them, or this tests nothing.
    assert!(done > 100_000 && exits > 10_000 && faults > 50_000, "{done} {exits} {faults}");
}
