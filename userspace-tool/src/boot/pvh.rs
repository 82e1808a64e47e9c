// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ELF kernels with a PVH note (Xen "x86/HVM direct boot ABI").
//!
//! Not supported: ELF kernels without that note, and modules other than one initial RAM disk.

use std::fs::File;

use anyhow::{bail, Result};
use linux_loader::loader::{elf, Elf, Error, KernelLoader, PvhBootCapability};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ensure_ram, load_initrd, memory_map, write_cmdline, Entry, Images};
use super::{CMDLINE, ELF_CMDLINE_SIZE, HIGH_MEMORY_START};

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6080;
/// "xEn3" with the first character's bit 7 set.
const MAGIC: u32 = 0x336E_C578;
/// The version with a memory map.
const VERSION: u32 = 1;

/// Loads an ELF kernel, its initrd and its command line.
pub fn load(memory: &GuestMemoryMmap, ram: u64, kernel: &mut File, images: &Images, rsdp: u64) -> Result<Entry> {
    let loaded = match Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_MEMORY_START))) {
        Ok(loaded) => loaded,
        Err(Error::Elf(elf::Error::ReadKernelImage)) => {
            bail!("a segment does not fit: the guest needs more --memory, or the file is cut off")
        }
        Err(error) => bail!("a damaged ELF file: {error}"),
    };
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        bail!("an ELF file without PVH note: build the kernel with CONFIG_PVH, or give a bzImage");
    };
    ensure_ram(ram, loaded.kernel_end)?;
    write_cmdline(memory, images.cmdline, ELF_CMDLINE_SIZE)?;
    let initrd = load_initrd(memory, ram, images.initrd, loaded.kernel_end, u64::MAX)?;

    let map = memory_map(ram);
    for (index, (addr, size, kind)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr: *addr, size: *size, type_: *kind as u32, reserved: 0 };
        let offset = index * std::mem::size_of::<hvm_memmap_table_entry>();
        memory.write_obj(entry, GuestAddress(MEMORY_MAP + offset as u64))?;
    }
    let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
    memory.write_obj(module, GuestAddress(MODULE_LIST))?;
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.size > 0),
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(START_INFO))?;
    Ok(Entry::Pvh { rip: entry.0, start_info: START_INFO })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;

    /// A 64-bit ELF file: one loaded segment at 1 MiB, and one note, which is PVH's if `note` is 18.
    fn image(note: u32) -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7FELF\x02\x01\x01");
        put(24, &0x10_0000u64.to_le_bytes()); // e_entry
        put(32, &64u64.to_le_bytes()); // e_phoff
        put(54, &56u16.to_le_bytes()); // e_phentsize
        put(56, &2u16.to_le_bytes()); // e_phnum
        let segment = |kind: u32, offset: u64, address: u64, size: u64| {
            let mut bytes = [kind.to_le_bytes(), [0; 4]].concat();
            for word in [offset, address, address, size, size, 4] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes
        };
        put(64, &segment(1, 0x800, 0x10_0000, 0x100));
        put(120, &segment(4, 0x400, 0, 20));
        put(0x400, &[4u32.to_le_bytes(), 4u32.to_le_bytes(), note.to_le_bytes()].concat());
        put(0x40C, b"Xen\0");
        put(0x410, &0x10_0040u32.to_le_bytes());
        put(0x800, &[0x90; 0x100]);
        image
    }

    fn boot(name: &str, image: &[u8]) -> Result<(Entry, GuestMemoryMmap)> {
        let path = std::env::temp_dir().join(format!("krab-test-{}-{name}", std::process::id()));
        std::fs::write(&path, image)?;
        let memory = map_ram(16 << 20)?;
        let images = Images { kernel: &path, initrd: Some(&path), cmdline: "quiet" };
        let entry = super::super::load(&memory, 16 << 20, &images, 0xE_0000);
        std::fs::remove_file(&path)?;
        Ok((entry?, memory))
    }

    #[test]
    fn start_info_is_filled() {
        let (entry, memory) = boot("pvh", &image(18)).unwrap();
        assert_eq!(entry, Entry::Pvh { rip: 0x10_0040, start_info: START_INFO });
        let info: hvm_start_info = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336E_C578, 1, 1));
        assert_eq!((info.rsdp_paddr, info.memmap_entries), (0xE_0000, 3));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), ((16 << 20) - 0x1000, 0x1000));
        let map: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr + 24)).unwrap();
        assert_eq!((map.addr, map.type_), (super::super::LOW_MEMORY_END, 2));
        let cmdline: [u8; 6] = memory.read_obj(GuestAddress(info.cmdline_paddr)).unwrap();
        assert_eq!(&cmdline, b"quiet\0");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_00FF)).unwrap(), 0x90);
    }

    #[test]
    fn refusals() {
        let mut far = image(18);
        far[64 + 24..64 + 32].copy_from_slice(&(1u64 << 40).to_le_bytes());
        let table = [
            ("no-note", image(17), "PVH note"),
            ("cut-elf", image(18)[..100].to_vec(), "damaged"),
            ("cut-segment", image(18)[..0x840].to_vec(), "cut off"),
            ("far", far, "--memory"),
        ];
        for (name, image, word) in table {
            let error = format!("{:#}", boot(name, &image).expect_err(name));
            assert!(error.contains(word), "{name}: {error}");
        }
    }
}
