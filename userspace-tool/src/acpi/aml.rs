// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The few words of AML that the DSDT needs. ACPI Specification "ACPI Machine Language (AML) Specification" and
//! "Resource Data Types for ACPI".
//!
//! Written here because the acpi_tables crate does not compile with this crate's minimum Rust version.

/// A name of four characters.
pub type NameSeg = [u8; 4];

const ZERO_OP: u8 = 0x00;
const NAME_OP: u8 = 0x08;
const BYTE_PREFIX: u8 = 0x0A;
const DWORD_PREFIX: u8 = 0x0C;
const STRING_PREFIX: u8 = 0x0D;
const SCOPE_OP: u8 = 0x10;
const BUFFER_OP: u8 = 0x11;
const PACKAGE_OP: u8 = 0x12;
const DEVICE_OP: [u8; 2] = [0x5B, 0x82];
const ROOT: u8 = b'\\';
const IO_PORTS: u8 = 0x47;
const EXTENDED_INTERRUPT: u8 = 0x89;
const END_TAG: [u8; 2] = [0x79, 0];

/// The length of `body` with the encoded length itself, as AML writes it.
fn package_length(body: usize) -> Vec<u8> {
    if body + 1 < 1 << 6 {
        return vec![(body + 1) as u8];
    }
    // The first byte: number of further bytes and the lowest four bits; each further byte holds eight bits more.
    let further = if body + 2 < 1 << 12 { 1 } else { 2 };
    let length = body + 1 + further;
    let mut bytes = vec![((further << 6) | length & 0xF) as u8];
    bytes.extend((0..further).map(|index| (length >> (4 + 8 * index)) as u8));
    bytes
}

fn with_length(opcode: &[u8], body: &[u8]) -> Vec<u8> {
    [opcode, &package_length(body.len()), body].concat()
}

/// An integer of one byte.
pub fn byte(value: u8) -> Vec<u8> {
    if value == 0 {
        vec![ZERO_OP]
    } else {
        vec![BYTE_PREFIX, value]
    }
}

/// A string of ASCII characters.
pub fn string(text: &str) -> Vec<u8> {
    [&[STRING_PREFIX], text.as_bytes(), &[0]].concat()
}

/// The id "PNPxxxx" with the hexadecimal `number`, as a compressed integer.
pub fn pnp_id(number: u16) -> Vec<u8> {
    let [high, low] = number.to_be_bytes();
    vec![DWORD_PREFIX, 0x41, 0xD0, high, low]
}

/// `Name (name, object)`
pub fn name(name: &NameSeg, object: Vec<u8>) -> Vec<u8> {
    [&[NAME_OP], name.as_slice(), &object].concat()
}

/// `Package () { items }`
pub fn package(items: &[Vec<u8>]) -> Vec<u8> {
    with_length(&[PACKAGE_OP], &[&[items.len() as u8], items.concat().as_slice()].concat())
}

/// `Device (name) { objects }`
pub fn device(name: &NameSeg, objects: &[Vec<u8>]) -> Vec<u8> {
    with_length(&DEVICE_OP, &[name.as_slice(), &objects.concat()].concat())
}

/// `Scope (\name) { objects }`
pub fn scope(name: &NameSeg, objects: &[Vec<u8>]) -> Vec<u8> {
    with_length(&[SCOPE_OP], &[&[ROOT], name.as_slice(), &objects.concat()].concat())
}

/// `ResourceTemplate () { descriptors }`
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    let template = [descriptors.concat().as_slice(), &END_TAG].concat();
    with_length(&[BUFFER_OP], &[byte(template.len() as u8), template].concat())
}

/// `len` ports from `base` on.
pub fn ports(base: u16, len: u8) -> Vec<u8> {
    const DECODE_16_BITS: u8 = 1;
    const ALIGNMENT: u8 = 1;
    let [low, high] = base.to_le_bytes();
    vec![IO_PORTS, DECODE_16_BITS, low, high, low, high, ALIGNMENT, len]
}

/// An interrupt, edge-triggered and active high, not shared.
pub fn edge_interrupt(gsi: u32) -> Vec<u8> {
    const CONSUMER_EDGE: u8 = 0b11;
    [&[EXTENDED_INTERRUPT, 6, 0, CONSUMER_EDGE, 1], gsi.to_le_bytes().as_slice()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        assert_eq!(package_length(0), [1]);
        assert_eq!(package_length(62), [63]);
        assert_eq!(package_length(63), [0x41, 0x04]);
        assert_eq!(package_length(0xFFD), [0x4F, 0xFF]);
        assert_eq!(package_length(0xFFE), [0x81, 0x00, 0x01]);
    }

    #[test]
    fn objects_as_a_compiler_writes_them() {
        // As `iasl` compiles these objects.
        assert_eq!(package(&[byte(5), byte(0)]), [0x12, 5, 2, 0x0A, 5, 0]);
        assert_eq!(name(b"_UID", byte(0)), *b"\x08_UID\x00");
        assert_eq!(name(b"_HID", pnp_id(0x0501)), *b"\x08_HID\x0C\x41\xD0\x05\x01");
        assert_eq!(string("AB"), [0x0D, b'A', b'B', 0]);
        assert_eq!(device(b"COM1", &[byte(0)]), *b"\x5B\x82\x06COM1\x00");
        assert_eq!(scope(b"_SB_", &[]), *b"\x10\x06\\_SB_");
        let buffer = resources(&[ports(0x3F8, 8)]);
        assert_eq!(buffer, [0x11, 13, 0x0A, 10, 0x47, 1, 0xF8, 3, 0xF8, 3, 1, 8, 0x79, 0]);
    }
}
