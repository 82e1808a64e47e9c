// SPDX-License-Identifier: GPL-2.0
/* C wrappers of inline functions and macros. No logic lives here. */
#include <linux/anon_inodes.h>
#include <linux/clocksource_ids.h>
#include <linux/entry-virt.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/vtime.h>

#include <linux/slab.h>
#include <linux/srcu.h>
#include <asm/apic.h>
#include <asm/irq_vectors.h>
#include <asm/tsc.h>

#include "helpers.h"

/* fd.rs, page.rs */

void krab_get_page(struct page *page)
{
	get_page(page);
}

void krab_put_page(struct page *page)
{
	put_page(page);
}

unsigned long krab_vma_flags(const struct vm_area_struct *vma)
{
	return vma->vm_flags;
}

/* user.rs */

void krab_pagefault_disable(void)
{
	pagefault_disable();
}

void krab_pagefault_enable(void)
{
	pagefault_enable();
}

int krab_read_user_u64_nofault(u64 *value, const u64 *from)
{
	const u64 __user *user = (const u64 __user *)from;
	int error = -EFAULT;

	pagefault_disable();
	if (user_read_access_begin(user, sizeof(*user))) {
		unsafe_get_user(*value, user, fault);
		error = 0;
fault:
		user_read_access_end();
	}
	pagefault_enable();
	return error;
}

/* 0: exchanged; 1: @old now holds what was found; -EFAULT. */
int krab_cmpxchg_user(void *at, u64 *old, u64 new, unsigned int size)
{
	int ret = -EINVAL;

	if (!access_ok((void __user *)at, size))
		return -EFAULT;

#define KRAB_CMPXCHG(type)							\
	case sizeof(type): {							\
		type seen = *old;						\
										\
		ret = __try_cmpxchg_user((type __user *)at, &seen, (type)new, fault_##type);	\
		*old = seen;							\
		break;								\
	}
	switch (size) {
	KRAB_CMPXCHG(u8)
	KRAB_CMPXCHG(u16)
	KRAB_CMPXCHG(u32)
	KRAB_CMPXCHG(u64)
	}
#undef KRAB_CMPXCHG
	return ret;
}

/* code.rs: both run with preemption off, so that a fault goes to the exception table at once. */

int krab_read_kernel_u64(u64 *value, const u64 *from)
{
	__get_kernel_nofault(value, from, u64, fault);
	return 0;
fault:
	return -EFAULT;
}

/* Reads 16 bytes; not if one of the @entries is not its @values any more. */
int krab_read_code(const u64 *const *entries, const u64 *values, unsigned int count, const u64 *code, u64 *out)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		u64 value;

		__get_kernel_nofault(&value, entries[i], u64, fault);
		if (value != values[i])
			return -EAGAIN;
	}
	__get_kernel_nofault(&out[0], &code[0], u64, fault);
	__get_kernel_nofault(&out[1], &code[1], u64, fault);
	return 0;
fault:
	return -EFAULT;
}

/* lock.rs */

void krab_raw_spin_lock_init(struct raw_spinlock *lock, const char *name, struct lock_class_key *key)
{
#ifdef CONFIG_DEBUG_SPINLOCK
	__raw_spin_lock_init(lock, name, key, LD_WAIT_SPIN);
#else
	raw_spin_lock_init(lock);
#endif
}

unsigned long krab_raw_spin_lock_irqsave(struct raw_spinlock *lock)
{
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	return flags;
}

bool krab_raw_spin_trylock_irqsave(struct raw_spinlock *lock, unsigned long *flags)
{
	return raw_spin_trylock_irqsave(lock, *flags);
}

void krab_raw_spin_unlock_irqrestore(struct raw_spinlock *lock, unsigned long flags)
{
	raw_spin_unlock_irqrestore(lock, flags);
}

void krab_raw_spin_assert_held(struct raw_spinlock *lock)
{
	lockdep_assert_held(lock);
}

int krab_mutex_lock_killable(struct mutex *lock)
{
	return mutex_lock_killable(lock);
}

/* guest_mem.rs */

