// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Puts a virtual machine together and runs it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, tables, Images};
use crate::device::DeviceError;
use crate::devices::serial::Console;
use crate::devices::{Devices, COM1_IRQ};
use crate::exit::{Outcome, Stop};
use crate::main_loop::{MainLoop, Signals};
use crate::memory::{map_ram, ram_layout, show_size};
use crate::stats::Stats;
use crate::terminal::{Output, RawMode};
use crate::{acpi, cpuid, device, vcpu};

/// Pages that the hypervisor needs for real mode on some processors: in the MMIO hole, below the BIOS flash.
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// What the user asked for.
#[derive(Debug)]
pub struct Config {
    pub device: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Show statistics at the end.
    pub stats: bool,
}

/// Runs a virtual machine to its end.
pub fn run(config: &Config) -> Result<Outcome> {
    let kvm = device::open(&config.device)?;
    check_cpus(config.cpus, kvm.get_max_vcpus(), kvm.get_max_vcpu_id())?;
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID failed")?;
    check_memory(config.memory, cpuid::physical_bits(supported.as_slice()))?;

    let memory = map_ram(config.memory)?;
    let rsdp = acpi::write_tables(&memory, config.cpus)?;
    let images = Images { kernel: &config.kernel, initrd: config.initrd.as_deref(), cmdline: &config.cmdline };
    let entry = boot::load(&memory, config.memory, &images, rsdp)?;

    let vm = create_vm(&kvm, config, &memory)?;
    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("eventfd failed");
    let (wake, drained, irq) = (event()?, event()?, event()?);
    vm.register_irqfd(&irq, COM1_IRQ).context("KVM_IRQFD failed")?;
    let stop = Arc::new(Stop::new(wake.try_clone()?));
    let console = Console::new(irq, drained.try_clone()?, Box::new(Output(stop.clone())));
    let devices = Arc::new(Devices::new(&stop, console));

    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::new();
    for id in 0..config.cpus {
        let fd = vm.create_vcpu(id.into()).with_context(|| format!("KVM_CREATE_VCPU {id} failed"))?;
        let entries = cpuid::for_vcpu(supported.as_slice(), id, config.cpus, tsc_deadline);
        vcpu::set_up(&fd, id, &entries).with_context(|| format!("vCPU {id}"))?;
        vcpus.push(fd);
    }
    if let Some(first) = vcpus.first() {
        let mut sregs = first.get_sregs().context("KVM_GET_SREGS failed")?;
        tables::set_up(&memory, entry, &mut sregs)?;
        first.set_sregs(&sregs).context("KVM_SET_SREGS failed")?;
        first.set_regs(&tables::registers(entry)).context("KVM_SET_REGS failed")?;
    }

    let stats: Vec<Stats> = if config.stats { vcpus.iter().map(Stats::of).collect::<Result<_>>()? } else { Vec::new() };

    // From here on the terminal is raw; `main_loop` puts it back when it goes, before anybody reports the end.
    let signals = Signals::block()?;
    let terminal = RawMode::enter()?;
    let main_loop = MainLoop {
        stop: stop.clone(),
        wake,
        drained,
        console: &devices.console,
        signals,
        input: libc::STDIN_FILENO,
        terminal,
    };
    let threads = start(vcpus, &vcpu::Machine { devices: devices.clone(), memory: memory.clone() }, &stop)?;
    if let Err(error) = main_loop.run() {
        stop.request(Outcome::Failed(format!("{error:#}")));
    }
    vcpu::join(threads)?;
    drop(main_loop);
    show(&stats)?;
    stop.outcome().cloned().context("the virtual machine ended without a reason")
}

/// Shows the sums, a line each.
fn show(stats: &[Stats]) -> Result<()> {
    let mut sums = BTreeMap::new();
    stats.iter().try_for_each(|one| one.add_to(&mut sums))?;
    for (name, sum) in sums {
        eprintln!("krab: statistics: {name} {sum}");
    }
    Ok(())
}

/// Starts all vCPUs; if one cannot be started, stops those that were.
fn start(vcpus: Vec<VcpuFd>, machine: &vcpu::Machine, stop: &Arc<Stop>) -> Result<Vec<vcpu::Thread>> {
    vcpu::install_kick_handler()?;
    let mut threads = Vec::new();
    // The first vCPU last: the others wait for its start-up interrupt anyway.
    for (id, fd) in vcpus.into_iter().enumerate().rev() {
        match vcpu::Thread::start(fd, id as u32, machine.clone(), stop.clone()) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                stop.request(Outcome::Failed(format!("{error:#}")));
                vcpu::join(threads)?;
                return Err(error);
            }
        }
    }
    Ok(threads)
}

fn create_vm(kvm: &Kvm, config: &Config, memory: &GuestMemoryMmap) -> Result<VmFd> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => {
                return Err(DeviceError::from_errno(&config.device, error.errno())).context("KVM_CREATE_VM failed")
            }
        }
    };
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).context("KVM_SET_IDENTITY_MAP_ADDR failed")?;
    }
    vm.set_tss_address(TSS_ADDRESS).context("KVM_SET_TSS_ADDR failed")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP failed")?;
    // The dummy speaker answers port 0x61, which kernels use to calibrate their clocks.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).context("KVM_CREATE_PIT2 failed")?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: memory.get_host_address(region.start_addr())? as u64,
        };
        // SAFETY: The range is guest RAM that `map_ram` has mapped, and it stays mapped until the process ends.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION failed")?;
    }
    Ok(vm)
}

/// Refuses more CPUs than the hypervisor or the ACPI tables can have.
fn check_cpus(cpus: u32, max_vcpus: usize, max_id: usize) -> Result<()> {
    let limit = max_vcpus.min(max_id).min(acpi::MAX_CPUS as usize);
    if cpus as usize > limit {
        bail!("{cpus} CPUs are too many: this hypervisor and launcher allow at most {limit} (--cpus)");
    }
    Ok(())
}

/// Refuses memory that the guest's physical addresses do not reach.
fn check_memory(size: u64, physical_bits: u32) -> Result<()> {
    let end = ram_layout(size).last().map_or(0, |(address, len)| address.saturating_add(*len));
    let reach = 1u64.checked_shl(physical_bits).unwrap_or(u64::MAX);
    if end > reach {
        bail!(
            "{} are more than this processor can address ({physical_bits} bits): give --memory less",
            show_size(size)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_limits() {
        assert!(check_cpus(4, 4, 4).is_ok());
        for (cpus, vcpus, id) in [(5, 4, 64), (5, 64, 4), (256, 1024, 4096)] {
            let error = check_cpus(cpus, vcpus, id).unwrap_err().to_string();
            assert!(error.contains("at most"), "{error}");
        }
    }

    #[test]
    fn memory_limits() {
        assert!(check_memory(63 << 30, 36).is_ok());
        assert!(check_memory((63 << 30) + 4096, 36).unwrap_err().to_string().contains("36 bits"));
        assert!(check_memory(1 << 40, 64).is_ok());
    }
}
