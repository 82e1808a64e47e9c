// SPDX-License-Identifier: GPL-2.0
//! `gdb_client --image FILE`: writes a boot sector. `gdb_client SOCKET [--no-int3]`: debugs it through QEMU's gdbstub, and prints a line
//! "NAME STATUS [TEXT]" for each thing that was expected, STATUS 0 where it came. GDB manual "GDB Remote Serial Protocol".
//!
//! QEMU is started with `-S` and boots from the file. The debugger meets the boot sector at its first instruction, steps through it,
//! watches a word, breaks in its loop by hardware and (without --no-int3) by INT3, moves its RIP, and lets it go; then it says DEBUGGED
//! on the serial port. Not supported: threads, features, everything else of the protocol.

use krabtest::payload;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

/// Where a PC's firmware puts the boot sector and starts it.
const BOOT: u64 = 0x7c00;
/// The word that the loop counts, and the byte that ends it.
const COUNTER: u64 = 0x600;
const LEAVE: u64 = 0x602;
/// RIP's number in the protocol.
const RIP: u8 = 16;

payload! { boot_sector, 16,
    "xor ax, ax",                    // 0
    "mov ds, ax",                    // 2
    "mov word ptr [0x600], ax",      // 4
    "mov byte ptr [0x602], al",      // 7
    "sti",                           // 10
    "nop",                           // 11
    "cpuid",                         // 12
    "out 0x80, al",                  // 14
    "cli",                           // 16
    "2: inc word ptr [0x600]",       // 17
    "nop",                           // 21
    "cmp byte ptr [0x602], 0",       // 22
    "je 2b",                         // 27
    "mov si, 0x7c40",                // 29
    "3: lodsb",                      // 32
    "test al, al",                   // 33
    "je 4f",                         // 35
    "mov dx, 0x3f8",                 // 37
    "out dx, al",                    // 40
    "jmp 3b",                        // 41
    "4: hlt",                        // 43
    "jmp 4b",                        // 44
    ".balign 64",
    ".asciz \"DEBUGGED\\n\"",
    ".balign 256",
    ".skip 254",
    ".byte 0x55, 0xaa",
}

/// Ends of the instructions from the first on; the one after STI is stepped on its own, and so are those that exit.
const STEPS: [u64; 9] = [2, 4, 7, 10, 11, 12, 14, 16, 17];
const LOOP: u64 = BOOT + 17;
const AFTER_COUNT: u64 = BOOT + 21;
const COMPARE: u64 = BOOT + 22;

struct Gdb {
    stream: UnixStream,
}

#[derive(Debug, PartialEq, Eq)]
struct Stop {
    pc: u64,
    watched: Option<u64>,
}

impl Gdb {
    fn connect(path: &str) -> io::Result<Self> {
        let mut last = None;
        for _ in 0..100 {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                    return Ok(Self { stream });
                }
                Err(error) => last = Some(error),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::NotConnected.into()))
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn ask(&mut self, body: &str) -> io::Result<String> {
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        self.stream.write_all(format!("${body}#{sum:02x}").as_bytes())?;
        while self.byte()? != b'$' {}
        let mut answer = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                byte => answer.push(byte),
            }
        }
        self.byte()?;
        self.byte()?;
        self.stream.write_all(b"+")?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// A request whose answer is "OK".
    fn order(&mut self, body: &str) -> io::Result<()> {
        match self.ask(body)?.as_str() {
            "OK" => Ok(()),
            answer => Err(io::Error::other(format!("{body}: answered {answer:?}"))),
        }
    }

    /// Little-endian digits at a place of an answer.
    fn number(&mut self, body: &str, place: Range<usize>) -> io::Result<u64> {
        let answer = self.ask(body)?;
        let digits =
            answer.get(place).and_then(|text| u64::from_str_radix(text, 16).ok().map(|value| (value, text.len())));
        match digits {
            Some((value, len)) => Ok(value.swap_bytes() >> (64 - 4 * len)),
            None => Err(io::Error::other(format!("{body}: answered {answer:?}"))),
        }
    }

    fn word(&mut self, address: u64) -> io::Result<u64> {
        self.number(&format!("m{address:x},2"), 0..4)
    }

    /// RIP. QEMU brings its registers up to date for "g", but not for "p" and "P".
    fn pc(&mut self) -> io::Result<u64> {
        let at = usize::from(RIP) * 16;
        self.number("g", at..at + 16)
    }

    /// "c" or "s", to the next stop.
    fn go(&mut self, how: &str) -> io::Result<Stop> {
        let answer = self.ask(how)?;
        if !answer.starts_with("T05") {
            return Err(io::Error::other(format!("{how}: stopped with {answer:?}")));
        }
        let watched = answer.split([';', ':']).skip_while(|word| !word.ends_with("watch")).nth(1);
        let watched = watched.and_then(|text| u64::from_str_radix(text, 16).ok());
        Ok(Stop { pc: self.pc()?, watched })
    }

    /// From a breakpoint of a kind on: steps with the breakpoint taken out, then goes on to the next stop.
    fn go_past(&mut self, kind: u8, address: u64) -> io::Result<Stop> {
        self.order(&format!("z{kind},{address:x},1"))?;
        self.go("s")?;
        self.order(&format!("Z{kind},{address:x},1"))?;
        self.go("c")
    }
}

