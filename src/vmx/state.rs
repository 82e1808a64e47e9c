// SPDX-License-Identifier: GPL-2.0
//! The software's copy of a guest's registers.
//!
//! What the guest changes only with an exit (most of the control registers but CR3, EFER, DR7, most MSRs) is always known here. The rest is in the
//! VMCS: while that is loaded, single fields are read when somebody asks; outside, everything is read at once, in a short stretch of its
//! own if need be, and kept until the guest runs again.
#![forbid(unsafe_code)]

use core::cell::Cell;

use kernel::{prelude::*, sync::Arc};

use super::{
    cpu::Vmx,
    insn::{CurrentVmcs, Vmcs},
};
use crate::{
    arch::{
        cr::{cr0, cr4, efer, rflags},
        segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName},
        vmcs::{
            control::{activity, entry},
            AccessRights, Control32, ControlNatural, Guest32, Guest64, GuestNatural, SegmentFields,
        },
        Gpa,
    },
    glue::{cpu::IrqsOff, vmx::SyscallMsrs},
    guest::SystemRegs,
    mmu::identity,
    policy::vmx::{
        event::{fix_interruptibility, pending_debug_for},
        guest_state::Context,
        pdpte, restricted,
    },
};

/// Numbers of segments: ES to GS as instructions encode them, then LDTR and TR.
pub(super) const LDTR: usize = 6;
pub(super) const TR: usize = 7;
pub(super) const SS: usize = SegmentName::Ss as usize;
pub(super) const FS: usize = SegmentName::Fs as usize;
pub(super) const GS: usize = SegmentName::Gs as usize;

/// Names of segments 0 to 5.
const NAMES: [SegmentName; 6] =
    [SegmentName::Es, SegmentName::Cs, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs];

/// The fields of segments 0 to 7.
const SEGMENTS: [SegmentFields; 8] = {
    let [es, cs, ss, ds, fs, gs] = SegmentFields::ALL;
    [es, cs, ss, ds, fs, gs, SegmentFields::LDTR, SegmentFields::TR]
};

const PDPTES: [Guest64; 4] = [Guest64::Pdpte0, Guest64::Pdpte1, Guest64::Pdpte2, Guest64::Pdpte3];

/// What the guest changes without an exit, because nothing depends on it outside the guest. CR4's only as far as its CPUID has them.
const CR0_OWNED: u64 = cr0::TS;
const CR4_OWNED: u64 =
    cr4::PVI | cr4::TSD | cr4::DE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE;

/// Groups of fields that are read and written together: bits of `valid` and `dirty`. Segment N is bit N.
pub(super) mod group {
    use super::SegmentName;

    pub(in super::super) const SEGMENTS: u32 = 0xFF;
    pub(in super::super) const GDTR: u32 = 1 << 8;
    pub(in super::super) const IDTR: u32 = 1 << 9;
    pub(in super::super) const CR3: u32 = 1 << 10;
    pub(in super::super) const INTERRUPTIBILITY: u32 = 1 << 11;
    /// The bits of CR0 and CR4 that the guest changes itself.
    pub(in super::super) const CR0_BITS: u32 = 1 << 12;
    pub(in super::super) const CR4_BITS: u32 = 1 << 13;
    /// The attributes of segment `number`, of which the rest may be unknown.
    pub(in super::super) const fn attributes(number: usize) -> u32 {
        1 << 24 << (number & 7)
    }
    /// What the guest changes without an exit.
    pub(in super::super) const VOLATILE: u32 = SEGMENTS | GDTR | IDTR | CR3 | INTERRUPTIBILITY | CR0_BITS | CR4_BITS;
    /// Of these, what nearly every instruction of 64-bit code needs that is emulated: what CS and SS say about the mode. No segment of its
    /// data, and not CR0 and CR4 as vector instructions want them, which few are that devices see.
    pub(in super::super) const LONG_CODE: u32 =
        attributes(SegmentName::Cs as usize) | attributes(SegmentName::Ss as usize) | CR3 | INTERRUPTIBILITY;
    pub(in super::super) const CR0: u32 = 1 << 16;
    pub(in super::super) const CR4: u32 = 1 << 17;
    pub(in super::super) const EFER: u32 = 1 << 18;
    pub(in super::super) const DR7: u32 = 1 << 19;
    pub(in super::super) const MSRS: u32 = 1 << 20;
    /// Pending debug exceptions and what else a reset sets.
    pub(in super::super) const RESET: u32 = 1 << 21;
    pub(in super::super) const PDPTES: u32 = 1 << 22;
    /// The guest does not sleep in HLT any more.
    pub(in super::super) const AWAKE: u32 = 1 << 23;
    /// With what is changed from outside, the guest is awake: the CPU insists on it where an event is blocked.
    pub(in super::super) const WAKES: u32 = SEGMENTS | INTERRUPTIBILITY | AWAKE;
    /// What decides on the paging mode.
    pub(in super::super) const PAGING: u32 = CR0 | CR3 | CR4 | EFER;
}

