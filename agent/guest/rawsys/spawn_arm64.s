#include "textflag.h"

// func cloneAndRun(args *cloneArgs, size uintptr, steps *step, n uintptr, masks *[2]uint64, failed *uintptr) (pid uintptr)
//
// The child shares the parent's memory and stack, and the parent waits until it has executed or ended: so it touches neither but for
// *failed.
TEXT ·cloneAndRun(SB), NOSPLIT, $0-56
	BL	runtime·entersyscall(SB)
	// Block every signal: none may find the child before it has executed.
	MOVD	$135, R8	// rt_sigprocmask
	MOVD	$2, R0		// SIG_SETMASK
	MOVD	masks+32(FP), R1
	ADD	$8, R1, R2
	MOVD	$8, R3
	SVC
	MOVD	steps+16(FP), R19
	MOVD	n+24(FP), R20
	MOVD	failed+40(FP), R21
	MOVD	args+0(FP), R0
	MOVD	size+8(FP), R1
	MOVD	$435, R8	// clone3
	SVC
	CBZ	R0, child
	MOVD	R0, pid+48(FP)
	MOVD	$135, R8
	MOVD	$2, R0
	MOVD	masks+32(FP), R1
	ADD	$8, R1
	MOVD	ZR, R2
	MOVD	$8, R3
	SVC
	BL	runtime·exitsyscall(SB)
	RET
child:
	CBZ	R20, exit
	MOVD	0(R19), R8
	MOVD	8(R19), R0
	MOVD	16(R19), R1
	MOVD	24(R19), R2
	MOVD	32(R19), R3
	MOVD	40(R19), R4
	MOVD	48(R19), R5
	SVC
	CMN	$4095, R0
	BCS	fail
	ADD	$56, R19
	SUB	$1, R20
	B	child
fail:
	NEG	R0, R0
	MOVD	R0, (R21)
exit:
	MOVD	$94, R8		// exit_group
	MOVD	$127, R0
	SVC
	BRK
