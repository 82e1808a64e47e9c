// SPDX-License-Identifier: GPL-2.0
/*
 * Counters in debugfs: a folder for the module with the sums over all VMs, and in it one for each VM, PID-FD. What the counters
 * are, and where, is the caller's: it gives names and a function.
 */
#include <linux/dcache.h>
#include <linux/debugfs.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "helpers.h"

struct counter {
	struct krab_debugfs_vm *vm;
	unsigned int index;
};

struct krab_debugfs_vm {
	struct list_head list;
	struct dentry *folder;
	const void *object;
	struct counter counters[];
};

static DEFINE_MUTEX(vms_lock);
static LIST_HEAD(vms);
static struct dentry *root;
static u64 (*read_counter)(const void *object, unsigned int index);

static int get_one(void *data, u64 *value)
{
	struct counter *counter = data;

	*value = read_counter(counter->vm->object, counter->index);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(one_fops, get_one, NULL, "%llu\n");

static int get_sum(void *data, u64 *value)
{
	struct krab_debugfs_vm *vm;
	u64 sum = 0;

	mutex_lock(&vms_lock);
	list_for_each_entry(vm, &vms, list)
		sum += read_counter(vm->object, (unsigned long)data);
	mutex_unlock(&vms_lock);
	*value = sum;
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(sum_fops, get_sum, NULL, "%llu\n");

void krab_debugfs_init(const char *name, const char *const *names, unsigned int count,
		       u64 (*read)(const void *object, unsigned int index))
{
	unsigned long n;

	read_counter = read;
	root = debugfs_create_dir(name, NULL);
	for (n = 0; n < count; n++)
		debugfs_create_file(names[n], 0444, root, (void *)n, &sum_fops);
}

void krab_debugfs_exit(void)
{
	debugfs_remove(root);
}

/* Without memory there is no folder: NULL. @object stays valid until krab_debugfs_remove_vm(). */
struct krab_debugfs_vm *krab_debugfs_add_vm(int fd, const char *const *names, unsigned int count, const void *object)
{
	struct krab_debugfs_vm *vm = kzalloc(struct_size(vm, counters, count), GFP_KERNEL_ACCOUNT);
	struct dentry *taken;
	char name[32];
	unsigned int n;

	if (!vm)
		return NULL;
	vm->object = object;
	snprintf(name, sizeof(name), "%d-%d", task_pid_nr(current), fd);
	/* A VM whose vCPUs outlive its descriptor still has the name. */
	taken = debugfs_lookup(name, root);
	if (taken)
		dput(taken);
	vm->folder = taken ? ERR_PTR(-EEXIST) : debugfs_create_dir(name, root);
	for (n = 0; n < count; n++) {
		vm->counters[n].vm = vm;
		vm->counters[n].index = n;
		debugfs_create_file(names[n], 0444, vm->folder, &vm->counters[n], &one_fops);
	}
	mutex_lock(&vms_lock);
	list_add(&vm->list, &vms);
	mutex_unlock(&vms_lock);
	return vm;
}

void krab_debugfs_remove_vm(struct krab_debugfs_vm *vm)
{
	if (!vm)
		return;
	mutex_lock(&vms_lock);
	list_del(&vm->list);
	mutex_unlock(&vms_lock);
	/* Waits for readers. */
	debugfs_remove(vm->folder);
	kfree(vm);
}
