// SPDX-License-Identifier: GPL-2.0
//! The tests, in the order in which a new hypervisor learns to pass them.

use krabtest::harness::Group;

pub mod api;
pub mod real_mode;

pub const GROUPS: &[Group] = &[api::GROUP, real_mode::GROUP];
