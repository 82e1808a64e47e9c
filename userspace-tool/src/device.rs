// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening the hypervisor's device node, what it must be able to do, and `krab info`.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

/// Why the device cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    #[error("{} does not exist: is {} loaded? try '{}'", .0.display(), module(.0).0, module(.0).1)]
    Missing(PathBuf),
    #[error("no permission to open {}: run as root, or join the group that owns it", .0.display())]
    Permission(PathBuf),
    #[error("{}: another hypervisor holds the processor's virtualization: stop its virtual machines and unload it", .0.display())]
    Busy(PathBuf),
    #[error("{}: no hypervisor answers: does the processor have virtualization, and is it on in the firmware? see dmesg", .0.display())]
    NoDevice(PathBuf),
    #[error("{} is no hypervisor's device: it does not know KVM_GET_API_VERSION", .0.display())]
    NotKvm(PathBuf),
    #[error("{}: API version {found}, but this launcher speaks {KVM_API_VERSION}", .path.display())]
    Version { path: PathBuf, found: i32 },
    #[error("{}: the hypervisor lacks {}, which this launcher needs", .path.display(), .names.join(", "))]
    Capabilities { path: PathBuf, names: Vec<&'static str> },
    #[error("cannot open {}: {}", .path.display(), std::io::Error::from_raw_os_error(*.errno))]
    Other { path: PathBuf, errno: i32 },
}

/// The module behind a device node, and how to load it.
fn module(path: &Path) -> (&'static str, &'static str) {
    if path == Path::new("/dev/kvm") {
        ("kvm_amd or kvm_intel", "modprobe kvm_amd")
    } else {
        ("krab.ko", "insmod krab.ko")
    }
}

impl DeviceError {
    /// The meaning of an error number from opening the node or from KVM_CREATE_VM.
    pub fn from_errno(path: &Path, errno: i32) -> Self {
        let path = path.to_owned();
        match errno {
            libc::ENOENT | libc::ENOTDIR => DeviceError::Missing(path),
            libc::EACCES | libc::EPERM => DeviceError::Permission(path),
            libc::EBUSY => DeviceError::Busy(path),
            libc::ENODEV | libc::ENXIO | libc::EOPNOTSUPP => DeviceError::NoDevice(path),
            errno => DeviceError::Other { path, errno },
        }
    }
}

/// A capability with its name in the API.
type Named = (Cap, &'static str);

/// What the launcher cannot do without.
const REQUIRED: [Named; 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Further capabilities for `krab info`.
const SHOWN: [Named; 18] = [
    (Cap::Hlt, "KVM_CAP_HLT"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::NrMemslots, "KVM_CAP_NR_MEMSLOTS"),
    (Cap::MaxVcpus, "KVM_CAP_MAX_VCPUS"),
];

/// Opens the device node and makes sure that it speaks our version of the API.
fn open_any(path: &Path) -> Result<Kvm> {
    let name = CString::new(path.as_os_str().as_bytes()).context("the device's name holds a NUL")?;
    let kvm = Kvm::new_with_path(name).map_err(|error| DeviceError::from_errno(path, error.errno()))?;
    match kvm.get_api_version() {
        found if found == KVM_API_VERSION as i32 => Ok(kvm),
        found if found < 0 => Err(DeviceError::NotKvm(path.into()).into()),
        found => Err(DeviceError::Version { path: path.into(), found }.into()),
    }
}

/// Opens a hypervisor that has all that the launcher needs.
pub fn open(path: &Path) -> Result<Kvm> {
    let kvm = open_any(path)?;
    let names: Vec<_> = REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if names.is_empty() {
        Ok(kvm)
    } else {
        Err(DeviceError::Capabilities { path: path.into(), names }.into())
    }
}

/// Prints what the hypervisor says about itself.
pub fn info(path: &Path) -> Result<()> {
    let kvm = open_any(path)?;
    println!("device       {}", path.display());
    println!("API version  {}", kvm.get_api_version());
    println!("run mapping  {} bytes", kvm.get_vcpu_mmap_size().context("KVM_GET_VCPU_MMAP_SIZE failed")?);
    println!("capabilities (* the launcher needs it)");
    for ((cap, name), mark) in REQUIRED.map(|cap| (cap, '*')).into_iter().chain(SHOWN.map(|cap| (cap, ' '))) {
        println!("  {mark} {name:<32} {}", kvm.check_extension_int(cap));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(path: &str, errno: i32) -> String {
        DeviceError::from_errno(Path::new(path), errno).to_string()
    }

    #[test]
    fn errors_say_what_to_do() {
        assert_eq!(
            message("/dev/krab", libc::ENOENT),
            "/dev/krab does not exist: is krab.ko loaded? try 'insmod krab.ko'"
        );
        assert!(message("/dev/kvm", libc::ENOENT).contains("modprobe kvm_amd"));
        assert!(message("/dev/krab", libc::EACCES).contains("run as root"));
        assert!(message("/dev/krab", libc::EBUSY).contains("another hypervisor"));
        assert!(message("/dev/krab", libc::ENODEV).contains("dmesg"));
        assert!(message("/dev/krab", libc::EMFILE).contains("Too many open files"));
        let lacking = DeviceError::Capabilities { path: "/dev/krab".into(), names: vec!["KVM_CAP_A", "KVM_CAP_B"] };
        assert!(lacking.to_string().contains("lacks KVM_CAP_A, KVM_CAP_B"));
    }

    #[test]
    fn files_that_are_no_hypervisor() {
        let error = |path: &str| open(Path::new(path)).unwrap_err().downcast::<DeviceError>().unwrap();
        assert_eq!(error("/nonexistent"), DeviceError::Missing("/nonexistent".into()));
        assert_eq!(error("/dev/null"), DeviceError::NotKvm("/dev/null".into()));
    }
}