/// A vCPU's VMCS and the host that runs it.
pub(super) struct Machine {
    pub(super) host: Arc<Vmx>,
    pub(super) vmcs: Vmcs,
    /// The VMCS could not be loaded, in this stretch of interrupts off.
    lost: Cell<bool>,
}

impl Machine {
    pub(super) fn new(host: Arc<Vmx>) -> Result<Self> {
        let vmcs = Vmcs::new(host.config.revision)?;
        Ok(Self { host, vmcs, lost: Cell::new(false) })
    }

    /// Makes the VMCS current on this CPU until `unload`.
    #[inline]
    pub(super) fn load(&self, irqs: &IrqsOff) {
        let loaded = self.vmcs.load(self.host.operation(irqs), irqs);
        self.lost.set(loaded.is_err());
    }

    #[inline]
    pub(super) fn unload(&self, irqs: &IrqsOff) {
        if self.vmcs.unload(self.host.operation(irqs), irqs).is_err() {
            pr_warn!("an access to a VMCS failed\n");
        }
        self.lost.set(false);
    }
}

/// The guest's registers but for what `Regs` holds.
pub(super) struct GuestState {
    pub(super) cr2: u64,
    pub(super) efer: u64,
    pub(super) dr6: u64,
    pub(super) dr7: u64,
    pub(super) pat: u64,
    pub(super) sysenter: [u64; 3],
    pub(super) syscall: SyscallMsrs,
    pub(super) kernel_gs_base: u64,
    pub(super) spec_ctrl: u64,

    pdptes: [u64; 4],
    /// The entries at CR3 were not read since the paging mode or CR3 was set.
    pdptes_stale: bool,

    /// Always known, but for what the guest owns: that is meaningful where `valid` says so.
    cr0: Cell<u64>,
    cr4: Cell<u64>,
    /// Where the page table is that hardware gets for a guest without paging, on a CPU without unrestricted guests. CR3 is the guest's
    /// only with an exit then.
    identity_map: Option<Gpa>,
    /// HLT does not exit: the CPU keeps the guest's sleep in the VMCS, across exits for the host.
    sleeps: bool,
    /// Bits of CR4 that the guest changes itself.
    cr4_owned: u64,
    /// Copies: meaningful where `valid` says so.
    segments: [Cell<Segment>; 8],
    gdtr: Cell<DescriptorTable>,
    idtr: Cell<DescriptorTable>,
    cr3: Cell<u64>,
    interruptibility: Cell<u32>,
    valid: Cell<u32>,
    /// Groups that the next entry writes. Those of `VOLATILE` are valid too.
    dirty: u32,
}

