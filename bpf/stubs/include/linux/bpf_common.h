/* Stand-in, see README: the instruction encodings that bcc's bpf.h builds on (uapi). */
#ifndef KVMTRACE_BPF_COMMON_H
#define KVMTRACE_BPF_COMMON_H
#define BPF_CLASS(code) ((code) & 0x07)
#endif
