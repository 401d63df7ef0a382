/* Stand-in, see README: the registers of a kprobe (arch/arm64/include/asm/ptrace.h). */
#ifndef KVMTRACE_PTRACE_H
#define KVMTRACE_PTRACE_H
struct user_pt_regs {
	unsigned long long regs[31], sp, pc, pstate;
};
struct pt_regs {
	union {
		struct user_pt_regs user_regs;
		struct {
			u64 regs[31], sp, pc, pstate;
		};
	};
};
#endif
