// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PC's CMOS clock (MC146818 registers, ports 0x70 and 0x71), read-only time in UTC.
//!
//! Not supported: alarms and periodic interrupts (no IRQ 8), setting the clock, 12-hour and binary formats.

use std::time::{SystemTime, UNIX_EPOCH};

const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;
/// 32.768 kHz time base, 1024 Hz rate, no update in progress.
const A_VALUE: u8 = 0x26;
/// 24-hour format, BCD.
const B_VALUE: u8 = 0x02;
/// The battery is good.
const D_VALUE: u8 = 0x80;

/// Index register and the bytes that are plain memory.
pub struct Cmos {
    index: u8,
    memory: [u8; 128],
}

impl Default for Cmos {
    fn default() -> Self {
        Cmos { index: 0, memory: [0; 128] }
    }
}

impl Cmos {
    /// `offset` 0 is the index port, which reads as ones on a PC; 1 is the data port.
    pub fn read(&self, offset: u16) -> u8 {
        if offset == 0 {
            return 0xFF;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.register(self.index, &Calendar::from_unix(now))
    }

    /// Bit 7 of the index is the NMI mask, which has no meaning here.
    pub fn write(&mut self, offset: u16, value: u8) {
        if offset == 0 {
            self.index = value & 0x7F;
        } else if let Some(byte) = self.memory.get_mut(usize::from(self.index)) {
            *byte = value;
        }
    }

    fn register(&self, index: u8, now: &Calendar) -> u8 {
        match index {
            0 => bcd(now.second),
            2 => bcd(now.minute),
            4 => bcd(now.hour),
            6 => bcd(now.weekday),
            7 => bcd(now.day),
            8 => bcd(now.month),
            9 => bcd((now.year % 100) as u8),
            CENTURY => bcd((now.year / 100) as u8),
            REGISTER_A => A_VALUE,
            REGISTER_B => B_VALUE,
            REGISTER_C => 0,
            REGISTER_D => D_VALUE,
            _ => self.memory.get(usize::from(index)).copied().unwrap_or(0xFF),
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// A moment in the Gregorian calendar, UTC.
#[derive(Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// Counts years from March, so that the leap day comes last and month lengths follow one formula.
    fn from_unix(seconds: u64) -> Self {
        const DAYS_PER_ERA: u64 = 146_097; // 400 years
        const MARCH_0000_TO_1970: u64 = 719_468;
        let days = seconds / 86_400;
        let in_day = seconds % 86_400;
        let shifted = days + MARCH_0000_TO_1970;
        let era = shifted / DAYS_PER_ERA;
        let day_of_era = shifted % DAYS_PER_ERA;
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Calendar {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8, // 1970-01-01 was a Thursday
            hour: (in_day / 3_600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> (u64, u8, u8, u8) {
        let c = Calendar::from_unix(seconds);
        (c.year, c.month, c.day, c.weekday)
    }

    #[test]
    fn known_days() {
        assert_eq!(at(0), (1970, 1, 1, 5));
        assert_eq!(at(951_782_400), (2000, 2, 29, 3));
        assert_eq!(at(951_868_800), (2000, 3, 1, 4));
        assert_eq!(at(1_735_689_599), (2024, 12, 31, 3));
        assert_eq!(at(4_107_542_400), (2100, 3, 1, 2));
    }

    #[test]
    fn days_follow_each_other() {
        let mut last = at(0);
        for day in 1..60_000 {
            let next = at(day * 86_400);
            assert!(next.0 > last.0 || (next.0 == last.0 && (next.1, next.2) > (last.1, last.2)), "{last:?} {next:?}");
            assert!((1..=12).contains(&next.1) && (1..=31).contains(&next.2));
            last = next;
        }
    }

    #[test]
    fn registers_are_bcd() {
        let mut cmos = Cmos::default();
        let now = Calendar::from_unix(946_684_799); // 1999-12-31 23:59:59
        let registers = [0, 2, 4, 7, 8, 9, CENTURY].map(|index| cmos.register(index, &now));
        assert_eq!(registers, [0x59, 0x59, 0x23, 0x31, 0x12, 0x99, 0x19]);
        assert_eq!(cmos.register(REGISTER_A, &now) & 0x80, 0);
        cmos.write(0, 0x80 | REGISTER_D);
        assert_eq!(cmos.read(1), D_VALUE);
        assert_eq!(cmos.read(0), 0xFF);
    }

    #[test]
    fn other_bytes_are_memory_and_the_clock_is_not() {
        let mut cmos = Cmos::default();
        cmos.write(0, 0x40);
        cmos.write(1, 0xA5);
        assert_eq!(cmos.read(1), 0xA5);
        cmos.write(0, REGISTER_B);
        cmos.write(1, 0xFF);
        assert_eq!(cmos.read(1), B_VALUE);
    }
}