void krab_put_used_page(struct page *page, bool dirty)
{
	if (!PageReserved(page)) {
		if (dirty)
			SetPageDirty(page);
		mark_page_accessed(page);
	}
	put_page(page);
}

/* kick.rs */

void krab_prepare_to_wait(struct rcuwait *waiter)
{
	prepare_to_rcuwait(waiter);
}

void krab_set_interruptible(void)
{
	set_current_state(TASK_INTERRUPTIBLE);
}

/* Interrupts another CPU, with the cheapest vector there is. */
void krab_kick_cpu(unsigned int cpu)
{
	if (cpu != get_cpu() && cpu_online(cpu))
		arch_smp_send_reschedule(cpu);
	put_cpu();
}

/* On this CPU, too: then it waits for the entry. */
void krab_notify_cpu(unsigned int cpu)
{
	if (cpu_online(cpu))
		apic->send_IPI(cpu, POSTED_INTR_VECTOR);
}

/* eventfd.rs */

__poll_t krab_poll(struct file *file, struct poll_table_struct *table)
{
	return vfs_poll(file, table);
}

int krab_add_wait_queue_priority_exclusive(struct wait_queue_head *queue, struct wait_queue_entry *entry)
{
	return add_wait_queue_priority_exclusive(queue, entry);
}

/* power.rs */

bool krab_goes_to_sleep(unsigned long action)
{
	return action == PM_SUSPEND_PREPARE || action == PM_HIBERNATION_PREPARE;
}

/* timer.rs */

void krab_read_clocks(struct krab_clocks *clocks)
{
	struct system_time_snapshot now = {};

	ktime_get_snapshot_id(CLOCK_BOOTTIME, &now);
	clocks->tsc = now.cycles;
	clocks->has_tsc = now.valid && now.cs_id == CSID_X86_TSC;
	clocks->real_ns = ktime_sub(now.systime, ktime_mono_to_any(0, TK_OFFS_BOOT)) + ktime_mono_to_any(0, TK_OFFS_REAL);
}

bool krab_tsc_is_stable(void)
{
	return !check_tsc_unstable();
}

/* srcu.rs */

void *krab_srcu_new(void)
{
	struct srcu_struct *domain = kzalloc(sizeof(*domain), GFP_KERNEL_ACCOUNT);

	if (domain && init_srcu_struct(domain)) {
		kfree(domain);
		return NULL;
	}
	return domain;
}

void krab_srcu_free(void *domain)
{
	cleanup_srcu_struct(domain);
	kfree(domain);
}

int krab_srcu_read_lock(void *domain)
{
	return srcu_read_lock(domain);
}

void krab_srcu_read_unlock(void *domain, int index)
{
	srcu_read_unlock(domain, index);
}

void krab_srcu_synchronize(void *domain)
{
	synchronize_srcu_expedited(domain);
}

void krab_srcu_call(void *domain, struct rcu_head *head, void (*done)(struct rcu_head *head))
{
	call_srcu(domain, head, done);
}

void krab_srcu_barrier(void *domain)
{
	srcu_barrier(domain);
}

/* task.rs */

void krab_guest_time_begin(void)
{
	preempt_disable();
	vtime_account_guest_enter();
}

/* As vtime_account_guest_exit(), but interrupts are on: only where the tick does not count need they be off. */
void krab_guest_time_end(void)
{
	unsigned long flags;

	if (vtime_accounting_enabled_this_cpu()) {
		local_irq_save(flags);
		vtime_guest_exit(current);
		local_irq_restore(flags);
	} else {
		current->flags &= ~PF_VCPU;
	}
	preempt_enable();
}

/* signal.rs */

void krab_send_memory_error(u64 address)
{
	send_sig_mceerr(BUS_MCEERR_AR, (void __user *)address, PAGE_SHIFT, current);
}

u64 krab_set_signal_mask(u64 mask)
{
	sigset_t new, old;

	siginitset(&new, 0);
	new.sig[0] = mask & ~(sigmask(SIGKILL) | sigmask(SIGSTOP));
	sigprocmask(SIG_SETMASK, &new, &old);
	return old.sig[0];
}
