// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One virtual CPU: its state at reset, its thread, and the loop around KVM_RUN.
//!
//! A vCPU in KVM_RUN is stopped with a signal whose handler sets `immediate_exit`: if the signal comes before the
//! ioctl, the ioctl returns at once, and if it comes during it, the ioctl is interrupted. So no kick is lost.

use std::cell::Cell;
use std::fmt::Write;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{bail, ensure, Context, Result};
use kvm_bindings::*;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{register_signal_handler, SIGRTMIN};

use crate::devices::Devices;
use crate::exit::{Outcome, Stop};

const MSR_TSC: u32 = 0x10;
const MSR_SYSENTER_CS: u32 = 0x174;
const MSR_SYSENTER_ESP: u32 = 0x175;
const MSR_SYSENTER_EIP: u32 = 0x176;
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
const MSR_STAR: u32 = 0xC000_0081;
const MSR_LSTAR: u32 = 0xC000_0082;
const MSR_CSTAR: u32 = 0xC000_0083;
const MSR_SYSCALL_MASK: u32 = 0xC000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xC000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, everything write-back: the memory of a VM is ordinary memory.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// MSRs that a kernel may rely on before it has written them.
const BOOT_MSRS: [(u32, u64); 11] = [
    (MSR_SYSENTER_CS, 0),
    (MSR_SYSENTER_ESP, 0),
    (MSR_SYSENTER_EIP, 0),
    (MSR_STAR, 0),
    (MSR_LSTAR, 0),
    (MSR_CSTAR, 0),
    (MSR_SYSCALL_MASK, 0),
    (MSR_KERNEL_GS_BASE, 0),
    (MSR_TSC, 0),
    (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
];

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Sets CPUID, MSRs, FPU and the local APIC's pins of the vCPU `id`.
pub fn set_up(vcpu: &VcpuFd, id: u32, cpuid: &[kvm_cpuid_entry2]) -> Result<()> {
    let cpuid = CpuId::from_entries(cpuid).map_err(|_| anyhow::anyhow!("too many CPUID entries"))?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2 failed")?;

    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| anyhow::anyhow!("too many MSRs"))?;
    let done = vcpu.set_msrs(&msrs).context("KVM_SET_MSRS failed")?;
    if let Some((index, value)) = BOOT_MSRS.get(done) {
        bail!("KVM_SET_MSRS: the hypervisor refused {value:#x} for MSR {index:#x}");
    }

    // What FNINIT and reset leave.
    let fpu = kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..Default::default() };
    vcpu.set_fpu(&fpu).context("KVM_SET_FPU failed")?;

    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC failed")?;
    if id == 0 {
        set_delivery(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
    }
    set_delivery(&mut lapic, LAPIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC failed")
}

/// Unmasks a local vector table entry and gives it a delivery mode.
fn set_delivery(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    const MASKED: u32 = 1 << 16;
    let mut bytes = [0; 4];
    for (byte, register) in bytes.iter_mut().zip(&lapic.regs[offset..]) {
        *byte = *register as u8;
    }
    let value = u32::from_le_bytes(bytes) & !(DELIVERY_MODE_MASK | MASKED) | mode;
    for (byte, register) in value.to_le_bytes().iter().zip(&mut lapic.regs[offset..]) {
        *register = *byte as _;
    }
}

thread_local! {
    /// The run mapping of the vCPU that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn handle_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: The pointer is set only while this thread owns the vCPU whose mapping it is.
        unsafe { std::ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler of the kick signal. Call once before the first [`Thread::start`].
pub fn install_kick_handler() -> Result<()> {
    register_signal_handler(SIGRTMIN(), handle_kick).context("cannot handle the kick signal")
}

/// What all vCPUs share.
#[derive(Clone)]
pub struct Machine {
    pub devices: Arc<Devices>,
    /// Only for the report of a crash.
    pub memory: GuestMemoryMmap,
}

/// A running vCPU.
pub struct Thread {
    handle: JoinHandle<()>,
}

impl Thread {
    /// Runs `vcpu` until a reason for the end of the run is in `stop`.
    pub fn start(mut vcpu: VcpuFd, id: u32, machine: Machine, stop: Arc<Stop>) -> Result<Self> {
        let run = move || {
            RUN.set(vcpu.get_kvm_run());
            let guard = PanicGuard(&stop);
            while !stop.is_requested() {
                if let Some(outcome) = step(&mut vcpu, id, &machine) {
                    stop.request(outcome);
                }
            }
            drop(guard);
            // The mapping goes away with `vcpu`.
            RUN.set(std::ptr::null_mut());
        };
        let handle = thread::Builder::new().name(format!("vcpu{id}")).spawn(run).context("cannot start a thread")?;
        Ok(Thread { handle })
    }

    /// Makes the thread look at `stop` again.
    pub fn kick(&self) {
        // SAFETY: The thread has not been joined, so its id is valid; the signal has a handler.
        unsafe { libc::pthread_kill(self.handle.as_pthread_t(), SIGRTMIN()) };
    }

    /// True when the thread has left its loop.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}

/// Ends the run when a vCPU thread panics, instead of leaving the main loop waiting forever.
struct PanicGuard<'a>(&'a Stop);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        RUN.set(std::ptr::null_mut());
        if thread::panicking() {
            self.0.request(Outcome::Failed("a vCPU thread panicked".into()));
        }
    }
}

/// Enters the guest once and serves the exit. `Some` ends the run.
fn step(vcpu: &mut VcpuFd, id: u32, machine: &Machine) -> Option<Outcome> {
    let reason = match vcpu.run() {
        // kvm-ioctls gives all bytes of a string instruction in one slice, without the size of each.
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
            serve_port(vcpu.get_kvm_run(), &machine.devices);
            return None;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            machine.devices.mmio_read(address, data);
            return None;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            machine.devices.mmio_write(address, data);
            return None;
        }
        Ok(VcpuExit::Intr) => return None,
        Ok(VcpuExit::Shutdown) => {
            let reason = format!("triple fault on vCPU {id}");
            return Some(Outcome::Crash { reason, dump: dump(vcpu, id, &machine.memory) });
        }
        Ok(VcpuExit::SystemEvent(event, data)) => {
            return Some(match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::PowerOff,
                KVM_SYSTEM_EVENT_RESET => Outcome::Reboot,
                KVM_SYSTEM_EVENT_CRASH => {
                    Outcome::Crash { reason: "its kernel reported a crash".into(), dump: String::new() }
                }
                _ => Outcome::Internal { reason: format!("system event {event}: {data:x?}"), dump: String::new() },
            })
        }
        Ok(VcpuExit::FailEntry(hardware, cpu)) => {
            format!("KVM_EXIT_FAIL_ENTRY, hardware reason {hardware:#x}, host CPU {cpu}")
        }
        Ok(VcpuExit::InternalError) => internal_error(vcpu.get_kvm_run()),
        // The irqchip is in the kernel, so nothing here could wake this vCPU.
        Ok(VcpuExit::Hlt) => "KVM_EXIT_HLT in spite of the in-kernel irqchip".into(),
        Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
            format!("KVM_EXIT_MEMORY_FAULT at {gpa:#x}, {size} bytes, flags {flags:#x}")
        }
        Ok(exit) => format!("an exit that the launcher does not serve: {exit:?}"),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => {
                vcpu.set_kvm_immediate_exit(0);
                return None;
            }
            _ => format!("KVM_RUN failed: {error}"),
        },
    };
    Some(Outcome::Internal { reason: format!("{reason} (vCPU {id})"), dump: dump(vcpu, id, &machine.memory) })
}

