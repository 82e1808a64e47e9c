// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ACPI tables: RSDP, XSDT, FADT, FACS, MADT, DSDT, for a PC without PCI.
//!
//! ACPI Specification "ACPI Software Programming Model". The platform is a full one (not hardware-reduced): PM1a event
//! and control blocks, S5, reset register. Not described: power button, PM timer, processor power states.

mod aml;

use anyhow::{ensure, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::cmos::CENTURY;
use crate::devices::ports::{ResetControl, PM1_CONTROL, SLEEP_TYPE_S5};
use crate::devices::{CMOS_BASE, COM1_BASE, COM1_IRQ, PM1_BASE, PVPANIC, RESET_CONTROL};

/// Where the tables lie: in the BIOS area, where a kernel that was not told also looks for the RSDP.
pub const RSDP_ADDRESS: u64 = 0xE_0000;
/// End of that area.
const TABLES_END: u64 = 0x10_0000;
/// The MADT of xAPIC entries has one byte for the APIC id, and 0xFF means all of them.
pub const MAX_CPUS: u32 = 255;

/// Addresses of the hypervisor's APICs after reset.
pub const LAPIC_ADDRESS: u32 = 0xFEE0_0000;
pub const IOAPIC_ADDRESS: u32 = 0xFEC0_0000;

const OEM: &[u8; 6] = b"KRAB  ";
const OEM_TABLE: &[u8; 8] = b"KRABVM  ";
const CREATOR: &[u8; 4] = b"KRAB";
const REVISION: u32 = 1;

const RSDP_LEN: usize = 36;
/// The part of the RSDP that ACPI 1.0 knew, with a checksum of its own.
const RSDP_V1_LEN: usize = 20;

/// ACPI's interrupt, unused but required by the FADT.
const SCI_IRQ: u8 = 9;

/// Writes all tables for `cpus` CPUs with APIC ids 0 to `cpus` - 1; returns the RSDP's address.
pub fn write_tables(memory: &GuestMemoryMmap, cpus: u32) -> Result<u64> {
    memory.write_slice(&build(cpus)?, GuestAddress(RSDP_ADDRESS))?;
    Ok(RSDP_ADDRESS)
}

/// The tables one after the other, as they lie from [`RSDP_ADDRESS`] on.
fn build(cpus: u32) -> Result<Vec<u8>> {
    ensure!((1..=MAX_CPUS).contains(&cpus), "at most {MAX_CPUS} CPUs fit the ACPI tables");
    let mut area = Area(vec![0; RSDP_LEN]);
    let facs = area.add(&facs());
    let dsdt = area.add(&dsdt());
    let fadt = area.add(&fadt(facs, dsdt));
    let madt = area.add(&madt(cpus));
    let entries = [fadt.to_le_bytes(), madt.to_le_bytes()].concat();
    let xsdt = area.add(&table(b"XSDT", 1, &entries));
    let Area(mut bytes) = area;
    bytes[..RSDP_LEN].copy_from_slice(&rsdp(xsdt));
    ensure!(bytes.len() as u64 <= TABLES_END - RSDP_ADDRESS, "the ACPI tables do not fit the BIOS area");
    Ok(bytes)
}

/// Memory that fills up from [`RSDP_ADDRESS`].
struct Area(Vec<u8>);

impl Area {
    /// Appends a table, aligned as the FACS demands, and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(64), 0);
        let address = RSDP_ADDRESS + self.0.len() as u64;
        self.0.extend_from_slice(table);
        address
    }
}

