// SPDX-License-Identifier: GPL-2.0
//! KVM_SET_GUEST_DEBUG: userspace debugs the guest with breakpoints, watchpoints and single steps. KVM API "KVM_SET_GUEST_DEBUG".
//!
//! While userspace steps or has hardware breakpoints, the CPU's debug registers are userspace's: the guest's own are kept here, and
//! the guest reads and writes those. Every #DB then goes to userspace, as in KVM.
//!
//! Not supported: breakpoints on instructions that are emulated.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::vcpu::*,
    arch::{
        cr::{dr, rflags},
        segment::SegmentName,
    },
    emul::Mode,
    exits::ToUser,
    glue::fpu::GuestFpu,
    guest::{event::vector, exit::RegisterMove, Exception, Exit},
    vcpu::{Core, State},
    vendor::{Vendor, VendorVcpu},
};

/// Debug registers of the guest while the CPU's are userspace's.
#[derive(Clone, Copy)]
struct Kept {
    breakpoints: [u64; 4],
    dr6: u64,
    dr7: u64,
}

/// How a vCPU is debugged.
#[derive(Default)]
pub(crate) struct GuestDebug {
    control: u32,
    kept: Option<Kept>,
    /// The guest's own RFLAGS.TF during an entry.
    guest_tf: u64,
    /// An instruction that exited is over.
    stepped: bool,
}

impl GuestDebug {
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.control != 0
    }

    fn has(&self, bit: u32) -> bool {
        self.control & bit != 0
    }

    #[inline]
    pub(crate) fn steps(&self) -> bool {
        self.has(KVM_GUESTDBG_SINGLESTEP)
    }

    /// Whether interrupts wait until userspace is done.
    #[inline]
    pub(crate) fn blocks_interrupts(&self) -> bool {
        self.has(KVM_GUESTDBG_BLOCKIRQ)
    }

    /// An instruction is over that hardware did not step.
    #[inline]
    pub(crate) fn instruction_over(&mut self) {
        self.stepped = true;
    }

    pub(crate) fn has_stepped(&self) -> bool {
        self.stepped
    }

    /// Before an entry: the trap flag. After it: the guest's own again.
    #[inline]
    pub(crate) fn before_entry(&mut self, flags: &mut u64) {
        if self.steps() {
            self.guest_tf = *flags & rflags::TF;
            *flags |= rflags::TF;
        }
    }

    #[inline]
    pub(crate) fn after_exit(&self, flags: &mut u64) {
        if self.steps() {
            *flags = *flags & !rflags::TF | self.guest_tf;
        }
    }
}

impl<V: Vendor> Core<V> {
    /// KVM_SET_GUEST_DEBUG. `EBUSY` when an exception is to be injected and there is one already.
    pub(crate) fn set_guest_debug(&mut self, request: &KvmGuestDebug) -> Result {
        let (state, fpu) = (&mut self.state, &mut self.fpu);
        let control = request.control;
        if control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
            if state.events.is_mid_delivery() {
                return Err(EBUSY);
            }
            let vector = if control & KVM_GUESTDBG_INJECT_DB != 0 { vector::DB } else { vector::BP };
            state.events.raise(Exception::plain(vector));
        }
        state.give_debug_registers_back(fpu);
        let control = if control & KVM_GUESTDBG_ENABLE != 0 { control & KVM_GUESTDBG_VALID_MASK } else { 0 };
        state.debug = GuestDebug { control, ..GuestDebug::default() };
        if state.debug.has(KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP) {
            let dr7 = state.hw.dr7();
            state.debug.kept = Some(Kept { breakpoints: fpu.breakpoints, dr6: state.hw.dr6(), dr7 });
            state.hw.set_dr6(dr::DR6_INIT);
            if state.debug.has(KVM_GUESTDBG_USE_HW_BP) {
                let [a, b, c, d, .., dr7] = request.debugreg;
                fpu.breakpoints = [a, b, c, d];
                fpu.breakpoints_enabled = dr7 & dr::DR7_ENABLES != 0;
                state.hw.set_dr7(dr7 & dr::DR7_WRITABLE | dr::DR7_INIT);
            }
        }
        state.hw.want_breakpoints(state.debug.has(KVM_GUESTDBG_USE_SW_BP));
        state.hw.set_user_steps(state.debug.steps());
        Ok(())
    }
}

