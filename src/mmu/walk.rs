// SPDX-License-Identifier: GPL-2.0
//! The guest's own paging: from a linear to a guest physical address. SDM "Paging", APM Vol. 2 "Page Translation and
//! Protection".
//!
//! All modes: none, 32-bit with 4 MiB pages and PSE-36, PAE, 4-level and 5-level. PAE page-directory pointers are read
//! from memory on each walk, as CPUs with nested paging of AMD do. Accessed and dirty bits are set as hardware sets
//! them: on the way down in entries that refer to tables, and in the last entry once the access is allowed.
//! Not supported: linear-address masking, shadow stacks, supervisor protection keys.
#![forbid(unsafe_code)]

use super::guest_mem::{GuestMem, Refused};
use crate::arch::addr::is_canonical;
use crate::arch::cr::{cr0, cr4, efer, rflags};
use crate::arch::paging::{entry, fault, ADDRESS, INDEX_BITS};
use crate::arch::{Gpa, Gva};
use crate::guest::Exception;

/// The bits of CR0 that decide how an address is translated.
pub const CR0_BITS: u64 = cr0::PG | cr0::WP;

/// The bits of CR4 that decide how an address is translated.
pub const CR4_BITS: u64 = cr4::PSE | cr4::PAE | cr4::LA57 | cr4::SMEP | cr4::SMAP | cr4::PKE;

/// The registers and features that decide how an address is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Only [`CR0_BITS`] count.
    pub cr0: u64,
    pub cr3: u64,
    /// Only [`CR4_BITS`] count.
    pub cr4: u64,
    pub efer: u64,
    /// Only AC counts.
    pub rflags: u64,
    /// Protection-key rights; only used with CR4.PKE.
    pub pkru: u32,
    /// 0 to 3.
    pub cpl: u8,
    /// Physical address bits of the virtual CPU, 32 to 52.
    pub physical_bits: u8,
    /// The virtual CPU has 1 GiB pages.
    pub pages_1g: bool,
    /// Bit 8 of entries that refer to tables is reserved in the two highest levels, as on AMD.
    pub upper_global_reserved: bool,
}

/// What the guest does with the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    Read,
    /// Also a read that a write follows.
    Write,
    Execute,
}

/// One access of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: AccessKind,
    /// The CPU itself accesses a system structure (descriptor table, TSS): a supervisor access at any CPL.
    pub implicit: bool,
}

impl Access {
    pub const READ: Self = Self { kind: AccessKind::Read, implicit: false };
    pub const WRITE: Self = Self { kind: AccessKind::Write, implicit: false };
    pub const EXECUTE: Self = Self { kind: AccessKind::Execute, implicit: false };
    pub const SYSTEM_READ: Self = Self { kind: AccessKind::Read, implicit: true };
    pub const SYSTEM_WRITE: Self = Self { kind: AccessKind::Write, implicit: true };
}

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub gpa: Gpa,
    /// log2 of the page size in bytes: 12, 21, 22 or 30.
    pub page_bits: u32,
    /// All entries have W set.
    pub writable: bool,
    /// All entries have U set.
    pub user: bool,
    /// No entry has NX set.
    pub executable: bool,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// #PF with its error code, and the address for CR2.
    Fault(Exception),
    /// Not canonical: #GP(0), or #SS(0) for a stack access.
    NonCanonical,
    /// A table of the guest could not be accessed.
    Tables(Gpa, Refused),
    /// Other CPUs keep changing the same entry: run the instruction again.
    Contended,
}

/// How often the walk starts again because an entry changed under it, before it gives up.
const ATTEMPTS: u32 = 16;

/// Translates `gva` for `access`, and sets accessed and dirty bits.
///
/// Without paging the result is the address itself: segmentation has wrapped it at 32 bits where that applies.
#[inline]
pub fn walk<M: GuestMem>(mem: &M, context: &Context, gva: Gva, access: Access) -> Result<Translation, WalkError> {
    translate_with(mem, context, gva, Some(access))
}

