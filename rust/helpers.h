/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What rust/ needs from C: wrappers of inline functions and macros, and the few kernel types that the kernel crate does
 * not bind. Everything declared here is seen by bindgen (rust/bindings.rs).
 */
#ifndef KRAB_HELPERS_H
#define KRAB_HELPERS_H

#include <linux/types.h>

#include "cpu.h"


#endif
