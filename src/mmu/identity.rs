// SPDX-License-Identifier: GPL-2.0
//! Paging that translates every address to itself: for a guest without paging on a CPU that cannot run one.
//!
//! It is 32-bit paging with pages of 4 MiB, one table for the four GiB that there are without paging. SDM Vol. 3 "32-Bit Paging". The
//! table is in the guest's physical memory, where the CPU looks for it.
#![forbid(unsafe_code)]

use super::walk::CR4_BITS;
use crate::arch::cr::cr4;
use crate::arch::paging::entry;

/// Bytes of the table.
pub const LEN: usize = 4096;
/// Where it is if userspace does not say. KVM_SET_IDENTITY_MAP_ADDR.
pub const DEFAULT_ADDR: u64 = 0xFFFB_C000;

const PAGE_SHIFT: u32 = 22;

/// The table. Its entries are accessed and dirty already, so the CPU changes nothing in it.
pub fn fill(table: &mut [u8; LEN]) {
    const BITS: u64 = entry::P | entry::W | entry::U | entry::A | entry::D | entry::PS;
    for (bytes, index) in table.chunks_exact_mut(4).zip(0u32..) {
        let value = index << PAGE_SHIFT | BITS as u32;
        bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

/// CR4 with which the CPU uses the table, for a guest that believes to have `value`.
pub const fn cr4(value: u64) -> u64 {
    value & !(CR4_BITS | cr4::PCIDE) | cr4::PSE
}

/// Whether the table can be at `at`: CR3 names a page of the first four GiB.
pub const fn fits(at: u64) -> bool {
    at % LEN as u64 == 0 && at >> 32 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::cr::cr0;
    use crate::arch::{Gpa, Gva};
    use crate::mmu::guest_mem::{GuestMem, Refused};
    use crate::mmu::walk::{walk, Access, Context};

    /// Nothing but the table, which refuses to be changed.
    struct Only([u8; LEN]);

    impl GuestMem for Only {
        fn read(&self, at: Gpa, to: &mut [u8]) -> Result<(), Refused> {
            let offset = at.0.checked_sub(DEFAULT_ADDR).ok_or(Refused::NotRam)? as usize;
            to.copy_from_slice(self.0.get(offset..offset + to.len()).ok_or(Refused::NotRam)?);
            Ok(())
        }

        fn read_u32(&self, at: Gpa) -> Result<u32, Refused> {
            let mut bytes = [0; 4];
            self.read(at, &mut bytes).map(|()| u32::from_le_bytes(bytes))
        }

        fn read_u64(&self, _: Gpa) -> Result<u64, Refused> {
            Err(Refused::NotRam)
        }

        fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<bool, Refused> {
            Err(Refused::ReadOnly)
        }

        fn compare_exchange_u32(&self, _: Gpa, _: u32, _: u32) -> Result<bool, Refused> {
            Err(Refused::ReadOnly)
        }

        fn write(&self, _: Gpa, _: &[u8]) -> Result<(), Refused> {
            Err(Refused::ReadOnly)
        }
    }

    #[test]
    fn every_access_goes_to_its_own_address() {
        let mut table = [0; LEN];
        fill(&mut table);
        let mem = Only(table);
        let everything = cr4::PAE | cr4::LA57 | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PCIDE;
        for guest_cr4 in [0, everything, everything | cr4::PSE | cr4::OSFXSR] {
            for cpl in [0, 3] {
                let context = Context {
                    cr0: cr0::PE | cr0::PG | cr0::WP,
                    cr3: DEFAULT_ADDR,
                    cr4: cr4(guest_cr4),
                    cpl,
                    physical_bits: 32,
                    ..Context::default()
                };
                for at in [0, 0xFFF, 0x3F_FFFF, 0x40_0000, 0x7FFF_FFFF, 0x8000_0000, DEFAULT_ADDR, 0xFFFF_FFFF] {
                    for access in [Access::READ, Access::WRITE, Access::EXECUTE, Access::SYSTEM_WRITE] {
                        let found = walk(&mem, &context, Gva(at), access).unwrap();
                        assert_eq!((found.gpa, found.page_bits), (Gpa(at), PAGE_SHIFT), "{access:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_has_to_do_with_translation_is_taken_from_the_guest() {
        let kept = cr4::OSFXSR | cr4::PGE | cr4::OSXSAVE | cr4::UMIP;
        assert_eq!(cr4(kept), kept | cr4::PSE);
        assert_eq!(cr4(cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PAE | cr4::LA57), cr4::PSE);
    }

    #[test]
    fn places() {
        assert!(fits(DEFAULT_ADDR) && fits(0) && fits(0xFFFF_F000));
        assert!(!fits(DEFAULT_ADDR + 8) && !fits(1 << 32));
    }
}
