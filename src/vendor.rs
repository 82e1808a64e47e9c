// SPDX-License-Identifier: GPL-2.0
//! What a processor vendor's room offers the rest of the module, in neutral words. The choice is made once, at load.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use crate::{
    arch::{
        segment::{DescriptorTable, Segment, SegmentAttributes},
        Gfn, Gpa, Hpa, Level,
    },
    glue::{cpu::IrqsOff, fpu::Window, virt::Hardware},
    guest::{Event, Exit, Regs, SystemRegs, Unintercepted},
    irqchip::{lapic::Lapic, Bits256},
    mmu,
    policy::tsc::{Format, GuestTsc},
};

pub(crate) use crate::policy::msr::HardwareMsr;

/// A vendor's virtualization extension.
pub(crate) trait Vendor: Hardware + Sized {
    type Vcpu: VendorVcpu;
    /// How its nested tables look.
    type NestedFormat: mmu::Format + Send + Sync + 'static;

    /// Its hypercall instruction: VMCALL, or VMMCALL.
    const HYPERCALL: [u8; 3];

    /// A virtual CPU in its reset state. Its guest does what is in `free` without an exit.
    fn new_vcpu(self: &Arc<Self>, free: Unintercepted) -> Result<Self::Vcpu>;

    /// Whether a guest can execute XSAVES and XRSTORS where the CPU has them.
    fn guest_xsaves(&self) -> bool;

    /// Levels of the nested table.
    fn nested_levels(&self) -> u8;

    /// The largest page that a nested table maps.
    fn nested_largest(&self) -> Level;

    /// Whether the CPU marks the entries of nested tables that it uses as accessed.
    fn nested_accessed(&self) -> bool;

    /// Whether large pages must not be executable: machine checks threaten where a guest executes from a page while its size changes.
    fn no_large_execute(&self) -> bool;

    /// How this CPU takes the ratio of a guest's TSC to the host's, if it scales.
    fn tsc_format(&self) -> Option<Format> {
        None
    }

    /// Pages that hardware can note for a vCPU before an exit, when the guest sets the dirty bits that map them; 0 if it notes none.
    fn write_log_entries(&self) -> u32 {
        0
    }

    /// Whether its CPUs take a guest's interrupts by themselves while they run it.
    fn takes_posted(&self) -> bool {
        false
    }

    /// Whether the host's counters can be turned on for guests alone: [`VendorVcpu::enable_counters`].
    fn counts_guests(&self) -> bool {
        false
    }

    /// Whether its CPUs know a page of host memory as the local APIC's window.
    fn has_apic_page(&self) -> bool {
        false
    }

    /// Whether its CPUs need a page table, [`identity`](mmu::identity), in guest memory to run a guest without paging.
    fn wants_identity_map(&self) -> bool {
        false
    }
}

