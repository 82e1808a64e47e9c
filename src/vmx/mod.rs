// SPDX-License-Identifier: GPL-2.0
//! Intel VMX with extended page tables. SDM "Introduction to Virtual Machine Extensions" and what follows.
//!
//! VMX operation is entered and left inside one stretch of interrupts off (see [`insn`]); between two of them a vCPU's state is in its
//! VMCS in memory, which the CPU alone can read, and in the copies that [`state`] keeps.
//!
//! Where the CPU has no unrestricted guest, real mode is the emulator's (`src/software.rs`), and a guest without paging has a page table
//! that translates every address to itself (`src/mmu/identity.rs`).
//!
//! Not supported: CPUs without EPT, task switches, nested virtualization, IPI virtualization, SMM, SGX.
// Not `forbid`, which `insn` could not lift.
#![deny(unsafe_code)]

mod apic;
mod cpu;
mod entry;
mod insn;
mod pml;
mod state;
mod timer;
mod vcpu;

pub(crate) use cpu::Vmx;
