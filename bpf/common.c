/* The eBPF side of kvmtrace, as bcc compiles it (no kernel headers: see stubs/).
 *
 * sources/bpf/source.py passes, as -D macros read from BTF:
 *   OFF_struct_member  byte offset, or -1 where this kernel has no such member
 *   SIZE_struct        bytes
 *   ARG_event_name     which argument of a tracepoint is called so, or -1
 *   NARGS_probe        number of arguments of the probe's target (its return value comes after)
 *   COPY_NUMBER_HELPER          the helper that a program calls for its number
 *   FN_probe           the name that tells bcc where to attach an fentry/fexit program, if it can:
 *                      see ON_FUNCTION
 * Everything else reaches a target by kprobe and kretprobe, through the kp_* functions.
 */
#include <asm/ptrace.h>
#include "record.h"
#include "kernel_objects.h"

/* How bcc wants an fentry or fexit program to be called: by the function and, since 0.29, which is
 * when it got MODULE_KFUNC_PROBE, by where the function is. */
#ifdef MODULE_KFUNC_PROBE
#define ON_FUNCTION(kind, module, function) kind##__##module##__##function
#else
#define ON_FUNCTION(kind, module, function) kind##__##function
#endif

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_TABLE("array", u32, u64, activity, 1); /* failed KVM_RUNs, of whatever kind */
BPF_TABLE("array", u32, u64, lost, LOST_PLACES);
BPF_TABLE("lru_hash", u64, u64, generation, 65536);

/* Threads whose last signal was told: the fault that it was sent from is to follow. The running
 * vCPU's count of exits at that time, or 0. */
BPF_TABLE("lru_hash", u32, u64, signalled, 8192);

/* Per thread and kind of call: the one that was seen last, and by which copies of the program. */
struct handled_call {
	u64 a, b;
	u64 copies;
};
enum call { CALL_RUN, CALL_GMEM, CALL_FAULTIN, CALL_SIGBUS, CALL_VM };
BPF_TABLE("lru_hash", u64, struct handled_call, handled_calls, 32768);

static __always_inline void count_lost(u32 place)
{
	u64 *count = lost.lookup(&place);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Which copy this is: bcc knows it as a helper, sources/bpf/copies.py puts the number in its place. */
static u64 (*copy_number)(void) = (void *)COPY_NUMBER_HELPER;
#define COPY_UNDER_WAY 31

/* While a program is preempted, the kernel skips it in all other threads of that CPU
 * (kernel/bpf/trampoline.c, recursion_misses): with more busy vCPUs than CPUs one run in ten or so. Hence
 * copies of it on the same function, of which the first that is not skipped takes the call.
 *
 * `a`, `b`: what tells this call from others of the thread. Where they are the same, a copy knows
 * another call by having seen it already, and one more skipped may cost the call: they had better
 * differ. Whether another copy has taken this call. */
static __always_inline int already_handled(enum call call, u64 a, u64 b, u32 copy)
{
	u64 key = (bpf_get_current_pid_tgid() << 32) | call;
	struct handled_call first = { a, b, 1ULL << copy }, *seen = handled_calls.lookup(&key);

	if (!seen) {
		handled_calls.update(&key, &first);
		return 0;
	}
	if (seen->a == a && seen->b == b && !(seen->copies & 1ULL << copy)) {
		seen->copies |= 1ULL << copy;
		return 1;
	}
	*seen = first;
	return 0;
}

/* A struct kvm's address is used again; together with the number of the last beginning or end seen
 * at that address it is not. */
static __always_inline u64 generation_of(u64 kvm)
{
	u64 *gen = generation.lookup(&kvm);

	return gen ? *gen : 0;
}

static __always_inline void fill_header(struct header *h, u32 type, u64 kvm)
{
	u64 id = bpf_get_current_pid_tgid();

	h->ts = bpf_ktime_get_ns();
	h->kvm = kvm;
	h->gen = kvm ? generation_of(kvm) : 0;
	h->type = type;
	h->tid = (u32)id;
	h->tgid = id >> 32;
	h->cpu = bpf_get_smp_processor_id();
}

static __always_inline void emit(void *record, u64 size)
{
	if (ring.ringbuf_output(record, size, 0))
		count_lost(LOST_RING);
}

/* The vCPU that this CPU is running, if the current thread is in KVM_RUN: virt/kvm/kvm_main.c keeps
 * it per CPU and clears it when the thread is scheduled out. */
static __always_inline u64 running_vcpu(void)
{
#ifdef SYM_KVM_RUNNING_VCPU
	u64 cpu = bpf_get_smp_processor_id();

	return read_u64(SYM_KVM_RUNNING_VCPU + read_u64(SYM_PER_CPU_OFFSET + cpu * 8));
#else
	return 0;
#endif
}

static __always_inline u64 exits_of(u64 vcpu)
{
	if (OFF_kvm_vcpu_stat_exits < 0 || !vcpu)
		return 0;
	return read_u64(vcpu + OFF_kvm_vcpu_stat_exits);
}

static __always_inline void count_activity(void)
{
	u32 zero = 0;
	u64 *count = activity.lookup(&zero);

	if (count)
		__sync_fetch_and_add(count, 1);
}

typedef unsigned long long args_t;

/* ---- kprobes, and kretprobes with the arguments kept from the entry ---- */

struct saved_args {
	u64 a, b, c;
};
BPF_TABLE("lru_hash", u64, struct saved_args, saved, 32768);

enum saved_for { SAVED_RUN, SAVED_GMEM, SAVED_FAULTIN, SAVED_VM_NEW, SAVED_SOFT_OFFLINE, SAVED_UNPOISON };

static __always_inline u64 saved_key(u64 probe)
{
	return (bpf_get_current_pid_tgid() << 32) | probe;
}

static __always_inline int save_args(u64 probe, u64 a, u64 b, u64 c)
{
	struct saved_args args = { a, b, c };
	u64 key = saved_key(probe);

	saved.update(&key, &args);
	return 0;
}

static __always_inline struct saved_args *saved_args(u64 probe)
{
	u64 key = saved_key(probe);

	return saved.lookup(&key);
}