/// Serves KVM_EXIT_IO: `count` accesses of `size` bytes to the same port.
fn serve_port(run: &mut kvm_run, devices: &Devices) {
    // SAFETY: The exit reason is KVM_EXIT_IO, so the kernel has filled this member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, len) = (usize::from(io.size), usize::from(io.size) * io.count as usize);
    if size == 0 {
        return;
    }
    // SAFETY: The kernel put the data `data_offset` bytes into the run mapping, which is larger than `kvm_run`, and
    // does not touch it until the next KVM_RUN.
    let data = unsafe {
        let start = (run as *mut kvm_run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, len)
    };
    for access in data.chunks_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            devices.pio_read(io.port, access);
        } else {
            devices.pio_write(io.port, access);
        }
    }
    // A closed standard output must not end the guest.
    let _ = devices.flush();
}

/// What the kernel says about KVM_EXIT_INTERNAL_ERROR.
fn internal_error(run: &kvm_run) -> String {
    // SAFETY: The exit reason is KVM_EXIT_INTERNAL_ERROR, so the kernel has filled this member.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction could not be emulated",
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an unexpected exit reason",
        _ => "unknown kind",
    };
    let data = &error.data[..error.data.len().min(error.ndata as usize)];
    format!("KVM_EXIT_INTERNAL_ERROR {}: {what}, data {data:x?}", error.suberror)
}