impl GuestState {
    /// All zero, and all of it to be written.
    pub(super) fn new(sleeps: bool) -> Self {
        Self {
            identity_map: None,
            sleeps,
            cr2: 0,
            efer: 0,
            dr6: 0,
            dr7: 0,
            pat: 0,
            sysenter: [0; 3],
            syscall: SyscallMsrs::default(),
            kernel_gs_base: 0,
            spec_ctrl: 0,
            pdptes: [0; 4],
            pdptes_stale: false,
            cr0: Cell::new(0),
            cr4: Cell::new(0),
            cr4_owned: 0,
            segments: Default::default(),
            gdtr: Cell::default(),
            idtr: Cell::default(),
            cr3: Cell::new(0),
            interruptibility: Cell::new(0),
            valid: Cell::new(group::VOLATILE),
            dirty: u32::MAX,
        }
    }

    /// The guest ran: what it may have changed is only in the VMCS.
    #[inline]
    pub(super) fn ran(&mut self) {
        self.valid.set(if self.hides_paging() { group::CR3 } else { 0 });
    }

    pub(super) fn set_identity_map(&mut self, at: Gpa) {
        self.identity_map = Some(at);
        self.changed(group::CR3 | group::CR4 | group::EFER);
    }

    pub(super) fn has_identity_map(&self) -> bool {
        self.identity_map.is_some()
    }

    /// Whether hardware has paging that the guest does not have.
    #[inline]
    pub(super) fn hides_paging(&self) -> bool {
        self.identity_map.is_some() && self.cr0.get() & cr0::PG == 0
    }

    /// An event goes into the guest: if it sleeps in HLT, that is over.
    #[inline]
    pub(super) fn wake(&mut self) {
        if self.sleeps {
            self.changed(group::AWAKE);
        }
    }

