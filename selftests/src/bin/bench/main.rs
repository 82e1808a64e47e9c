// SPDX-License-Identifier: GPL-2.0
//! `bench [--device PATH] [--bed NAME] [--json FILE|-] [--rounds N] [--except FILTER] [FILTER ...]`: instructions per operation.
//!
//! Every row is a small program of guest and host. RDTSC is read in the guest, or in the host around ioctls; under
//! QEMU's `-icount shift=0,sleep=off` it counts instructions (of the host kernel, this program and the guest together).
//! A loop of known length tells how many ticks an instruction takes, and all figures are divided by that: so elsewhere
//! than under `-icount` they are relative times only. Minimum and median of `--rounds` rounds (15 unless told).
//!
//! JSON: {"device", "ticks_per_instruction", "rows": {name: {"min", "median", "counts"} or null}, "reasons": {name: text}}. Counts, of what
//! costs the host's kernel more than an instruction, are there for most rows where the machine tells them: {name: number}.

mod loops;

use krabtest::counts::{self, Counts};
use krabtest::guest::*;
use krabtest::harness::{options, set_options, Options, Skip};
use krabtest::ioctls::*;
use krabtest::kvm::*;
use krabtest::routing::Routing;
use krabtest::sys::{self, *};
use krabtest::vm::{Device, Ram};
use krabtest::{payload, skip};
use loops::*;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

