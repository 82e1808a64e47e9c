// SPDX-License-Identifier: GPL-2.0
/* C wrappers of inline functions and macros. No logic lives here. */
#include "helpers.h"
