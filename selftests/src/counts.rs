// SPDX-License-Identifier: GPL-2.0
//! What the host's kernel executes per operation and costs more than an instruction: VMREAD, RDMSR and so on. The Bochs of the beds counts
//! it and tells at ports (`scripts/bochs-counts.patch`); no other machine does.

use std::sync::Mutex;

/// The first port, of a double word each.
const PORT: u16 = 0x8b00;

/// What is counted, in the ports' order. VMCS are VMPTRLD, VMPTRST and VMCLEAR; INV are INVEPT and INVVPID; CR are writes of
/// CR0, CR3 and CR4; XSAVE are XRSTOR and their likes, too. A window is a stretch of VMX operation that does not last:
/// instructions from its begin to the first entry, from exits to the next entry in the same window, and from the last exit to its end.
pub const NAMES: [&str; 14] = [
    "vmread",
    "vmwrite",
    "rdmsr",
    "wrmsr",
    "vmcs",
    "vmxon, vmxoff",
    "inv",
    "cr",
    "xsave",
    "entries",
    "windows",
    "opening",
    "turning",
    "closing",
];

pub type Counts = [f64; NAMES.len()];

static RECORDED: Mutex<Vec<Counts>> = Mutex::new(Vec::new());

fn now() -> [u32; NAMES.len()] {
    std::array::from_fn(|n| {
        let value: u32;
        // SAFETY: reading a port that `available` asked for, of no device.
        unsafe {
            std::arch::asm!("in eax, dx", in("dx") PORT + 4 * n as u16, out("eax") value, options(nomem, nostack));
        }
        value
    })
}

/// Whether this machine counts. The process may read the ports from then on.
fn available() -> bool {
    if !crate::harness::options().bed.contains("bochs") {
        return false;
    }
    // SAFETY: a system call with numbers.
    unsafe { libc::ioperm(PORT.into(), 4 * NAMES.len() as u64, 1) == 0 && now() != [u32::MAX; NAMES.len()] }
}

/// What `body` makes the host do.
pub fn of(body: impl FnOnce()) -> Option<Counts> {
    if !available() {
        body();
        return None;
    }
    let before = now();
    body();
    let after = now();
    Some(std::array::from_fn(|n| after[n].wrapping_sub(before[n]).into()))
}

/// Runs `body` and records what it makes the host do, per operation. `body` tells how many there were; what it does besides, `frame`, does
/// not count.
pub fn record(frame: Option<Counts>, body: impl FnOnce() -> u64) {
    let mut operations = 0;
    if let Some(counts) = of(|| operations = body()) {
        let frame = frame.unwrap_or_default();
        let each = std::array::from_fn(|n| (counts[n] - frame[n]) / operations.max(1) as f64);
        RECORDED.lock().expect("one thread").push(each);
    }
}

/// The least of what was recorded, number by number: what disturbs only adds.
pub fn least() -> Option<Counts> {
    let recorded = RECORDED.lock().expect("one thread");
    let first = *recorded.first()?;
    Some(recorded.iter().fold(first, |least, one| std::array::from_fn(|n| least[n].min(one[n]))))
}