type Row = (&'static str, fn() -> Vec<f64>);

const ROWS: &[Row] = &[
    ("calibration: 2 instructions", calibration),
    ("cpuid leaf 0", || guest_loop(b_cpuid(), Irqchip::No)),
    ("hypercall", hypercall),
    ("rdmsr", || guest_loop(b_rdmsr(), Irqchip::No)),
    ("wrmsr", || guest_loop(b_wrmsr(), Irqchip::No)),
    ("invd", || guest_loop(b_invd(), Irqchip::No)),
    ("wbinvd", || guest_loop(b_wbinvd(), Irqchip::No)),
    ("mov from cr8", || guest_loop(b_cr8(), Irqchip::Yes)),
    ("in-kernel port", || guest_loop(b_port(), Irqchip::Yes)),
    ("ioeventfd pio", ioeventfd_pio),
    ("ioeventfd mmio", ioeventfd_mmio),
    ("port to userspace", port_to_userspace),
    ("port from userspace", port_from_userspace),
    ("mmio write to userspace", || mmio_to_userspace(b_mmio_write())),
    ("mmio read from userspace", || mmio_to_userspace(b_mmio_read())),
    ("x2apic eoi", || guest_loop(b_eoi(), Irqchip::X2apic)),
    ("x2apic icr self", || guest_loop(b_icr(), Irqchip::X2apic)),
    ("x2apic self ipi taken", || guest_loop(b_self_ipi(), Irqchip::X2apic)),
    ("xapic eoi", || guest_loop(b_xapic_eoi(), Irqchip::Yes)),
    ("tsc deadline write", tsc_deadline_write),
    ("ipi round trip", ipi),
    ("hlt wake-up by timer", halt_wake),
    ("nested fault, page present", || nested_fault(false)),
    ("nested fault, demand zero", || nested_fault(true)),
    ("nested fault, 2 MiB page", nested_fault_huge),
    ("logged write", logged_write),
    ("get dirty log, per page", dirty_log_per_page),
    ("enable dirty log, per page", dirty_log_enable),
    ("empty run", empty_run),
    ("cheapest ioctl", cheapest),
    ("get regs", || vcpu_ioctl::<kvm_regs>(KVM_GET_REGS)),
    ("set regs", set_regs),
    ("get sregs", || vcpu_ioctl::<kvm_sregs>(KVM_GET_SREGS)),
    ("signal msi", signal_msi),
    // KVM leaves a line's interrupts to a worker, and several become one: its least is what it costs to find that one waits already.
    ("irqfd write", irqfd_write),
    ("irqfd write, message", irqfd_message),
    ("create vm and vcpu", || create_destroy(true)),
    ("destroy vm and vcpu", || create_destroy(false)),
    (VM_BYTES, vm_bytes),
];

/// The row that is no count of instructions.
const VM_BYTES: &str = "kernel memory per vm, bytes";

static ROUNDS: OnceLock<usize> = OnceLock::new();

fn rounds() -> usize {
    ROUNDS.get().copied().unwrap_or(15)
}

fn main() {
    let mut o =
        Options { device: "/dev/krab".into(), bed: String::new(), times: false, apicv: true, unrestricted: true };
    let (mut json, mut filters, mut except) = (None, Vec::new(), None);
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| usage());
        match a.as_str() {
            "--device" => o.device = value(),
            "--bed" => o.bed = value(),
            "--json" => json = Some(value()),
            "--except" => except = Some(value()),
            "--rounds" => {
                let n: usize = value().parse().unwrap_or_else(|_| usage());
                let _ = ROUNDS.set(n.max(1));
            }
            f if f.starts_with("--") => usage(),
            f => filters.push(f.to_string()),
        }
    }
    set_options(o);
    let ticks = measure(calibration).map_or(1.0, |row| row.min / 2.0);
    println!("# {}: {ticks:.3} ticks per instruction", options().device);
    println!("{:<30} {:>12} {:>12}", "operation", "min", "median");
    let (mut rows, mut reasons) = (String::new(), String::new());
    for (name, func) in ROWS {
        if !filters.is_empty() && !filters.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        if except.as_ref().is_some_and(|e| name.contains(e.as_str())) {
            continue;
        }
        let comma = |s: &String| if s.is_empty() { "" } else { "," };
        match measure(*func) {
            Ok(Measured { min, median, counts }) => {
                let unit = if *name == VM_BYTES { 1.0 } else { ticks };
                let (min, median) = (min / unit, median / unit);
                println!("{name:<30} {min:>12.1} {median:>12.1}");
                let c = comma(&rows);
                let counts: Vec<_> =
                    counts::NAMES.iter().zip(&counts).map(|(n, count)| format!("\"{n}\": {count:.2}")).collect();
                let counts = counts.join(", ");
                let _ = write!(
                    rows,
                    "{c}\n  \"{name}\": {{\"min\": {min:.1}, \"median\": {median:.1}, \"counts\": {{{counts}}}}}"
                );
            }
            Err(why) => {
                println!("{name:<30} {:>12} {:>12}  # {why}", "-", "-");
                let c = comma(&rows);
                let _ = write!(rows, "{c}\n  \"{name}\": null");
                let c = comma(&reasons);
                let why = why.replace(['"', '\\', '\n'], " ");
                let _ = write!(reasons, "{c}\n  \"{name}\": \"{why}\"");
            }
        }
    }
    let text = format!(
        "{{\"device\": \"{}\", \"ticks_per_instruction\": {ticks:.4}, \"rows\": {{{rows}\n}}, \"reasons\": {{{reasons}\n}}}}\n",
        options().device
    );
    match json.as_deref() {
        Some("-") => print!("{text}"),
        Some(path) => std::fs::write(path, text).unwrap_or_else(|e| eprintln!("{path}: {e}")),
        None => {}
    }
}

fn usage() -> ! {
    eprintln!("usage: bench [--device PATH] [--bed NAME] [--json FILE|-] [--rounds N] [--except FILTER] [FILTER ...]");
    std::process::exit(2);
}

/// One row, in ticks.
struct Measured {
    min: f64,
    median: f64,
    /// Empty where nothing was counted.
    counts: Vec<f64>,
}

