/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What rust/ needs from C: wrappers of inline functions and macros, and prototypes of exported functions that the kernel
 * crate does not bind. Everything declared here is seen by bindgen (rust/bindings.rs).
 */
#ifndef KRAB_HELPERS_H
#define KRAB_HELPERS_H

#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/rcuwait.h>
#include <linux/spinlock.h>
#include <linux/srcu.h>
#include <linux/syscore_ops.h>
#include <linux/types.h>

#include "cpu.h"
#include "pmu.h"
#include "vmx.h"

/* fd.rs */
struct file *anon_inode_getfile_fmode(const char *name, const struct file_operations *fops, void *priv, int flags,
				      fmode_t f_mode);
static const fmode_t krab_fmode_pread = FMODE_PREAD;

unsigned long krab_vma_flags(const struct vm_area_struct *vma);

/* debugfs.c */
struct krab_debugfs_vm;
void krab_debugfs_init(const char *name, const char *const *names, unsigned int count,
		       u64 (*read)(const void *object, unsigned int index));
void krab_debugfs_exit(void);
struct krab_debugfs_vm *krab_debugfs_add_vm(int fd, const char *const *names, unsigned int count, const void *object);
void krab_debugfs_remove_vm(struct krab_debugfs_vm *vm);

/* user.rs */
void krab_pagefault_disable(void);
void krab_pagefault_enable(void);
int krab_read_user_u64_nofault(u64 *value, const u64 *from);
int krab_cmpxchg_user(void *at, u64 *old, u64 new, unsigned int size);

/* code.rs */
int krab_read_kernel_u64(u64 *value, const u64 *from);
int krab_read_code(const u64 *const *entries, const u64 *values, unsigned int count, const u64 *code, u64 *out);

/* lock.rs */
void krab_raw_spin_lock_init(struct raw_spinlock *lock, const char *name, struct lock_class_key *key);
unsigned long krab_raw_spin_lock_irqsave(struct raw_spinlock *lock);
bool krab_raw_spin_trylock_irqsave(struct raw_spinlock *lock, unsigned long *flags);
void krab_raw_spin_unlock_irqrestore(struct raw_spinlock *lock, unsigned long flags);
void krab_raw_spin_assert_held(struct raw_spinlock *lock);
int krab_mutex_lock_killable(struct mutex *lock);

/* page.rs */
void krab_get_page(struct page *page);
void krab_put_page(struct page *page);

/* guest_mem.rs */
void krab_put_used_page(struct page *page, bool dirty);

/* task.rs */
int xfer_to_guest_mode_handle_work(void);
void krab_guest_time_begin(void);
void krab_guest_time_end(void);

/* kick.rs */
void krab_prepare_to_wait(struct rcuwait *waiter);
void krab_set_interruptible(void);
void krab_kick_cpu(unsigned int cpu);
void krab_notify_cpu(unsigned int cpu);

/* eventfd.rs */
__poll_t krab_poll(struct file *file, struct poll_table_struct *table);
int krab_add_wait_queue_priority_exclusive(struct wait_queue_head *queue, struct wait_queue_entry *entry);

/* power.rs */
int register_reboot_notifier(struct notifier_block *block);
int unregister_reboot_notifier(struct notifier_block *block);
int register_pm_notifier(struct notifier_block *block);
int unregister_pm_notifier(struct notifier_block *block);
bool krab_goes_to_sleep(unsigned long action);

/* timer.rs */
struct krab_clocks {
	u64 tsc;
	u64 real_ns;
	bool has_tsc;
};
void krab_read_clocks(struct krab_clocks *clocks);

/* signal.rs */
u64 krab_set_signal_mask(u64 mask);
void krab_send_memory_error(u64 address);
bool krab_tsc_is_stable(void);

/* srcu.rs: the domain is a struct srcu_struct */
void *krab_srcu_new(void);
void krab_srcu_free(void *domain);
int krab_srcu_read_lock(void *domain);
void krab_srcu_read_unlock(void *domain, int index);
void krab_srcu_synchronize(void *domain);
void krab_srcu_call(void *domain, struct rcu_head *head, void (*done)(struct rcu_head *head));
void krab_srcu_barrier(void *domain);

#endif
