// SPDX-License-Identifier: GPL-2.0
//! The VMX instructions, as safe operations over tokens. One of the few files that may be unsafe.
//!
//! VMX operation exists only inside a stretch of interrupts off, from [`Vmcs::load`] to [`Vmcs::unload`]: the host kernel does not know of
//! CR4.VMXE, and may write CR4 without it whenever it runs.
#![allow(unsafe_code)]

use core::{
    arch::asm,
    cell::Cell,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use kernel::{error::to_result, prelude::*};

use crate::{
    arch::{
        cr::cr4,
        vmcs::{
            caps::{InveptType, InvvpidType},
            error::InstructionError,
            HostNatural, ReadOnly32, Readable, Writable,
        },
        Gfn, Gpa, Hpa,
    },
    glue::{
        cpu::{self, IrqsOff},
        fpu::Window,
        phys::{Bytes, PhysBox},
    },
    guest::Regs,
    irqchip::lapic::regs,
    policy::vmx::exit::Fields,
};

extern "C" {
    // enter.S
    fn krab_vmx_enter(
        regs: *mut Regs,
        launched: bool,
        host_rsp: *mut u64,
        guest_spec_ctrl: u64,
        host_spec_ctrl: u64,
        virtual_apic: *const VirtualApic,
    ) -> u32;
    fn krab_vmx_exit();
    fn krab_vmxon(address: *const u64) -> u32;
    fn krab_vmxoff() -> u32;
    fn krab_vmclear(address: *const u64) -> u32;
    fn krab_vmptrld(address: *const u64) -> u32;
    fn krab_vmptrst(address: *mut u64) -> u32;
    fn krab_invept(kind: u64, descriptor: *const [u64; 2]) -> u32;
    fn krab_invvpid(kind: u64, descriptor: *const [u64; 2]) -> u32;
}

/// What the functions of enter.S return.
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// No VMCS is current.
const NO_VMCS: u64 = u64::MAX;

/// `EIO`: the instruction failed. `ENODEV`: it faulted, because VMX was turned off under us; the host is going down.
fn check(code: u32) -> Result {
    match code {
        DONE => Ok(()),
        FAILED => Err(EIO),
        _ => Err(ENODEV),
    }
}

#[inline]
fn read_cr3() -> u64 {
    let value;
    // SAFETY: reading CR3 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

#[inline]
fn read_cr4() -> u64 {
    let value;
    // SAFETY: reading CR4 has no effect.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Whether somebody has VMX on, on this CPU.
#[inline]
pub(super) fn is_on(_irqs: &IrqsOff) -> bool {
    read_cr4() & cr4::VMXE != 0
}

/// Turns CR4.VMXE on or off and leaves the rest as it is.
#[inline]
fn write_vmxe(value: u64, _irqs: &IrqsOff) {
    // SAFETY: `value` is what CR4 held with VMXE changed. The kernel's copy of CR4 is stale until it is changed back, which is before
    // interrupts are on again.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// What one CPU needs for VMX operation.
pub(super) struct Operation {
    region: PhysBox<Bytes<4096>>,
    /// Who has VMX operation on this CPU while a VMCS of ours is current.
    state: Cell<Held>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Nobody,
    /// We turned it on.
    Ours,
    /// Another hypervisor is in VMX operation, with this VMCS current.
    Shared(u64),
}

impl Operation {
    pub(super) fn new(revision: u32) -> Result<Self> {
        Ok(Self { region: new_region(revision)?, state: Cell::new(Held::Nobody) })
    }

    /// Begins VMX operation, or joins that of another hypervisor. `EBUSY` when CR4.VMXE is set by somebody who is not in VMX operation:
    /// nothing is known about what he is up to.
    #[inline]
    fn begin(&self, irqs: &IrqsOff) -> Result {
        let old = read_cr4();
        if old & cr4::VMXE != 0 {
            return self.join();
        }
        write_vmxe(old | cr4::VMXE, irqs);
        let address = self.region.address().0;
        // SAFETY: the region is a page that belongs to this CPU for this purpose, with its revision set.
        let begun = check(unsafe { krab_vmxon(&address) });
        match begun {
            Ok(()) => self.state.set(Held::Ours),
            Err(_) => write_vmxe(old, irqs),
        }
        begun
    }

    #[cold]
    fn join(&self) -> Result {
        let mut previous = NO_VMCS;
        // SAFETY: stores the address of the current VMCS and changes nothing.
        check(unsafe { krab_vmptrst(&mut previous) }).map_err(|_| EBUSY)?;
        self.state.set(Held::Shared(previous));
        Ok(())
    }

    /// Ends what `begin` began. No VMCS of ours is current.
    #[inline]
    fn end(&self, irqs: &IrqsOff) {
        match self.state.replace(Held::Nobody) {
            Held::Nobody => {}
            Held::Ours => {
                // SAFETY: leaves VMX operation that we entered. It may have been left already, by the kernel's emergency path.
                unsafe { krab_vmxoff() };
                write_vmxe(read_cr4() & !cr4::VMXE, irqs);
            }
            Held::Shared(NO_VMCS) => {}
            Held::Shared(previous) => {
                // SAFETY: what was current before, which its owner did not free: it had no chance to run here.
                unsafe { krab_vmptrld(&previous) };
            }
        }
    }
}

/// A page that begins with the revision identifier, as VMXON and VMPTRLD want it.
fn new_region(revision: u32) -> Result<PhysBox<Bytes<4096>>> {
    let mut region = PhysBox::<Bytes<4096>>::new()?;
    region.0[..4].copy_from_slice(&revision.to_le_bytes());
    Ok(region)
}

/// The page of virtual-APIC state: the registers, at their offsets in the xAPIC's window. Without virtual-interrupt delivery only the task
/// priority is used.
#[repr(C, align(4096))]
pub(super) struct VirtualApic([AtomicU32; 1024]);

// SAFETY: every field is made of integers.
unsafe impl Zeroable for VirtualApic {}

impl VirtualApic {
    /// The register at `offset`, which is a multiple of 4 below 1000h.
    #[inline]
    pub(super) fn load(&self, offset: u32) -> u32 {
        self.0[offset as usize >> 2 & 1023].load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn store(&self, offset: u32, value: u32) {
        self.0[offset as usize >> 2 & 1023].store(value, Ordering::Relaxed);
    }

    /// CR8.
    #[inline]
    pub(super) fn cr8(&self) -> u8 {
        (self.load(regs::TPR) >> 4 & 0xF) as u8
    }

    #[inline]
    pub(super) fn set_cr8(&self, cr8: u8) {
        self.store(regs::TPR, u32::from(cr8 & 0xF) << 4);
    }
}

/// Where the CPU notes the addresses of pages that the guest writes.
#[repr(C, align(4096))]
pub(super) struct WriteLog([AtomicU64; 512]);

// SAFETY: every field is made of integers.
unsafe impl Zeroable for WriteLog {}

impl WriteLog {
    /// The pages from the last entry back to entry number `last`: in the order of the writes.
    #[inline]
    pub(super) fn back_to(&self, last: u16) -> impl Iterator<Item = Gfn> + '_ {
        let entries = self.0.get(last.into()..).unwrap_or(&[]);
        entries.iter().rev().map(|entry| Gpa(entry.load(Ordering::Relaxed)).gfn())
    }
}

/// Why a guest was not entered.
pub(super) enum NotEntered {
    /// VM-instruction error.
    Refused(u32),
    /// VMX was turned off under us: the host is going down.
    VmxIsOff,
}

/// A virtual-machine control structure.
///
/// # Invariants
///
/// While `current` is set this VMCS is current on this CPU and interrupts are off. Otherwise it is clear: no CPU has any of it cached.
pub(super) struct Vmcs {
    region: PhysBox<Bytes<4096>>,
    current: Cell<bool>,
    /// No CPU ever saw it.
    fresh: Cell<bool>,
    launched: Cell<bool>,
    /// An instruction failed that never should.
    failed: Cell<u8>,
    /// What the host RSP field holds.
    host_rsp: Cell<u64>,
}

impl Vmcs {
    /// Nothing in it is set.
    pub(super) fn new(revision: u32) -> Result<Self> {
        Ok(Self {
            region: new_region(revision)?,
            current: Cell::new(false),
            fresh: Cell::new(true),
            launched: Cell::new(false),
            failed: Cell::new(0),
            host_rsp: Cell::new(0),
        })
    }

    /// Begins VMX operation on this CPU and makes this VMCS current, until [`unload`](Self::unload) on the same CPU, which must come before
    /// interrupts are on again. `operation` is this CPU's.
    #[inline]
    pub(super) fn load(&self, operation: &Operation, irqs: &IrqsOff) -> Result {
        operation.begin(irqs)?;
        let address = self.region.address().0;
        if self.fresh.replace(false) {
            // SAFETY: the page is ours; the CPU gives it its own format.
            unsafe { krab_vmclear(&address) };
        }
        // SAFETY: the page is a VMCS of ours, which no other CPU has current by the type's invariant.
        if let Err(error) = check(unsafe { krab_vmptrld(&address) }) {
            operation.end(irqs);
            return Err(error);
        }
        // INVARIANT: it is current now.
        self.current.set(true);
        Ok(())
    }

    /// Clears the VMCS, so that any CPU may load it next, and ends what `load` began. Nothing happens if it is not loaded. `EIO` when an
    /// access to a field failed since the last time.
    #[inline]
    pub(super) fn unload(&self, operation: &Operation, irqs: &IrqsOff) -> Result {
        if !self.current.replace(false) {
            return Ok(());
        }
        let address = self.region.address().0;
        // SAFETY: our VMCS; its data goes to memory and it is not current any more.
        unsafe { krab_vmclear(&address) };
        self.launched.set(false);
        operation.end(irqs);
        to_result(if self.failed.replace(0) != 0 { EIO.to_errno() } else { 0 })
    }

    /// Whether [`load`](Self::load) was called and [`unload`](Self::unload) was not.
    #[inline]
    pub(super) fn is_current(&self) -> bool {
        self.current.get()
    }

    /// The token for reading and writing fields, if this VMCS is loaded.
    #[inline]
    pub(super) fn current<'a>(&'a self, _irqs: &'a IrqsOff) -> Option<CurrentVmcs<'a>> {
        self.current.get().then_some(CurrentVmcs(self))
    }

    /// Reads a field. A VMCS that is not loaded has nothing to say: 0.
    #[inline]
    pub(super) fn peek<F: Readable>(&self, field: F) -> F::Value {
        F::value(if self.current.get() { read(field.encoding()) } else { 0 })
    }
}

#[inline]
fn read(encoding: u32) -> u64 {
    let mut value = 0_u64;
    // SAFETY: reads a field of the current VMCS and changes nothing else. A failure or fault leaves 0.
    unsafe {
        asm!(
            "2: vmread {field}, {value}",
            "3:",
            ".pushsection \"__ex_table\", \"a\"",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".long 1", // EX_TYPE_DEFAULT
            ".popsection",
            value = inout(reg) value,
            field = in(reg) u64::from(encoding),
            options(att_syntax, nostack)
        );
    }
    value
}

/// Proof that a VMCS is current on this CPU.
#[derive(Clone, Copy)]
pub(super) struct CurrentVmcs<'a>(&'a Vmcs);

impl Fields for CurrentVmcs<'_> {
    #[inline]
    fn read<F: Readable>(&self, field: F) -> F::Value {
        F::value(read(field.encoding()))
    }
}

impl CurrentVmcs<'_> {
    #[inline]
    pub(super) fn read<F: Readable>(self, field: F) -> F::Value {
        F::value(read(field.encoding()))
    }

    #[inline]
    pub(super) fn write<F: Writable>(self, field: F, value: F::Value) {
        let value: u64 = value.into();
        // SAFETY: writes a field of the current VMCS, which is ours. What a field makes the CPU do is checked by the next entry, and what is
        // not checked (controls, addresses, host state) is set by this room's own code from its own tables. A failure is noted.
        unsafe {
            asm!(
                "2: vmwrite {value}, {field}",
                "ja 4f",
                "3: movb $1, ({failed})",
                "4:",
                ".pushsection \"__ex_table\", \"a\"",
                ".balign 4",
                ".long 2b - .",
                ".long 3b - .",
                ".long 1",
                ".popsection",
                value = in(reg) value,
                field = in(reg) u64::from(field.encoding()),
                failed = in(reg) self.0.failed.as_ptr(),
                options(att_syntax, nostack)
            );
        }
    }

    /// Writes where exits go.
    pub(super) fn write_host_entry_point(self) {
        self.write(HostNatural::Rip, krab_vmx_exit as usize as u64);
        self.0.host_rsp.set(0);
    }

    /// CR3 and CR4 as exits must load them.
    #[inline]
    pub(super) fn host_control_registers(self) -> (u64, u64) {
        (read_cr3(), read_cr4())
    }

    /// Runs the guest until its next exit. `regs` gets every register but RSP, RIP and RFLAGS, which are in the VMCS. `cr2` is the guest's.
    #[inline]
    pub(super) fn enter(
        self,
        regs: &mut Regs,
        cr2: &mut u64,
        guest_spec_ctrl: u64,
        virtual_apic: &VirtualApic,
        _window: &Window<'_>,
        irqs: &IrqsOff,
    ) -> Result<(), NotEntered> {
        let vmcs = self.0;
        // SAFETY: CR2 is the kernel's only between a page fault and its handler's first instructions, and there is no fault here.
        unsafe { asm!("mov cr2, {}", in(reg) *cr2, options(nomem, nostack, preserves_flags)) };
        // SAFETY: interrupts are off and the guest's extended state is loaded, as the tokens say. The VMCS is ours and current; the memory that
        // it names outlives it, and every control that keeps the host whole is set. The assembly restores all host state but what
        // `glue::vmx::TaskState` and the window restore.
        let code = unsafe {
            krab_vmx_enter(
                regs,
                vmcs.launched.get(),
                vmcs.host_rsp.as_ptr(),
                guest_spec_ctrl,
                cpu::host_spec_ctrl(irqs),
                virtual_apic,
            )
        };
        // SAFETY: reading CR2 has no effect.
        unsafe { asm!("mov {}, cr2", out(reg) * cr2, options(nomem, nostack, preserves_flags)) };
        match code {
            DONE => {
                vmcs.launched.set(true);
                Ok(())
            }
            FAILED => Err(NotEntered::Refused(self.read(ReadOnly32::InstructionError))),
            _ => Err(NotEntered::VmxIsOff),
        }
    }

    /// Forgets translations through the nested tables at `ept_pointer`, or all.
    pub(super) fn invept(self, kind: InveptType, ept_pointer: u64) {
        // SAFETY: forgetting translations only costs time.
        self.note(unsafe { krab_invept(kind as u64, &[ept_pointer, 0]) });
    }

    /// Forgets translations of a VPID, or of all.
    pub(super) fn invvpid(self, kind: InvvpidType, vpid: u16) {
        // SAFETY: as above.
        self.note(unsafe { krab_invvpid(kind as u64, &[vpid.into(), 0]) });
    }

    fn note(self, code: u32) {
        if code != DONE {
            self.0.failed.set(1);
        }
    }
}

/// One line about a refused entry.
pub(super) fn describe(error: u32) -> &'static str {
    InstructionError::from_number(error).map_or("unknown VM-instruction error", InstructionError::text)
}

/// Where a VMCS or another structure is: for fields that hold addresses.
pub(super) fn address<T: Zeroable>(memory: &PhysBox<T>) -> u64 {
    let Hpa(address) = memory.address();
    address
}
