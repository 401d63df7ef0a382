/* Stand-in, see README. The programs never ask for a version; bcc's macros need some number. */
#ifndef KVMTRACE_VERSION_H
#define KVMTRACE_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
#endif