/// Runs a row in a child of its own, or tells why not.
fn measure(func: fn() -> Vec<f64>) -> std::result::Result<Measured, String> {
    let mut pipe = [0; 2];
    let _ = std::io::stdout().flush();
    // SAFETY: this process has one thread; the child leaves by `_exit`.
    let pid = unsafe {
        assert_eq!(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC), 0);
        libc::fork()
    };
    if pid == 0 {
        child(func, pipe[1]);
    }
    let _ = close(pipe[1]);
    let mut text = Vec::new();
    loop {
        let mut b = [0u8; 4096];
        let mut p = libc::pollfd { fd: pipe[0], events: libc::POLLIN, revents: 0 };
        // SAFETY: locals; the child is ours.
        let n = unsafe {
            if libc::poll(&mut p, 1, 120_000) == 0 {
                libc::kill(pid, libc::SIGKILL);
                text = b"E no end after 120 seconds".to_vec();
                0
            } else {
                libc::read(pipe[0], b.as_mut_ptr() as *mut _, b.len())
            }
        };
        if n <= 0 {
            break;
        }
        text.extend(&b[..n as usize]);
    }
    let _ = close(pipe[0]);
    sys::wait(pid);
    let text = String::from_utf8_lossy(&text).into_owned();
    if let Some(why) = text.strip_prefix("E ") {
        return Err(why.to_string());
    }
    let numbers = |text: &str| text.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    let (samples, counts) = text.split_once('|').unwrap_or((&text, ""));
    let (mut samples, counts): (Vec<f64>, Vec<f64>) = (numbers(samples), numbers(counts));
    if samples.is_empty() {
        return Err("the child ended without a word".into());
    }
    samples.sort_by(f64::total_cmp);
    Ok(Measured { min: samples[0], median: samples[samples.len() / 2], counts })
}

fn child(func: fn() -> Vec<f64>, to: i32) -> ! {
    // SAFETY: the child of a single-threaded parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    std::panic::set_hook(Box::new(|_| ()));
    sys::arm_kick_signal();
    let text = match std::panic::catch_unwind(func) {
        Ok(samples) => {
            let join = |numbers: &[f64]| numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(" ");
            format!("{}|{}", join(&samples), counts::least().map_or(String::new(), |counts| join(&counts)))
        }
        Err(p) => {
            let why = p
                .downcast_ref::<Skip>()
                .map(|s| s.0.clone())
                .or(p.downcast_ref::<String>().cloned())
                .or(p.downcast_ref::<&str>().map(|s| s.to_string()));
            format!("E {}", why.unwrap_or_default())
        }
    };
    // SAFETY: our pipe; then the end of this process.
    unsafe {
        libc::write(to, text.as_ptr() as *const _, text.len());
        libc::_exit(0)
    }
}

