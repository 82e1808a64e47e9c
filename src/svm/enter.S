/* SPDX-License-Identifier: GPL-2.0 */
/*
 * World switch of SVM: one VMRUN, with the host's speculation mitigations around it.
 * APM Vol. 2 "VMRUN Instruction", "VMSAVE and VMLOAD Instructions", "Global Interrupt Flag".
 */
#include <linux/linkage.h>
#include <asm/asm.h>
#include <asm/cpufeatures.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/segment.h>

/* Offsets in `guest::Regs`: the array is in encoding order. RAX and RSP are switched by VMRUN. */
#define RCX_OFFSET	(1 * 8)
#define RDX_OFFSET	(2 * 8)
#define RBX_OFFSET	(3 * 8)
#define RBP_OFFSET	(5 * 8)
#define RSI_OFFSET	(6 * 8)
#define RDI_OFFSET	(7 * 8)
#define R8_OFFSET	(8 * 8)
#define R9_OFFSET	(9 * 8)
#define R10_OFFSET	(10 * 8)
#define R11_OFFSET	(11 * 8)
#define R12_OFFSET	(12 * 8)
#define R13_OFFSET	(13 * 8)
#define R14_OFFSET	(14 * 8)
#define R15_OFFSET	(15 * 8)

	.section .rodata
	.balign 2
	/* VERW with a writable data selector in memory is the form that clears CPU buffers. */
SYM_DATA_LOCAL(krab_verw_selector, .word __KERNEL_DS)

	.section .noinstr.text, "ax"

/*
 * u32 krab_svm_enter(Regs *regs, u64 vmcb_pa, u64 host_save_pa, u64 guest_spec_ctrl, u64 host_spec_ctrl, Vmcb *vmcb)
 *
 * Called with interrupts off and SVM on. Returns 0 after a #VMEXIT, or 1 when SVM was turned off under us (emergency reboot): then
 * nothing was loaded. `vmcb` is not used here: passing it tells the compiler that the VMCB changes.
 *
 * The global interrupt flag is clear from CLGI to STGI, so neither an NMI nor a reboot IPI comes in between, and SVM cannot
 * be turned off there: only CLGI needs an exception table entry. STI with GIF clear takes nothing; it makes VMRUN save a host
 * RFLAGS.IF of 1, so that a host interrupt ends the guest's run. Interrupts stay pending until the caller enables them.
 *
 * STI and CLI enclose VMRUN alone. With RFLAGS.IF set on a longer way from CLGI to STGI, QEMU's emulation took, about once in a
 * million entries with two CPUs, a second #VMEXIT in the host's code behind VMRUN, which put host state into the VMCB.
 */
SYM_FUNC_START(krab_svm_enter)
	push	%rbp
	mov	%rsp, %rbp
	push	%r15
	push	%r14
	push	%r13
	push	%r12
	push	%rbx
	push	%r8			/* host SPEC_CTRL */
	push	%rcx			/* guest SPEC_CTRL */
	push	%rdx			/* host save area */
	push	%rsi			/* VMCB */
	push	%rdi			/* registers */

1:	clgi

	ALTERNATIVE "jmp .Lguest_spec_ctrl_done", "", X86_FEATURE_MSR_SPEC_CTRL
	cmp	%rcx, %r8
	je	.Lguest_spec_ctrl_done
	mov	%ecx, %eax
	mov	%rcx, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Lguest_spec_ctrl_done:

	/* Some CPUs let the next user of the divider see stale data of the last one: divide something harmless. */
	ALTERNATIVE "jmp .Ldivider_done", "", X86_BUG_DIV0
	xor	%eax, %eax
	xor	%edx, %edx
	mov	$1, %ecx
	div	%ecx
