// SPDX-License-Identifier: GPL-2.0
//! [`DeviceMove`] beside the emulator: whatever it takes, it does the same.
#![forbid(unsafe_code)]

use super::{
    mock::{Mock, CODE, DEVICE},
    *,
};
use crate::guest::Regs;

/// What [`DeviceMove`] makes of `code` where the emulator comes to a device first, after both did it and agreed.
fn compare(cpu: &mut Mock, code: &[u8], gpr: [u64; 16], answer: u64) -> Option<DeviceMove> {
    (cpu.gpr, cpu.rip) = (gpr, CODE);
    let mut regs = Regs { gpr, rip: CODE, rflags: cpu.rflags };
    let (gpa, write) = match Emulator::new().step(cpu, Some(code)) {
        Step::MmioRead { gpa, .. } => (gpa, false),
        Step::MmioWrite { gpa, .. } => (gpa, true),
        _ => return None,
    };
    // RSP is not there.
    regs.gpr[4] = 0x5A5A_5A5A_5A5A_5A5A;
    let found = DeviceMove::of(code, &regs, gpa.page_offset(), write)?;
    assert_eq!(DeviceMove::of(code, &regs, gpa.page_offset(), !write), None, "{code:x?}");
    assert_eq!(DeviceMove::of(code, &regs, gpa.page_offset() ^ 0x80, write), None, "{code:x?}");
    (cpu.gpr, cpu.rip) = (gpr, CODE);
    let mut emulator = Emulator::new();
    match (found.direction, emulator.step(cpu, Some(code))) {
        (Direction::Store(value), Step::MmioWrite { data, len, .. }) => {
            assert_eq!((value.to_le_bytes(), found.size), (data, len), "{code:x?}");
        }
        (Direction::Load { .. }, Step::MmioRead { len, .. }) => {
            assert_eq!(found.size, len, "{code:x?}");
            emulator.complete_read(answer);
            assert_eq!(emulator.step(cpu, None), Step::Done, "{code:x?}");
            found.answer(answer, &mut regs);
        }
        other => panic!("{code:x?}: {other:x?}"),
    }
    assert!(!emulator.is_busy(), "{code:x?}");
    regs.gpr[4] = gpr[4];
    assert_eq!((regs.gpr, regs.rip + u64::from(found.length)), (cpu.gpr, cpu.rip), "{code:x?}");
    Some(found)
}

#[test]
fn moves_as_the_emulator() {
    let mut random = Random(5);
    let mut cpu = Mock::new(Mode::Long64);
    let mut taken = [0; 2];
    for _ in 0..200_000 {
        let mut code = [0; 16];
        code.iter_mut().for_each(|byte| *byte = random.next() as u8);
        // Most of it MOV, now and then with prefixes; the rest is anything.
        let mut at = 0;
        for prefix in [0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x65, 0x2E] {
            if random.below(12) == 0 {
                (code[at], at) = (prefix, at + 1);
            }
        }
        if random.below(2) == 0 {
            (code[at], at) = (0x40 | random.below(16) as u8, at + 1);
        }
        let opcodes: &[u8] = match random.below(12) {
            n @ 0..=3 => &[[0x88], [0x89], [0x8A], [0x8B]][n as usize],
            4 | 5 => &[0xC7],
            6 => &[0xC6],
            7 => &[0x0F, 0xB6],
            8 => &[0x0F, 0xB7],
            9 => &[0x0F],
            _ => &[],
        };
        code[at..at + opcodes.len()].copy_from_slice(opcodes);
        if random.below(2) == 0 {
            // An immediate has the field zero.
            code[at + opcodes.len()] &= 0xC7;
        }
        let gpr = core::array::from_fn(|_| DEVICE + random.below(1 << 16));
        if let Some(found) = compare(&mut cpu, &code, gpr, random.next()) {
            taken[usize::from(matches!(found.direction, Direction::Store(_)))] += 1;
        }
    }
    assert!(taken.iter().all(|taken| *taken > 5000), "{taken:?}");
}

#[test]
fn leaves_to_the_emulator() {
    let gpr: [u64; 16] = core::array::from_fn(|n| DEVICE + 8 * n as u64);
    let mut cpu = Mock::new(Mode::Long64);
    let mut found = |code: &[u8], gpr| compare(&mut cpu, code, gpr, u64::MAX);
    assert!(found(&[0x89, 0x18], gpr).is_some(), "mov [rax], ebx");
    for (code, what) in [
        (&[0x89, 0x20][..], "mov [rax], esp"),
        (&[0x8B, 0x20], "mov esp, [rax]"),
        (&[0x89, 0x04, 0x24], "mov [rsp], eax"),
        (&[0x88, 0x20], "mov [rax], ah"),
        (&[0x8A, 0x20], "mov ah, [rax]"),
        (&[0x65, 0x89, 0x18], "mov gs:[rax], ebx"),
        (&[0x67, 0x89, 0x18], "mov [eax], ebx"),
        (&[0x01, 0x18], "add [rax], ebx"),
        (&[0x87, 0x18], "xchg [rax], ebx"),
        (&[0x0F, 0xBE, 0x18], "movsx ebx, byte [rax]"),
        (&[0xAB], "stosd"),
        (&[0xA5], "movsd"),
        (&[0x0F, 0x11, 0x08], "movups [rax], xmm1"),
    ] {
        assert_eq!(found(code, gpr), None, "{what}");
    }
    let regs = Regs { gpr, rip: CODE, rflags: 2 };
    assert_eq!(DeviceMove::of(&[0x89], &regs, 0, true), None, "half an instruction");
    assert_eq!(DeviceMove::of(&[], &regs, 0, true), None, "no instruction");
    assert_eq!(DeviceMove::of(&[0xF0, 0x89, 0x18], &regs, 0, true), None, "lock mov");
    assert_eq!(DeviceMove::of(&[0x89, 0xC3], &regs, 0, true), None, "mov ebx, eax");
    let mut border = regs;
    border.gpr[0] = DEVICE + 0xFFD;
    for offset in [0xFFD, 0, 0x1000] {
        assert_eq!(DeviceMove::of(&[0x89, 0x18], &border, offset, true), None, "across pages, at {offset:x}");
    }
    border.gpr[0] = DEVICE + 0xFFC;
    assert!(DeviceMove::of(&[0x89, 0x18], &border, 0xFFC, true).is_some());
}
