// SPDX-License-Identifier: GPL-2.0
/*
 * C side of rust/pmu.rs: counters of the kernel's that count while the current task runs a guest. They have the attribute exclude_host: perf
 * puts them into the CPU and leaves them off in IA32_PERF_GLOBAL_CTRL, so that VM entries can turn them on.
 */
#include <linux/atomic.h>
#include <linux/bitops.h>
#include <linux/cpufeature.h>
#include <linux/err.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/smp.h>

#include "pmu.h"

/* General counters are bits 0 and up of IA32_PERF_GLOBAL_CTRL, fixed ones bits 32 and up. What lies above is none that counts. */
#define MAX_INDEX 48

struct krab_counter {
	struct krab_counters *all;
	struct perf_event *event;
};

struct krab_counters {
	/* A bit for each counter, set in NMIs. */
	unsigned long overflowed;
	unsigned int count;
	struct krab_counter each[] __counted_by(count);
};

static void overflow(struct perf_event *event, struct perf_sample_data *data, struct pt_regs *regs)
{
	struct krab_counter *counter = event->overflow_handler_context;

	if (counter)
		set_bit(counter - counter->all->each, &counter->all->overflowed);
}

static struct perf_event *create(u64 config, bool user, bool kernel, u64 period, struct krab_counter *counter)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_RAW,
		.size = sizeof(attr),
		.config = config,
		.sample_period = period,
		.pinned = true,
		.exclude_idle = true,
		.exclude_host = true,
		.exclude_user = !user,
		.exclude_kernel = !kernel,
	};

	return perf_event_create_kernel_counter(&attr, -1, current, overflow, counter);
}

/* Whether the kernel counts instructions in guests. Not on CPUs of different kinds, which have different events. */
bool krab_pmu_works(void)
{
	struct perf_event *event;

	if (!boot_cpu_has(X86_FEATURE_ARCH_PERFMON) || boot_cpu_has(X86_FEATURE_HYBRID_CPU))
		return false;
	event = create(0xc0, true, true, BIT_ULL(31), NULL);
	if (IS_ERR(event))
		return false;
	perf_event_release_kernel(event);
	return true;
}

struct krab_counters *krab_counters_new(unsigned int count)
{
	struct krab_counters *counters = kzalloc_flex(*counters, each, count, GFP_KERNEL_ACCOUNT);

	if (!counters)
		return NULL;
	counters->count = count;
	for (unsigned int n = 0; n < count; n++)
		counters->each[n].all = counters;
	return counters;
}

void krab_counter_stop(struct krab_counters *counters, unsigned int n)
{
	struct perf_event *event = counters->each[n].event;

	counters->each[n].event = NULL;
	if (event)
		perf_event_release_kernel(event);
}

void krab_counters_free(struct krab_counters *counters)
{
	for (unsigned int n = 0; n < counters->count; n++)
		krab_counter_stop(counters, n);
	kfree(counters);
}

/* Begins to count for the current task, from 0. It overflows after period. */
bool krab_counter_start(struct krab_counters *counters, unsigned int n, u64 config, bool user, bool kernel, u64 period)
{
	struct krab_counter *counter = &counters->each[n];
	struct perf_event *event;

	krab_counter_stop(counters, n);
	event = create(config, user, kernel, period, counter);
	if (IS_ERR(event))
		return false;
	counter->event = event;
	return true;
}

/* The same for a counter that was paused. */
bool krab_counter_resume(struct krab_counters *counters, unsigned int n, u64 period)
{
	struct perf_event *event = counters->each[n].event;

	if (!event || perf_event_period(event, period))
		return false;
	perf_event_enable(event);
	return true;
}

/* What was counted since the start; from now on nothing is. */
u64 krab_counter_pause(struct krab_counters *counters, unsigned int n)
{
	struct perf_event *event = counters->each[n].event;

	return event ? perf_event_pause(event, true) : 0;
}

/* What was counted since the start. */
u64 krab_counter_read(struct krab_counters *counters, unsigned int n)
{
	struct perf_event *event = counters->each[n].event;
	u64 enabled, running;

	return event ? perf_event_read_value(event, &enabled, &running) : 0;
}

bool krab_counters_overflowed(const struct krab_counters *counters)
{
	return READ_ONCE(counters->overflowed) != 0;
}

unsigned long krab_counters_take_overflowed(struct krab_counters *counters)
{
	return xchg(&counters->overflowed, 0);
}

/* The bits of IA32_PERF_GLOBAL_CTRL that make the counters count which are in this CPU. Interrupts are off. */
u64 krab_counters_enabled(const struct krab_counters *counters)
{
	u64 enabled = 0;

	for (unsigned int n = 0; n < counters->count; n++) {
		const struct perf_event *event = counters->each[n].event;
		int index;

		if (!event || READ_ONCE(event->state) != PERF_EVENT_STATE_ACTIVE || READ_ONCE(event->oncpu) != raw_smp_processor_id())
			continue;
		index = READ_ONCE(event->hw.idx);
		if (index >= 0 && index < MAX_INDEX)
			enabled |= BIT_ULL(index);
	}
	return enabled;
}
