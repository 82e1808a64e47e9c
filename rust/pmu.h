/* SPDX-License-Identifier: GPL-2.0 */
/* C side of rust/pmu.rs. */
#ifndef KRAB_PMU_H
#define KRAB_PMU_H

#include <linux/types.h>

struct krab_counters;

bool krab_pmu_works(void);
struct krab_counters *krab_counters_new(unsigned int count);
void krab_counters_free(struct krab_counters *counters);
bool krab_counter_start(struct krab_counters *counters, unsigned int n, u64 event, bool user, bool kernel, u64 period);
bool krab_counter_resume(struct krab_counters *counters, unsigned int n, u64 period);
u64 krab_counter_pause(struct krab_counters *counters, unsigned int n);
u64 krab_counter_read(struct krab_counters *counters, unsigned int n);
void krab_counter_stop(struct krab_counters *counters, unsigned int n);
bool krab_counters_overflowed(const struct krab_counters *counters);
unsigned long krab_counters_take_overflowed(struct krab_counters *counters);
u64 krab_counters_enabled(const struct krab_counters *counters);

#endif
