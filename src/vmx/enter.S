/* SPDX-License-Identifier: GPL-2.0 */
/*
 * World switch of VMX: one VMLAUNCH or VMRESUME, with the host's speculation mitigations around it, and the VMX instructions that are
 * not on the hot path. SDM "VM Entries", "VM Exits", and "VMX Instruction Reference" for how each tells its failure.
 */
#include <linux/objtool.h>
#include <asm/irq_vectors.h>
#include <asm/unwind_hints.h>

#include "../enter.h"

/* VMCS field: host RSP. */
#define HOST_RSP	0x6C14

/* log2 of the bytes that the code for one interrupt gate has. */
#define GATE_SHIFT	4

/* What the functions here return. */
#define DONE		0
#define FAILED		1	/* VMfail: the VM-instruction error tells why, if there is a current VMCS */
#define FAULTED		2	/* #UD or #GP: VMX was turned off under us */

/*
 * u32 krab_vmx_enter(Regs *regs, bool launched, u64 *host_rsp, u64 guest_spec_ctrl, u64 host_spec_ctrl, void *virtual_apic)
 *
 * Called with interrupts off and the guest's VMCS current. `host_rsp` holds the stack pointer that the VMCS has for the host.
 * `virtual_apic` is not used here: passing it tells the compiler that the page changes.
 */
SYM_FUNC_START(krab_vmx_enter)
	push	%rbp
	mov	%rsp, %rbp
	push	%r15
	push	%r14
	push	%r13
	push	%r12
	push	%rbx
	push	%r8			/* host SPEC_CTRL */
	push	%rcx			/* guest SPEC_CTRL */
	push	%rdi			/* registers */
	push	%rsi			/* launched */

	cmp	%rsp, (%rdx)
	je	.Lhost_rsp_same
	mov	%rsp, (%rdx)
	mov	$HOST_RSP, %eax
.Lwrite_host_rsp:
	vmwrite	%rsp, %rax
.Lhost_rsp_same:

	LOAD_GUEST_SPEC_CTRL

	mov	RAX_OFFSET(%rdi), %rax
	LOAD_GUEST_REGISTERS

	/*
	 * Where the host clears buffers only for guests that reach its devices' memory, a guest might: clear for all. VERW changes ZF, so
	 * the test comes behind it.
	 */
	ALTERNATIVE_2 "", \
		"verw krab_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO, \
		"verw krab_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM

	testb	$1, (%rsp)
	jz	.Llaunch

	/* The CPU comes back at krab_vmx_exit with this very stack. */
	UNWIND_HINT_SAVE
.Lresume:
	vmresume
	jmp	.Lentry_failed
.Llaunch:
	vmlaunch
	jmp	.Lentry_failed

SYM_INNER_LABEL_ALIGN(krab_vmx_exit, SYM_L_GLOBAL)
	UNWIND_HINT_RESTORE
	ENDBR
	push	%rax
	mov	16(%rsp), %rax		/* registers */
	STORE_GUEST_REGISTERS
	pop	%rcx
	mov	%rcx, RAX_OFFSET(%rax)
	mov	$DONE, %ebx

.Lleave:
	/* RSP was switched by the CPU, RBX is the result. */
	xor	%eax, %eax
	CLEAR_GUEST_REGISTERS

	/* No RET may run on the guest's return stack; with eIBRS one call that retires is enough. */
	FILL_RETURN_BUFFER %rcx, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT, X86_FEATURE_RSB_VMEXIT_LITE

	add	$(2 * 8), %rsp
	pop	%r8			/* guest SPEC_CTRL */
	pop	%r9			/* host SPEC_CTRL */
	LOAD_HOST_SPEC_CTRL

	ALTERNATIVE "", "call krab_vmx_clear_branch_history", X86_FEATURE_CLEAR_BHB_VMEXIT

	mov	%ebx, %eax
	pop	%rbx
	pop	%r12
	pop	%r13
	pop	%r14
	pop	%r15
	pop	%rbp
	RET

.Lentry_failed:
	mov	$FAILED, %ebx
	jmp	.Lleave
