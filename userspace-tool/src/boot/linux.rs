// SPDX-License-Identifier: Apache-2.0 OR MIT
//! bzImage through the 64-bit boot protocol (Linux "The Linux/x86 Boot Protocol").
//!
//! Not supported: kernels without a 64-bit entry (protocol before 2.12, or 32-bit), setup data.

use std::fs::File;

use anyhow::{anyhow, ensure, Result};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{ensure_ram, load_initrd, memory_map, write_cmdline, Entry, Images, Initrd};
use super::{CMDLINE, HIGH_MEMORY_START, ZERO_PAGE};

/// Where the setup header starts in the file and in the zero page.
const SETUP_HEADER: usize = 0x1F1;
/// `loadflags`: the kernel goes to 1 MiB, not below.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// First protocol version with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020C;
/// The 64-bit entry lies so far behind the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// "Some boot loader that has no number".
const LOADER_UNDEFINED: u8 = 0xFF;

/// Loads a bzImage, its initrd and its command line.
pub fn load(
    memory: &GuestMemoryMmap,
    ram: u64,
    kernel: &mut File,
    file_header: &[u8],
    images: &Images,
    rsdp: u64,
) -> Result<Entry> {
    let header = parse_header(file_header)?;
    // The kernel decompresses itself to its preferred address at the lowest, and says how much room that takes.
    let unpacked = header.pref_address.max(HIGH_MEMORY_START).saturating_add(header.init_size.into());
    let packed = HIGH_MEMORY_START.saturating_add(kernel.metadata()?.len());
    let kernel_end = unpacked.max(packed);
    ensure_ram(ram, kernel_end)?;

    let loaded = BzImage::load(memory, Some(GuestAddress(HIGH_MEMORY_START)), kernel, None)?;
    let header = loaded.setup_header.ok_or_else(|| anyhow!("no setup header"))?;
    write_cmdline(memory, images.cmdline, (header.cmdline_size as usize).saturating_add(1))?;
    let limit = u64::from(header.initrd_addr_max).saturating_add(1);
    let initrd = load_initrd(memory, ram, images.initrd, kernel_end, limit)?;
    memory.write_obj(zero_page(header, ram, initrd, rsdp), GuestAddress(ZERO_PAGE))?;
    Ok(Entry::Long { rip: loaded.kernel_load.0.saturating_add(ENTRY_64), zero_page: ZERO_PAGE })
}

/// The setup header of a file that starts with `file`, if it has a 64-bit entry.
fn parse_header(file: &[u8]) -> Result<setup_header> {
    let len = std::mem::size_of::<setup_header>();
    let bytes = file.get(SETUP_HEADER..SETUP_HEADER + len).ok_or_else(|| anyhow!("the file is cut off"))?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(bytes);
    let version = header.version;
    ensure!(
        version >= PROTOCOL_2_12,
        "boot protocol {}.{:02} is too old: 2.12 (Linux 3.8) is needed",
        version >> 8,
        version & 0xFF
    );
    ensure!(header.loadflags & LOADED_HIGH != 0, "a zImage: only a bzImage can be booted");
    ensure!(header.xloadflags & XLF_KERNEL_64 != 0, "a kernel without 64-bit entry: an x86-64 kernel is needed");
    Ok(header)
}

