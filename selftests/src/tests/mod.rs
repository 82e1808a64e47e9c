// SPDX-License-Identifier: GPL-2.0
//! The tests, in the order in which a new hypervisor learns to pass them.

use krabtest::harness::Group;

pub mod aging;
pub mod api;
pub mod apicv;
pub mod client;
pub mod control;
pub mod deadline;
pub mod debug;
pub mod dirty_log;
pub mod disable_exits;
pub mod eventfds;
pub mod exceptions;
pub mod faults;
pub mod host_state;
pub mod hypercall;
pub mod irqchip;
pub mod lapic;
pub mod long_mode;
pub mod memory;
pub mod mmio;
pub mod pmu;
pub mod protection;
pub mod pv_eoi;
pub mod random_state;
pub mod real_mode;
pub mod registers;
pub mod safety;
pub mod state;
pub mod stress;
pub mod tasks;
pub mod tsc;
pub mod unpaged;
pub mod vmms;
pub mod windows;

pub const GROUPS: &[Group] = &[
    api::GROUP,
    real_mode::GROUP,
    unpaged::GROUP,
    long_mode::GROUP,
    control::GROUP,
    hypercall::GROUP,
    exceptions::GROUP,
    debug::GROUP,
    tasks::GROUP,
    mmio::GROUP,
    protection::GROUP,
    host_state::GROUP,
    state::GROUP,
    registers::GROUP,
    tsc::GROUP,
    memory::GROUP,
    aging::GROUP,
    dirty_log::GROUP,
    faults::GROUP,
    lapic::GROUP,
    deadline::GROUP,
    disable_exits::GROUP,
    apicv::GROUP,
    pv_eoi::GROUP,
    irqchip::GROUP,
    eventfds::GROUP,
    client::GROUP,
    windows::GROUP,
    pmu::GROUP,
    random_state::GROUP,
    vmms::GROUP,
    stress::GROUP,
    safety::GROUP,
];