/// A result line.
fn expect<T: PartialEq + std::fmt::Debug>(name: &str, got: T, wanted: T) -> bool {
    let good = got == wanted;
    if good {
        println!("{name} 0");
    } else {
        println!("{name} 1 {got:x?}, wanted {wanted:x?}");
    }
    good
}

fn debug(socket: &str, int3: bool) -> io::Result<bool> {
    let at = |pc| Stop { pc, watched: None };
    let mut gdb = Gdb::connect(socket)?;
    let mut good = expect("stopped_at_reset", gdb.ask("?")?.starts_with("T05"), true);
    // The firmware runs with this breakpoint set.
    gdb.order(&format!("Z1,{BOOT:x},1"))?;
    good &= expect("hardware_breakpoint", gdb.go("c")?, at(BOOT));
    gdb.order(&format!("z1,{BOOT:x},1"))?;

    let mut ends = Vec::new();
    for _ in STEPS {
        ends.push(gdb.go("s")?.pc - BOOT);
    }
    good &= expect("single_steps", ends, STEPS.to_vec());

    gdb.order(&format!("Z2,{COUNTER:x},2"))?;
    for count in 1..=3 {
        let stop = gdb.go("c")?;
        let wanted = (Stop { pc: AFTER_COUNT, watched: Some(COUNTER) }, count);
        good &= expect(&format!("write_watchpoint_{count}"), (stop, gdb.word(COUNTER)?), wanted);
    }
    gdb.order(&format!("z2,{COUNTER:x},2"))?;
    gdb.order(&format!("Z4,{LEAVE:x},1"))?;
    good &= expect("access_watchpoint", gdb.go("c")?, Stop { pc: BOOT + 27, watched: Some(LEAVE) });
    gdb.order(&format!("z4,{LEAVE:x},1"))?;

    // Four at once, of which the loop meets two.
    let breakpoints = [COMPARE, AFTER_COUNT, 0x1234, 0x5678];
    for address in breakpoints {
        gdb.order(&format!("Z1,{address:x},1"))?;
    }
    let stops = [gdb.go("c")?, gdb.go_past(1, AFTER_COUNT)?, gdb.go_past(1, COMPARE)?];
    good &= expect("four_breakpoints", stops, [at(AFTER_COUNT), at(COMPARE), at(AFTER_COUNT)]);
    good &= expect("a_fifth_breakpoint", gdb.ask("Z1,7000,1")?.starts_with('E'), true);
    for address in breakpoints {
        gdb.order(&format!("z1,{address:x},1"))?;
    }

    if int3 {
        gdb.order(&format!("Z0,{COMPARE:x},1"))?;
        good &= expect("software_breakpoint", gdb.go("c")?, at(COMPARE));
        let before = gdb.word(COUNTER)?;
        good &= expect(
            "software_breakpoint_again",
            (gdb.go_past(0, COMPARE)?, gdb.word(COUNTER)?),
            (at(COMPARE), before + 1),
        );
        gdb.order(&format!("z0,{COMPARE:x},1"))?;
        good &= expect("instruction_restored", gdb.word(COMPARE)?, 0x3e80);
    }

    // What the debugger writes counts: registers and memory.
    gdb.order(&format!("P{RIP:x}={:016x}", LOOP.swap_bytes()))?;
    gdb.order(&format!("M{COUNTER:x},2:3412"))?;
    let stop = gdb.go("s")?;
    good &= expect("written_registers_and_memory", (stop, gdb.word(COUNTER)?), (at(AFTER_COUNT), 0x1235));
    gdb.order(&format!("M{LEAVE:x},1:01"))?;
    gdb.order("D")?;
    Ok(good)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--image", file] => {
            // SeaBIOS reads nothing from a disk without cylinders.
            let mut disk = boot_sector().to_vec();
            disk.resize(1 << 20, 0);
            std::fs::write(file, disk).map(|()| true)
        }
        [socket] => debug(socket, true),
        [socket, "--no-int3"] => debug(socket, false),
        _ => Err(io::Error::other("see the head of the source")),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("session 1 {error}");
            ExitCode::FAILURE
        }
    }
}