/// The zero page: the kernel's own header with the loader's fields filled in, memory map, ACPI.
fn zero_page(header: setup_header, ram: u64, initrd: Initrd, rsdp: u64) -> boot_params {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    // Always below 4 GiB, see `load_initrd`.
    params.hdr.ramdisk_image = initrd.address as u32;
    params.hdr.ramdisk_size = initrd.size as u32;
    let map = memory_map(ram);
    let mut table = params.e820_table;
    for (entry, (addr, size, kind)) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, type_: *kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{map_ram, HIGH_RAM_START};
    use std::io::Write;
    use std::path::{Path, PathBuf};

    /// The smallest file that passes for a bzImage: header, one setup sector, 4 KiB of "kernel".
    fn image() -> Vec<u8> {
        let mut image = vec![0; 1024 + 4096];
        image[0x1F1] = 1; // setup_sects
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020Fu16.to_le_bytes());
        image[0x211] = LOADED_HIGH;
        image[0x22C..0x230].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes()); // initrd_addr_max
        image[0x236] = XLF_KERNEL_64 as u8;
        image[0x238..0x23C].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes()); // pref_address
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes()); // init_size
        image[1024..].fill(0xC3);
        image
    }

    struct TempFile(PathBuf);

    impl TempFile {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("krab-test-{}-{name}", std::process::id()));
            File::create(&path).unwrap().write_all(bytes).unwrap();
            TempFile(path)
        }
    }

    impl Drop for TempFile {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn boot(name: &str, image: &[u8], ram: u64, cmdline: &str, initrd: Option<&Path>) -> Result<(Entry, boot_params)> {
        let file = TempFile::new(name, image);
        let memory = map_ram(ram)?;
        let images = Images { kernel: &file.0, initrd, cmdline };
        let entry = super::super::load(&memory, ram, &images, 0xE_0000)?;
        Ok((entry, memory.read_obj(GuestAddress(ZERO_PAGE))?))
    }

    #[test]
    fn zero_page_is_filled() {
        let initrd = TempFile::new("initrd", &[1; 5000]);
        let (entry, params) = boot("good", &image(), 64 << 20, "console=ttyS0", Some(&initrd.0)).unwrap();
        assert_eq!(entry, Entry::Long { rip: 0x10_0200, zero_page: ZERO_PAGE });
        let header = params.hdr;
        assert_eq!({ header.header }, 0x5372_6448);
        assert_eq!({ header.cmd_line_ptr }, CMDLINE as u32);
        assert_eq!({ header.type_of_loader }, 0xFF);
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), ((64 << 20) - 0x2000, 5000));
        assert_eq!({ params.acpi_rsdp_addr }, 0xE_0000);
        assert_eq!({ params.e820_entries }, 3);
    }

    #[test]
    fn initrd_respects_the_header() {
        let mut image = image();
        image[0x22C..0x230].copy_from_slice(&0x37FF_FFFFu32.to_le_bytes());
        let initrd = TempFile::new("initrd-max", &[1; 4096]);
        let (_, params) = boot("max", &image, 5 << 30, "", Some(&initrd.0)).unwrap();
        assert_eq!({ params.hdr.ramdisk_image }, 0x37FF_F000);
        let table = params.e820_table;
        assert_eq!({ params.e820_entries }, 4);
        assert_eq!(({ table[3].addr }, { table[3].size }), (HIGH_RAM_START, 2 << 30));
    }

    #[test]
    fn refusals() {
        let with = |offset: usize, bytes: &[u8]| {
            let mut image = image();
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
            image
        };
        let long = "x".repeat(2048);
        let table: [(&str, Vec<u8>, u64, &str, &str); 6] = [
            ("old", with(0x206, &[0x0B, 2]), 64 << 20, "", "2.11 is too old"),
            ("zimage", with(0x211, &[0]), 64 << 20, "", "zImage"),
            ("x32", with(0x236, &[0, 0]), 64 << 20, "", "64-bit"),
            ("small", image(), 16 << 20, "", "at least 17M"),
            ("cmdline", image(), 64 << 20, &long, "at most 2047"),
            ("cut", image()[..0x230].to_vec(), 64 << 20, "", "cut off"),
        ];
        for (name, image, ram, cmdline, word) in table {
            let error = format!("{:#}", boot(name, &image, ram, cmdline, None).err().expect(name));
            assert!(error.contains(word), "{name}: {error}");
        }
    }

    #[test]
    fn sizes_in_the_header_may_lie() {
        for (offset, len) in [(0x258, 8), (0x260, 4), (0x1F1, 1)] {
            let mut image = image();
            image[offset..offset + len].fill(0xFF);
            assert!(boot(&format!("lie-{offset:x}"), &image, 64 << 20, "", None).is_err());
        }
    }

    #[test]
    fn large_initrd_is_refused() {
        let initrd = TempFile::new("initrd-large", &vec![1; 4 << 20]);
        let error = boot("large", &image(), 20 << 20, "", Some(&initrd.0)).err().unwrap();
        assert!(format!("{error:#}").contains("does not fit"), "{error:#}");
    }
}