/// The vCPU's registers, and the code that it was about to run, as one block of lines.
fn dump(vcpu: &VcpuFd, id: u32, memory: &GuestMemoryMmap) -> String {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return format!("vCPU {id}: its registers cannot be read\n");
    };
    let mut text = dump_registers(id, &regs, &sregs);
    let linear = sregs.cs.base.wrapping_add(regs.rip);
    let physical = match vcpu.translate_gva(linear) {
        Ok(translation) if translation.valid != 0 => Some(translation.physical_address),
        _ => None,
    };
    let code = physical.and_then(|address| memory.read_obj::<[u8; 16]>(GuestAddress(address)).ok());
    let code = code.map_or("unreadable".into(), |bytes| bytes.map(|byte| format!("{byte:02x}")).join(" "));
    let _ = writeln!(text, "  code {code}");
    text
}

fn dump_registers(id: u32, r: &kvm_regs, s: &kvm_sregs) -> String {
    let mut text = String::new();
    let rows = [
        [("rip", r.rip), ("rsp", r.rsp), ("rfl", r.rflags), ("rax", r.rax)],
        [("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx), ("rsi", r.rsi)],
        [("rdi", r.rdi), ("rbp", r.rbp), ("r8 ", r.r8), ("r9 ", r.r9)],
        [("r10", r.r10), ("r11", r.r11), ("r12", r.r12), ("r13", r.r13)],
        [("r14", r.r14), ("r15", r.r15), ("cr0", s.cr0), ("cr2", s.cr2)],
        [("cr3", s.cr3), ("cr4", s.cr4), ("cr8", s.cr8), ("efr", s.efer)],
    ];
    let segments = [
        ("cs", s.cs),
        ("ss", s.ss),
        ("ds", s.ds),
        ("es", s.es),
        ("fs", s.fs),
        ("gs", s.gs),
        ("tr", s.tr),
        ("ld", s.ldt),
    ];
    // Writing to a String cannot fail.
    let _ = writeln!(text, "vCPU {id}:");
    for row in rows {
        let row = row.map(|(name, value)| format!("{name} {value:016x}"));
        let _ = writeln!(text, "  {}", row.join("  "));
    }
    for (name, g) in segments {
        let _ = writeln!(
            text,
            "  {name}  {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} l {} db {} g {}{}",
            g.selector,
            g.base,
            g.limit,
            g.type_,
            g.s,
            g.dpl,
            g.present,
            g.l,
            g.db,
            g.g,
            if g.unusable != 0 { " unusable" } else { "" }
        );
    }
    for (name, table) in [("gdt", s.gdt), ("idt", s.idt)] {
        let _ = writeln!(text, "  {name} base {:016x} limit {:04x}", table.base, table.limit);
    }
    let _ = writeln!(text, "  apic base {:x}", s.apic_base);
    text
}

/// Waits until all `threads` have ended, kicking them again and again: one may be about to block in a write.
pub fn join(threads: Vec<Thread>) -> Result<()> {
    while threads.iter().any(|thread| !thread.is_finished()) {
        for thread in threads.iter().filter(|thread| !thread.is_finished()) {
            thread.kick();
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    for thread in threads {
        ensure!(thread.handle.join().is_ok(), "a vCPU thread panicked");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint_pins() {
        let mut lapic = kvm_lapic_state::default();
        let register = |lapic: &kvm_lapic_state, offset: usize| -> Vec<u8> {
            lapic.regs[offset..offset + 4].iter().map(|byte| *byte as u8).collect()
        };
        lapic.regs[LAPIC_LVT_LINT0 + 2] = 1; // masked, as after reset
        set_delivery(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
        set_delivery(&mut lapic, LAPIC_LVT_LINT1, DELIVERY_NMI);
        assert_eq!(register(&lapic, LAPIC_LVT_LINT0), [0, 7, 0, 0]);
        assert_eq!(register(&lapic, LAPIC_LVT_LINT1), [0, 4, 0, 0]);
    }

    #[test]
    fn dumps_are_readable() {
        let regs = kvm_regs { rip: 0xFFFF_FFFF_8100_0000, ..Default::default() };
        let text = dump_registers(1, &regs, &kvm_sregs::default());
        assert!(text.starts_with("vCPU 1:\n  rip ffffffff81000000"), "{text}");
        assert!(text.lines().all(|line| line.len() < 100), "{text}");
    }

    #[test]
    fn internal_errors_show_their_data() {
        let mut run = kvm_run::default();
        run.__bindgen_anon_1.internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
        run.__bindgen_anon_1.internal.ndata = u32::MAX;
        let text = internal_error(&run);
        assert!(text.contains("ERROR 1: an instruction could not be emulated"), "{text}");
    }
}
