// SPDX-License-Identifier: GPL-2.0
//! Guests for a host that goes to sleep or down: two for each CPU of the host. One is always at work and has a periodic timer; the other is
//! halted until its next TSC deadline. Both look at their TSC and at the paravirtual clock all the time, and count how often these went back.

use krabtest::guest::*;
use krabtest::ioctls::*;
use krabtest::{payload, sys};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Rounds so far, where the guest keeps them; the rest follows.
const ROUNDS: u64 = DATA;
const TSC: u64 = DATA + 8;
const TSC_WENT_BACK: u64 = DATA + 0x10;
const CLOCK_NS: u64 = DATA + 0x18;
const CLOCK_WENT_BACK: u64 = DATA + 0x20;
/// Ticks to each deadline; 0: no deadlines but a periodic timer.
const PERIOD: u64 = DATA + 0x28;
/// `struct pvclock_vcpu_time_info`.
const CLOCK_PAGE: u64 = DATA + 0x1000;
const TIMER_VECTOR: u8 = 0x42;
const PERIOD_MS: u64 = 20;

payload! { power_work, 64,
    "mov ebp, 0x100000",
    "mov esi, 0xfee00000",
    "mov dword ptr [rsi + 0xf0], 0x1ff",
    "mov ecx, 0x4b564d01",
    "lea eax, [rbp + 0x1001]",
    "xor edx, edx",
    "wrmsr",
    "sti",
    "cmp qword ptr [rbp + 0x28], 0",
    "jne 4f",
    // Always at work, with an exit now and then
    "mov dword ptr [rsi + 0x3e0], 0xb",
    "mov dword ptr [rsi + 0x320], 0x20042",
    "mov dword ptr [rsi + 0x380], 20000000",
    "2: call 90f",
    "mov ecx, 1000",
    "3: dec ecx",
    "jnz 3b",
    "xor eax, eax",
    "cpuid",
    "jmp 2b",
    // Halted most of the time
    "4: mov dword ptr [rsi + 0x320], 0x40042",
    "mfence",
    "5: cli",
    "call 90f",
    "call 91f",
    "add rax, [rbp + 0x28]",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "jmp 5b",
    // RAX: the TSC.
    "91: lfence",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "ret",
    // Looks at the clocks.
    "90: call 91b",
    "cmp rax, [rbp + 8]",
    "jae 92f",
    "inc qword ptr [rbp + 0x10]",
    "92: mov [rbp + 8], rax",
    "93: mov r8d, [rbp + 0x1000]",
    "test r8b, 1",
    "jnz 93b",
    "call 91b",
    "sub rax, [rbp + 0x1008]",
    "movsx ecx, byte ptr [rbp + 0x101c]",
    "test ecx, ecx",
    "js 94f",
    "shl rax, cl",
    "jmp 95f",
    "94: neg ecx",
    "shr rax, cl",
    "95: mov edx, [rbp + 0x1018]",
    "mul rdx",
    "shrd rax, rdx, 32",
    "add rax, [rbp + 0x1010]",
    "lfence",
    "cmp r8d, [rbp + 0x1000]",
    "jne 93b",
    // What one page and the next say may differ by their rounding.
    "lea rdx, [rax + 1000]",
    "cmp rdx, [rbp + 0x18]",
    "jae 96f",
    "inc qword ptr [rbp + 0x20]",
    "96: mov [rbp + 0x18], rax",
    "lock inc qword ptr [rbp]",
    "ret",
}

/// A guest and the thread that runs it.
pub struct Worker {
    guest: Guest,
    tsc_khz: u64,
    thread: AtomicI32,
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Starts guests on every CPU and waits until they run.
pub fn start() -> &'static [Worker] {
    // SAFETY: no arguments.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize;
    let workers: &[Worker] = (0..2 * cpus).map(|index| Worker::new(index % 2 == 1)).collect::<Vec<_>>().leak();
    for (index, worker) in workers.iter().enumerate() {
        std::thread::spawn(move || {
            let _ = sys::pin(index / 2);
            worker.thread.store(sys::gettid(), Ordering::Relaxed);
            while !STOP.load(Ordering::Relaxed) {
                match worker.guest.cpu.run() {
                    Err(sys::EINTR) => {}
                    other => panic!("KVM_RUN: {other:?}"),
                }
            }
        });
    }
    assert!(all_run(workers, 20_000), "the guests do not run");
    println!("# guests on {cpus} CPUs");
    workers
}

/// Whether every guest runs and takes its timer's interrupts.
pub fn all_run(workers: &[Worker], ms: u64) -> bool {
    let timer = COUNTS + u64::from(TIMER_VECTOR) * 8;
    workers.iter().all(|Worker { guest: Guest { ram, .. }, .. }| {
        [ROUNDS, timer].iter().all(|&at| ram.wait_u64(at, ram.read_u64(at) + 3, ms))
    })
}

/// Ends the guests.
pub fn stop(workers: &[Worker]) {
    STOP.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.guest.cpu.set_immediate_exit(true);
        sys::kick(worker.thread.load(Ordering::Relaxed));
    }
}

impl Worker {
    fn new(deadlines: bool) -> Self {
        let guest = Guest::long_irqchip(power_work());
        guest.set_eoi(Eoi::Xapic);
        let tsc_khz = guest.cpu.ioctl(KVM_GET_TSC_KHZ, 0).expect("KVM_GET_TSC_KHZ") as u64;
        if deadlines {
            guest.show_tsc_deadline();
            guest.ram.write_u64(PERIOD, PERIOD_MS * tsc_khz);
        }
        Self { guest, tsc_khz, thread: AtomicI32::new(0) }
    }

    /// The guest's TSC when it looked last, in nanoseconds.
    pub fn tsc_ns(&self) -> u64 {
        (u128::from(self.guest.ram.read_u64(TSC)) * 1_000_000 / u128::from(self.tsc_khz)) as u64
    }

    /// What the guest last read from the paravirtual clock.
    pub fn clock_ns(&self) -> u64 {
        self.guest.ram.read_u64(CLOCK_NS)
    }

    /// The paravirtual clock says that the guest was stopped.
    pub fn was_told(&self) -> bool {
        const GUEST_STOPPED: u8 = 1 << 1;
        self.guest.ram.read(CLOCK_PAGE + 29, 1)[0] & GUEST_STOPPED != 0
    }

    /// How often the TSC and the paravirtual clock went back.
    pub fn went_back(&self) -> (u64, u64) {
        (self.guest.ram.read_u64(TSC_WENT_BACK), self.guest.ram.read_u64(CLOCK_WENT_BACK))
    }
}
