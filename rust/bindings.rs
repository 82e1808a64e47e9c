// SPDX-License-Identifier: GPL-2.0
//! bindgen's view of `rust/helpers.h`. Types that the kernel crate binds already are taken from there, so that they unify.
#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused
)]

use kernel::bindings::*;

include!(env!("KRAB_BINDINGS"));
