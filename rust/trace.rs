// SPDX-License-Identifier: GPL-2.0
//! Tracepoints (rust/trace.h). One that is off is a NOP in the code: the kernel patches a jump there when it is turned on.
use core::{arch::asm, mem::offset_of};
use kernel::bindings::tracepoint;

use crate::guest::Exit;

/// Whether the tracepoint is on, by its static key. `asm/jump_label.h`; objtool turns the jump into a NOP.
macro_rules! is_on {
    ($key:ident) => {
        'on: {
            asm!(
                "2: jmp {l_yes}",
                ".pushsection __jump_table, \"aw\"",
                ".balign 8",
                ".long 2b - .",
                ".long {l_yes} - .",
                // Bit 1 marks a jump that objtool has to replace.
                ".quad {key} + {offset} + 2 - .",
                ".popsection",
                key = sym $key,
                offset = const offset_of!(tracepoint, key),
                l_yes = label {
                    break 'on true;
                },
                options(nomem, nostack, preserves_flags),
            );
            false
        }
    };
}

macro_rules! tracepoints {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) = $key:ident, $call:ident;)*) => {
        // The type is the kernel's own; only its address and the offset of the key are used.
        #[allow(improper_ctypes)]
        extern "C" {
            $(
                static $key: tracepoint;
                fn $call($($argument: $type),*);
            )*
        }

        $(
            $(#[$doc])*
            #[inline(always)]
            pub(crate) fn $name($($argument: $type),*) {
                // SAFETY: the key is in a tracepoint of this module, and the asm has no effect but to jump or not.
                if unsafe { is_on!($key) } {
                    // SAFETY: a C function that may be called in any context, and reads nothing but its arguments.
                    unsafe { $call($($argument),*) };
                }
            }
        )*
    };
}

tracepoints! {
    /// A vCPU is about to run guest code.
    fn entry(vcpu: u32, rip: u64) = __tracepoint_krab_entry, krab_do_trace_entry;
    /// It stopped. `reason`: as [`Exit::number`] has it.
    fn numbered_exit(vcpu: u32, rip: u64, reason: u32) = __tracepoint_krab_exit, krab_do_trace_exit;
    /// The nested tables refused an access.
    fn page_fault(vcpu: u32, gpa: u64, write: bool, execute: bool, present: bool)
        = __tracepoint_krab_page_fault, krab_do_trace_page_fault;
    /// An access to a device in memory; what is read is not known yet.
    fn mmio(write: bool, gpa: u64, len_bytes: u32, value: u64) = __tracepoint_krab_mmio, krab_do_trace_mmio;
    /// An access to ports.
    fn pio(write: bool, port: u16, size_bytes: u32, count: u32) = __tracepoint_krab_pio, krab_do_trace_pio;
    /// RDMSR or WRMSR.
    fn msr(write: bool, index: u32, value: u64, refused: bool) = __tracepoint_krab_msr, krab_do_trace_msr;
    /// An event goes in. `kind`: 0 interrupt, 1 NMI, 2 exception.
    fn inject(vcpu: u32, kind: u32, vector: u8) = __tracepoint_krab_inject, krab_do_trace_inject;
}

/// A vCPU stopped. Its reason gets a number only where somebody wants to know.
#[inline(always)]
pub(crate) fn exit(vcpu: u32, rip: u64, exit: &Exit) {
    // SAFETY: as for the others.
    if unsafe { is_on!(__tracepoint_krab_exit) } {
        numbered_exit(vcpu, rip, exit.number());
    }
}