fn tsc() -> u64 {
    // SAFETY: reads the time stamp counter, behind all that came before.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// `n` times `op` on the host; ticks of one, for each round.
fn host_rounds(n: u64, mut op: impl FnMut()) -> Vec<f64> {
    op();
    (0..rounds())
        .map(|_| {
            let mut took = 0;
            counts::record(None, || {
                let start = tsc();
                for _ in 0..n {
                    op();
                }
                took = tsc() - start;
                n
            });
            took as f64 / n as f64
        })
        .collect()
}

fn calibration() -> Vec<f64> {
    (0..rounds())
        .map(|_| {
            let start = tsc();
            // SAFETY: counts a register down: two instructions a turn.
            unsafe { std::arch::asm!("2: dec {0:e}", "jnz 2b", inout(reg) 100_000 => _) };
            (tsc() - start) as f64 / 100_000.0
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Irqchip {
    No,
    Yes,
    X2apic,
}

fn bench_guest(code: &[u8], irqchip: Irqchip) -> Guest {
    let g = match irqchip {
        Irqchip::No => Guest::long(code),
        _ => Guest::long_irqchip(code),
    };
    if irqchip == Irqchip::X2apic {
        let mut s = g.cpu.sregs();
        s.apic_base |= 0xc00;
        g.cpu.set_sregs(&s);
        // The spurious-interrupt register, by the guest's MSR: bit 8 enables.
        assert!(g.cpu.set_msr(0x80f, 0x1ff), "MSR 0x80f");
        g.set_eoi(Eoi::X2apic);
    }
    g
}

/// One round after the other of an `op_loop` guest whose operations never reach userspace.
fn rounds_of(g: &Guest) -> Vec<f64> {
    let frame = frame();
    g.expect_done();
    g.expect_done();
    (0..rounds())
        .map(|_| {
            counts::record(frame, || {
                g.expect_done();
                g.ram.read_u64(DATA + 8)
            });
            g.ram.read_u64(DATA) as f64 / g.ram.read_u64(DATA + 8) as f64
        })
        .collect()
}

/// What a round of nothing makes the host do: a call of KVM_RUN that ends with the guest's next port.
fn frame() -> Option<Counts> {
    let g = Guest::long(b_nothing());
    g.expect_done();
    g.expect_done();
    (0..4).filter_map(|_| counts::of(|| g.expect_done())).reduce(|a, b| std::array::from_fn(|n| a[n].min(b[n])))
}

fn guest_loop(code: &[u8], irqchip: Irqchip) -> Vec<f64> {
    rounds_of(&bench_guest(code, irqchip))
}

fn hypercall() -> Vec<f64> {
    let amd = Device::open().supported_cpuid().find(0, 0).is_some_and(|e| e.ebx == 0x6874_7541);
    guest_loop(if amd { b_vmmcall() } else { b_vmcall() }, Irqchip::No)
}

fn ioeventfd_pio() -> Vec<f64> {
    let g = bench_guest(b_ioeventfd_pio(), Irqchip::No);
    g.vm.ioeventfd(eventfd(), 0x600, 1, KVM_IOEVENTFD_FLAG_PIO, 0).expect("KVM_IOEVENTFD");
    rounds_of(&g)
}

fn ioeventfd_mmio() -> Vec<f64> {
    let g = bench_guest(b_ioeventfd_mmio(), Irqchip::No);
    g.vm.ioeventfd(eventfd(), MMIO, 4, 0, 0).expect("KVM_IOEVENTFD");
    rounds_of(&g)
}

/// As `rounds_of`, with every other exit sent straight back.
fn rounds_with_exits(g: &Guest) -> Vec<f64> {
    let page = g.cpu.page();
    let round = || loop {
        sys::ioctl(g.cpu.fd, KVM_RUN, 0).unwrap_or_else(|e| panic!("KVM_RUN: {e:?}"));
        // SAFETY: `io` is the union's field for this exit reason.
        if page.exit_reason == KVM_EXIT_IO && unsafe { page.__bindgen_anon_1.io.port } == PORT_DONE {
            return g.ram.read_u64(DATA + 8).max(1);
        } else if page.exit_reason != KVM_EXIT_IO && page.exit_reason != KVM_EXIT_MMIO {
            panic!("exit {:?}", g.cpu.exit());
        }
    };
    let frame = frame();
    round();
    round();
    (0..rounds())
        .map(|_| {
            counts::record(frame, round);
            g.ram.read_u64(DATA) as f64 / g.ram.read_u64(DATA + 8).max(1) as f64
        })
        .collect()
}

fn port_to_userspace() -> Vec<f64> {
    rounds_with_exits(&bench_guest(b_out(), Irqchip::No))
}

fn port_from_userspace() -> Vec<f64> {
    rounds_with_exits(&bench_guest(b_in(), Irqchip::No))
}

fn mmio_to_userspace(code: &[u8]) -> Vec<f64> {
    rounds_with_exits(&bench_guest(code, Irqchip::No))
}

fn tsc_deadline_write() -> Vec<f64> {
    let g = bench_guest(b_deadline(), Irqchip::Yes);
    if g.vm.cap(KVM_CAP_TSC_DEADLINE_TIMER) <= 0 {
        skip!("no TSC deadline timer");
    }
    g.show_tsc_deadline();
    rounds_of(&g)
}

payload! { b_ipi_send, 64,
    "4: out 0xed, al",
    "mov r15d, 20",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r8, rax",
    "5: mov r9, [0x7000 + 0x56 * 8]",
    "mov ecx, 0x830",
    "mov eax, 0x56",
    "mov edx, 1",
    "wrmsr",
    "6: pause",
    "cmp r9, [0x7000 + 0x56 * 8]",
    "je 6b",
    "dec r15d",
    "jnz 5b",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, r8",
    "mov [0x100000], rax",
    "mov qword ptr [0x100008], 20",
    "jmp 4b",
}

payload! { b_ipi_receive, 64,
    "mov qword ptr [0x100010], 1",
    "sti",
    "2: pause",
    "jmp 2b",
}

/// From the ICR write to the sight of the other CPU's counter: both run.
fn ipi() -> Vec<f64> {
    let g = bench_guest(b_ipi_send(), Irqchip::X2apic);
    let second = g.add_long_vcpu(1, b_ipi_receive());
    second.set_mp_state(KVM_MP_STATE_RUNNABLE).expect("KVM_SET_MP_STATE");
    let mut s = second.sregs();
    s.apic_base |= 0xc00;
    second.set_sregs(&s);
    assert!(second.set_msr(0x80f, 0x1ff), "MSR 0x80f");
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (send, receive) = std::sync::mpsc::channel();
        let (stop, second) = (&stop, &second);
        let t = s.spawn(move || {
            send.send(sys::gettid()).expect("the bench waits");
            while !stop.load(Ordering::Relaxed) {
                match second.run() {
                    Err(EINTR) | Err(EAGAIN) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        let tid = receive.recv().expect("the thread runs");
        let ready = g.ram.wait_u64(DATA + 16, 1, 5000);
        let samples = if ready { rounds_of(&g) } else { Vec::new() };
        stop.store(true, Ordering::Relaxed);
        while !t.is_finished() {
            second.set_immediate_exit(true);
            sys::kick(tid);
            sleep_ms(1);
        }
        samples
    })
}

payload! { b_halt, 64,
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x320], 0x40042",
    "mfence",
    "4: out 0xed, al",
    "cli",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, 300000",
    "mov r9, rax",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, r9",
    "mov [0x100000], rax",
    "mov qword ptr [0x100008], 1",
    "jmp 4b",
}

/// From the deadline to the instruction behind HLT, with the handler between.
fn halt_wake() -> Vec<f64> {
    let g = bench_guest(b_halt(), Irqchip::Yes);
    if g.vm.cap(KVM_CAP_TSC_DEADLINE_TIMER) <= 0 {
        skip!("no TSC deadline timer");
    }
    g.show_tsc_deadline();
    g.set_eoi(Eoi::Xapic);
    rounds_of(&g)
}

const BASE: u64 = 0x1000_0000;
const PAGES: usize = 1024;

payload! { b_touch, 64,
    "4: out 0xed, al",
    "mov rsi, 0x10000000",
    "mov ecx, 1024",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r8, rax",
    "5: mov [rsi], rcx",
    "add rsi, rbp",
    "dec ecx",
    "jnz 5b",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, r8",
    "mov [0x100000], rax",
    "mov qword ptr [0x100008], 1024",
    "jmp 4b",
}

fn touch_guest(step: u64) -> Guest {
    let g = Guest::long(b_touch());
    let mut r = g.cpu.regs();
    r.rbp = step;
    g.cpu.set_regs(&r);
    g.expect_done();
    g
}

fn advise(ram: Ram, advice: i32) {
    // SAFETY: memory of this program's own.
    let r = unsafe { libc::madvise(ram.hva as *mut _, ram.len, advice) };
    assert_eq!(r, 0, "madvise {advice}");
}

fn populate(ram: Ram) {
    for i in (0..ram.len).step_by(4096) {
        ram.write_u64(ram.gpa + i as u64, 1);
    }
}

fn one_touch(g: &Guest) -> f64 {
    g.expect_done();
    g.ram.read_u64(DATA) as f64 / PAGES as f64
}

fn recorded_touch(g: &Guest) -> f64 {
    let mut ticks = 0.0;
    counts::record(None, || {
        ticks = one_touch(g);
        PAGES as u64
    });
    ticks
}

fn nested_fault(demand_zero: bool) -> Vec<f64> {
    let g = touch_guest(4096);
    let ram = Ram::new(BASE, PAGES * 4096);
    advise(ram, libc::MADV_NOHUGEPAGE);
    populate(ram);
    (0..rounds() + 1)
        .map(|_| {
            if demand_zero {
                advise(ram, libc::MADV_DONTNEED);
            }
            // A new slot has no mappings.
            g.vm.map(1, 0, ram).expect("slot");
            let t = recorded_touch(&g);
            g.vm.set_slot(1, 0, 0, 0, 0).expect("slot");
            t
        })
        .skip(1)
        .collect()
}

/// 16 huge pages, 64 touches in each: ticks per huge page.
fn nested_fault_huge() -> Vec<f64> {
    let g = touch_guest((2 << 20) / 64);
    let ram = Ram::new(BASE, 16 * (2 << 20));
    advise(ram, libc::MADV_HUGEPAGE);
    populate(ram);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let huge: u64 = smaps
        .lines()
        .filter_map(|l| l.strip_prefix("AnonHugePages:")?.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    if huge < 32 << 10 {
        skip!("only {huge} KiB of huge pages");
    }
    (0..rounds() + 1)
        .map(|_| {
            g.vm.map(1, 0, ram).expect("slot");
            let t = one_touch(&g) * 64.0;
            g.vm.set_slot(1, 0, 0, 0, 0).expect("slot");
            t
        })
        .skip(1)
        .collect()
}

/// A guest and a slot whose 1,024 pages are mapped, small.
fn mapped(flags: u32) -> (Guest, Ram) {
    let g = touch_guest(4096);
    let ram = Ram::new(BASE, PAGES * 4096);
    advise(ram, libc::MADV_NOHUGEPAGE);
    populate(ram);
    g.vm.map(1, flags, ram).expect("slot");
    one_touch(&g);
    (g, ram)
}

fn get_dirty_log(g: &Guest) -> u64 {
    let mut bitmap = [0u64; PAGES / 64];
    let d = kvm_dirty_log {
        slot: 1,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr() as *mut _ },
        ..Default::default()
    };
    let start = tsc();
    g.vm.set(KVM_GET_DIRTY_LOG, &d).expect("KVM_GET_DIRTY_LOG");
    let took = tsc() - start;
    assert!(bitmap.iter().all(|w| *w == u64::MAX), "the log misses pages");
    took
}

fn logged_write() -> Vec<f64> {
    let (g, _) = mapped(KVM_MEM_LOG_DIRTY_PAGES);
    (0..rounds())
        .map(|_| {
            get_dirty_log(&g);
            recorded_touch(&g)
        })
        .collect()
}

fn dirty_log_per_page() -> Vec<f64> {
    let (g, _) = mapped(KVM_MEM_LOG_DIRTY_PAGES);
    (0..rounds())
        .map(|_| {
            let t = get_dirty_log(&g) as f64 / PAGES as f64;
            one_touch(&g);
            t
        })
        .collect()
}

fn dirty_log_enable() -> Vec<f64> {
    let (g, ram) = mapped(0);
    (0..rounds())
        .map(|_| {
            one_touch(&g);
            let start = tsc();
            g.vm.map(1, KVM_MEM_LOG_DIRTY_PAGES, ram).expect("slot");
            let t = (tsc() - start) as f64 / PAGES as f64;
            g.vm.map(1, 0, ram).expect("slot");
            t
        })
        .collect()
}

payload! { b_nothing, 64, "2: out 0xed, al", "jmp 2b" }

fn empty_run() -> Vec<f64> {
    let g = Guest::long(b_nothing());
    g.expect_done();
    g.cpu.set_immediate_exit(true);
    let fd = g.cpu.fd;
    host_rounds(200, || assert!(sys::ioctl(fd, KVM_RUN, 0).is_err()))
}

fn cheapest() -> Vec<f64> {
    let d = Device::open();
    host_rounds(200, || assert!(sys::ioctl(d.fd, KVM_GET_API_VERSION, 0).is_ok()))
}

fn vcpu_ioctl<T>(nr: u32) -> Vec<f64> {
    let g = Guest::long(b_nothing());
    g.expect_done();
    // SAFETY: plain data of the KVM API.
    let mut t: T = unsafe { std::mem::zeroed() };
    host_rounds(200, || assert!(sys::ioctl_out(g.cpu.fd, nr, &mut t).is_ok()))
}

fn set_regs() -> Vec<f64> {
    let g = Guest::long(b_nothing());
    g.expect_done();
    let r = g.cpu.regs();
    host_rounds(200, || assert!(g.cpu.set(KVM_SET_REGS, &r).is_ok()))
}

fn signal_msi() -> Vec<f64> {
    let g = bench_guest(b_nothing(), Irqchip::Yes);
    let m = kvm_msi { address_lo: 0xfee0_0000, data: 0x70, ..Default::default() };
    g.expect_done();
    host_rounds(200, || assert!(g.vm.set(KVM_SIGNAL_MSI, &m).is_ok()))
}

fn irqfd_write() -> Vec<f64> {
    let g = bench_guest(b_nothing(), Irqchip::Yes);
    let fd = eventfd();
    g.vm.irqfd(fd, 5, 0, 0).unwrap_or_else(|e| panic!("KVM_IRQFD: {e:?}"));
    g.expect_done();
    host_rounds(200, || eventfd_write(fd, 1))
}

fn irqfd_message() -> Vec<f64> {
    let g = bench_guest(b_nothing(), Irqchip::Yes);
    let fd = eventfd();
    Routing::new().msi(5, 0xfee0_0000, 0x70).set(&g.vm).expect("KVM_SET_GSI_ROUTING");
    g.vm.irqfd(fd, 5, 0, 0).unwrap_or_else(|e| panic!("KVM_IRQFD: {e:?}"));
    g.expect_done();
    host_rounds(200, || eventfd_write(fd, 1))
}

fn create_destroy(create: bool) -> Vec<f64> {
    let d = Device::open();
    (0..rounds())
        .map(|_| {
            let start = tsc();
            let vm = d.create_vm();
            let cpu = vm.create_vcpu(0);
            let made = tsc();
            drop(cpu);
            drop(vm);
            if create {
                (made - start) as f64
            } else {
                (tsc() - made) as f64
            }
        })
        .collect()
}

/// Memory of the system that is neither free nor this or another program's, in bytes.
fn kernel_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap_or("0");
        line.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0)
    };
    (of("MemTotal") - of("MemFree") - of("AnonPages") - of("Cached") - of("Buffers")) * 1024.0
}

/// What a VM with one vCPU, which ran a few pages of code, takes of the kernel's memory. Nothing is given back meanwhile: freed pages wait in
/// lists that do not count as free.
fn vm_bytes() -> Vec<f64> {
    let mut guests = Vec::new();
    let mut more = |count: usize| {
        let before = kernel_bytes();
        for _ in 0..count {
            let g = Guest::long_irqchip(b_nothing());
            g.expect_done();
            guests.push(g);
        }
        (kernel_bytes() - before) / count as f64
    };
    more(16);
    vec![more(128)]
}