.Lentry_faulted:
	mov	$FAULTED, %ebx
	jmp	.Lleave

	_ASM_EXTABLE(.Lwrite_host_rsp, .Lentry_faulted)
	_ASM_EXTABLE(.Lresume, .Lentry_faulted)
	_ASM_EXTABLE(.Llaunch, .Lentry_faulted)
SYM_FUNC_END(krab_vmx_enter)

/*
 * Pushes the guest's branches out of the branch history: Intel's published software sequence, five times five taken branches in the
 * published shape. Each RET is in the upper half of its cache line, where return thunks are not needed on the CPUs concerned.
 * Changes EAX and ECX.
 */
SYM_FUNC_START_LOCAL(krab_vmx_clear_branch_history)
	ANNOTATE_NOENDBR
	push	%rbp
	mov	%rsp, %rbp
	mov	$5, %ecx
	ANNOTATE_INTRA_FUNCTION_CALL
	call	.Lhistory_outer
	jmp	.Lhistory_done
	.balign	64, 0xcc
	.skip	32 - (.Lhistory_ret_1 - .Lhistory_outer), 0xcc
	ANNOTATE_INTRA_FUNCTION_CALL
.Lhistory_outer:
	call	.Lhistory_inner
.Lhistory_ret_1:
	RET
	.balign	64, 0xcc
	/* Bytes from .Lhistory_inner to the RET. */
	.skip	32 - 18, 0xcc
.Lhistory_inner:
	movl	$5, %eax
.Lhistory_loop:
	jmp	.Lhistory_next
	nop
.Lhistory_next:
	sub	$1, %eax
	jnz	.Lhistory_loop
	sub	$1, %ecx
	jnz	.Lhistory_outer
	RET
.Lhistory_done:
	lfence
	pop	%rbp
	RET
SYM_FUNC_END(krab_vmx_clear_branch_history)
STACK_FRAME_NON_STANDARD(krab_vmx_clear_branch_history)

/* One VMX instruction as a function that returns DONE, FAILED or FAULTED. */
.macro VMX_FUNCTION name:req, instruction:vararg
SYM_FUNC_START(\name)
.Ldo_\@:
	\instruction
	jbe	.Lfailed_\@
	xor	%eax, %eax
	RET
.Lfailed_\@:
	mov	$FAILED, %eax
	RET
.Lfaulted_\@:
	mov	$FAULTED, %eax
	RET
	_ASM_EXTABLE(.Ldo_\@, .Lfaulted_\@)
SYM_FUNC_END(\name)
.endm

/* u32 krab_vmxon(const u64 *address), and so on */
VMX_FUNCTION krab_vmxon, vmxon (%rdi)
VMX_FUNCTION krab_vmxoff, vmxoff
VMX_FUNCTION krab_vmclear, vmclear (%rdi)
VMX_FUNCTION krab_vmptrld, vmptrld (%rdi)
VMX_FUNCTION krab_vmptrst, vmptrst (%rdi)
/* u32 krab_invept(u64 type, const u64 descriptor[2]) */
VMX_FUNCTION krab_invept, invept (%rsi), %rdi
VMX_FUNCTION krab_invvpid, invvpid (%rsi), %rdi

	.text

/*
 * void krab_vmx_gate(u32 vector): goes through the interrupt gate of a vector from 32 to 255, which only an instruction with the vector in it
 * can do.
 */
SYM_FUNC_START(krab_vmx_gate)
	movzbl	%dil, %edi
	sub	$FIRST_EXTERNAL_VECTOR, %edi
	jb	.Lno_gate
	shl	$GATE_SHIFT, %edi
	lea	krab_vmx_gates(%rip), %rax
	add	%rdi, %rax
	JMP_NOSPEC rax
.Lno_gate:
	RET
SYM_FUNC_END(krab_vmx_gate)

	.balign 1 << GATE_SHIFT
SYM_CODE_START_LOCAL(krab_vmx_gates)
	vector = FIRST_EXTERNAL_VECTOR
	.rept 256 - FIRST_EXTERNAL_VECTOR
	UNWIND_HINT_FUNC
2:	ENDBR
	.byte	0xcd, vector		/* int $vector */
	RET
	.fill	2b + (1 << GATE_SHIFT) - ., 1, 0xcc
	vector = vector + 1
	.endr
SYM_CODE_END(krab_vmx_gates)
