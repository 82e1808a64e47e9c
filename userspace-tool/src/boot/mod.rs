// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loads a kernel, its initial RAM disk and its command line, and says in which state the first CPU starts.
//!
//! Low memory during the boot; a kernel takes what it needs from here before it uses this memory:
//!
//! | address        | contents                                        |
//! |----------------|-------------------------------------------------|
//! | 0x500          | GDT                                             |
//! | 0x6000         | PVH start info, module list and memory map      |
//! | 0x7000         | zero page (`boot_params`)                       |
//! | 0x9000         | page tables, six pages                          |
//! | 0x2_0000       | command line                                    |
//! | 0x9_FC00       | end of conventional memory                      |
//! | 0xE_0000       | ACPI tables                                     |
//! | 0x10_0000      | bzImage                                         |

pub mod linux;
pub mod pvh;
pub mod tables;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::{anyhow, bail, ensure, Context, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::memory::{low_ram_end, ram_layout, show_size};

pub const ZERO_PAGE: u64 = 0x7000;
pub const CMDLINE: u64 = 0x2_0000;
/// First address behind conventional memory.
pub const LOW_MEMORY_END: u64 = 0x9_FC00;
/// First address behind the BIOS area.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Linux takes no more from an ELF image's boot protocol (COMMAND_LINE_SIZE of x86), with the final NUL.
const ELF_CMDLINE_SIZE: usize = 2048;
/// Enough of a file to tell what it is.
const HEADER_LEN: usize = 0x280;
const PAGE: u64 = 4096;

/// How the first CPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode, RSI holds the zero page.
    Long { rip: u64, zero_page: u64 },
    /// PVH: 32-bit protected mode without paging, EBX holds the start info.
    Pvh { rip: u64, start_info: u64 },
}

/// What to boot.
pub struct Images<'a> {
    pub kernel: &'a Path,
    pub initrd: Option<&'a Path>,
    pub cmdline: &'a str,
}

/// Where the initial RAM disk lies; a size of 0 means that there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Initrd {
    pub address: u64,
    pub size: u64,
}

/// Kinds of memory in the map for the guest, with E820 numbers (which PVH shares).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    Ram = 1,
    Reserved = 2,
}

/// Address, size and kind of each range that the guest should know of, for `ram` bytes of memory.
pub fn memory_map(ram: u64) -> Vec<(u64, u64, MapKind)> {
    let mut map = vec![
        (0, LOW_MEMORY_END, MapKind::Ram),
        (LOW_MEMORY_END, HIGH_MEMORY_START - LOW_MEMORY_END, MapKind::Reserved),
    ];
    for (address, size) in ram_layout(ram) {
        let start = address.max(HIGH_MEMORY_START);
        map.push((start, address + size - start, MapKind::Ram));
    }
    map
}

/// Loads `images` into `memory` of `ram` bytes. `rsdp` is the address of the ACPI tables.
pub fn load(memory: &GuestMemoryMmap, ram: u64, images: &Images, rsdp: u64) -> Result<Entry> {
    let name = images.kernel.display();
    let mut kernel = open(images.kernel).context("kernel")?;
    let mut header = Vec::new();
    (&kernel).take(HEADER_LEN as u64).read_to_end(&mut header).with_context(|| format!("cannot read kernel {name}"))?;
    kernel.rewind()?;
    match Format::of(&header) {
        Some(Format::BzImage) => linux::load(memory, ram, &mut kernel, &header, images, rsdp),
        Some(Format::Elf) => pvh::load(memory, ram, &mut kernel, images, rsdp),
        None => Err(anyhow!("{name} is no kernel image: neither an x86 bzImage nor an ELF vmlinux")),
    }
    .with_context(|| format!("cannot boot {name}"))
}

#[derive(Debug, PartialEq, Eq)]
enum Format {
    BzImage,
    Elf,
}

impl Format {
    fn of(header: &[u8]) -> Option<Self> {
        if header.starts_with(b"\x7FELF") {
            Some(Format::Elf)
        } else if header.get(0x202..0x206) == Some(b"HdrS") {
            Some(Format::BzImage)
        } else {
            None
        }
    }
}

/// Opens a file that is not a directory.
fn open(path: &Path) -> Result<File> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(!file.metadata()?.is_dir(), "{} is a directory", path.display());
    Ok(file)
}

