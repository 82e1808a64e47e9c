/* SPDX-License-Identifier: GPL-2.0 */
/* C side of rust/cpu.rs, rust/fpu.rs and rust/virt.rs. */
#ifndef KRAB_CPU_H
#define KRAB_CPU_H

#include <linux/types.h>

/* What the run loop must know of this host's CPUs; filled once at load. */
struct krab_host_features {
	bool svm;
	bool npt;
	bool next_rip;
	bool decode_assists;
	bool flush_by_asid;
	bool fsgsbase;
	bool xsave;
	bool pku;
	bool rdtscp;
	bool spec_ctrl;
	bool la57;
	bool lfence_serializing;
	bool invariant_tsc;
	/* Physical addresses carry an encryption bit. */
	bool memory_encryption;
	/* The host checks who owns a page (SEV-SNP's reverse map). */
	bool snp;
	/* Indirect-branch prediction barriers: the CPU has them and the host uses mitigations. */
	bool ibpb;
	bool ibpb_exit_to_user;
	bool bp_spec_reduce;
	/* VMX: the CPU has it, and firmware and the kernel left it on. */
	bool vmx;
	/* The host takes measures against L1TF. */
	bool l1tf;
	bool flush_l1d;
	/* The host takes measures against machine checks from large executable pages. */
	bool itlb_multihit;
	/* APERF and MPERF. */
	bool aperfmperf;
	/* MWAIT ends with every interrupt, and the local APIC's timer goes on meanwhile. */
	bool mwait;
	/* A sibling that sleeps may leave return predictions of its own to this thread. */
	bool smt_rsb;
	/* The host takes its events by FRED and not through an IDT. */
	bool fred;
};

void krab_host_features(struct krab_host_features *features);
u64 krab_host_spec_ctrl(void);
u64 krab_host_dr7(void);
void krab_machine_check(void);
void krab_ibpb_before_user(void);

u64 krab_virt_to_phys(const void *pointer);
void krab_cpuid(u32 leaf, u32 subleaf, u32 *out);
unsigned int krab_cpu_ids(void);
void krab_on_each_cpu(void (*fn)(void *), void *arg);
void krab_cpus_read_lock(void);
void krab_cpus_read_unlock(void);
void krab_interrupt_self(void);
void krab_rcu_quiescent(void);
int krab_cpuhp_setup(int (*up)(unsigned int cpu), int (*down)(unsigned int cpu));
void krab_cpuhp_remove(int state);

/* Loading and saving a guest's extended state; 0, or -EFAULT when the CPU refused the image. */
int krab_xrstor(const void *area, u64 mask);
void krab_xsave(void *area, u64 mask);
int krab_xsetbv(u64 xcr0);
u64 krab_xgetbv(void);
u32 krab_read_pkru(void);
void krab_write_pkru(u32 pkru);
void krab_fpu_begin(void);
void krab_fpu_end(void);
void krab_swap_debug_registers(u64 *registers);
void krab_write_dr7(u64 dr7);

#endif
