// SPDX-License-Identifier: GPL-2.0
//! AMD SVM with nested paging. APM Vol. 2 "Secure Virtual Machine".
//!
//! Not supported: shadow paging, nested virtualization, AVIC, encrypted guests.
// Not `forbid`, which `insn` could not lift.
#![deny(unsafe_code)]

mod cpu;
mod exit;
mod insn;
mod vcpu;

pub(crate) use cpu::Svm;