    /// Whether the next entry has something to write.
    #[inline]
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty != 0
    }

    /// Whether the copy of a group is good. If it is not, the VMCS is loaded and its fields can be asked.
    #[inline]
    fn has(&self, machine: &Machine, group: u32) -> bool {
        if self.valid.get() & group != 0 {
            return true;
        }
        if machine.vmcs.is_current() {
            return false;
        }
        self.read_back(machine);
        true
    }

    /// Reads everything that is only in the VMCS, in process context.
    #[cold]
    fn read_back(&self, machine: &Machine) {
        if machine.lost.get() {
            return;
        }
        let irqs = IrqsOff::new();
        machine.load(&irqs);
        if machine.vmcs.is_current() {
            self.read_groups(machine, group::VOLATILE);
        }
        machine.unload(&irqs);
    }

    /// Reads those of `groups` that are not known.
    pub(super) fn read_groups(&self, machine: &Machine, groups: u32) {
        let missing = groups & !self.valid.get();
        for (number, segment) in self.segments.iter().enumerate() {
            if missing & 1 << number != 0 {
                segment.set(read_segment(&machine.vmcs, number));
            } else if missing & group::attributes(number) != 0 && self.valid.get() & 1 << number == 0 {
                segment.set(Segment { attributes: read_attributes(&machine.vmcs, number), ..segment.get() });
            }
        }
        if missing & group::GDTR != 0 {
            self.gdtr.set(read_gdtr(&machine.vmcs));
        }
        if missing & group::IDTR != 0 {
            self.idtr.set(read_idtr(&machine.vmcs));
        }
        if missing & group::CR3 != 0 {
            self.cr3.set(machine.vmcs.peek(GuestNatural::Cr3));
        }
        if missing & group::INTERRUPTIBILITY != 0 {
            self.interruptibility.set(machine.vmcs.peek(Guest32::Interruptibility));
        }
        if missing & group::CR0_BITS != 0 {
            self.read_cr0_bits(machine);
        }
        if missing & group::CR4_BITS != 0 {
            self.read_cr4_bits(machine);
        }
        self.valid.set(self.valid.get() | missing);
    }

    #[inline]
    pub(super) fn segment(&self, machine: &Machine, number: usize) -> Segment {
        let number = number & 7;
        if self.has(machine, 1 << number) {
            self.segments[number].get()
        } else {
            read_segment(&machine.vmcs, number)
        }
    }

    #[inline]
    pub(super) fn attributes(&self, machine: &Machine, number: usize) -> SegmentAttributes {
        let number = number & 7;
        let segment = &self.segments[number];
        if !self.has(machine, 1 << number | group::attributes(number)) {
            segment.set(Segment { attributes: read_attributes(&machine.vmcs, number), ..segment.get() });
            self.valid.set(self.valid.get() | group::attributes(number));
        }
        segment.get().attributes
    }

    pub(super) fn set_segment(&mut self, number: usize, value: Segment) {
        let number = number & 7;
        self.segments[number].set(value);
        self.changed(1 << number);
    }

    pub(super) fn interruptibility(&self, machine: &Machine) -> u32 {
        if self.has(machine, group::INTERRUPTIBILITY) {
            return self.interruptibility.get();
        }
        let value = machine.vmcs.peek(Guest32::Interruptibility);
        self.interruptibility.set(value);
        self.valid.set(self.valid.get() | group::INTERRUPTIBILITY);
        value
    }

    pub(super) fn set_interruptibility(&mut self, machine: &Machine, clear: u32, set: u32) {
        let old = self.interruptibility(machine);
        let new = old & !clear | set;
        if new != old {
            self.interruptibility.set(new);
            self.changed(group::INTERRUPTIBILITY);
        }
    }

    /// A group is set in its copy.
    pub(super) fn changed(&mut self, groups: u32) {
        self.valid.set(self.valid.get() | groups & group::VOLATILE);
        self.dirty |= groups;
        self.pdptes_stale |= groups & group::PAGING != 0;
    }

    #[inline]
    pub(super) fn gdtr(&self, machine: &Machine) -> DescriptorTable {
        if self.has(machine, group::GDTR) {
            self.gdtr.get()
        } else {
            read_gdtr(&machine.vmcs)
        }
    }

    pub(super) fn set_gdtr(&mut self, value: DescriptorTable) {
        self.gdtr.set(value);
        self.changed(group::GDTR);
    }

    #[inline]
    pub(super) fn idtr(&self, machine: &Machine) -> DescriptorTable {
        if self.has(machine, group::IDTR) {
            self.idtr.get()
        } else {
            read_idtr(&machine.vmcs)
        }
    }

    pub(super) fn set_idtr(&mut self, value: DescriptorTable) {
        self.idtr.set(value);
        self.changed(group::IDTR);
    }

    fn read_cr0_bits(&self, machine: &Machine) {
        self.cr0.set(self.cr0.get() & !CR0_OWNED | machine.vmcs.peek(GuestNatural::Cr0) & CR0_OWNED);
    }

    fn read_cr4_bits(&self, machine: &Machine) {
        self.cr4.set(self.cr4.get() & !self.cr4_owned | machine.vmcs.peek(GuestNatural::Cr4) & self.cr4_owned);
    }

    pub(super) fn cr0(&self, machine: &Machine) -> u64 {
        if !self.has(machine, group::CR0_BITS) {
            self.read_cr0_bits(machine);
            self.valid.set(self.valid.get() | group::CR0_BITS);
        }
        self.cr0.get()
    }

    /// CR0 but for what the guest owns, which may be old.
    #[inline]
    pub(super) fn cr0_mode(&self) -> u64 {
        self.cr0.get()
    }

    /// The bits `wanted` of CR0.
    #[inline]
    pub(super) fn cr0_bits(&self, machine: &Machine, wanted: u64) -> u64 {
        wanted & if wanted & CR0_OWNED == 0 { self.cr0.get() } else { self.cr0(machine) }
    }

    pub(super) fn set_cr0(&mut self, machine: &Machine, value: u64) {
        if self.identity_map.is_some() && (self.cr0.get() ^ value) & cr0::PG != 0 {
            // Hardware's paging becomes the guest's own, or is its own no more.
            let (cr3, cr4) = (self.cr3(machine), self.cr4(machine));
            self.set_cr3(cr3);
            self.set_cr4(cr4);
            self.changed(group::EFER);
        }
        self.cr0.set(value);
        self.changed(group::CR0 | group::CR0_BITS);
    }

    pub(super) fn cr4(&self, machine: &Machine) -> u64 {
        if !self.has(machine, group::CR4_BITS) {
            self.read_cr4_bits(machine);
            self.valid.set(self.valid.get() | group::CR4_BITS);
        }
        self.cr4.get()
    }

    /// The bits `wanted` of CR4.
    #[inline]
    pub(super) fn cr4_bits(&self, machine: &Machine, wanted: u64) -> u64 {
        wanted & if wanted & self.cr4_owned == 0 { self.cr4.get() } else { self.cr4(machine) }
    }

    pub(super) fn set_cr4(&mut self, value: u64) {
        self.cr4.set(value);
        self.changed(group::CR4 | group::CR4_BITS);
    }

    /// Which bits of CR4 the guest changes itself: of those that it may set.
    pub(super) fn own_cr4(&mut self, machine: &Machine, allowed: u64) {
        let now = self.cr4(machine);
        self.cr4_owned = CR4_OWNED & allowed;
        self.set_cr4(now);
    }

    /// The masks of CR0 and CR4: what is not the guest's.
    pub(super) fn masks(&self) -> (u64, u64) {
        (!CR0_OWNED, !self.cr4_owned)
    }

    #[inline]
    pub(super) fn cr3(&self, machine: &Machine) -> u64 {
        if self.has(machine, group::CR3) {
            self.cr3.get()
        } else {
            let value = machine.vmcs.peek(GuestNatural::Cr3);
            self.cr3.set(value);
            self.valid.set(self.valid.get() | group::CR3);
            value
        }
    }

    pub(super) fn set_cr3(&mut self, value: u64) {
        self.cr3.set(value);
        self.changed(group::CR3);
    }

    /// The privilege level is that of the stack segment's descriptor, even when it is null.
    #[inline]
    pub(super) fn cpl(&self, machine: &Machine) -> u8 {
        self.attributes(machine, SS).dpl()
    }

    #[inline]
    pub(super) fn wants_pdptes(&self) -> bool {
        self.pdptes_stale && pdpte::in_use(self.cr0.get(), self.cr4.get(), self.efer)
    }

    /// Entries with reserved bits, which MOV to a control register would refuse, are taken as not present.
    pub(super) fn set_pdptes(&mut self, entries: [u64; 4], physical_bits: u32) {
        self.pdptes = entries.map(|entry| if pdpte::valid(entry, physical_bits) { entry } else { 0 });
        self.pdptes_stale = false;
        self.changed(group::PDPTES);
    }

    /// The entries that the guest goes by, in process context: it brings new ones whenever it writes CR3.
    #[cold]
    pub(super) fn pdptes(&self, machine: &Machine) -> [u64; 4] {
        if self.dirty & group::PDPTES != 0 || machine.lost.get() {
            return self.pdptes;
        }
        let irqs = IrqsOff::new();
        machine.load(&irqs);
        let entries = PDPTES.map(|field| machine.vmcs.peek(field));
        machine.unload(&irqs);
        entries
    }

    /// Everything but CR8.
    pub(super) fn system_regs(&self, machine: &Machine) -> SystemRegs {
        let [es, cs, ss, ds, fs, gs, ldtr, tr] = core::array::from_fn(|number| self.segment(machine, number));
        SystemRegs {
            segments: [es, cs, ss, ds, fs, gs],
            ldtr,
            tr,
            gdtr: self.gdtr(machine),
            idtr: self.idtr(machine),
            cr0: self.cr0(machine),
            cr2: self.cr2,
            cr3: self.cr3(machine),
            cr4: self.cr4(machine),
            cr8: 0,
            efer: self.efer,
            cpl: ss.attributes.dpl(),
        }
    }

    pub(super) fn set_system_regs(&mut self, machine: &Machine, regs: &SystemRegs) {
        for (number, segment) in regs.segments.iter().enumerate() {
            self.set_segment(number, *segment);
        }
        self.set_segment(LDTR, regs.ldtr);
        self.set_segment(TR, regs.tr);
        self.set_gdtr(regs.gdtr);
        self.set_idtr(regs.idtr);
        self.set_cr3(regs.cr3);
        self.set_cr0(machine, regs.cr0);
        self.cr2 = regs.cr2;
        self.set_cr4(regs.cr4);
        self.efer = regs.efer;
        self.changed(group::EFER);
    }

    /// Whether a CPU without unrestricted guests can run this one with its segments.
    #[cold]
    pub(super) fn segments_fit(&self, machine: &Machine, rflags: u64) -> bool {
        let segments = core::array::from_fn(|number| self.segment(machine, number));
        let stack = segments[SS].attributes;
        let mode = Context::of(self.cr0.get(), self.efer, rflags, stack, machine.host.linear_bits).mode;
        restricted::segments_fit(mode, rflags, &segments)
    }

    /// RFLAGS differ in `bits` from what the guest left: what must fit them is written again.
    pub(super) fn flags_changed(&mut self, machine: &Machine, bits: u64) {
        let mut groups = 0;
        if bits & rflags::VM != 0 {
            groups |= group::SEGMENTS;
        }
        if bits & (rflags::IF | rflags::TF) != 0 {
            groups |= group::INTERRUPTIBILITY;
        }
        if groups != 0 {
            self.read_groups(machine, groups);
            self.changed(groups);
        }
    }

    /// Writes what the software changed.
    #[cold]
    #[inline(never)]
    pub(super) fn write_dirty(&mut self, machine: &Machine, vmcs: CurrentVmcs<'_>, rflags: u64) {
        let config = &machine.host.config;
        let stack = self.attributes(machine, SS);
        let context = Context::of(self.cr0.get(), self.efer, rflags, stack, machine.host.linear_bits);
        let hidden = self.identity_map.filter(|_| self.hides_paging());
        let dirty = core::mem::take(&mut self.dirty);
        for (number, (segment, fields)) in self.segments.iter().zip(&SEGMENTS).enumerate() {
            if dirty & 1 << number != 0 {
                let segment = &segment.get();
                let raw = match NAMES.get(number) {
                    Some(name) => context.segment(*name, segment),
                    None if number == LDTR => context.ldtr(segment),
                    None => context.tr(segment),
                };
                vmcs.write(fields.selector, raw.selector);
                vmcs.write(fields.base, raw.base);
                vmcs.write(fields.limit, raw.limit);
                vmcs.write(fields.access_rights, raw.access_rights.0);
            }
        }
        if dirty & group::GDTR != 0 {
            let table = context.table(self.gdtr.get());
            vmcs.write(GuestNatural::GdtrBase, table.base);
            vmcs.write(Guest32::GdtrLimit, table.limit.into());
        }
        if dirty & group::IDTR != 0 {
            let table = context.table(self.idtr.get());
            vmcs.write(GuestNatural::IdtrBase, table.base);
            vmcs.write(Guest32::IdtrLimit, table.limit.into());
        }
        if dirty & group::CR3 != 0 {
            vmcs.write(GuestNatural::Cr3, hidden.map_or(context.cr3(self.cr3.get()), |table| table.0));
        }
        if dirty & group::INTERRUPTIBILITY != 0 {
            vmcs.write(Guest32::Interruptibility, fix_interruptibility(self.interruptibility.get(), rflags));
            self.prepare_single_step(machine, vmcs, rflags);
        }
        if dirty & group::CR0 != 0 {
            // Entries do not load CD and NW: hardware's copy has caching on.
            vmcs.write(GuestNatural::Cr0, config.cr0.apply(self.cr0.get() & !(cr0::CD | cr0::NW)));
            vmcs.write(ControlNatural::Cr0Shadow, self.cr0.get());
        }
        if dirty & group::CR4 != 0 {
            // A machine check in a guest without MCE would shut the CPU down.
            let value = if hidden.is_some() { identity::cr4(self.cr4.get()) } else { self.cr4.get() };
            vmcs.write(GuestNatural::Cr4, config.cr4.apply(value | cr4::MCE));
            vmcs.write(ControlNatural::Cr4Shadow, self.cr4.get());
        }
        if dirty & group::EFER != 0 {
            let long = if self.efer & efer::LMA != 0 { entry::IA32E_MODE_GUEST } else { 0 };
            // With paging on, LME is to be what LMA is.
            let value = if hidden.is_some() { self.efer & !efer::LME } else { self.efer };
            vmcs.write(Guest64::Efer, value);
            vmcs.write(Control32::Entry, config.controls.entry | long);
        }
        if dirty & group::DR7 != 0 {
            vmcs.write(GuestNatural::Dr7, self.dr7);
        }
        if dirty & group::MSRS != 0 {
            let [cs, esp, eip] = self.sysenter;
            vmcs.write(Guest32::SysenterCs, cs as u32);
            vmcs.write(GuestNatural::SysenterEsp, esp);
            vmcs.write(GuestNatural::SysenterEip, eip);
            vmcs.write(Guest64::Pat, self.pat);
        }
        if dirty & group::PDPTES != 0 {
            for (field, entry) in PDPTES.into_iter().zip(self.pdptes) {
                vmcs.write(field, entry);
            }
        }
        if dirty & group::RESET != 0 {
            vmcs.write(GuestNatural::PendingDebugExceptions, 0);
        }
        if dirty & group::RESET != 0 || self.sleeps && dirty & group::WAKES != 0 {
            vmcs.write(Guest32::ActivityState, activity::ACTIVE);
        }
    }

    /// While STI or MOV SS blocks events, the CPU insists on a pending single-step trap with TF set, and on none without. SDM "Checks on
    /// Guest Non-Register State".
    #[cold]
    pub(super) fn prepare_single_step(&self, machine: &Machine, vmcs: CurrentVmcs<'_>, rflags: u64) {
        let blocking = fix_interruptibility(self.interruptibility(machine), rflags);
        let pending = vmcs.read(GuestNatural::PendingDebugExceptions);
        let wanted = pending_debug_for(pending, blocking, rflags, false);
        if wanted != pending {
            vmcs.write(GuestNatural::PendingDebugExceptions, wanted);
        }
    }
}

