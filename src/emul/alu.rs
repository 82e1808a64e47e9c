// SPDX-License-Identifier: GPL-2.0
//! Integer arithmetic and its flags, after the operation sections of SDM Vol. 2.
//!
//! Every function takes the operand size in bytes (1, 2, 4 or 8) and operands that are already cut to it, and returns the result cut
//! to it with the six arithmetic flags. Flags that the manual calls undefined get some value, never a surprise.
#![forbid(unsafe_code)]

use crate::arch::cr::rflags::{AF, CF, OF, PF, SF, ZF};

/// The arithmetic flags.
pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// All ones in an operand of `size` bytes.
#[inline]
pub const fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - bits(size))
}

/// Width of an operand of `size` bytes, in bits. Spelled out so that the compiler knows that no shift by it can overflow.
#[inline]
pub const fn bits(size: u8) -> u32 {
    match size {
        1 => 8,
        2 => 16,
        4 => 32,
        _ => 64,
    }
}

/// The most significant bit of an operand of `size` bytes.
#[inline]
pub const fn sign(size: u8) -> u64 {
    mask(size) ^ (mask(size) >> 1)
}

/// `value` of `size` bytes, sign-extended to 64 bits.
#[inline]
pub const fn sign_extend(size: u8, value: u64) -> u64 {
    let shift = 64 - bits(size);
    (((value << shift) as i64) >> shift) as u64
}

#[inline]
const fn flag(condition: bool, bit: u64) -> u64 {
    if condition {
        bit
    } else {
        0
    }
}

/// SF, ZF and PF of a result.
#[inline]
pub const fn szp(size: u8, result: u64) -> u64 {
    flag(result == 0, ZF) | flag(result & sign(size) != 0, SF) | flag((result as u8).count_ones() & 1 == 0, PF)
}

/// ADD, ADC and XADD; `carry` is 0 or 1.
#[inline]
pub fn add(size: u8, a: u64, b: u64, carry: u64) -> (u64, u64) {
    let result = a.wrapping_add(b).wrapping_add(carry) & mask(size);
    let carries = (a & b) | ((a | b) & !result);
    let overflow = (a ^ result) & (b ^ result);
    let flags = flag(carries & sign(size) != 0, CF) | ((a ^ b ^ result) & AF) | flag(overflow & sign(size) != 0, OF);
    (result, flags | szp(size, result))
}

/// SUB, SBB, CMP and NEG; `borrow` is 0 or 1.
#[inline]
pub fn sub(size: u8, a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let result = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let borrows = (!a & b) | ((!a | b) & result);
    let overflow = (a ^ b) & (a ^ result);
    let flags = flag(borrows & sign(size) != 0, CF) | ((a ^ b ^ result) & AF) | flag(overflow & sign(size) != 0, OF);
    (result, flags | szp(size, result))
}

/// AND, OR, XOR and TEST: the flags of `result`.
#[inline]
pub fn logic(size: u8, result: u64) -> (u64, u64) {
    (result, szp(size, result))
}

