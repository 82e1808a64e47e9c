// SPDX-License-Identifier: GPL-2.0
//! KVM's ioctl ABI for x86, as Linux 7.2 publishes it: structures, numbers, and which of them Krab answers.
//!
//! Every structure derives zerocopy's traits, so that any bytes a user hands in are a valid value and every byte of
//! a value is initialized: a copy from or to userspace can neither misread nor leak. Layouts are asserted field by
//! field when the file is compiled. C unions appear as byte arrays or as one structure per arm.
//!
//! Not here: what belongs to other architectures, to nested virtualization, to SEV, TDX, Xen and Hyper-V.
#![forbid(unsafe_code)]

/// Declares C structures: each field with its byte offset, each structure with its size, both checked at compile time.
macro_rules! layout {
    ($($(#[$doc:meta])* struct $name:ident: $size:literal {
        $($(#[$field_doc:meta])* $offset:literal $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(
            Clone,
            Copy,
            Debug,
            PartialEq,
            Eq,
            zerocopy_derive::FromBytes,
            zerocopy_derive::IntoBytes,
            zerocopy_derive::Immutable,
            zerocopy_derive::KnownLayout,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        /// All zeros.
        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }

        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size);
            $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
        };
    )*};
}

pub mod cap;
mod convert;
pub mod ioctl;
pub mod irq;
pub mod pvclock;
pub mod run;
pub mod stats;
pub mod vcpu;
pub mod vm;

#[cfg(test)]
mod tests;

pub use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// What KVM_GET_API_VERSION returns; it has not changed since 2007 and clients refuse any other value.
pub const KVM_API_VERSION: u32 = 12;
