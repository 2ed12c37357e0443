#include "textflag.h"

// func cloneAndRun(args *cloneArgs, size uintptr, steps *step, n uintptr, masks *[2]uint64, failed *uintptr) (pid uintptr)
//
// The child shares the parent's memory and stack, and the parent waits until it has executed or ended: so it touches neither but for
// *failed.
TEXT ·cloneAndRun(SB), NOSPLIT, $0-56
	CALL	runtime·entersyscall(SB)
	// Block every signal: none may find the child before it has executed.
	MOVL	$14, AX		// rt_sigprocmask
	MOVL	$2, DI		// SIG_SETMASK
	MOVQ	masks+32(FP), SI
	LEAQ	8(SI), DX
	MOVL	$8, R10
	SYSCALL
	MOVQ	steps+16(FP), R12
	MOVQ	n+24(FP), R13
	MOVQ	failed+40(FP), BX
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVL	$435, AX	// clone3
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	MOVQ	AX, pid+48(FP)
	MOVL	$14, AX
	MOVL	$2, DI
	MOVQ	masks+32(FP), SI
	ADDQ	$8, SI
	XORL	DX, DX
	MOVL	$8, R10
	SYSCALL
	CALL	runtime·exitsyscall(SB)
	RET
child:
	TESTQ	R13, R13
	JZ	exit
	MOVQ	0(R12), AX
	MOVQ	8(R12), DI
	MOVQ	16(R12), SI
	MOVQ	24(R12), DX
	MOVQ	32(R12), R10
	MOVQ	40(R12), R8
	MOVQ	48(R12), R9
	SYSCALL
	CMPQ	AX, $0xfffffffffffff001
	JCC	fail
	ADDQ	$56, R12
	DECQ	R13
	JMP	child
fail:
	NEGQ	AX
	MOVQ	AX, (BX)
exit:
	MOVL	$231, AX	// exit_group
	MOVL	$127, DI
	SYSCALL
	INT	$3
