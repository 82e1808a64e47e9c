// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hypervisor's statistics of a vCPU, as the files of KVM_GET_STATS_FD have them. Kernel documentation "KVM_GET_STATS_FD".
//!
//! Histograms are left out.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{bail, Context, Result};
use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xAECE;
/// Bytes of a header, and of a descriptor without its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// More than any hypervisor has, in bytes.
const LIMIT: usize = 1 << 16;

/// The statistics of one vCPU. They may be read when it is gone.
pub struct Stats(File);

impl Stats {
    pub fn of(vcpu: &VcpuFd) -> Result<Self> {
        // SAFETY: an ioctl without an argument, on a vCPU.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error()).context("KVM_GET_STATS_FD failed");
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Adds what there is now to `sums`, by name.
    pub fn add_to(&self, sums: &mut BTreeMap<String, u64>) -> Result<()> {
        let mut bytes = vec![0; LIMIT];
        let len = self.0.read_at(&mut bytes, 0).context("the statistics cannot be read")?;
        for (name, value) in parse(bytes.get(..len).unwrap_or_default())? {
            *sums.entry(name).or_default() += value;
        }
        Ok(())
    }
}

/// The single numbers of a statistics file, with their names.
fn parse(bytes: &[u8]) -> Result<Vec<(String, u64)>> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b) as usize);
    let header = (word(4), word(8), word(16), word(20));
    let (Some(name_size), Some(count), Some(descriptors), Some(data)) = header else {
        bail!("the statistics are shorter than their header of {HEADER} bytes")
    };
    let mut found = Vec::new();
    for index in 0..count.min(LIMIT / DESCRIPTOR) {
        let one = || {
            let at = descriptors.checked_add(index.checked_mul(name_size.checked_add(DESCRIPTOR)?)?)?;
            let size = u16::from_le_bytes(*bytes.get(at.checked_add(6)?..)?.first_chunk()?);
            let place = data.checked_add(word(at.checked_add(8)?)?)?;
            let value = u64::from_le_bytes(*bytes.get(place..)?.first_chunk()?);
            let start = at.checked_add(DESCRIPTOR)?;
            let name = bytes.get(start..start.checked_add(name_size)?)?.split(|byte| *byte == 0).next()?;
            Some((String::from_utf8_lossy(name).into_owned(), value, size))
        };
        match one() {
            Some((name, value, 1)) => found.push((name, value)),
            Some(_) => {}
            None => bail!("the statistics end in the middle of number {index}"),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with two numbers and a histogram between them.
    fn file() -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0u32, 8, 3, 24, 24, 24 + 3 * 24] {
            bytes.extend(word.to_le_bytes());
        }
        for (name, size, offset) in [(b"exits\0\0\0", 1u16, 0u32), (b"buckets\0", 2, 8), (b"fulleigh", 1, 24)] {
            bytes.extend([0; 6]);
            bytes.extend(size.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
        }
        for value in [7u64, 1, 2, 9] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn numbers_without_histograms() {
        assert_eq!(parse(&file()).unwrap(), [("exits".into(), 7), ("fulleigh".into(), 9)]);
    }

    #[test]
    fn short_files_are_refused() {
        let whole = file();
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len}");
        }
    }
}