/// Writes the command line, which with its final NUL must fit `limit` bytes.
fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str, limit: usize) -> Result<()> {
    let limit = limit.min((LOW_MEMORY_END - CMDLINE) as usize);
    ensure!(!cmdline.contains('\0'), "the command line holds a NUL");
    ensure!(
        cmdline.len() < limit,
        "the command line has {} bytes, but this kernel takes at most {}",
        cmdline.len(),
        limit - 1
    );
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

/// Where an initial RAM disk of `size` bytes goes: as high as possible below `limit`, but not below `floor`.
fn place_initrd(size: u64, floor: u64, limit: u64) -> Result<u64> {
    ensure!(size > 0, "the initrd is empty");
    match limit.checked_sub(size).map(|address| address & !(PAGE - 1)) {
        Some(address) if address >= floor => Ok(address),
        _ => bail!(
            "the initrd of {} bytes does not fit between {floor:#x} and {limit:#x}: give the guest more --memory",
            size
        ),
    }
}

/// Loads the initial RAM disk, if one is given, between `floor` and `limit` (and the end of low RAM).
fn load_initrd(memory: &GuestMemoryMmap, ram: u64, path: Option<&Path>, floor: u64, limit: u64) -> Result<Initrd> {
    let Some(path) = path else { return Ok(Initrd::default()) };
    let name = path.display();
    let mut file = open(path).context("initrd")?;
    let size = file.metadata()?.len();
    let address = place_initrd(size, floor, limit.min(low_ram_end(ram))).with_context(|| format!("initrd {name}"))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, usize::try_from(size)?)
        .with_context(|| format!("cannot read initrd {name}"))?;
    Ok(Initrd { address, size })
}

/// An error that names the memory that this kernel needs, if `ram` has not `needed` bytes below the hole.
fn ensure_ram(ram: u64, needed: u64) -> Result<()> {
    ensure!(
        needed <= low_ram_end(ram),
        "this kernel needs at least {}, but the guest has {}: give it more --memory",
        show_size(needed.checked_next_multiple_of(1 << 20).unwrap_or(needed)),
        show_size(ram)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{map_ram, HIGH_RAM_START, MMIO_HOLE_START};

    #[test]
    fn map_of_small_memory() {
        let map = memory_map(256 << 20);
        assert_eq!(map.last(), Some(&(HIGH_MEMORY_START, (256 << 20) - HIGH_MEMORY_START, MapKind::Ram)));
        assert_eq!(map.len(), 3);
    }

    #[test]
    fn map_is_sorted_and_free_of_overlap_and_keeps_the_hole() {
        for ram in [16 << 20, MMIO_HOLE_START, MMIO_HOLE_START + PAGE, 16 << 30] {
            let map = memory_map(ram);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{map:x?}");
            }
            let end = map.iter().map(|(start, size, _)| start + size).max().unwrap();
            assert_eq!(end, if ram > MMIO_HOLE_START { ram + HIGH_RAM_START - MMIO_HOLE_START } else { ram });
            assert!(!map.iter().any(|(start, size, _)| *start < HIGH_RAM_START && start + size > MMIO_HOLE_START));
            let usable: u64 = map.iter().filter(|entry| entry.2 == MapKind::Ram).map(|entry| entry.1).sum();
            assert_eq!(usable, ram - (HIGH_MEMORY_START - LOW_MEMORY_END));
        }
    }

    #[test]
    fn formats() {
        assert_eq!(Format::of(b"\x7FELF"), Some(Format::Elf));
        let mut image = vec![0; HEADER_LEN];
        assert_eq!(Format::of(&image), None);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(Format::of(&image), Some(Format::BzImage));
        assert_eq!(Format::of(&image[..0x205]), None);
        assert_eq!(Format::of(b"\x1F\x8B"), None);
        assert_eq!(Format::of(b""), None);
    }

    #[test]
    fn cmdline_limits() {
        let memory = map_ram(16 << 20).unwrap();
        write_cmdline(&memory, &"x".repeat(2047), 2048).unwrap();
        let last: [u8; 2] = memory.read_obj(GuestAddress(CMDLINE + 2046)).unwrap();
        assert_eq!(last, [b'x', 0]);
        let error = write_cmdline(&memory, &"x".repeat(2048), 2048).unwrap_err().to_string();
        assert!(error.contains("2048 bytes") && error.contains("2047"), "{error}");
        assert!(write_cmdline(&memory, "a\0b", 2048).is_err());
        // A kernel that claims no limit must not make us write over the BIOS area.
        assert!(write_cmdline(&memory, &"x".repeat(0x8_0000), usize::MAX).is_err());
    }

    #[test]
    fn initrd_goes_high() {
        assert_eq!(place_initrd(0x1800, 0x100_0000, 0x200_0000).unwrap(), 0x1FF_E000);
        assert_eq!(place_initrd(0x1000, 0x1000, 0x2000).unwrap(), 0x1000);
        assert!(place_initrd(0x1001, 0x1000, 0x2000).is_err());
        assert!(place_initrd(0x3000, 0, 0x2000).unwrap_err().to_string().contains("--memory"));
        assert!(place_initrd(0, 0, 0x2000).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn files_that_are_missing_or_no_kernel() {
        let memory = map_ram(16 << 20).unwrap();
        let load = |path: &str| {
            let images = Images { kernel: Path::new(path), initrd: None, cmdline: "" };
            format!("{:#}", load(&memory, 16 << 20, &images, 0).unwrap_err())
        };
        assert!(load("/nonexistent/vmlinuz").contains("cannot open /nonexistent/vmlinuz: No such file"));
        assert!(load("/dev/null").contains("no kernel image"));
        assert!(load("/").contains("directory"));
    }
}