fn read_segment(vmcs: &Vmcs, number: usize) -> Segment {
    let fields = &SEGMENTS[number & 7];
    Segment {
        base: vmcs.peek(fields.base),
        limit: vmcs.peek(fields.limit),
        selector: vmcs.peek(fields.selector),
        attributes: read_attributes(vmcs, number),
    }
}

fn read_attributes(vmcs: &Vmcs, number: usize) -> SegmentAttributes {
    AccessRights(vmcs.peek(SEGMENTS[number & 7].access_rights)).attributes()
}

fn read_gdtr(vmcs: &Vmcs) -> DescriptorTable {
    DescriptorTable { base: vmcs.peek(GuestNatural::GdtrBase), limit: vmcs.peek(Guest32::GdtrLimit) as u16 }
}

fn read_idtr(vmcs: &Vmcs) -> DescriptorTable {
    DescriptorTable { base: vmcs.peek(GuestNatural::IdtrBase), limit: vmcs.peek(Guest32::IdtrLimit) as u16 }
}

/// What the host fields of the VMCS hold, of what changes while a vCPU stays on its CPU.
#[derive(Clone, Copy)]
pub(super) struct HostFields {
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) fs_base: u64,
    pub(super) perf_global_ctrl: u64,
}

impl HostFields {
    /// Of a new VMCS: a base that no task has, so that the first one is written.
    pub(super) const UNWRITTEN: Self = Self { cr3: 0, cr4: 0, fs_base: u64::MAX, perf_global_ctrl: 0 };
}
