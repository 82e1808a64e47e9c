// SPDX-License-Identifier: GPL-2.0
//! Error codes that the kernel crate does not name.
use kernel::{bindings, error::Error};

/// `EOPNOTSUPP`: the operation is not supported here.
pub(crate) fn unsupported() -> Error {
    Error::from_errno(-(bindings::EOPNOTSUPP as i32))
}

/// `EHWPOISON`: the memory is broken.
pub(crate) fn hwpoison() -> Error {
    Error::from_errno(-(bindings::EHWPOISON as i32))
}
