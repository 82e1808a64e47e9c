// SPDX-License-Identifier: GPL-2.0
//! The virtual machine control structure of VMX and the words around it. SDM "Virtual Machine Control Structures", "VM Exits" and appendices
//! "Field Encoding in VMCS", "VMX Basic Exit Reasons" and "VMX Capability Reporting Facility".
//!
//! Not modelled: the dual-monitor treatment of SMM, shadow VMCSs, processor trace, CET, SGX, TDX and FRED beyond their bits' places.
#![forbid(unsafe_code)]

pub mod access_rights;
pub mod caps;
pub mod control;
pub mod error;
pub mod event;
pub mod exit;
pub mod field;

pub use access_rights::AccessRights;
pub use field::*;
