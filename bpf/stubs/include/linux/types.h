/* Stand-in, see README. */
#ifndef KVMTRACE_TYPES_H
#define KVMTRACE_TYPES_H
typedef signed char s8, __s8;
typedef unsigned char u8, __u8, uint8_t;
typedef short s16, __s16;
typedef unsigned short u16, __u16, uint16_t;
typedef int s32, __s32, int32_t;
typedef unsigned int u32, __u32, uint32_t;
typedef long long s64, __s64, int64_t;
typedef unsigned long long u64, __u64, uint64_t;
typedef u16 __le16, __be16, __sum16;
typedef u32 __le32, __be32, __wsum;
typedef u64 __le64, __be64, __aligned_u64;
typedef unsigned long size_t, uintptr_t;
typedef int pid_t;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define __always_inline inline __attribute__((__always_inline__))
#endif