/// Which shift or rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts `a` by `count` (any value; the CPU's mask is applied here). `flags` are the flags before, and come back changed.
pub fn shift(which: Shift, size: u8, a: u64, count: u64, flags: u64) -> (u64, u64) {
    let width = bits(size);
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return (a, flags);
    }
    let top = |value: u64| value & sign(size) != 0;
    match which {
        Shift::Rol | Shift::Ror => {
            let left = if which == Shift::Rol { count % width } else { (width - count % width) % width };
            let result =
                if left == 0 { a } else { (a << left | a.wrapping_shr(width.wrapping_sub(left))) & mask(size) };
            let (carry, overflow) = if which == Shift::Rol {
                (result & 1 != 0, top(result) != (result & 1 != 0))
            } else {
                (top(result), top(result) != top(result << 1))
            };
            (result, flags & !(CF | OF) | flag(carry, CF) | flag(overflow, OF))
        }
        Shift::Rcl | Shift::Rcr => {
            // A rotation of width + 1 bits, the carry being the topmost.
            let wide = width + 1;
            let left = if which == Shift::Rcl { count % wide } else { (wide - count % wide) % wide };
            let value = (a as u128) | (((flags & CF) as u128) << width);
            let turned = if left == 0 { value } else { value << left | value.wrapping_shr(wide.wrapping_sub(left)) };
            let result = turned as u64 & mask(size);
            let carry = (turned >> width) & 1 != 0;
            let overflow = if which == Shift::Rcl { top(result) != carry } else { top(result) != top(result << 1) };
            (result, flags & !(CF | OF) | flag(carry, CF) | flag(overflow, OF))
        }
        Shift::Shl => {
            let wide = (a as u128) << count;
            let result = wide as u64 & mask(size);
            let carry = (wide >> width) & 1 != 0;
            (result, flags & !ARITHMETIC | flag(carry, CF) | flag(top(result) != carry, OF) | szp(size, result))
        }
        Shift::Shr | Shift::Sar => {
            let value = if which == Shift::Sar { sign_extend(size, a) as i64 as i128 } else { a as i128 };
            let result = (value >> count) as u64 & mask(size);
            let carry = value.wrapping_shr(count.wrapping_sub(1)) & 1 != 0;
            let overflow = which == Shift::Shr && top(a);
            (result, flags & !ARITHMETIC | flag(carry, CF) | flag(overflow, OF) | szp(size, result))
        }
    }
}

/// SHLD (`left`) and SHRD of `a`, filled from `b`.
pub fn double_shift(left: bool, size: u8, a: u64, b: u64, count: u64, flags: u64) -> (u64, u64) {
    let width = bits(size);
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return (a, flags);
    }
    // A 16-bit count past 16, which the manual leaves undefined, goes on into the first operand again.
    let again = if width == 16 { (a as u128, 16) } else { (0, 0) };
    let (result, carry) = if left {
        let wide = ((a as u128) << width | b as u128) << again.1 | again.0;
        let result = (wide << count) >> (width + again.1);
        (
            result as u64 & mask(size),
            if count <= width {
                a.wrapping_shr(width.wrapping_sub(count))
            } else {
                b.wrapping_shr((2 * width).wrapping_sub(count))
            },
        )
    } else {
        let wide = (b as u128) << width | a as u128 | again.0 << 32;
        ((wide >> count) as u64 & mask(size), wide.wrapping_shr(count.wrapping_sub(1)) as u64)
    };
    let overflow = (a ^ result) & sign(size) != 0;
    (result, flags & !ARITHMETIC | flag(carry & 1 != 0, CF) | flag(overflow, OF) | szp(size, result))
}

/// MUL: low half, high half, and whether the high half matters.
pub fn multiply(size: u8, a: u64, b: u64) -> (u64, u64, bool) {
    let product = (a as u128).wrapping_mul(b as u128);
    let high = (product >> bits(size)) as u64 & mask(size);
    (product as u64 & mask(size), high, high != 0)
}

/// IMUL: low half, high half, and whether the low half alone is not the product.
pub fn multiply_signed(size: u8, a: u64, b: u64) -> (u64, u64, bool) {
    let wide = |value: u64| sign_extend(size, value) as i64 as i128;
    let product = wide(a).wrapping_mul(wide(b));
    let low = product as u64 & mask(size);
    let high = (product >> bits(size)) as u64 & mask(size);
    (low, high, wide(low) != product)
}

/// DIV of `high`:`low` by `divisor`: quotient and remainder, or `None` for #DE.
pub fn divide(size: u8, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if high >= divisor {
        return None; // zero, or a quotient too large
    }
    if size < 8 {
        let dividend = high.wrapping_shl(bits(size)) | low;
        return Some((dividend.checked_div(divisor)?, dividend.checked_rem(divisor)?));
    }
    // 128 by 64 bits, one bit at a time: the kernel has no 128-bit division.
    let (mut remainder, mut quotient) = (high, low);
    for _ in 0..64 {
        let carry = remainder >> 63 != 0;
        remainder = remainder << 1 | quotient >> 63;
        quotient <<= 1;
        if carry || remainder >= divisor {
            remainder = remainder.wrapping_sub(divisor);
            quotient |= 1;
        }
    }
    Some((quotient, remainder))
}

