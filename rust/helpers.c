// SPDX-License-Identifier: GPL-2.0
/* C wrappers of inline functions and macros. No logic lives here. */
#include <linux/module.h>
#include <asm/tsc.h>

#include "helpers.h"

u64 krab_rdtsc(void)
{
	return rdtsc_ordered();
}
