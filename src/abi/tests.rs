// SPDX-License-Identifier: GPL-2.0
//! The tables against Linux's names and against `uapi/README.md`, and the safety of reading untrusted bytes.
#![forbid(unsafe_code)]

use super::cap::{check_extension, Limits, CAPABILITIES};
use super::ioctl::{argument_bytes, Scope, State, FOREIGN_IOCTLS, IOCTLS};
use super::vcpu::KvmRegs;
use super::{cap, ioctl, FromBytes, IntoBytes};
use std::{collections::HashSet, env, format, fs, path::Path, string::String};

const LIMITS: Limits = Limits {
    recommended_vcpus: 2,
    max_vcpus: 64,
    max_vcpu_id: 256,
    memory_slots: 509,
    xsave: true,
    tsc_scaling: true,
    pmu: true,
    xsave_bytes: 4096,
    disable_exits: 4,
};

#[test]
fn numbers_and_names_are_unique_within_a_scope() {
    for scope in [Scope::SYSTEM, Scope::VM, Scope::VCPU, Scope::DEVICE] {
        let mut seen = HashSet::new();
        for row in IOCTLS.iter().filter(|row| row.scope.contains(scope)) {
            assert!(seen.insert(row.number), "{} repeats a number", row.name);
        }
    }
    let mut names = HashSet::new();
    assert!(IOCTLS.iter().all(|row| names.insert(row.name) && row.number >> 8 & 0xFF == 0xAE));
    let mut numbers = HashSet::new();
    assert!(CAPABILITIES.iter().all(|row| names.insert(row.name) && numbers.insert(row.number)));
}

#[test]
fn argument_size_comes_from_the_number() {
    assert_eq!(argument_bytes(ioctl::KVM_GET_REGS), 144);
    assert_eq!(argument_bytes(ioctl::KVM_RUN), 0);
    assert_eq!(argument_bytes(ioctl::KVM_SET_CPUID2), 8);
}

#[test]
fn unknown_capabilities_are_zero() {
    for number in [u64::MAX, 1 << 32, 5, 17, 250, u64::from(cap::KVM_CAP_NESTED_STATE)] {
        assert_eq!(check_extension(number, &LIMITS), 0, "{number}");
    }
    assert_eq!(check_extension(u64::from(cap::KVM_CAP_MAX_VCPUS), &LIMITS), 64);
    assert_eq!(check_extension(u64::from(cap::KVM_CAP_XSAVE2), &LIMITS), 4096);
    assert_eq!(check_extension(u64::from(cap::KVM_CAP_IRQCHIP), &LIMITS), 1);
}

/// What Firecracker, libkrun and vmm-reference refuse to start without.
#[test]
fn clients_find_what_they_need() {
    use cap::*;
    for number in [
        KVM_CAP_USER_MEMORY,
        KVM_CAP_IRQCHIP,
        KVM_CAP_IRQFD,
        KVM_CAP_IOEVENTFD,
        KVM_CAP_SET_TSS_ADDR,
        KVM_CAP_EXT_CPUID,
        KVM_CAP_MP_STATE,
        KVM_CAP_VCPU_EVENTS,
        KVM_CAP_XSAVE,
        KVM_CAP_XSAVE2,
        KVM_CAP_ADJUST_CLOCK,
        KVM_CAP_DEBUGREGS,
        KVM_CAP_PIT2,
        KVM_CAP_PIT_STATE2,
        KVM_CAP_XCRS,
        KVM_CAP_IMMEDIATE_EXIT,
        KVM_CAP_TSC_DEADLINE_TIMER,
    ] {
        assert_ne!(check_extension(u64::from(number), &LIMITS), 0, "capability {number}");
    }
}

#[test]
fn structures_read_from_short_or_long_input() {
    let bytes = [0xA5u8; 200];
    assert!(KvmRegs::read_from_bytes(&bytes[..143]).is_err());
    let (regs, rest) = KvmRegs::read_from_prefix(&bytes).unwrap();
    assert_eq!((regs.rsp, rest.len()), (0xA5A5_A5A5_A5A5_A5A5, 56));
    assert_eq!(regs.as_bytes(), &bytes[..144]);
}

const README_HEAD: &str = "\
<!-- SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note -->
<!-- Written by the test `readme_matches_the_tables` in src/abi from its tables; do not edit by hand. -->
# What userspace may see

`/dev/krab` speaks KVM's ioctl interface for x86, version 12, as Linux 7.2 defines it in `linux/kvm.h` and
`asm/kvm.h`: same numbers, same structures, same errno values, same `kvm_run` page. There are no ioctls of Krab's own, so
a client includes KVM's headers and opens another device node.

What is not answered gives ENOTTY from `ioctl` and 0 from KVM_CHECK_EXTENSION, never a half-made answer.
";

fn scope_names(scope: Scope) -> String {
    let names = [(Scope::SYSTEM, "system"), (Scope::VM, "VM"), (Scope::VCPU, "vCPU"), (Scope::DEVICE, "device")];
    let mut text = String::new();
    for (one, name) in names {
        if scope.contains(one) {
            text += if text.is_empty() { "" } else { ", " };
            text += name;
        }
    }
    text
}

fn readme() -> String {
    let mut text = String::from(README_HEAD);
    let supported = IOCTLS.iter().filter(|row| row.state == State::Supported).count();
    text += &format!("\n## ioctls: {supported} of {} answered\n\n", IOCTLS.len());
    text += "| ioctl | number | works on | Krab | note |\n|---|---|---|---|---|\n";
    for row in IOCTLS {
        let state = if row.state == State::Supported { "yes" } else { "ENOTTY" };
        text +=
            &format!("| {} | 0x{:08X} | {} | {state} | {} |\n", row.name, row.number, scope_names(row.scope), row.note);
    }
    text += "\nOf other architectures, and so ENOTTY: ";
    text += &FOREIGN_IOCTLS.join(", ");
    let announced = CAPABILITIES.iter().filter(|row| row.answer != cap::Answer::No).count();
    text += &format!(".\n\n## Capabilities: {announced} of {} announced\n\n", CAPABILITIES.len());
    text += "| capability | number | KVM_CHECK_EXTENSION | note |\n|---|---|---|---|\n";
    for row in CAPABILITIES {
        let answer = match row.answer {
            cap::Answer::No => String::from("0"),
            cap::Answer::Value(value) => format!("{value}"),
            _ => String::from("at run time"),
        };
        text += &format!("| {} | {} | {answer} | {} |\n", row.name, row.number, row.note);
    }
    text += "\nCapabilities of other architectures, and numbers that no kernel has given out, answer 0.\n";
    text
}

/// With KRAB_WRITE set in the environment the file is written instead of compared.
#[test]
fn readme_matches_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../uapi/README.md");
    if env::var_os("KRAB_WRITE").is_some() {
        fs::write(&path, readme()).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == readme(), "uapi/README.md is stale: KRAB_WRITE=1 cargo test readme");
}
