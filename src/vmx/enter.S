/* SPDX-License-Identifier: GPL-2.0 */
/*
 * World switch of VMX: one VMLAUNCH or VMRESUME, with the host's speculation mitigations around it, and the VMX instructions that are
 * not on the hot path. SDM "VM Entries", "VM Exits", and "VMX Instruction Reference" for how each tells its failure.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <asm/asm.h>
#include <asm/cpufeatures.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/segment.h>
#include <asm/unwind_hints.h>

/* Offsets in `guest::Regs`: the array is in encoding order. RSP is switched by the CPU. */
#define RAX_OFFSET	(0 * 8)
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

/* VMCS field: host RSP. */
#define HOST_RSP	0x6C14

/* What the functions here return. */
#define DONE		0
#define FAILED		1	/* VMfail: the VM-instruction error tells why, if there is a current VMCS */
#define FAULTED		2	/* #UD or #GP: VMX was turned off under us */

	.section .rodata
	.balign 2
	/* VERW with a writable data selector in memory is the form that clears CPU buffers. */
SYM_DATA_LOCAL(krab_vmx_verw_selector, .word __KERNEL_DS)

	.section .noinstr.text, "ax"

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

	ALTERNATIVE "jmp .Lguest_spec_ctrl_done", "", X86_FEATURE_MSR_SPEC_CTRL
	cmp	%rcx, %r8
	je	.Lguest_spec_ctrl_done
	mov	%ecx, %eax
	mov	%rcx, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Lguest_spec_ctrl_done:

	mov	RAX_OFFSET(%rdi), %rax
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

	/*
	 * Where the host clears buffers only for guests that reach its devices' memory, a guest might: clear for all. VERW changes ZF, so
	 * the test comes behind it.
	 */
	ALTERNATIVE_2 "", \
		"verw krab_vmx_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO, \
		"verw krab_vmx_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM

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
	pop	%rcx
	mov	%rcx, RAX_OFFSET(%rax)
	mov	$DONE, %ebx

.Lleave:
	/* Guest values must not be used by speculation: RSP was switched by the CPU, RBX is the result. */
	xor	%eax, %eax
	xor	%ecx, %ecx
	xor	%edx, %edx
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

	/* No RET may run on the guest's return stack; with eIBRS one call that retires is enough. */
	FILL_RETURN_BUFFER %rcx, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT, X86_FEATURE_RSB_VMEXIT_LITE

	add	$(2 * 8), %rsp
	pop	%r8			/* guest SPEC_CTRL: its writes exit, so the guest did not change it */
	pop	%r9			/* host SPEC_CTRL */
	ALTERNATIVE "jmp .Lhost_spec_ctrl_done", "", X86_FEATURE_MSR_SPEC_CTRL
	/* With plain IBRS each write counts: it is a barrier against what the guest trained. */
	ALTERNATIVE "", "jmp .Lwrite_host_spec_ctrl", X86_FEATURE_KERNEL_IBRS
	cmp	%r8, %r9
	je	.Lhost_spec_ctrl_same
.Lwrite_host_spec_ctrl:
	mov	%r9d, %eax
	mov	%r9, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Lhost_spec_ctrl_same:
	/* The comparison may be mispredicted: nothing runs ahead of it. */
	lfence
.Lhost_spec_ctrl_done:

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
