/* SPDX-License-Identifier: GPL-2.0 */
/* C side of rust/vmx.rs. */
#ifndef KRAB_VMX_H
#define KRAB_VMX_H

#include <linux/types.h>

/* What a VM exit loads and what does not change on one CPU. */
struct krab_vmx_host {
	u64 cr0;
	u64 efer;
	u64 pat;
	u64 gs_base;
	u64 tr_base;
	u64 gdt_base;
	u64 idt_base;
	u64 sysenter_cs;
	u64 sysenter_esp;
	u64 sysenter_eip;
	u16 cs;
	u16 ss;
	u16 tr;
};

/* What belongs to the current task and is lost or replaced while a guest runs. */
struct krab_vmx_task {
	u64 fs_base;
	/* The caller's, before and after. */
	u64 kernel_gs_base;
	u16 ds;
	u16 es;
	u16 fs;
	u16 gs;
	u16 ldt;
};

void krab_vmx_read_host(struct krab_vmx_host *host);
void krab_vmx_save_task(struct krab_vmx_task *task);
void krab_vmx_restore_task(const struct krab_vmx_task *task);
void krab_vmx_host_nmi(void);
u8 krab_vmx_notification_vector(void);
void krab_vmx_host_interrupt(u8 vector);

#endif