/// What makes the sum of `bytes` zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// A table: the common header, then `body`.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_LEN: usize = 36;
    let mut table = signature.to_vec();
    table.extend_from_slice(&((HEADER_LEN + body.len()) as u32).to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(OEM);
    table.extend_from_slice(OEM_TABLE);
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(CREATOR);
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(body);
    table[9] = checksum(&table);
    table
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend_from_slice(OEM);
    rsdp.push(2); // revision
    rsdp.extend_from_slice(&0u32.to_le_bytes()); // no RSDT
    rsdp.extend_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    rsdp.extend_from_slice(&xsdt.to_le_bytes());
    rsdp.resize(RSDP_LEN, 0);
    rsdp[8] = checksum(&rsdp[..RSDP_V1_LEN]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

fn facs() -> Vec<u8> {
    const LEN: u32 = 64;
    const VERSION: u8 = 1;
    let mut facs = [b"FACS".as_slice(), &LEN.to_le_bytes()].concat();
    facs.resize(LEN as usize, 0);
    facs[32] = VERSION;
    facs
}

/// Flags of the FADT. The power and sleep buttons count as control methods that the DSDT does not have.
const WBINVD: u32 = 1 << 0;
const PROC_C1: u32 = 1 << 2;
const PWR_BUTTON: u32 = 1 << 4;
const SLP_BUTTON: u32 = 1 << 5;
const RESET_REG_SUP: u32 = 1 << 10;
/// IAPC_BOOT_ARCH: there are legacy devices (COM1), no 8042 keyboard and no VGA to probe for.
const LEGACY_DEVICES: u16 = 1 << 0;
const VGA_NOT_PRESENT: u16 = 1 << 2;

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    const LEN: usize = 276;
    const REVISION: u8 = 6;
    const NO_C_STATE: u16 = 0xFFFF;
    let (events, control) = (PM1_BASE, PM1_BASE + PM1_CONTROL);
    let fields: [(usize, &[u8]); 17] = [
        (36, &(facs as u32).to_le_bytes()),
        (40, &(dsdt as u32).to_le_bytes()),
        (46, &[SCI_IRQ]),
        (56, &events.to_le_bytes()),
        (64, &control.to_le_bytes()),
        (88, &[PM1_CONTROL as u8]), // length of the event block
        (89, &[2]),                 // length of the control block
        (96, &NO_C_STATE.to_le_bytes()),
        (98, &NO_C_STATE.to_le_bytes()),
        (108, &[CENTURY]),
        (109, &(LEGACY_DEVICES | VGA_NOT_PRESENT).to_le_bytes()),
        (112, &(WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP).to_le_bytes()),
        (116, &port(RESET_CONTROL, 8, 1)),
        (128, &[ResetControl::RESET_VALUE]),
        (140, &dsdt.to_le_bytes()),
        (148, &port(events, 32, 2)),
        (172, &port(control, 16, 2)),
    ];
    let mut fadt = vec![0; LEN];
    for (offset, bytes) in fields {
        fadt[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    table(b"FACP", REVISION, &fadt[36..])
}

/// A Generic Address Structure for `bits` in port space. `access`: 1 is by byte, 2 by word.
fn port(address: u16, bits: u8, access: u8) -> [u8; 12] {
    const SYSTEM_IO: u8 = 1;
    let [low, high] = address.to_le_bytes();
    [SYSTEM_IO, bits, 0, access, low, high, 0, 0, 0, 0, 0, 0]
}

fn madt(cpus: u32) -> Vec<u8> {
    const REVISION: u8 = 5;
    const PC_AT_COMPATIBLE: u32 = 1; // the 8259s are there too
    const AS_THE_BUS: u16 = 0x0000;
    const ACTIVE_HIGH_LEVEL: u16 = 0x000D;
    let mut body = [LAPIC_ADDRESS.to_le_bytes(), PC_AT_COMPATIBLE.to_le_bytes()].concat();
    for id in 0..cpus as u8 {
        // Processor local APIC: UID, APIC id, enabled.
        body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // IOAPIC: id 0 as the hypervisor's has after reset, interrupts from 0 on.
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Interrupt source overrides: the PIT's IRQ 0 is on pin 2, and the SCI is level-triggered.
    for (irq, gsi, flags) in [(0, 2, AS_THE_BUS), (SCI_IRQ, SCI_IRQ, ACTIVE_HIGH_LEVEL)] {
        body.extend_from_slice(&[2, 10, 0, irq, gsi, 0, 0, 0]);
        body.extend_from_slice(&flags.to_le_bytes());
    }
    // Local APIC NMI: LINT1 of all CPUs.
    body.extend_from_slice(&[4, 6, 0xFF, 0, 0, 1]);
    table(b"APIC", REVISION, &body)
}

fn dsdt() -> Vec<u8> {
    const REVISION: u8 = 2;
    let sleep = [aml::byte(SLEEP_TYPE_S5), aml::byte(0), aml::byte(0), aml::byte(0)];
    let com1 = [
        aml::name(b"_HID", aml::pnp_id(0x0501)),
        aml::name(b"_UID", aml::byte(0)),
        aml::name(b"_CRS", aml::resources(&[aml::ports(COM1_BASE, 8), aml::edge_interrupt(COM1_IRQ)])),
    ];
    let clock =
        [aml::name(b"_HID", aml::pnp_id(0x0B00)), aml::name(b"_CRS", aml::resources(&[aml::ports(CMOS_BASE, 2)]))];
    let pvpanic =
        [aml::name(b"_HID", aml::string("QEMU0001")), aml::name(b"_CRS", aml::resources(&[aml::ports(PVPANIC, 1)]))];
    let devices = [aml::device(b"COM1", &com1), aml::device(b"RTC_", &clock), aml::device(b"PEVT", &pvpanic)];
    table(b"DSDT", REVISION, &[aml::name(b"_S5_", aml::package(&sleep)), aml::scope(b"_SB_", &devices)].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a guest address, as long as its header says.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let start = (address - RSDP_ADDRESS) as usize;
        &area[start..start + u32_at(area, start + 4) as usize]
    }

    /// Signature and bytes of all tables that the XSDT and the FADT point to.
    fn tables(area: &[u8]) -> Vec<(&[u8], &[u8])> {
        let xsdt = table(area, u64_at(area, 24));
        let mut found = vec![(&xsdt[..4], xsdt)];
        for entry in xsdt[36..].chunks(8) {
            let table = table(area, u64_at(entry, 0));
            found.push((&table[..4], table));
            if &table[..4] == b"FACP" {
                let dsdt = self::table(area, u64_at(table, 140));
                assert_eq!(u64::from(u32_at(table, 40)), u64_at(table, 140));
                found.push((&dsdt[..4], dsdt));
            }
        }
        found
    }

    #[test]
    fn every_checksum_is_right() {
        for cpus in [1, 2, 64, MAX_CPUS] {
            let area = build(cpus).unwrap();
            assert_eq!(&area[..8], b"RSD PTR ");
            assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
            let tables = tables(&area);
            let names: Vec<_> = tables.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"DSDT", b"APIC"]);
            for (name, bytes) in tables {
                assert_eq!(sum(bytes), 0, "{name:?}");
            }
        }
    }

    #[test]
    fn madt_lists_each_cpu_once() {
        let area = build(3).unwrap();
        let (_, madt) = *tables(&area).last().unwrap();
        let (mut rest, mut ids, mut overrides) = (&madt[44..], vec![], vec![]);
        while let [kind, len, ..] = rest {
            match kind {
                0 => ids.push((rest[2], rest[3], u32_at(rest, 4))),
                2 => overrides.push((rest[3], u32_at(rest, 4))),
                _ => {}
            }
            rest = &rest[usize::from(*len)..];
        }
        assert_eq!(ids, [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
        assert_eq!(overrides, [(0, 2), (9, 9)]);
        assert!(rest.is_empty());
    }

    #[test]
    fn fadt_names_the_devices_that_exist() {
        let area = build(1).unwrap();
        let fadt = tables(&area)[1].1;
        assert_eq!(fadt.len(), 276);
        assert_eq!(u32_at(fadt, 36) % 64, 0, "FACS alignment");
        assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64)), (0x600, 0x604));
        assert_eq!(u32_at(fadt, 112) & (1 << 20), 0, "not hardware-reduced");
        assert_eq!(fadt[116..119], [1, 8, 0], "reset register in port space");
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0xCF9, 6));
    }

    #[test]
    fn dsdt_has_s5_with_the_type_of_the_device() {
        let dsdt = dsdt();
        let name = [0x08, b'_', b'S', b'5', b'_', 0x12];
        let at = dsdt.windows(name.len()).position(|window| window == name).expect("_S5_");
        let package = &dsdt[at + name.len()..];
        assert_eq!(package[..7], [7, 4, 0x0A, SLEEP_TYPE_S5, 0, 0, 0]);
    }

    #[test]
    fn too_many_cpus_are_refused() {
        assert!(build(0).is_err());
        assert!(build(MAX_CPUS + 1).is_err());
    }
}
