/* SPDX-License-Identifier: GPL-2.0 */
/*
 * World switch of SVM: one VMRUN, with the host's speculation mitigations around it.
 * APM Vol. 2 "VMRUN Instruction", "VMSAVE and VMLOAD Instructions", "Global Interrupt Flag".
 */
#include "../enter.h"

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

	LOAD_GUEST_SPEC_CTRL

	/* Some CPUs let the next user of the divider see stale data of the last one: divide something harmless. */
	ALTERNATIVE "jmp .Ldivider_done", "", X86_BUG_DIV0
	xor	%eax, %eax
	xor	%edx, %edx
	mov	$1, %ecx
	div	%ecx
.Ldivider_done:

	mov	%rsi, %rax
	vmload	%rax

	LOAD_GUEST_REGISTERS

	ALTERNATIVE "", "verw krab_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM

	sti
	vmrun	%rax
	cli

	pop	%rax
	STORE_GUEST_REGISTERS

	pop	%rax
	vmsave	%rax
	/* Brings back GS base among others: per-CPU data is reachable from here on. */
	pop	%rax
	vmload	%rax

	/* No RET may run on the guest's return stack. */
	FILL_RETURN_BUFFER %rax, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT

	pop	%r8			/* guest SPEC_CTRL */
	pop	%r9			/* host SPEC_CTRL */
	LOAD_HOST_SPEC_CTRL

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

	/* RAX and RSP were switched by the CPU. */
	xor	%ebx, %ebx
	CLEAR_GUEST_REGISTERS

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