/// Translates `gva` whatever the permissions, and changes nothing: KVM_TRANSLATE.
pub fn translate<M: GuestMem>(mem: &M, context: &Context, gva: Gva) -> Result<Translation, WalkError> {
    translate_with(mem, context, gva, None)
}

fn translate_with<M: GuestMem>(
    mem: &M,
    context: &Context,
    gva: Gva,
    access: Option<Access>,
) -> Result<Translation, WalkError> {
    if context.cr0 & cr0::PG == 0 {
        return Ok(Translation { gpa: Gpa(gva.0), page_bits: 12, writable: true, user: true, executable: true });
    }
    let walk = Walk { mem, context, gva: gva.0, access, mark: if access.is_some() { entry::A } else { 0 } };
    let mut result = walk.attempt();
    for _ in 1..ATTEMPTS {
        if result != Err(WalkError::Contended) {
            break;
        }
        result = walk.attempt();
    }
    result
}

impl Context {
    /// Reserved bits of all long-mode entries.
    #[inline]
    fn reserved(&self) -> u64 {
        let beyond = u64::MAX.checked_shl(u32::from(self.physical_bits)).unwrap_or(0) & ADDRESS;
        if self.efer & efer::NXE == 0 {
            beyond | entry::NX
        } else {
            beyond
        }
    }

    /// Whether the access counts as one of the user.
    #[inline]
    fn is_user(&self, access: Access) -> bool {
        self.cpl == 3 && !access.implicit
    }

    /// Error code bits that describe the access.
    fn access_code(&self, access: Access) -> u32 {
        let mut code = if self.is_user(access) { fault::U } else { 0 };
        match access.kind {
            AccessKind::Read => {}
            AccessKind::Write => code |= fault::W,
            AccessKind::Execute => {
                let no_execute = self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0;
                if no_execute || self.cr4 & cr4::SMEP != 0 {
                    code |= fault::FETCH;
                }
            }
        }
        code
    }

    /// Whether the U, W and NX bits refuse the access. `rights` has NX inverted: set where execution is allowed.
    #[inline]
    fn refuses(&self, access: Access, rights: u64) -> bool {
        let user_page = rights & entry::U != 0;
        let user = self.is_user(access);
        if user && !user_page {
            return true;
        }
        if access.kind == AccessKind::Execute {
            return rights & entry::NX == 0 || (!user && user_page && self.cr4 & cr4::SMEP != 0);
        }
        if access.kind == AccessKind::Write && rights & entry::W == 0 && (user || self.cr0 & cr0::WP != 0) {
            return true;
        }
        let allowed_by_ac = !access.implicit && self.rflags & rflags::AC != 0;
        !user && user_page && self.cr4 & cr4::SMAP != 0 && !allowed_by_ac
    }

    /// Whether the protection key in the last entry refuses the access. SDM "Protection Keys".
    #[inline]
    fn key_refuses(&self, access: Access, rights: u64, last: u64) -> bool {
        if self.cr4 & cr4::PKE == 0
            || self.efer & efer::LMA == 0
            || rights & entry::U == 0
            || access.kind == AccessKind::Execute
        {
            return false;
        }
        let key = (last >> entry::PK_SHIFT) as u32 & 0xF;
        let rights_of_key = self.pkru >> (2 * key);
        let (access_disable, write_disable) = (rights_of_key & 1 != 0, rights_of_key & 2 != 0);
        let guarded = self.is_user(access) || self.cr0 & cr0::WP != 0;
        access_disable || (write_disable && access.kind == AccessKind::Write && guarded)
    }
}

struct Walk<'a, M> {
    mem: &'a M,
    context: &'a Context,
    gva: u64,
    /// `None`: look only.
    access: Option<Access>,
    /// The accessed bit, or nothing.
    mark: u64,
}

/// One walk from the top: [`WalkError::Contended`] when an entry changed meanwhile.
type Attempt = Result<Translation, WalkError>;