.Ldivider_done:

	mov	%rsi, %rax
	vmload	%rax

	mov	RCX_OFFSET(%rdi), %rcx
	mov	RDX_OFFSET(%rdi), %rdx
	mov	RBX_OFFSET(%rdi), %rbx
	mov	RBP_OFFSET(%rdi), %rbp
	mov	RSI_OFFSET(%rdi), %rsi
	mov	R8_OFFSET(%rdi), %r8
	mov	R9_OFFSET(%rdi), %r9
	mov	R10_OFFSET(%rdi), %r10
	mov	R11_OFFSET(%rdi), %r11
	mov	R12_OFFSET(%rdi), %r12
	mov	R13_OFFSET(%rdi), %r13
	mov	R14_OFFSET(%rdi), %r14
	mov	R15_OFFSET(%rdi), %r15
	mov	RDI_OFFSET(%rdi), %rdi

	ALTERNATIVE "", "verw krab_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM

	sti
	vmrun	%rax
	cli

	pop	%rax
	mov	%rcx, RCX_OFFSET(%rax)
	mov	%rdx, RDX_OFFSET(%rax)
	mov	%rbx, RBX_OFFSET(%rax)
	mov	%rbp, RBP_OFFSET(%rax)
	mov	%rsi, RSI_OFFSET(%rax)
	mov	%rdi, RDI_OFFSET(%rax)
	mov	%r8, R8_OFFSET(%rax)
	mov	%r9, R9_OFFSET(%rax)
	mov	%r10, R10_OFFSET(%rax)
	mov	%r11, R11_OFFSET(%rax)
	mov	%r12, R12_OFFSET(%rax)
	mov	%r13, R13_OFFSET(%rax)
	mov	%r14, R14_OFFSET(%rax)
	mov	%r15, R15_OFFSET(%rax)

	pop	%rax
	vmsave	%rax
	/* Brings back GS base among others: per-CPU data is reachable from here on. */
	pop	%rax
	vmload	%rax

	/* No RET may run on the guest's return stack. */
	FILL_RETURN_BUFFER %rax, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT

	pop	%r8			/* guest SPEC_CTRL: it is intercepted, so the guest did not change it */
	pop	%r9			/* host SPEC_CTRL */
	ALTERNATIVE "jmp .Lhost_spec_ctrl_done", "", X86_FEATURE_MSR_SPEC_CTRL
	cmp	%r8, %r9
	je	.Lhost_spec_ctrl_same
	mov	%r9d, %eax
	mov	%r9, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Lhost_spec_ctrl_same:
	/* The comparison may be mispredicted: nothing runs ahead of it. */
	lfence
.Lhost_spec_ctrl_done:

	VALIDATE_UNRET_END
	CALL_UNTRAIN_RET
	ALTERNATIVE "jmp .Libpb_done", "", X86_FEATURE_IBPB_ON_VMEXIT
	mov	$MSR_IA32_PRED_CMD, %ecx
	mov	$PRED_CMD_IBPB, %eax
	xor	%edx, %edx
	wrmsr
	/* Some CPUs' barrier leaves return predictions. */
	FILL_RETURN_BUFFER %rax, RSB_CLEAR_LOOPS, X86_BUG_IBPB_NO_RET
.Libpb_done:

	/* Guest values must not be used by speculation: RAX and RSP were switched by hardware. */
	xor	%ecx, %ecx
	xor	%edx, %edx
	xor	%ebx, %ebx
	xor	%ebp, %ebp
	xor	%esi, %esi
	xor	%edi, %edi
	xor	%r8d, %r8d
	xor	%r9d, %r9d
	xor	%r10d, %r10d
	xor	%r11d, %r11d
	xor	%r12d, %r12d
	xor	%r13d, %r13d
	xor	%r14d, %r14d
	xor	%r15d, %r15d

	stgi				/* a pending NMI is taken here */
	xor	%eax, %eax
	pop	%rbx
	pop	%r12
	pop	%r13
	pop	%r14
	pop	%r15
	pop	%rbp
	RET

.Lsvm_is_off:
	add	$(5 * 8), %rsp
	mov	$1, %eax
	pop	%rbx
	pop	%r12
	pop	%r13
	pop	%r14
	pop	%r15
	pop	%rbp
	RET

	_ASM_EXTABLE(1b, .Lsvm_is_off)
SYM_FUNC_END(krab_svm_enter)

/* void krab_svm_save_host(u64 host_save_pa): VMSAVE, or nothing when SVM was turned off under us. */
SYM_FUNC_START(krab_svm_save_host)
	mov	%rdi, %rax
2:	vmsave	%rax
3:	RET
	_ASM_EXTABLE(2b, 3b)
SYM_FUNC_END(krab_svm_save_host)
