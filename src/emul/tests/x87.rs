// SPDX-License-Identifier: GPL-2.0
//! Looking for an x87 unit.
#![forbid(unsafe_code)]

use super::mock::{Mock, CODE, DEVICE, HOLE};
use super::*;

const WORDS: X87Words = X87Words { control: 0x1234, status: 0x3041 };

/// An instruction with its operand, if it has one, at [BX].
fn run(code: &[u8]) -> (Step, Mock) {
    let mut cpu = Mock::code(Mode::Real, code);
    (cpu.gpr[0], cpu.gpr[3], cpu.x87) = (0xAAAA_AAAA, 0x2000, WORDS);
    cpu.set_ram(0x2000, &[0xFF; 8]);
    (cpu.step(), cpu)
}

#[test]
fn as_a_kernel_looks_for_it() {
    let (step, cpu) = run(&[0xDB, 0xE3]); // fninit
    assert_eq!((step, cpu.rip, cpu.x87), (Step::Done, CODE + 2, X87Words::INITIAL));
    let (step, cpu) = run(&[0xDD, 0x3F]); // fnstsw [bx]
    assert_eq!((step, cpu.ram64(0x2000)), (Step::Done, !0xFFFF | 0x3041));
    let (step, cpu) = run(&[0xD9, 0x3F]); // fnstcw [bx]
    assert_eq!((step, cpu.ram64(0x2000)), (Step::Done, !0xFFFF | 0x1234));
    let (step, cpu) = run(&[0x66, 0xDF, 0xE0]); // fnstsw ax
    assert_eq!((step, cpu.gpr[0]), (Step::Done, 0xAAAA_3041));
    let (step, cpu) = run(&[0x9B]); // fwait
    assert_eq!((step, cpu.rip), (Step::Done, CODE + 1));
}

#[test]
fn the_unit_is_off() {
    for (code, bits) in [
        (&[0xDB, 0xE3][..], &[cr0::EM, cr0::TS, cr0::TS | cr0::MP][..]),
        (&[0xDD, 0x3F], &[cr0::EM, cr0::TS]),
        (&[0xDF, 0xE0], &[cr0::EM, cr0::TS]),
        (&[0x9B], &[cr0::MP | cr0::TS, cr0::MP | cr0::TS | cr0::EM]),
    ] {
        for bits in bits {
            let mut cpu = Mock::code(Mode::Real, code);
            (cpu.gpr[3], cpu.x87) = (0x2000, WORDS);
            cpu.cr[0] |= bits;
            assert_eq!(cpu.step(), Step::Fault(Exception::plain(ex::NM)), "{code:x?} {bits:x}");
            assert_eq!((cpu.rip, cpu.x87, cpu.ram64(0x2000)), (CODE, WORDS, 0));
        }
    }
    // Neither alone keeps FWAIT.
    for bits in [cr0::EM, cr0::TS, cr0::MP, cr0::MP | cr0::EM] {
        let mut cpu = Mock::code(Mode::Real, &[0x9B]);
        cpu.cr[0] |= bits;
        assert_eq!(cpu.step(), Step::Done, "{bits:x}");
    }
}

#[test]
fn the_rest_is_not_supported() {
    // fld1; fadd [bx]; fnstenv [bx]; fnsave [bx]; fnclex; fnop
    for code in [[0xD9, 0xE8], [0xD8, 0x07], [0xD9, 0x37], [0xDD, 0x37], [0xDB, 0xE2], [0xD9, 0xD0]] {
        assert_eq!(run(&code).0, Step::Unsupported, "{code:x?}");
    }
    let mut cpu = Mock::code(Mode::Real, &[0x9B]);
    cpu.x87.status = 0x80;
    assert_eq!(cpu.step(), Step::Unsupported, "an exception is pending");
    assert_eq!(run(&[0xF0, 0xDB, 0xE3]).0, UD);
}

#[test]
fn where_the_word_goes() {
    let mut cpu = Mock::code(Mode::Long64, &[0xDD, 0x38]); // fnstsw [rax]
    (cpu.gpr[0], cpu.x87) = (DEVICE, WORDS);
    assert_eq!(cpu.step(), write(DEVICE, 0x3041, 2));
    let mut cpu = Mock::code(Mode::Long64, &[0xDD, 0x38]);
    cpu.gpr[0] = HOLE;
    assert!(matches!(cpu.step(), Step::Fault(Exception { vector: ex::PF, .. })));
}
