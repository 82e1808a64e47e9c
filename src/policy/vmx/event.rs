// SPDX-License-Identifier: GPL-2.0
//! From neutral events to VM entries, and the guest state that must go with them. SDM "VM-Entry Controls for Event Injection", "Checks on
//! VM-Entry Control Fields", "Checks on Guest Non-Register State".
#![forbid(unsafe_code)]

use crate::{
    arch::{
        cr::rflags,
        vmcs::{
            control::{interruptibility, pending_debug},
            event::{InterruptionInfo, Kind},
        },
    },
    guest::event::{vector, Event},
};

/// What a VM entry delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    pub info: InterruptionInfo,
    /// For the error-code field, which matters only if `info` says so.
    pub error_code: u32,
}

/// How `event` is injected. `protected`: the guest's CR0.PE, without which no error code is pushed. `None` for a software interrupt: its
/// instruction runs again.
///
/// Whether there is an error code follows from the vector, as the entry checks want it, and not from what userspace made of the event.
#[inline]
pub fn injection(event: Event, protected: bool) -> Option<Injection> {
    let plain = |kind, vector| Injection { info: InterruptionInfo::new(kind, vector, false), error_code: 0 };
    Some(match event {
        Event::Interrupt(vector) => plain(Kind::ExternalInterrupt, vector),
        Event::Nmi => plain(Kind::Nmi, vector::NMI),
        Event::Exception(exception) => {
            // A larger vector would fail the entry.
            let vector = exception.vector & 0x1F;
            let code = protected && pushes_error_code(vector);
            Injection {
                info: InterruptionInfo::new(Kind::HardwareException, vector, code),
                // The upper half must be 0.
                error_code: exception.error_code.unwrap_or(0) & 0xFFFF,
            }
        }
        Event::Software { .. } => return None,
    })
}

/// SDM "Exception and Interrupt Vectors", less #CP, which no guest has.
const fn pushes_error_code(vector: u8) -> bool {
    matches!(vector, vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC)
}

/// The interruptibility state that `injection` may go with: an interrupt does not come in a shadow, and an NMI not while NMIs are blocked,
/// which its delivery does. An entry that says otherwise fails.
#[inline]
pub const fn interruptibility_for(state: u32, injection: Option<Injection>) -> u32 {
    const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;
    let Some(injection) = injection else { return state };
    match injection.info.kind() {
        Kind::ExternalInterrupt => state & !SHADOW,
        Kind::Nmi => state & !(SHADOW | interruptibility::NMI),
        _ => state,
    }
}

/// Whether an interruptibility state is one that a CPU can be in. With interrupts off there is no shadow of STI, and no two shadows at once.
pub const fn interruptibility_valid(state: u32, rflags: u64) -> bool {
    const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;
    state & !(SHADOW | interruptibility::NMI) == 0
        && state & SHADOW != SHADOW
        && (state & interruptibility::STI == 0 || rflags & rflags::IF != 0)
}

/// The nearest interruptibility state that is valid: what userspace and emulation leave may not be.
#[inline]
pub const fn fix_interruptibility(state: u32, rflags: u64) -> u32 {
    let mut state = state & (interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI);
    if state & interruptibility::STI != 0 && (rflags & rflags::IF == 0 || state & interruptibility::MOV_SS != 0) {
        // A shadow stays a shadow: both last for one instruction.
        state = state & !interruptibility::STI | interruptibility::MOV_SS;
    }
    state
}

