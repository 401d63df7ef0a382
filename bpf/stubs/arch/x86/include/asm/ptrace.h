/* Stand-in, see README: the registers of a kprobe (arch/x86/include/asm/ptrace.h). */
#ifndef KVMTRACE_PTRACE_H
#define KVMTRACE_PTRACE_H
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax;
	unsigned long ip, cs, flags, sp, ss;
};
#endif
