/* Maps and helpers of the eBPF programs. bcc compiles them without kernel headers (see stubs/), as one
 * text: common.c, exits.c, signals.c, poison.c, hardware.c, vms.c, lookup.bpf.c
 * (sources/bpf/compiler.py).
 *
 * sources/bpf/layout.py passes, as -D macros read from BTF:
 *   OFF_struct_member   byte offset, or -1 if this kernel has no such member
 *   SIZE_struct         bytes
 *   ARG_event_name      position of a tracepoint's argument of that name, or -1
 *   NARGS_probe         number of arguments of the probe's target (its return value comes after)
 *   COPY_NUMBER_HELPER  the helper that a program calls for its copy number
 *   RING_PAGES …        sizes and rate limits (sources/limits.py, IN_C)
 *   FN_probe            the name of the probe's fentry or fexit program, if its target is in BTF
 *   SYM_variable        what stands for the address of a kernel's variable: see sources/bpf/copies.py
 *   HAS_TASK_PT_REGS    the kernel has the helper of that name (Linux 5.15)
 * Programs are named by their probe: FN_probe (fentry, fexit), kp_probe and kr_probe (kprobe and
 * kretprobe), tp_probe (raw tracepoint), te_probe (trace event).
 */
#include <asm/ptrace.h>
#include "record.h"
#include "kernel_objects.h"

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_TABLE("array", u32, u64, activity, 1); /* everything that the counters count */
BPF_TABLE("array", u32, u64, lost, LOST_PLACES);
BPF_TABLE("lru_hash", u64, u64, generation, 65536);

/* Threads that sent a signal with a record, until the fault that it was sent from returns. The value is
 * the running vCPU's count of exits at that time, or 0. */
BPF_TABLE("lru_hash", u32, u64, signalled, 8192);
#ifdef __aarch64__
/* Rows of `signalled`, or more if it was full. There, each fault that KVM handles asks: an array is read
 * without a call, and this one is nearly always zero. */
BPF_TABLE("array", u32, u64, nr_signalled, 1);

static __always_inline void count_signalled(u32 tid, u64 more)
{
	u32 zero = 0;
	u64 *count = nr_signalled.lookup(&zero);

	if (count && !signalled.lookup(&tid) == (more == 1))
		__sync_fetch_and_add(count, more);
}

static __always_inline int is_any_signalled(void)
{
	u32 zero = 0;
	u64 *count = nr_signalled.lookup(&zero);

	return count && *count;
}
#else
#define count_signalled(tid, more)
#define is_any_signalled() 1
#endif

static __always_inline void remember_signal(u32 tid, u64 exits)
{
	count_signalled(tid, 1);
	signalled.update(&tid, &exits);
}

static __always_inline void forget_signal(u32 tid)
{
	count_signalled(tid, -1ULL);
	signalled.delete(&tid);
}

/* Per thread and kind of call: the last one, and a bit for each copy of the program that ran in it. */
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

/* Number of this copy. To bcc it is a helper call; sources/bpf/copies.py replaces it by the number. */
static u64 (*copy_number)(void) = (void *)COPY_NUMBER_HELPER;

/* Returns 1 if another copy already handled this call.
 *
 * While a program is preempted, the kernel skips it in all other threads of that CPU
 * (kernel/bpf/trampoline.c, recursion_misses): with more busy vCPUs than CPUs that is about one run in
 * ten. So several copies are attached to the same function, and the first that is not skipped handles
 * the call.
 *
 * `a` and `b` identify the call within its thread. If two consecutive calls have equal values, a skipped
 * copy can make us miss one, so choose values that differ. */
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

/* The address of a struct kvm is reused. Together with this number, which changes whenever a VM is
 * created or destroyed at that address, it identifies one VM. 0 if neither was seen. */
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

/* The vCPU that this CPU runs, 0 if the current thread is not in KVM_RUN. virt/kvm/kvm_main.c keeps it
 * per CPU and clears it when the thread is scheduled out. */
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

/* bpf_get_current_task_btf (Linux 5.11), bpf_task_pt_regs */
static u64 (*current_task)(void) = (void *)158;
static u64 (*user_registers)(u64 task) = (void *)175;

/* The trace event kvm:kvm_userspace_exit, see its `format`. */
struct userspace_exit {
	u64 common;
	u32 reason;
	s32 error;
};

/* A kretprobe has no arguments: the kprobe at the entry saves them, per thread and probe. */
struct saved_args {
	u64 a, b, c;
};
BPF_TABLE("lru_hash", u64, struct saved_args, saved, 32768);

enum saved_for { SAVED_GMEM, SAVED_FAULTIN, SAVED_VM_NEW, SAVED_SOFT_OFFLINE, SAVED_UNPOISON };

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