impl<M: GuestMem> Walk<'_, M> {
    #[inline]
    fn attempt(&self) -> Attempt {
        let context = self.context;
        if context.efer & efer::LMA != 0 {
            let top = if context.cr4 & cr4::LA57 != 0 { 48 } else { 39 };
            if !is_canonical(self.gva, top + INDEX_BITS) {
                return Err(WalkError::NonCanonical);
            }
            self.descend(context.cr3 & ADDRESS, top, context.reserved())
        } else if context.cr4 & cr4::PAE != 0 {
            self.pae()
        } else {
            self.two_level()
        }
    }

    #[cold]
    fn fault(&self, code: u32) -> Attempt {
        let access = self.access.map_or(0, |access| self.context.access_code(access));
        Err(WalkError::Fault(Exception::page_fault(code | access, self.gva)))
    }

    /// For an entry that is not present or has a reserved bit set.
    #[cold]
    fn bad_entry(&self, bits: u64) -> Attempt {
        self.fault(if bits & entry::P == 0 { 0 } else { fault::P | fault::RSVD })
    }

    /// The page-fault error code if the access is refused. `rights` are those of all entries, with NX inverted.
    #[inline]
    fn refusal(&self, rights: u64, last: u64) -> Option<u32> {
        let access = self.access?;
        let key = self.context.key_refuses(access, rights, last);
        (key || self.context.refuses(access, rights)).then_some(fault::P | if key { fault::PK } else { 0 })
    }

    /// The bits that the entry of the page must have: accessed, and dirty if it is written.
    #[inline]
    fn page_marks(&self) -> u64 {
        match self.access {
            Some(Access { kind: AccessKind::Write, .. }) => entry::A | entry::D,
            _ => self.mark,
        }
    }

    /// What an update of the entry at `at` came to.
    fn updated(at: Gpa, result: Result<bool, Refused>) -> Result<(), WalkError> {
        match result {
            // Tables in read-only memory work as if their bits were set.
            Ok(true) | Err(Refused::ReadOnly) => Ok(()),
            Ok(false) => Err(WalkError::Contended),
            Err(why) => Err(WalkError::Tables(at, why)),
        }
    }

    #[cold]
    fn update_u64(&self, at: Gpa, bits: u64, marks: u64) -> Result<(), WalkError> {
        Self::updated(at, self.mem.compare_exchange_u64(at, bits, bits | marks))
    }

    #[cold]
    fn update_u32(&self, at: Gpa, bits: u64, marks: u64) -> Result<(), WalkError> {
        Self::updated(at, self.mem.compare_exchange_u32(at, bits as u32, (bits | marks) as u32))
    }

    #[inline]
    fn found(&self, base: u64, page_bits: u32, rights: u64) -> Attempt {
        let inside = 1_u64.wrapping_shl(page_bits).wrapping_sub(1);
        Ok(Translation {
            gpa: Gpa((base & !inside) | (self.gva & inside)),
            page_bits,
            writable: rights & entry::W != 0,
            user: rights & entry::U != 0,
            executable: rights & entry::NX != 0,
        })
    }

    /// Tables of 64-bit entries, from the one at `table`, which the linear address indexes from bit `top` on.
    #[inline]
    fn descend(&self, mut table: u64, top: u32, reserved: u64) -> Attempt {
        let upper = if self.context.upper_global_reserved { entry::G } else { 0 };
        let mut rights = u64::MAX;
        let mut shift = top;
        loop {
            let at = Gpa(table | ((self.gva.wrapping_shr(shift) & 0x1FF) << 3));
            let bits = self.mem.read_u64(at).map_err(|why| WalkError::Tables(at, why))?;
            let reserved_here = if shift >= 39 { reserved | upper } else { reserved };
            if bits & (reserved_here | entry::P) != entry::P {
                return self.bad_entry(bits);
            }
            rights &= bits ^ entry::NX;
            if shift == 12 || bits & entry::PS != 0 {
                if bits & self.reserved_in_page(shift) != 0 {
                    return self.bad_entry(bits);
                }
                if let Some(code) = self.refusal(rights, bits) {
                    return self.fault(code);
                }
                let marks = self.page_marks();
                if !bits & marks != 0 {
                    self.update_u64(at, bits, marks)?;
                }
                return self.found(bits & ADDRESS, shift, rights);
            }
            if !bits & self.mark != 0 {
                self.update_u64(at, bits, self.mark)?;
            }
            table = bits & ADDRESS;
            shift = shift.wrapping_sub(INDEX_BITS);
        }
    }

    /// Bits reserved in an entry that maps a page of 2^`shift` bytes, besides those reserved everywhere.
    #[inline]
    fn reserved_in_page(&self, shift: u32) -> u64 {
        /// Below the address of a large page, without the PAT bit.
        const BELOW_2M: u64 = 0x001F_E000;
        const BELOW_1G: u64 = 0x3FFF_E000;
        match shift {
            12 => 0,
            21 => BELOW_2M,
            30 if self.context.pages_1g => BELOW_1G,
            _ => entry::PS,
        }
    }

    /// PAE paging: a page-directory pointer, then two levels.
    fn pae(&self) -> Attempt {
        /// Bits 2-1 and 8-6 of a pointer, and 63-52 of all entries. Bit 5 is reserved, too, but QEMU's emulated CPU sets it when it walks,
        /// as if it were an accessed bit, and the guest ran on with it.
        const POINTER_RESERVED: u64 = 0x1C6;
        const HIGH: u64 = 0xFFF0_0000_0000_0000;
        let at = Gpa((self.context.cr3 & 0xFFFF_FFE0) | (((self.gva >> 30) & 3) << 3));
        let pointer = self.mem.read_u64(at).map_err(|why| WalkError::Tables(at, why))?;
        let reserved = self.context.reserved() | (HIGH & !entry::NX);
        if pointer & (reserved | HIGH | POINTER_RESERVED | entry::P) != entry::P {
            return self.bad_entry(pointer);
        }
        self.descend(pointer & ADDRESS, 21, reserved)
    }

    /// 32-bit paging: two levels of 32-bit entries.
    fn two_level(&self) -> Attempt {
        let mut table = self.context.cr3 & 0xFFFF_F000;
        let mut rights = u64::MAX;
        let mut shift = 22;
        loop {
            let at = Gpa(table | ((self.gva.wrapping_shr(shift) & 0x3FF) << 2));
            let bits = u64::from(self.mem.read_u32(at).map_err(|why| WalkError::Tables(at, why))?);
            let large = shift == 22 && bits & entry::PS != 0 && self.context.cr4 & cr4::PSE != 0;
            let reserved = if large { self.reserved_4m() } else { 0 };
            if bits & (reserved | entry::P) != entry::P {
                return self.bad_entry(bits);
            }
            rights &= bits | entry::NX;
            if large || shift == 12 {
                if let Some(code) = self.refusal(rights, bits) {
                    return self.fault(code);
                }
                let marks = self.page_marks();
                if !bits & marks != 0 {
                    self.update_u32(at, bits, marks)?;
                }
                // PSE-36: bits 20-13 of a 4 MiB entry are bits 39-32 of the address.
                let high = if large { ((bits >> 13) & 0xFF) << 32 } else { 0 };
                return self.found((bits & 0xFFFF_F000) | high, shift, rights);
            }
            if !bits & self.mark != 0 {
                self.update_u32(at, bits, self.mark)?;
            }
            table = bits & 0xFFFF_F000;
            shift = 12;
        }
    }

    /// Reserved bits of a 4 MiB entry: 21, and those of 20 to 13 that are past the physical address width.
    fn reserved_4m(&self) -> u64 {
        let high_bits = u32::from(self.context.physical_bits.clamp(32, 40)) - 32;
        0x3F_E000 & !(((1 << high_bits) - 1) << 13)
    }
}
