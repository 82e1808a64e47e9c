// SPDX-License-Identifier: GPL-2.0
/* C side of rust/vmx.rs: the host state that VM exits load, and the part of it that they lose. */
#include <linux/cpu.h>
#include <linux/irqflags.h>
#include <asm/apic.h>
#include <asm/cpu_entry_area.h>
#include <asm/cpufeature.h>
#include <asm/desc.h>
#include <asm/fsgsbase.h>
#include <asm/gsseg.h>
#include <asm/irq_vectors.h>
#include <asm/msr.h>
#include <asm/processor.h>
#include <asm/segment.h>
#include <asm/special_insns.h>
#include <asm/sync_core.h>

#include "vmx.h"

static u64 read_msr_or_zero(u32 msr)
{
	u64 value = 0;

	if (rdmsrq_safe(msr, &value))
		return 0;
	return value;
}

/* Preemption is off. */
void krab_vmx_read_host(struct krab_vmx_host *host)
{
	int cpu = raw_smp_processor_id();
	struct desc_ptr idt;

	store_idt(&idt);
	*host = (struct krab_vmx_host){
		.cr0 = read_cr0(),
		.efer = read_msr_or_zero(MSR_EFER),
		.pat = read_msr_or_zero(MSR_IA32_CR_PAT),
		.gs_base = cpu_kernelmode_gs_base(cpu),
		.tr_base = (u64)&get_cpu_entry_area(cpu)->tss.x86_tss,
		.gdt_base = (u64)get_cpu_gdt_ro(cpu),
		.idt_base = idt.address,
		.sysenter_cs = read_msr_or_zero(MSR_IA32_SYSENTER_CS),
		.sysenter_esp = read_msr_or_zero(MSR_IA32_SYSENTER_ESP),
		.sysenter_eip = read_msr_or_zero(MSR_IA32_SYSENTER_EIP),
		.cs = __KERNEL_CS,
		.ss = __KERNEL_DS,
		.tr = GDT_ENTRY_TSS * 8,
	};
}

/* Preemption is off from here until krab_vmx_restore_task(). */
void krab_vmx_save_task(struct krab_vmx_task *task)
{
	savesegment(ds, task->ds);
	savesegment(es, task->es);
	savesegment(fs, task->fs);
	savesegment(gs, task->gs);
	asm volatile("sldt %0" : "=m"(task->ldt));
	task->fs_base = x86_fsbase_read_cpu();
}

/*
 * A VM exit left null selectors, no LDT, a task segment without the I/O bitmap and a descriptor table of the largest size. Loading a
 * selector changes the base behind it, so bases come last: what SWAPGS brings in is the caller's.
 */
void krab_vmx_restore_task(const struct krab_vmx_task *task)
{
	unsigned long flags;

	load_fixmap_gdt(raw_smp_processor_id());
	/* Whoever needs the bitmap loads the segment again first. */
	this_cpu_write(__tss_limit_invalid, true);
	if (unlikely(task->ldt))
		asm volatile("lldt %0" : : "m"(task->ldt));
	if (unlikely(task->ds | task->es)) {
		loadsegment(ds, task->ds);
		loadsegment(es, task->es);
	}
	if (unlikely(task->fs)) {
		loadsegment(fs, task->fs);
		wrmsrq(MSR_FS_BASE, task->fs_base);
	}
	if (unlikely(task->gs)) {
		local_irq_save(flags);
		asm_load_gs_index(task->gs);
		local_irq_restore(flags);
	}
}

/*
 * An NMI ended the guest's run and NMIs are blocked until the next return from an interrupt. With FRED the vector is no gate:
 * the NMI is sent again, and an IRET to the next instruction lets it in.
 */
void krab_vmx_host_nmi(void)
{
	if (!cpu_feature_enabled(X86_FEATURE_FRED)) {
		asm volatile("int $2");
		return;
	}
	apic->send_IPI(raw_smp_processor_id(), NMI_VECTOR);
	iret_to_self();
}

/*
 * The vector whose interrupt a guest's CPU takes for itself, or 0. The kernel has a handler for it that does nothing, for KVM: so it may come
 * at any time. It is not used with FRED, where the gates that krab_vmx_host_interrupt() goes through are not there.
 */
u8 krab_vmx_notification_vector(void)
{
	return IS_ENABLED(CONFIG_KVM) ? POSTED_INTR_VECTOR : 0;
}

/* enter.S */
void krab_vmx_gate(unsigned int vector);

/*
 * A VM exit acknowledged this interrupt. Its handler has to believe that it came with interrupts on: what it puts off, such as setting the
 * timer again, is done on the way back to such code only.
 */
void krab_vmx_host_interrupt(u8 vector)
{
	local_irq_enable();
	krab_vmx_gate(vector);
	local_irq_disable();
}