impl<V: Vendor> State<V> {
    fn give_debug_registers_back(&mut self, fpu: &mut GuestFpu) {
        if let Some(Kept { breakpoints, dr6, dr7 }) = self.debug.kept.take() {
            fpu.breakpoints = breakpoints;
            fpu.breakpoints_enabled = dr7 & dr::DR7_ENABLES != 0;
            self.hw.set_dr6(dr6);
            self.hw.set_dr7(dr7);
        }
    }

    /// A debug register as the guest sees it: 0 to 3, 6 or 7.
    pub(crate) fn debug_register(&self, fpu: &GuestFpu, number: u8) -> u64 {
        match (number, &self.debug.kept) {
            (6, Some(kept)) => kept.dr6,
            (7, Some(kept)) => kept.dr7,
            (6, None) => self.hw.dr6(),
            (7, None) => self.hw.dr7(),
            (number, kept) => kept.as_ref().map_or(&fpu.breakpoints, |kept| &kept.breakpoints)[usize::from(number & 3)],
        }
    }

    /// Sets a debug register of the guest; bits that do not exist get their fixed values.
    pub(crate) fn set_debug_register(&mut self, fpu: &mut GuestFpu, number: u8, value: u64) {
        let users = self.debug.has(KVM_GUESTDBG_USE_HW_BP);
        match (number, &mut self.debug.kept) {
            (6, kept) => {
                let value = value & dr::DR6_WRITABLE | dr::DR6_INIT;
                match kept {
                    Some(kept) => kept.dr6 = value,
                    None => self.hw.set_dr6(value),
                }
            }
            (7, kept) => {
                let value = value & dr::DR7_WRITABLE | dr::DR7_INIT;
                if let Some(kept) = kept {
                    kept.dr7 = value;
                }
                if !users {
                    self.hw.set_dr7(value);
                    fpu.breakpoints_enabled = value & dr::DR7_ENABLES != 0;
                }
            }
            (number, kept) => {
                let at = usize::from(number & 3);
                if let Some(kept) = kept {
                    kept.breakpoints[at] = value;
                }
                if !users {
                    fpu.breakpoints[at] = value;
                }
            }
        }
    }

    /// KVM_EXIT_DEBUG, if userspace wants to know of this exit. It comes before anything else is done about it.
    pub(crate) fn debug_exit(&mut self, exit: &Exit) -> Option<ToUser> {
        match *exit {
            Exit::Exception(Exception { vector: vector::BP, .. }) if self.debug.has(KVM_GUESTDBG_USE_SW_BP) => {
                Some(self.debug_report(vector::BP, 0))
            }
            Exit::Exception(Exception { vector: vector::DB, payload, .. }) if self.debug.kept.is_some() => {
                Some(self.debug_report(vector::DB, self.hw.dr6() | payload.unwrap_or(0)))
            }
            Exit::DebugRegister(RegisterMove { .. })
                if self.debug.has(KVM_GUESTDBG_USE_HW_BP) && self.hw.dr7() & dr::DR7_GD != 0 =>
            {
                Some(self.debug_report(vector::DB, dr::DR6_INIT | dr::DR6_BD))
            }
            _ => None,
        }
    }

    /// KVM_EXIT_DEBUG after an instruction that exited.
    pub(crate) fn take_step(&mut self) -> Option<ToUser> {
        (core::mem::take(&mut self.debug.stepped) && self.debug.steps())
            .then(|| self.debug_report(vector::DB, dr::DR6_INIT | dr::DR6_BS))
    }

    fn debug_report(&mut self, exception: u8, dr6: u64) -> ToUser {
        let base = match self.mode() {
            Mode::Long64 => 0,
            _ => self.hw.segment(SegmentName::Cs as usize).base,
        };
        self.debug.stepped = false;
        let dr7 = self.hw.dr7();
        if self.debug.kept.is_some() {
            self.hw.set_dr6(dr::DR6_INIT);
        }
        ToUser::Debug { exception, pc: base.wrapping_add(self.regs.rip), dr6, dr7 }
    }
}
