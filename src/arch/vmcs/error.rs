// SPDX-License-Identifier: GPL-2.0
//! VM-instruction errors. SDM "VM Instruction Error Numbers".
#![forbid(unsafe_code)]

macro_rules! errors {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        /// Why a VMX instruction failed, as the current VMCS's VM-instruction error field tells.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum InstructionError {
            $($name = $number,)*
        }

        impl InstructionError {
            /// From the field. `None` for a number that the manual does not know.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// One line for a log.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

errors! {
    VmcallInRoot = 1, "VMCALL in VMX root operation";
    VmclearAddress = 2, "VMCLEAR with an invalid address";
    VmclearVmxonPointer = 3, "VMCLEAR of the VMXON region";
    LaunchNotClear = 4, "VMLAUNCH of a VMCS that is not clear";
    ResumeNotLaunched = 5, "VMRESUME of a VMCS that is not launched";
    ResumeAfterVmxoff = 6, "VMRESUME after VMXOFF";
    EntryControls = 7, "VM entry with invalid control fields";
    EntryHostState = 8, "VM entry with invalid host-state fields";
    VmptrldAddress = 9, "VMPTRLD with an invalid address";
    VmptrldVmxonPointer = 10, "VMPTRLD of the VMXON region";
    VmptrldRevision = 11, "VMPTRLD of a VMCS with another revision identifier";
    UnsupportedField = 12, "VMREAD or VMWRITE of a field that the CPU does not have";
    ReadOnlyField = 13, "VMWRITE to a read-only field";
    VmxonInRoot = 15, "VMXON in VMX root operation";
    EntryExecutivePointer = 16, "VM entry with an invalid executive-VMCS pointer";
    EntryExecutiveNotLaunched = 17, "VM entry with an executive VMCS that is not launched";
    EntryExecutiveNotVmxon = 18, "VM entry with an executive-VMCS pointer that is not the VMXON pointer";
    VmcallNotClear = 19, "VMCALL with a VMCS that is not clear";
    VmcallExitControls = 20, "VMCALL with invalid VM-exit control fields";
    VmcallMsegRevision = 22, "VMCALL with another MSEG revision identifier";
    VmxoffDualMonitor = 23, "VMXOFF under the dual-monitor treatment";
    VmcallSmmFeatures = 24, "VMCALL with invalid SMM-monitor features";
    EntryExecutiveControls = 25, "VM entry with invalid control fields in the executive VMCS";
    EntryMovSs = 26, "VM entry with events blocked by MOV SS";
    InvalidationOperand = 28, "INVEPT or INVVPID with an invalid operand";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        let known = (0..64).filter_map(InstructionError::from_number);
        assert!(known.clone().all(|error| InstructionError::from_number(error as u32) == Some(error)));
        assert_eq!(known.count(), 25);
    }

    #[test]
    fn holes_stay_holes() {
        for number in [0, 14, 21, 27, 29, u32::MAX] {
            assert_eq!(InstructionError::from_number(number), None);
        }
        assert_eq!(InstructionError::EntryHostState as u32, 8);
    }
}