/// Pending debug exceptions that fit the rest: in a shadow, a single step waits exactly when the guest steps instructions. `btf`: DEBUGCTL
/// makes TF step branches.
#[inline]
pub const fn pending_debug_for(pending: u64, interruptibility: u32, rflags: u64, btf: bool) -> u64 {
    if interruptibility & (interruptibility::STI | interruptibility::MOV_SS) == 0 {
        pending
    } else if rflags & rflags::TF != 0 && !btf {
        pending | pending_debug::BS
    } else {
        pending & !pending_debug::BS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Exception;

    fn words(event: Event, protected: bool) -> (u32, u32) {
        let injection = injection(event, protected).unwrap();
        (injection.info.0, injection.error_code)
    }

    #[test]
    fn events_become_words() {
        for (event, wanted) in [
            (Event::Interrupt(0x31), (0x8000_0031, 0)),
            (Event::Interrupt(0xFF), (0x8000_00FF, 0)),
            (Event::Nmi, (0x8000_0202, 0)),
            (Event::Exception(Exception::UD), (0x8000_0306, 0)),
            (Event::Exception(Exception::GP0), (0x8000_0B0D, 0)),
            (Event::Exception(Exception::page_fault(7, 0x1000)), (0x8000_0B0E, 7)),
            (Event::Exception(Exception::with_code(vector::AC, 0)), (0x8000_0B11, 0)),
            (Event::Exception(Exception::plain(vector::BP)), (0x8000_0303, 0)),
        ] {
            assert_eq!(words(event, true), wanted, "{event:?}");
        }
        assert_eq!(injection(Event::Software { vector: 0x80, length_bytes: 2 }, true), None);
    }

    #[test]
    fn real_mode_pushes_no_error_code() {
        assert_eq!(words(Event::Exception(Exception::GP0), false), (0x8000_030D, 0));
        assert_eq!(words(Event::Exception(Exception::with_code(vector::DF, 0)), false), (0x8000_0308, 0));
    }

    #[test]
    fn userspace_cannot_make_an_entry_fail() {
        // The check: bit 11 exactly for the vectors that push a code in protected mode; vector below 32; upper half of the code 0.
        for vector in 0..=255 {
            for error_code in [None, Some(0), Some(u32::MAX)] {
                for protected in [false, true] {
                    let event = Event::Exception(Exception { vector, error_code, payload: None });
                    let (info, code) = words(event, protected);
                    let number = info & 0xFF;
                    let pushes = protected && [8, 10, 11, 12, 13, 14, 17].contains(&number);
                    assert!(number < 32 && info & !0xFF == if pushes { 0x8000_0B00 } else { 0x8000_0300 });
                    assert_eq!(code >> 16, 0);
                }
            }
        }
    }

    #[test]
    fn shadows_end_before_what_they_hold_back() {
        let all = interruptibility::STI | interruptibility::NMI;
        let with = |event| interruptibility_for(all, injection(event, true));
        assert_eq!(with(Event::Interrupt(0x20)), interruptibility::NMI);
        assert_eq!(with(Event::Nmi), 0);
        assert_eq!(with(Event::Exception(Exception::UD)), all);
        assert_eq!(interruptibility_for(all, None), all);
    }

    #[test]
    fn interruptibility_states() {
        use interruptibility::{ENCLAVE, MOV_SS, NMI, SMI, STI};
        for (state, flags, wanted) in [
            (0, 0, 0),
            (STI, rflags::IF, STI),
            (STI, 0, MOV_SS),
            (MOV_SS | NMI, 0, MOV_SS | NMI),
            (STI | MOV_SS, rflags::IF, MOV_SS),
            (SMI | ENCLAVE | 0xFFFF_FFE0, rflags::IF, 0),
        ] {
            assert_eq!(fix_interruptibility(state, flags), wanted, "{state:#x}");
            assert_eq!(interruptibility_valid(state, flags), state == wanted, "{state:#x}");
        }
        for state in 0..64 {
            for flags in [0, rflags::IF] {
                assert!(interruptibility_valid(fix_interruptibility(state, flags), flags), "{state:#x}");
            }
        }
    }

    #[test]
    fn a_step_in_a_shadow_is_pending() {
        use pending_debug::{BREAKPOINTS, BS};
        let shadow = interruptibility::STI;
        assert_eq!(pending_debug_for(0, shadow, rflags::TF, false), BS);
        assert_eq!(pending_debug_for(0, interruptibility::MOV_SS, rflags::TF, false), BS);
        assert_eq!(pending_debug_for(BS | 1, shadow, 0, false), 1);
        assert_eq!(pending_debug_for(BS, shadow, rflags::TF, true), 0);
        assert_eq!(pending_debug_for(BREAKPOINTS, 0, rflags::TF, false), BREAKPOINTS, "without a shadow both are fine");
        assert_eq!(pending_debug_for(BS, interruptibility::NMI, 0, false), BS);
    }
}