/// One virtual CPU's hardware state. General-purpose registers, RIP and RFLAGS are in [`Regs`], which `run` moves.
pub(crate) trait VendorVcpu: Send + 'static {
    /// Whether [`Exit::NmiWindow`] comes when the guest can take an NMI, in whatever shadow it was before. Otherwise there is only
    /// [`Exit::NmiReturn`].
    const NMI_WINDOW: bool;
    /// Whether there are CPUs that deliver and end a guest's interrupts themselves. See [`apic`](crate::apic).
    const DELIVERS: bool = false;

    /// Back to the state after RESET or INIT (`init`), segments and control registers and MSRs that INIT changes.
    fn reset(&mut self, init: bool);

    /// Everything but `cr8`, which the caller owns.
    fn system_regs(&self) -> SystemRegs;
    /// Sets everything but `cr8`. Values were checked by the caller.
    fn set_system_regs(&mut self, regs: &SystemRegs);
    fn segment(&self, number: usize) -> Segment;
    /// The attributes of a segment: cheaper than all of it.
    #[inline]
    fn attributes(&self, number: usize) -> SegmentAttributes {
        self.segment(number).attributes
    }
    fn set_segment(&mut self, number: usize, value: &Segment);
    fn tr(&self) -> Segment;
    fn gdtr(&self) -> DescriptorTable;
    fn set_gdtr(&mut self, value: DescriptorTable);
    fn idtr(&self) -> DescriptorTable;
    fn set_idtr(&mut self, value: DescriptorTable);
    fn cr0(&self) -> u64;
    /// The bits `wanted` of CR0: cheaper than all of it.
    #[inline]
    fn cr0_bits(&self, wanted: u64) -> u64 {
        self.cr0() & wanted
    }
    fn set_cr0(&mut self, value: u64);
    fn cr2(&self) -> u64;
    fn set_cr2(&mut self, value: u64);
    fn cr3(&self) -> u64;
    fn set_cr3(&mut self, value: u64);
    fn cr4(&self) -> u64;
    fn set_cr4(&mut self, value: u64);
    /// The bits `wanted` of CR4: cheaper than all of it.
    #[inline]
    fn cr4_bits(&self, wanted: u64) -> u64 {
        self.cr4() & wanted
    }
    /// Which bits of CR4 the guest may set: it may change some of them without an exit.
    fn set_cr4_allowed(&mut self, _allowed: u64) {}
    fn efer(&self) -> u64;
    fn cpl(&self) -> u8;
    fn dr6(&self) -> u64;
    fn set_dr6(&mut self, value: u64);
    fn dr7(&self) -> u64;
    fn set_dr7(&mut self, value: u64);
    fn msr(&self, msr: HardwareMsr) -> u64;
    /// The value was checked by the caller.
    fn set_msr(&mut self, msr: HardwareMsr, value: u64);

    fn set_nested_root(&mut self, root: Hpa);
    /// Forgets every translation of this guest before the next entry.
    fn flush_tlb(&mut self);
    /// How the guest's TSC follows the host's. It has a ratio only where [`Vendor::tsc_format`] says how to write one.
    fn set_tsc(&mut self, tsc: GuestTsc);
    /// Delivers `event` at the next entry.
    fn inject(&mut self, event: Event, irqs: &IrqsOff);
    /// What the last exit interrupted the delivery of.
    fn take_unfinished_event(&mut self) -> Option<Event>;
    /// Whether the guest is in an interrupt shadow.
    fn interrupt_shadow(&self) -> bool;
    fn set_interrupt_shadow(&mut self, shadow: bool);
    /// Asks for [`Exit::InterruptWindow`] as soon as the guest can take an interrupt.
    fn want_interrupt_window(&mut self, wanted: bool);

    /// Whether that is asked for.
    fn has_interrupt_window(&self) -> bool;
    /// Asks for [`Exit::NmiWindow`] or [`Exit::NmiReturn`] when the guest leaves its NMI handler.
    fn want_nmi_window(&mut self, wanted: bool);
    /// Puts the guest into an NMI handler, or takes it out, without the events that lead there.
    fn set_nmi_masked(&mut self, masked: bool);
    /// Asks for [`Exit::ControlRegister`] when the guest writes CR8, or for [`Exit::PriorityLowered`] when it has become less than this.
    fn want_cr8_writes(&mut self, below: Option<u8>);
    /// Asks for [`Exit::Exception`] when the guest runs into INT3, before it does anything.
    fn want_breakpoints(&mut self, wanted: bool);
    /// Whether RFLAGS.TF is set by userspace, which wants each instruction's trap even after STI.
    fn set_user_steps(&mut self, steps: bool);
    /// Asks for an exit at every RDMSR and WRMSR, also where the guest may use the register freely.
    fn want_all_msrs(&mut self, wanted: bool);
    /// Whether the CPU watches deadlines while the guest runs.
    #[inline]
    fn watches_deadlines(&self) -> bool {
        false
    }
    /// Asks for [`Exit::Deadline`] as soon as the guest runs and the host's TSC has reached `tsc`, or not any more. It may come without
    /// reason.
    fn set_deadline(&mut self, _tsc: Option<u64>) {}
    /// Begins or ends noting pages that the guest writes, if hardware can: see [`Vendor::write_log_entries`].
    fn log_writes(&mut self, _on: bool) {}
    /// What was noted since the last call, in the order of the writes; all of it counts as taken. After every `run`, before anybody sees
    /// the vCPU outside of guest mode.
    #[inline]
    fn take_written(&mut self, _irqs: &IrqsOff) -> Option<impl Iterator<Item = Gfn>> {
        None::<core::iter::Empty<Gfn>>
    }
    /// CR8, as the guest may have changed it.
    fn tpr(&self) -> u8;
    fn set_tpr(&mut self, cr8: u8);

    /// Where the page is that a CPU with [`Vendor::has_apic_page`] takes for the local APIC's window.
    fn set_apic_page(&mut self, _page: Hpa) {}
    /// Where the page table is in guest memory that [`Vendor::wants_identity_map`] is about. Software runs a guest without paging that has none.
    fn set_identity_map(&mut self, _at: Gpa) {}
    /// Where a [`PostedInterrupts`](crate::irqchip::lapic::PostedInterrupts) is for a CPU with [`Vendor::takes_posted`].
    fn set_posted(&mut self, _descriptor: Hpa) {}
    /// Whether the CPU delivers the interrupts of this APIC from now on. `None`: software does, in any case. Software has the interrupts now.
    fn choose_delivery(&mut self, _apic: Option<&Lapic>) -> bool {
        false
    }
    /// Whether the guest's accesses to the page are those to its local APIC.
    fn uses_apic_page(&self) -> bool {
        false
    }
    /// The vectors whose end somebody wants to know: [`Exit::EndOfInterrupt`].
    fn set_eoi_listeners(&mut self, _vectors: &Bits256) {}
    /// Hands over to the CPU what `lapic` has. `all`: the CPU had nothing so far.
    fn hand_over(&mut self, _lapic: &mut Lapic, _all: bool, _irqs: &IrqsOff) {}
    /// Takes back to `lapic` what the CPU has.
    fn take_back(&mut self, _lapic: &mut Lapic) {}

    /// Which of the host's performance counters count in this guest, where [`Vendor::counts_guests`]: bits of IA32_PERF_GLOBAL_CTRL. After
    /// `load`, until the next.
    fn enable_counters(&mut self, _enabled: u64, _irqs: &IrqsOff) {}

    /// Whether the CPU cannot run the guest in the state that it is in, so that software has to.
    #[inline]
    fn needs_software(&self, _regs: &Regs) -> bool {
        false
    }
    /// Software runs the guest: what the last exit told counts no more.
    fn forget_exit(&mut self) {}

    /// Whether the page-directory-pointer entries at CR3 must be brought before the next `run`: the guest got PAE paging by other means than
    /// an instruction of its own, and the CPU keeps the four entries in registers.
    fn wants_pdptes(&self) -> bool;
    fn set_pdptes(&mut self, entries: [u64; 4]);
    /// Those in the CPU's registers, if it keeps them there. Not while `wants_pdptes`.
    fn pdptes(&self) -> Option<[u64; 4]>;

    /// RIP behind the instruction that exited, where the CPU tells it.
    fn next_rip(&self) -> Option<u64>;
    /// Bytes of the instruction that faulted, where the CPU keeps them.
    fn instruction_bytes(&self) -> Option<&[u8]>;

    /// In each window, before the first `run`.
    fn load(&mut self, irqs: &IrqsOff);
    /// Nobody is going to look at the guest's registers after this exit: they need not be at hand behind `unload`.
    #[inline]
    fn leave_registers(&mut self) {}
    /// At the end of each window. Only now is RSP sure to be in `regs`.
    fn unload(&mut self, regs: &mut Regs, irqs: &IrqsOff);
    /// After each window: lets the host have the interrupt that the last exit took from it, if this CPU acknowledges them at exits.
    fn deliver_host_interrupt(&mut self, _irqs: &IrqsOff) {}
    /// Runs the guest until its next exit. RSP need not be in `regs` after exits whose quick handlers have no use for it.
    fn run(&mut self, regs: &mut Regs, window: &Window<'_>, irqs: &IrqsOff) -> Exit;
}