/// IDIV of `high`:`low` by `divisor`: quotient and remainder, or `None` for #DE.
pub fn divide_signed(size: u8, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let negative = high & sign(size) != 0;
    let negative_divisor = divisor & sign(size) != 0;
    let width = bits(size);
    let dividend = (high as u128) << width | low as u128;
    let dividend = if negative { dividend.wrapping_neg() } else { dividend };
    let (high, low) = ((dividend >> width) as u64 & mask(size), dividend as u64 & mask(size));
    let divisor = if negative_divisor { divisor.wrapping_neg() & mask(size) } else { divisor };
    let (quotient, remainder) = divide(size, high, low, divisor)?;
    let largest = if negative != negative_divisor { sign(size) } else { sign(size) - 1 };
    if quotient > largest {
        return None;
    }
    let signed = |value: u64, negative: bool| if negative { value.wrapping_neg() & mask(size) } else { value };
    Some((signed(quotient, negative != negative_divisor), signed(remainder, negative)))
}

/// Whether the condition in the low four bits of an opcode holds. SDM Vol. 1 "Condition Codes".
#[inline]
pub const fn condition(code: u8, flags: u64) -> bool {
    let less = (flags & SF != 0) != (flags & OF != 0);
    let holds = match (code >> 1) & 7 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => less,
        _ => less || flags & ZF != 0,
    };
    holds != (code & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_and_overflows() {
        assert_eq!(add(1, 0xFF, 1, 0), (0, CF | ZF | PF | AF));
        assert_eq!(add(1, 0x7F, 0, 1), (0x80, OF | SF | AF));
        assert_eq!(add(8, u64::MAX, 0, 1), (0, CF | ZF | PF | AF));
        assert_eq!(sub(4, 0, 1, 0), (0xFFFF_FFFF, CF | SF | PF | AF));
        assert_eq!(sub(2, 0x8000, 1, 0), (0x7FFF, OF | PF | AF));
        assert_eq!(sub(1, 0, 0xFF, 1), (0, CF | ZF | PF | AF));
    }

    #[test]
    fn shifts() {
        assert_eq!(shift(Shift::Shl, 1, 0x81, 1, 0), (2, CF | OF));
        assert_eq!(shift(Shift::Sar, 1, 0x81, 1, 0), (0xC0, CF | SF | PF));
        assert_eq!(shift(Shift::Rcl, 1, 0x80, 1, CF), (1, CF | OF));
        assert_eq!(shift(Shift::Rcr, 8, 1, 1, 0), (0, CF));
        assert_eq!(shift(Shift::Rol, 4, 0x8000_0001, 0, ZF), (0x8000_0001, ZF));
        assert_eq!(shift(Shift::Rcr, 1, 0x55, 9, CF).0, 0x55);
        assert_eq!(double_shift(true, 4, 0x8000_0000, 0xC000_0000, 1, 0).0, 1);
    }

    #[test]
    fn division() {
        assert_eq!(divide(8, 1, 0, 2), Some((1 << 63, 0)));
        assert_eq!(divide(8, 2, 0, 2), None);
        assert_eq!(divide(4, 0, 5, 0), None);
        assert_eq!(divide_signed(1, 0xFF, 0x80, 1), Some((0x80, 0)));
        assert_eq!(divide_signed(1, 0, 0x80, 1), None);
        assert_eq!(divide_signed(8, u64::MAX, (-7i64) as u64, 2), Some(((-3i64) as u64, (-1i64) as u64)));
        assert_eq!(divide_signed(8, u64::MAX, 1 << 63, u64::MAX), None);
    }

    #[test]
    fn conditions() {
        assert!(condition(0x4, ZF) && !condition(0x5, ZF));
        assert!(condition(0xC, SF) && !condition(0xC, SF | OF));
        assert!(condition(0xF, 0) && !condition(0xF, ZF));
    }
}
