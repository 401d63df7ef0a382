/* Stand-in, see README. */
#ifndef KVMTRACE_KCONFIG_H
#define KVMTRACE_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
