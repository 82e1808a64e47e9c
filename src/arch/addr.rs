// SPDX-License-Identifier: GPL-2.0
//! Address newtypes. A bare `u64` address never crosses a room's border.
#![forbid(unsafe_code)]

/// log2 of the size of a base page, in bytes.
pub const PAGE_SHIFT: u32 = 12;
/// Size of a base page, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Byte offset inside the 4 KiB page, 0 to 4095.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The address `bytes` further on, wrapping at 2^64.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address `bytes` further on, or `None` past 2^64.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(address) => Some(Self(address)),
                    None => None,
                }
            }

            /// The start of the 4 KiB page.
            #[inline]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
        }
    };
}

address!(
    /// Guest virtual address; after segmentation, that is: a linear address.
    Gva
);
address!(
    /// Guest physical address.
    Gpa
);
address!(
    /// Host virtual address in the virtual machine monitor's address space.
    Hva
);
address!(
    /// Host physical address.
    Hpa
);

/// Guest frame number: a guest physical address in units of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl Gpa {
    /// The frame that holds this address.
    #[inline]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Gfn {
    /// First byte of the frame. The frame number must be below 2^52, as every guest physical frame is.
    #[inline]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

/// Whether `address` is canonical with `bits` (48 or 57) linear-address bits. SDM "Canonical Addressing".
#[inline]
pub const fn is_canonical(address: u64, bits: u32) -> bool {
    let shift = 64 - bits;
    (((address << shift) as i64) >> shift) as u64 == address
}
