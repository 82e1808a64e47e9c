/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the two vendors' world switches have in common: moving the guest's general-purpose registers, SPEC_CTRL, and the selector that clears
 * CPU buffers. Included by their enter.S alone.
 */
#include <linux/linkage.h>
#include <asm/asm.h>
#include <asm/cpufeatures.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/segment.h>

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

	.section .rodata
	.balign 2
	/* VERW with a writable data selector in memory is the form that clears CPU buffers. */
SYM_DATA_LOCAL(krab_verw_selector, .word __KERNEL_DS)

	.section .noinstr.text, "ax"

/* Guest registers from the `Regs` at RDI, RDI last. RAX and RSP are the vendor's. */
.macro LOAD_GUEST_REGISTERS
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
.endm

/* Guest registers to the `Regs` at RAX. RAX and RSP are the vendor's. */
.macro STORE_GUEST_REGISTERS
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
.endm

/* Guest values must not be used by speculation. RAX, RBX and RSP are left to the vendor. */
.macro CLEAR_GUEST_REGISTERS
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
.endm

/* SPEC_CTRL becomes the guest's, in RCX; it is the host's, in R8. Changes RAX, RCX and RDX. */
.macro LOAD_GUEST_SPEC_CTRL
	ALTERNATIVE "jmp .Ldone_\@", "", X86_FEATURE_MSR_SPEC_CTRL
	cmp	%rcx, %r8
	je	.Ldone_\@
	mov	%ecx, %eax
	mov	%rcx, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Ldone_\@:
.endm

/*
 * SPEC_CTRL becomes the host's, in R9; it is the guest's, in R8: its writes exit, so the guest did not change it. Changes RAX, RCX and RDX.
 */
.macro LOAD_HOST_SPEC_CTRL
	ALTERNATIVE "jmp .Ldone_\@", "", X86_FEATURE_MSR_SPEC_CTRL
	/* With plain IBRS each write counts: it is a barrier against what the guest trained. */
	ALTERNATIVE "", "jmp .Lwrite_\@", X86_FEATURE_KERNEL_IBRS
	cmp	%r8, %r9
	je	.Lsame_\@
.Lwrite_\@:
	mov	%r9d, %eax
	mov	%r9, %rdx
	shr	$32, %rdx
	mov	$MSR_IA32_SPEC_CTRL, %ecx
	wrmsr
.Lsame_\@:
	/* The comparison may be mispredicted: nothing runs ahead of it. */
	lfence
.Ldone_\@:
.endm
