// SPDX-License-Identifier: GPL-2.0
//! The tests, in the order in which a new hypervisor learns to pass them.

use krabtest::harness::Group;

pub mod api;
pub mod host_state;
pub mod irqchip;
pub mod long_mode;
pub mod memory;
pub mod mmio;
pub mod real_mode;
pub mod safety;

pub const GROUPS: &[Group] = &[
    api::GROUP,
    real_mode::GROUP,
    long_mode::GROUP,
    mmio::GROUP,
    host_state::GROUP,
    memory::GROUP,
    irqchip::GROUP,
    safety::GROUP,
];
