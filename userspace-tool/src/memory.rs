// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest RAM: where it lies in the guest, how it is mapped here, and the SIZE argument.
//!
//! RAM fills the guest from address 0 up to the MMIO hole below 4 GiB (local APIC, IOAPIC, TSS and identity-map pages
//! of the hypervisor); the rest continues at 4 GiB.

use anyhow::{bail, Context, Result};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// First byte of the MMIO hole.
pub const MMIO_HOLE_START: u64 = 0xC000_0000;
/// First byte behind the MMIO hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Less than this cannot hold even a tiny kernel and its boot data.
pub const MIN_MEMORY: u64 = 4 << 20;
const PAGE: u64 = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Parses SIZE: a decimal number of bytes, or with a unit K, M, G or T (also KiB, KB and so on, always powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("unknown unit '{}': write for example 512M or 2G", unit.trim())),
    };
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) if number.is_empty() => return Err("not a number: write for example 512M or 2G".into()),
        Err(_) => return Err("too large".into()),
    };
    let bytes = number.checked_mul(1 << shift).ok_or("too large")?;
    if bytes < MIN_MEMORY {
        let hint = if shift == 0 { format!(" (did you mean {number}M?)") } else { String::new() };
        return Err(format!("a guest needs at least {}{hint}", show_size(MIN_MEMORY)));
    }
    if bytes % PAGE != 0 {
        return Err("must be a multiple of 4K".into());
    }
    Ok(bytes)
}

/// `bytes` in the largest unit that loses nothing.
pub fn show_size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{}G", b >> 30),
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{}M", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{}K", b >> 10),
        b => format!("{b} bytes"),
    }
}

/// Address and size of each piece of RAM for `size` bytes in all.
pub fn ram_layout(size: u64) -> Vec<(u64, u64)> {
    let mut layout = vec![(0, size.min(MMIO_HOLE_START))];
    if let Some(high) = size.checked_sub(MMIO_HOLE_START).filter(|&high| high > 0) {
        layout.push((HIGH_RAM_START, high));
    }
    layout
}

/// End of the RAM below the hole for `size` bytes in all.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(MMIO_HOLE_START)
}

/// Maps `size` bytes of guest RAM: private, anonymous, not reserved ahead, ready for transparent huge pages.
///
/// The mapping lasts until the process ends.
pub fn map_ram(size: u64) -> Result<GuestMemoryMmap> {
    let mut regions = Vec::new();
    for (address, len) in ram_layout(size) {
        let region = map_aligned(usize::try_from(len)?)
            .and_then(|region| GuestRegionMmap::new(region, GuestAddress(address)).context("address overflow"))
            .with_context(|| format!("cannot map {} of guest memory: give --memory less", show_size(size)))?;
        regions.push(region);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// Maps `len` bytes (whole pages) at an address that is a multiple of 2 MiB, as the guest's addresses are: only then can the
/// hypervisor map huge pages.
fn map_aligned(len: usize) -> Result<vm_memory::mmap::MmapRegion> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let Some(padded) = len.checked_add(HUGE_PAGE) else { bail!("too large") };
    // SAFETY: A new anonymous mapping at an address of the kernel's choice touches no memory in use.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), padded, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    let start = (base as usize).next_multiple_of(HUGE_PAGE);
    let head = start - base as usize;
    // SAFETY: All three ranges lie in the mapping just made: `head` bytes before `start` (less than HUGE_PAGE), `len`
    // bytes that stay, and the rest behind them. Nobody else knows these addresses yet.
    unsafe {
        if head > 0 {
            libc::munmap(base, head);
        }
        if HUGE_PAGE > head {
            libc::munmap((start + len) as *mut _, HUGE_PAGE - head);
        }
        // Only advice: a host without transparent huge pages is slower, not wrong.
        libc::madvise(start as *mut _, len, libc::MADV_HUGEPAGE);
        let builder = MmapRegionBuilder::new(len).with_raw_mmap_pointer(start as *mut u8);
        Ok(builder.with_mmap_prot(prot).with_mmap_flags(flags).build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4194304", 4 << 20),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MiB", 512 << 20),
            ("512MB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("8192K", 8 << 20),
            ("2G", 2 << 30),
            (" 1T ", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_say_why() {
        for (text, word) in [
            ("", "not a number"),
            ("G", "not a number"),
            ("-1G", "unknown unit"),
            ("1.5G", "unknown unit"),
            ("0x1000000", "unknown unit"),
            ("2X", "unknown unit"),
            ("512", "512M"),
            ("0", "at least"),
            ("1M", "at least"),
            ("4194305", "multiple"),
            ("99999999999999999999G", "too large"),
            ("18446744073709551615G", "too large"),
        ] {
            let error = parse_size(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn layout_splits_at_the_hole() {
        assert_eq!(ram_layout(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_layout(MMIO_HOLE_START), [(0, MMIO_HOLE_START)]);
        assert_eq!(ram_layout(MMIO_HOLE_START + PAGE), [(0, MMIO_HOLE_START), (HIGH_RAM_START, PAGE)]);
        assert_eq!(ram_layout(5 << 30), [(0, 3 << 30), (HIGH_RAM_START, 2 << 30)]);
    }

    #[test]
    fn ram_is_mapped_aligned_and_usable() {
        let size = (5 << 30) + PAGE;
        let memory = map_ram(size).unwrap();
        for (address, len) in ram_layout(size) {
            let host = memory.get_host_address(GuestAddress(address)).unwrap() as usize;
            assert_eq!(host % HUGE_PAGE, 0);
            memory.write_obj(0x55AAu16, GuestAddress(address + len - 2)).unwrap();
            assert!(memory.write_obj(0u8, GuestAddress(address + len)).is_err());
        }
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert!(map_ram(1 << 56).unwrap_err().to_string().contains("--memory"));
    }
}
