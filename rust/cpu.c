// SPDX-License-Identifier: GPL-2.0
/* C wrappers for CPU state: inline functions, macros and instructions behind alternatives. */
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/cc_platform.h>
#include <linux/mem_encrypt.h>
#include <linux/rcupdate.h>
#include <linux/smp.h>
#include <asm/cpufeature.h>
#include <asm/cpuid/api.h>
#include <asm/debugreg.h>
#include <asm/fpu/api.h>
#include <asm/fpu/xcr.h>
#include <asm/io.h>
#include <asm/mce.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>
#include <asm/ptrace.h>
#include <asm/special_insns.h>

#include "cpu.h"

void krab_host_features(struct krab_host_features *features)
{
	*features = (struct krab_host_features){
		.svm = boot_cpu_has(X86_FEATURE_SVM),
		.npt = boot_cpu_has(X86_FEATURE_NPT),
		.next_rip = boot_cpu_has(X86_FEATURE_NRIPS),
		.decode_assists = boot_cpu_has(X86_FEATURE_DECODEASSISTS),
		.flush_by_asid = boot_cpu_has(X86_FEATURE_FLUSHBYASID),
		.fsgsbase = boot_cpu_has(X86_FEATURE_FSGSBASE),
		.xsave = boot_cpu_has(X86_FEATURE_XSAVE),
		.pku = boot_cpu_has(X86_FEATURE_OSPKE),
		.rdtscp = boot_cpu_has(X86_FEATURE_RDTSCP) || boot_cpu_has(X86_FEATURE_RDPID),
		.spec_ctrl = boot_cpu_has(X86_FEATURE_MSR_SPEC_CTRL),
		.la57 = pgtable_l5_enabled(),
		.lfence_serializing = boot_cpu_has(X86_FEATURE_LFENCE_RDTSC),
		.invariant_tsc = boot_cpu_has(X86_FEATURE_NONSTOP_TSC),
		.memory_encryption = sme_me_mask != 0,
		.snp = cc_platform_has(CC_ATTR_HOST_SEV_SNP),
		.ibpb = boot_cpu_has(X86_FEATURE_IBPB) && !cpu_mitigations_off(),
		.ibpb_exit_to_user = boot_cpu_has(X86_FEATURE_IBPB_EXIT_TO_USER),
		.bp_spec_reduce = boot_cpu_has(X86_FEATURE_SRSO_BP_SPEC_REDUCE),
		.vmx = boot_cpu_has(X86_FEATURE_VMX),
		.l1tf = boot_cpu_has_bug(X86_BUG_L1TF) && !cpu_mitigations_off(),
		.flush_l1d = boot_cpu_has(X86_FEATURE_FLUSH_L1D),
		.fred = boot_cpu_has(X86_FEATURE_FRED),
		.itlb_multihit = boot_cpu_has_bug(X86_BUG_ITLB_MULTIHIT) && !cpu_mitigations_off(),
		.aperfmperf = boot_cpu_has(X86_FEATURE_APERFMPERF),
		.mwait = boot_cpu_has(X86_FEATURE_MWAIT) && !boot_cpu_has_bug(X86_BUG_MONITOR) &&
			 boot_cpu_has(X86_FEATURE_ARAT),
		.smt_rsb = boot_cpu_has_bug(X86_BUG_SMT_RSB) && cpu_smt_possible(),
	};
}

u64 krab_host_spec_ctrl(void)
{
	return this_cpu_read(x86_spec_ctrl_current);
}

u64 krab_host_dr7(void)
{
	return this_cpu_read(cpu_dr7);
}

/*
 * A machine check ended the guest's run. To the host's handler it came from user mode: what broke is this task's guest, not the
 * kernel, which must not panic for it.
 */
void krab_machine_check(void)
{
	struct pt_regs user = { .cs = __USER_CS, .flags = X86_EFLAGS_IF };

	do_machine_check(&user);
}

/* This CPU ran a guest: the kernel puts a barrier before the next return to user code. */
void krab_ibpb_before_user(void)
{
	this_cpu_write(x86_ibpb_exit_to_user, true);
}

u64 krab_virt_to_phys(const void *pointer)
{
	return virt_to_phys((void *)pointer);
}

void krab_cpuid(u32 leaf, u32 subleaf, u32 *out)
{
	cpuid_count(leaf, subleaf, &out[0], &out[1], &out[2], &out[3]);
}

unsigned int krab_cpu_ids(void)
{
	return nr_cpu_ids;
}

void krab_on_each_cpu(void (*fn)(void *), void *arg)
{
	on_each_cpu(fn, arg, true);
}

void krab_cpus_read_lock(void)
{
	cpus_read_lock();
}

void krab_cpus_read_unlock(void)
{
	cpus_read_unlock();
}

/* An interrupt that is pending until interrupts are on, of the cheapest kind. */
void krab_interrupt_self(void)
{
	arch_smp_send_reschedule(raw_smp_processor_id());
}

void krab_rcu_quiescent(void)
{
	rcu_note_context_switch(false);
}

int krab_cpuhp_setup(int (*up)(unsigned int cpu), int (*down)(unsigned int cpu))
{
	return cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN, "krab:online", up, down);
}

void krab_cpuhp_remove(int state)
{
	cpuhp_remove_state_nocalls(state);
}

int krab_xrstor(const void *area, u64 mask)
{
	int err;

	asm volatile("1: xrstor64 (%[area])\n"
		     "xor %[err], %[err]\n"
		     "2:\n"
		     _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %[err])
		     : [err] "=r"(err)
		     : [area] "r"(area), "a"((u32)mask), "d"((u32)(mask >> 32))
		     : "memory");
	return err;
}

void krab_xsave(void *area, u64 mask)
{
	asm volatile("xsave64 (%[area])"
		     :
		     : [area] "r"(area), "a"((u32)mask), "d"((u32)(mask >> 32))
		     : "memory");
}

int krab_xsetbv(u64 xcr0)
{
	int err;

	asm volatile("1: xsetbv\n"
		     "xor %[err], %[err]\n"
		     "2:\n"
		     _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %[err])
		     : [err] "=r"(err)
		     : "c"(0), "a"((u32)xcr0), "d"((u32)(xcr0 >> 32)));
	return err;
}

u64 krab_xgetbv(void)
{
	return xgetbv(XCR_XFEATURE_ENABLED_MASK);
}

u32 krab_read_pkru(void)
{
	return rdpkru();
}

void krab_write_pkru(u32 pkru)
{
	wrpkru(pkru);
}

void krab_fpu_begin(void)
{
	/* No control register is initialised: XRSTOR loads them all. */
	kernel_fpu_begin_mask(0);
}

void krab_fpu_end(void)
{
	kernel_fpu_end();
}

void krab_swap_debug_registers(u64 *registers)
{
	unsigned long now[4];
	int i;

	get_debugreg(now[0], 0);
	get_debugreg(now[1], 1);
	get_debugreg(now[2], 2);
	get_debugreg(now[3], 3);
	set_debugreg(registers[0], 0);
	set_debugreg(registers[1], 1);
	set_debugreg(registers[2], 2);
	set_debugreg(registers[3], 3);
	for (i = 0; i < 4; i++)
		registers[i] = now[i];
}

void krab_write_dr7(u64 dr7)
{
	set_debugreg(dr7, 7);
}
