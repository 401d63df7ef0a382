/* The eBPF side of kvmtrace, as bcc compiles it (no kernel headers: see stubs/).
 *
 * sources/bpf/source.py passes, as -D macros read from BTF:
 *   OFF_struct_member  byte offset, or -1 where this kernel has no such member
 *   SIZE_struct        bytes
 *   ARG_event_name     which argument of a tracepoint is called so, or -1
 *   NARGS_probe        number of arguments of the probe's target (its return value comes after)
 *   THIS_COPY          the helper that a program calls for its number
 *   FN_probe           the name that tells bcc where to attach an fentry/fexit program, if it can:
 *                      see names.h
 * Everything else reaches a target by kprobe and kretprobe, through the kp_* functions.
 */
#include <asm/ptrace.h>
#include "names.h"
#include "record.h"
#include "walk.h"

#define EINTR_ 4
#define EAGAIN_ 11
#define EFAULT_ 14
#define EHWPOISON_ 133
#define SIGBUS_ 7
#define SI_KERNEL_ 0x80
#define KVM_EXIT_MEMORY_FAULT_ 39
#define KVM_EXIT_ARM_SEA_ 41
#define MEMORY_EXIT_FLAG_PRIVATE_ (1ULL << 3)
#define ARM_SEA_GPA_VALID 1
#define KVM_PFN_ERR_HWPOISON_ 0x7ff0000000000001ULL /* include/linux/kvm_host.h */

/* A key's first exit is told at once, later ones at most this often; the counters have them all. */
#define TELL_EVERY_NS 200000000ULL
/* Over all keys together: this many events in a window of 100 ms. */
#define TELL_BURST 200
/* Signals of one key: so many records in a second; the counters have them all. */
#define SIGNAL_BURST 200

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_TABLE("hash", struct exit_key, struct exit_count, exits, MAX_KEYS);
BPF_TABLE("hash", struct exit_key, struct exit_count, overflow, MAX_OVERFLOW);
BPF_TABLE("hash", struct refused_key, struct refused_count, refused, MAX_OVERFLOW);
BPF_TABLE("hash", struct sigbus_key, struct sigbus_count, signals, MAX_OVERFLOW);
BPF_TABLE("array", u32, u64, activity, 1); /* failed KVM_RUNs, of whatever kind */
BPF_TABLE("array", u32, u32, watching_gmem, 1); /* 1: kvm_gmem_get_pfn's answers are seen */
BPF_TABLE("array", u32, u64, lost, LOST_PLACES);
BPF_TABLE("lru_hash", u64, u64, generation, 65536);
BPF_TABLE("array", u32, u64, generations, 1);

/* Per thread: what kvm_gmem_get_pfn answered last when it failed, until a fault takes it up. */
struct gmem_fail {
	u64 kvm;
	u64 gfn;
	u64 exits;  /* the running vCPU's count of exits, or 0 */
	u64 pfn_at; /* where the pfn was to be written: into the fault that asked */
	s32 ret;
	u32 pad;
};
BPF_TABLE("lru_hash", u32, struct gmem_fail, gmem_fails, 8192);

/* Per thread: the fault that failed last, until KVM_RUN's return takes it up. */
struct fault {
	u64 vcpu;
	u64 exits; /* vcpu->stat.exits: no guest entry lies between this fault and the return */
	u64 gfn;
	s32 gmem;
	u32 access;
};
BPF_TABLE("lru_hash", u32, struct fault, faults, 8192);

/* Threads whose last signal was told: the fault that it was sent from is to follow. The running
 * vCPU's count of exits at that time, or 0. */
BPF_TABLE("lru_hash", u32, u64, signalled, 8192);

/* Per thread and kind of call: the one that was seen last, and by which copies of the program. */
struct seen_call {
	u64 a, b;
	u64 copies;
};
enum call { CALL_RUN, CALL_GMEM, CALL_FAULTIN, CALL_SIGBUS, CALL_VM };
BPF_TABLE("lru_hash", u64, struct seen_call, seen_calls, 32768);

/* Per thread: from kvm_gmem_error_folio to the verdict that follows it. */
BPF_TABLE("lru_hash", u32, struct gmem_walk, walks, 256);
BPF_TABLE("percpu_array", u32, struct gmem_walk, walk_scratch, 1);

struct tell_budget {
	u64 since;
	u64 left;
};
BPF_TABLE("array", u32, struct tell_budget, budget, 1);

static __always_inline void lose(u32 place)
{
	u64 *count = lost.lookup(&place);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Which copy this is: bcc knows it as a helper, sources/bpf/copies.py puts the number in its place. */
static u64 (*this_copy)(void) = (void *)THIS_COPY;
#define COPY_UNDER_WAY 31

/* While a program is preempted, the kernel skips it in all other threads of that CPU
 * (kernel/bpf/trampoline.c, recursion_misses): with more busy vCPUs than CPUs one run in ten or so. Hence
 * copies of it on the same function, of which the first that is not skipped takes the call.
 *
 * `a`, `b`: what tells this call from others of the thread. Where they are the same, a copy knows
 * another call by having seen it already, and one more skipped may cost the call: they had better
 * differ. Whether another copy has taken this call. */
static __always_inline int is_seen(enum call call, u64 a, u64 b, u32 copy)
{
	u64 key = (bpf_get_current_pid_tgid() << 32) | call;
	struct seen_call first = { a, b, 1ULL << copy }, *seen = seen_calls.lookup(&key);

	if (!seen) {
		seen_calls.update(&key, &first);
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
static __always_inline u64 gen_of(u64 kvm)
{
	u64 *gen = generation.lookup(&kvm);

	return gen ? *gen : 0;
}

static __always_inline void fill(struct header *h, u32 type, u64 kvm)
{
	u64 id = bpf_get_current_pid_tgid();

	h->ts = bpf_ktime_get_ns();
	h->kvm = kvm;
	h->gen = kvm ? gen_of(kvm) : 0;
	h->type = type;
	h->tid = (u32)id;
	h->tgid = id >> 32;
	h->cpu = bpf_get_smp_processor_id();
}

static __always_inline void tell(void *record, u64 size)
{
	if (ring.ringbuf_output(record, size, 0))
		lose(LOST_RING);
}

/* The vCPU that this CPU is running, if the current thread is in KVM_RUN: virt/kvm/kvm_main.c keeps
 * it per CPU and clears it when the thread is scheduled out. */
static __always_inline u64 running_vcpu(void)
{
#ifdef SYM_KVM_RUNNING_VCPU
	u64 cpu = bpf_get_smp_processor_id();

	return word(SYM_KVM_RUNNING_VCPU + word(SYM_PER_CPU_OFFSET + cpu * 8));
#else
	return 0;
#endif
}

static __always_inline u64 exits_of(u64 vcpu)
{
	if (OFF_kvm_vcpu_stat_exits < 0 || !vcpu)
		return 0;
	return word(vcpu + OFF_kvm_vcpu_stat_exits);
}

/* Whether a VM may have private memory; where the kernel does not tell, on x86 it may. */
static __always_inline int has_private(u64 kvm)
{
#if OFF_kvm_has_private_mem < 0 && defined(__aarch64__)
	return 0;
#else
	return OFF_kvm_has_private_mem < 0 || byte(kvm + OFF_kvm_has_private_mem);
#endif
}

static __always_inline void count_activity(void)
{
	u32 zero = 0;
	u64 *count = activity.lookup(&zero);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline int may_tell(u64 now)
{
	u32 zero = 0;
	struct tell_budget *b = budget.lookup(&zero);

	if (!b)
		return 0;
	if (now - b->since > 100000000ULL) {
		b->since = now;
		b->left = TELL_BURST;
	}
	if (!b->left)
		return 0;
	b->left--;
	return 1;
}

/* ---- run: KVM_RUN came back ---- */

/* Exits whose address tells nobody anything: guest_memfd was not asked (a conversion), or a bit that
 * is not mainline's says that the page is to be fetched. They come for one page after the other by
 * the ten thousand, and would leave no counter to others. */
static __always_inline int is_normal_business(struct exit_key *key)
{
	return key->annotated && key->ret == -EFAULT_ &&
	       (!key->gmem || key->flags & ~MEMORY_EXIT_FLAG_PRIVATE_);
}

static __always_inline int on_run_failed(u64 vcpu, int ret)
{
	struct exit_key key = {};
	struct exit_count zero = {}, *count;
	struct exit_record record = {};
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct gmem_fail *gmem;
	struct fault *fault;
	u64 run, now, gpa = 0;

	key.kvm = word(vcpu + OFF_kvm_vcpu_kvm);
	key.gen = gen_of(key.kvm);
	key.vcpu = half(vcpu + OFF_kvm_vcpu_vcpu_id);
	key.ret = ret;
	key.gfn = NO_GFN;
	/* Only the fault handler's own return says whether it asked: a fault that nobody saw says
	 * nothing, and must not pass for one that was a conversion. */
	key.gmem = GMEM_NOT_WATCHED;
	run = word(vcpu + OFF_kvm_vcpu_run);
	key.reason = half(run + OFF_kvm_run_exit_reason);
	/* Only then is the union a memory_fault (api.rst); else it is another exit's leftovers. 0: see
	 * on_vncr. */
	if (key.reason == KVM_EXIT_MEMORY_FAULT_ &&
	    (ret == -EFAULT_ || ret == -EHWPOISON_ || !ret) && OFF_kvm_run_memory_fault >= 0) {
		key.annotated = 1;
		key.flags = word(run + OFF_kvm_run_memory_fault);
		key.gpa = word(run + OFF_kvm_run_memory_fault + 8);
		key.size = word(run + OFF_kvm_run_memory_fault + 16);
	}

	fault = faults.lookup(&tid);
	if (fault) {
		u64 exits = exits_of(vcpu);
		/* The same vCPU and, since it was recorded, no further exit: then no guest entry. Where
		 * exits aren't counted the annotation has to confirm the page. */
		int same = OFF_kvm_vcpu_stat_exits >= 0 ?
				   fault->exits == exits :
				   key.annotated && fault->gfn == key.gpa >> PAGE_SHIFT_;

		if (fault->vcpu == vcpu && same) {
			key.gfn = fault->gfn;
			key.gmem = fault->gmem;
			key.access = fault->access;
		}
		faults.delete(&tid);
	}
	/* on_vncr: asked in this thread, and for this page. */
	gmem = gmem_fails.lookup(&tid);
	if (!ret && key.annotated && gmem && gmem->kvm == key.kvm &&
	    gmem->gfn == key.gpa >> PAGE_SHIFT_)
		key.gmem = gmem->ret;
	gmem_fails.delete(&tid);
	/* No conversion where nothing is private: then guest_memfd failed, though nobody heard it. A
	 * bit that is not mainline's may mean something else altogether. */
	if (key.annotated && ret == -EFAULT_ && !has_private(key.kvm) &&
	    !(key.flags & ~MEMORY_EXIT_FLAG_PRIVATE_) &&
	    (!key.gmem || key.gmem == GMEM_NOT_WATCHED))
		key.gmem = ret;

	/* No errno, and told only on arm64: see on_arm_sea. struct { flags, esr, gva, gpa } */
	if (!ret && key.reason == KVM_EXIT_ARM_SEA_ && OFF_kvm_run_arm_sea >= 0 &&
	    word(run + OFF_kvm_run_arm_sea) & ARM_SEA_GPA_VALID)
		key.gfn = word(run + OFF_kvm_run_arm_sea + 24) >> PAGE_SHIFT_;

	if (is_normal_business(&key)) {
		gpa = key.gpa;
		key.gpa = NO_GPA;
		key.gfn = NO_GFN;
	}
	now = bpf_ktime_get_ns();
	count = exits.lookup_or_try_init(&key, &zero);
	if (!count) {
		/* The map is full. Stay exact per VM, errno and cause; give up the rest, and say so. */
		lose(LOST_KEYS);
		key.gpa = NO_GPA;
		key.gfn = NO_GFN;
		key.size = 0;
		key.vcpu = NO_VCPU;
		key.access = 0;
		count = overflow.lookup_or_try_init(&key, &zero);
		if (!count) {
			lose(LOST_COUNTS);
			return 0;
		}
	} else if (key.gpa == NO_GPA && (count->gpa != gpa || !count->since)) {
		/* A key has one vCPU, and so one writer. Who reads meanwhile finds the row begun later
		 * than it was, rather than with the wrong address. */
		*(volatile u64 *)&count->since = count->total + 1;
		*(volatile u64 *)&count->gpa = gpa;
	}
	__sync_fetch_and_add(&count->total, 1);
	count_activity();
	count->last_ts = now;
	count->tid = tid;
	count->tgid = bpf_get_current_pid_tgid() >> 32;
	if (now - count->told_ts < TELL_EVERY_NS)
		return 0;
	if (!may_tell(now))
		return 0;
	count->told_ts = now;
	fill(&record.h, RECORD_EXIT, key.kvm);
	record.key = key;
	record.total = count->total;
	record.gpa = count->gpa;
	record.since = count->since;
	tell(&record, sizeof(record));
	return 0;
}

static __always_inline int on_run(u64 vcpu, int ret, u32 copy)
{
	if (ret >= 0)
		return 0;
	/* A signal is pending, or the vCPU is not started yet: ordinary life. */
	if (ret == -EINTR_ || ret == -EAGAIN_)
		return 0;
	return is_seen(CALL_RUN, vcpu, exits_of(vcpu), copy) ? 0 : on_run_failed(vcpu, ret);
}

/* A KVM_RUN that was under way when the probes were attached returns past them, but not past
 * kvm:kvm_userspace_exit(reason, errno), which is traced behind it. Whose it is, the fault tells that
 * has just failed in it; what `run` has seen has taken its fault. */
static __always_inline int on_run_under_way(int ret)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct fault *fault = faults.lookup(&tid);

	if (!fault || fault->exits != exits_of(fault->vcpu))
		return 0;
	return on_run(fault->vcpu, ret, COPY_UNDER_WAY);
}

/* ---- arm_sea: kvm_handle_guest_sea(vcpu) returned; 0: KVM_RUN will too, with KVM_EXIT_ARM_SEA ---- */

static __always_inline int on_arm_sea(u64 vcpu, int ret)
{
	if (ret || half(word(vcpu + OFF_kvm_vcpu_run) + OFF_kvm_run_exit_reason) != KVM_EXIT_ARM_SEA_)
		return 0;
	return on_run_failed(vcpu, 0);
}

/* ---- vncr: kvm_handle_vncr_abort(vcpu) returned; 0: so will KVM_RUN, with a memory fault or as above.
 * Against api.rst there is no errno with it; asking so here costs KVM_RUN's other returns nothing. ---- */

static __always_inline int on_vncr(u64 vcpu, int ret)
{
	if (ret || half(word(vcpu + OFF_kvm_vcpu_run) + OFF_kvm_run_exit_reason) !=
			   KVM_EXIT_MEMORY_FAULT_)
		return 0;
	return on_run_failed(vcpu, 0);
}

/* ---- gmem: kvm_gmem_get_pfn(kvm, slot, gfn, pfn, ...) failed ---- */

static __always_inline void on_refused(u64 kvm, u64 gfn)
{
	struct refused_key key = {};
	struct refused_count zero = {}, *count;

	key.kvm = kvm;
	key.gen = gen_of(kvm);
	key.gfn = gfn;
	count = refused.lookup_or_try_init(&key, &zero);
	if (!count) {
		lose(LOST_COUNTS);
		return;
	}
	__sync_fetch_and_add(&count->total, 1);
	count->last_ts = bpf_ktime_get_ns();
	count->tgid = bpf_get_current_pid_tgid() >> 32;
	count_activity();
}

static __always_inline int on_gmem(u64 kvm, u64 gfn, u64 pfn_at, int ret, u32 copy)
{
	u32 tid;
	struct gmem_fail fail = {};

	if (ret >= 0 || is_seen(CALL_GMEM, gfn, exits_of(running_vcpu()), copy))
		return 0;
	if (ret == -EHWPOISON_)
		on_refused(kvm, gfn);
	tid = (u32)bpf_get_current_pid_tgid();
	fail.kvm = kvm;
	fail.gfn = gfn;
	fail.pfn_at = pfn_at;
	fail.exits = exits_of(running_vcpu());
	fail.ret = ret;
	gmem_fails.update(&tid, &fail);
	return 0;
}

/* ---- faultin: the fault handler; on x86 (vcpu, fault, ...), on arm64 (vcpu) ---- */

/* On arm64 the vCPU keeps the fault's registers (arch/arm64/include/asm/{kvm_emulate,esr}.h):
 * HPFAR_EL2 bits 39:4 are bits 47:12 of the address, ESR_EL2 tells the kind of access. */
#define IN_REGISTERS (OFF_kvm_page_fault_gfn < 0)
#define ESR_EC_IABT_LOW 0x20
#define ESR_WNR (1 << 6)

static __always_inline u64 gfn_of(u64 vcpu, u64 fault)
{
	if (!IN_REGISTERS)
		return word(fault + OFF_kvm_page_fault_gfn);
	return ((word(vcpu + OFF_kvm_vcpu_hpfar) & 0xffffffffff0ULL) << 8) >> PAGE_SHIFT_;
}

static __always_inline u32 access_of(u64 vcpu, u64 fault)
{
	u32 access = ACCESS_KNOWN;

	if (IN_REGISTERS) {
		u32 esr = half(vcpu + OFF_kvm_vcpu_esr);

		if (OFF_kvm_vcpu_esr < 0)
			return 0;
		if (esr >> 26 == ESR_EC_IABT_LOW)
			return access | ACCESS_EXEC;
		return access | (esr & ESR_WNR ? ACCESS_WRITE : ACCESS_READ);
	}
	if (OFF_kvm_page_fault_write < 0 || OFF_kvm_page_fault_exec < 0)
		return 0;
	if (byte(fault + OFF_kvm_page_fault_write))
		access |= ACCESS_WRITE;
	else if (byte(fault + OFF_kvm_page_fault_exec))
		access |= ACCESS_EXEC;
	else
		access |= ACCESS_READ;
	if (OFF_kvm_page_fault_is_private >= 0)
		access |= ACCESS_PRIVATE_KNOWN;
	if (OFF_kvm_page_fault_is_private >= 0 && byte(fault + OFF_kvm_page_fault_is_private))
		access |= ACCESS_PRIVATE;
	return access;
}

/* Whether this fault, which the handler took for done, was one on a poisoned page. */
static __always_inline int is_poisoned(u64 vcpu, u64 fault, u64 *sent)
{
	/* The signal was sent in this very fault if the vCPU has not been in the guest since. */
	if (IN_REGISTERS)
		return *sent && *sent == exits_of(vcpu);
	return OFF_kvm_page_fault_pfn >= 0 &&
	       word(fault + OFF_kvm_page_fault_pfn) == KVM_PFN_ERR_HWPOISON_;
}

static __always_inline int on_faultin(u64 vcpu, u64 fault, int ret, u32 copy)
{
	struct gmem_fail *gmem;
	struct fault state = {};
	u32 tid, zero = 0, *watching;

	if (ret == 0) /* RET_PF_CONTINUE */
		return 0;
	tid = (u32)bpf_get_current_pid_tgid();
	if (ret > 0) {
		struct fault_record record = {};
		u64 slot, *sent = signalled.lookup(&tid);

		if (!sent || !is_poisoned(vcpu, fault, sent))
			return 0;
		signalled.delete(&tid);
		fill(&record.h, RECORD_FAULT, word(vcpu + OFF_kvm_vcpu_kvm));
		record.vcpu = half(vcpu + OFF_kvm_vcpu_vcpu_id);
		record.gfn = gfn_of(vcpu, fault);
		record.access = access_of(vcpu, fault);
		slot = OFF_kvm_page_fault_slot >= 0 ? word(fault + OFF_kvm_page_fault_slot) : 0;
		if (slot)
			record.hva = word(slot + OFF_kvm_memory_slot_userspace_addr) +
				     ((record.gfn - word(slot + OFF_kvm_memory_slot_base_gfn))
				      << PAGE_SHIFT_);
		tell(&record, sizeof(record));
		return 0;
	}
	state.vcpu = vcpu;
	state.exits = exits_of(vcpu);
	if (is_seen(CALL_FAULTIN, vcpu, state.exits, copy))
		return 0;
	state.gfn = gfn_of(vcpu, fault);
	state.access = access_of(vcpu, fault);
	watching = watching_gmem.lookup(&zero);
	state.gmem = watching && *watching ? 0 : GMEM_NOT_WATCHED;
	gmem = gmem_fails.lookup(&tid);
	if (gmem) {
		/* Asked for this fault: it was to answer into this very fault, for this gfn, and the
		 * vCPU has not been in the guest since. */
		int same = gmem->gfn == state.gfn &&
			   (OFF_kvm_page_fault_pfn < 0 ||
			    gmem->pfn_at == fault + OFF_kvm_page_fault_pfn) &&
			   (!gmem->exits || gmem->exits == state.exits);

		if (same)
			state.gmem = gmem->ret;
		gmem_fails.delete(&tid);
	}
	faults.update(&tid, &state);
	return 0;
}

/* ---- gmem_error: kvm_gmem_error_folio(mapping, folio), and from there to VMs and gfns ---- */

static __always_inline int on_gmem_error(u64 mapping, u64 folio)
{
	u32 zero = 0, tid = (u32)bpf_get_current_pid_tgid();
	struct gmem_walk *walk = walk_scratch.lookup(&zero);
	int i;

	if (!walk)
		return 0;
	gmem_owners(walk, mapping, word(folio + OFF_folio_index));
	for (i = 0; i < MAX_OWNERS; i++)
		if (i < walk->nr_owners)
			walk->owners[i].gen = gen_of(walk->owners[i].kvm);
	walks.update(&tid, walk);
	return 0;
}

/* ---- poison: memory_failure_event(pfn, type, result) ---- */

static __always_inline int on_poison(u64 pfn, int page_type, int result)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct gmem_walk *walk = walks.lookup(&tid);
	struct poison_record record = {};

	fill(&record.h, RECORD_POISON, 0);
	record.pfn = pfn;
	record.page_type = page_type;
	record.result = result;
	if (walk) {
		record.gmem = *walk;
		walks.delete(&tid);
	}
	tell(&record, sizeof(record));
	return 0;
}

/* ---- sigbus: force_sig_mceerr(code, addr, lsb), send_sig_mceerr(code, addr, lsb, task) ---- */

/* Count a signal; 0 if that was enough of its kind for now. */
static __always_inline int count_signal(struct sigbus_record *record, struct sigbus_count **counted)
{
	struct sigbus_key key = {};
	struct sigbus_count zero = {}, *count;

	key.kvm = record->h.kvm;
	key.gen = record->h.gen;
	key.hva = record->hva;
	key.code = record->code;
	key.lsb = record->lsb;
	key.target_tid = record->target_tid;
	key.target_tgid = record->target_tgid;
	key.vcpu = record->vcpu;
	key.sender = record->h.tid;
	count = signals.lookup_or_try_init(&key, &zero);
	*counted = count;
	if (!count)
		return 1;
	__sync_fetch_and_add(&count->total, 1);
	count_activity();
	count->last_ts = record->h.ts;
	record->total = count->total;
	if (record->h.ts - count->since > 1000000000ULL) {
		count->since = record->h.ts;
		count->left = SIGNAL_BURST;
	}
	if (!count->left)
		return 0;
	count->left--;
	return 1;
}

static __always_inline int on_sigbus(int code, u64 hva, int lsb, u64 task, u32 copy)
{
	struct sigbus_record record = {};
	struct sigbus_count *count = 0;
	u32 tid = (u32)bpf_get_current_pid_tgid(), target = task ? half(task + OFF_task_struct_pid) : tid;
	/* memory_failure in a vCPU's thread also sends to others who have the page. */
	u64 vcpu = target == tid ? running_vcpu() : 0, exits = exits_of(vcpu);

	/* Not the task's address: the verifier does not add to that. */
	if (is_seen(CALL_SIGBUS, hva, ((u64)target << 32) + exits, copy))
		return 0;
	fill(&record.h, RECORD_SIGBUS, vcpu ? word(vcpu + OFF_kvm_vcpu_kvm) : 0);
	record.hva = hva;
	record.code = code;
	record.lsb = (short)lsb;
#ifdef SYM_KVM_RUNNING_VCPU
	record.vcpu = vcpu ? half(vcpu + OFF_kvm_vcpu_vcpu_id) : -1;
#else
	record.vcpu = -2;
#endif
	record.target_tid = target;
	record.target_tgid = task ? half(task + OFF_task_struct_tgid) : record.h.tgid;
	if (!count_signal(&record, &count)) {
		signalled.delete(&record.h.tid);
		return 0;
	}
	signalled.update(&record.h.tid, &exits);
	if (!task)
		bpf_get_current_comm(record.comm, sizeof(record.comm));
	else if (OFF_task_struct_comm >= 0)
		bpf_probe_read_kernel(record.comm, sizeof(record.comm), (void *)(task + OFF_task_struct_comm));
	if (!count)
		tell(&record, sizeof(record));
	else if (!ring.ringbuf_output(&record, sizeof(record), 0))
		count->sent = record.total;
	return 0;
}

/* force_sig(sig): what a thread gets that consumed poison which memory_failure could not deal with */
static __always_inline int on_sigbus_bare(int sig, u32 copy)
{
	return sig == SIGBUS_ ? on_sigbus(SI_KERNEL_, 0, 0, 0, copy) : 0;
}

/* ---- mce: mce:mce_record(struct mce_hw_err * or struct mce *) ---- */

static __always_inline int on_mce(u64 mce)
{
	struct mce_record_ record = {};

	if (OFF_mce_status < 0)
		return 0;
	fill(&record.h, RECORD_MCE, 0);
	record.status = word(mce + OFF_mce_status);
	record.addr = word(mce + OFF_mce_addr);
	record.misc = word(mce + OFF_mce_misc);
	record.bank = byte(mce + OFF_mce_bank);
	record.mce_cpu = half(mce + OFF_mce_extcpu);
	record.socket = half(mce + OFF_mce_socketid);
#if OFF_mce_ipid >= 0
	record.ipid = word(mce + OFF_mce_ipid);
#endif
#if OFF_mce_vendor >= 0
	/* struct mce_hw_err begins with struct mce. */
	bpf_probe_read_kernel(record.vendor_data, sizeof(record.vendor_data),
			      (void *)(mce + OFF_mce_vendor));
#endif
	tell(&record, sizeof(record));
	return 0;
}

/* ---- vm_new, vm_gone ---- */

static __always_inline void next_generation(u64 kvm)
{
	u32 zero = 0;
	u64 *last = generations.lookup(&zero), next;

	if (!last)
		return;
	__sync_fetch_and_add(last, 1);
	next = *last;
	generation.update(&kvm, &next);
}

static __always_inline int on_vm(u64 kvm, u32 type, u32 copy)
{
	struct vm_record record = {};

	if (is_seen(CALL_VM, kvm, type, copy))
		return 0;
	/* Either may be missed: then the other parts one VM from the next. */
	if (type == RECORD_VM_NEW)
		next_generation(kvm);
	fill(&record.h, type, kvm);
	bpf_get_current_comm(record.comm, sizeof(record.comm));
	tell(&record, sizeof(record));
	if (type == RECORD_VM_GONE)
		next_generation(kvm);
	return 0;
}

/* ---- hardware and firmware: memory errors as they were reported ---- */

#define FRU_TEXT 20 /* struct acpi_hest_generic_data */

static __always_inline int on_cper(u32 via, int severity, u64 mem, u64 fru_text)
{
	struct hw_record record = {};

	fill(&record.h, RECORD_HW, 0);
	record.via = via;
	record.severity = severity;
	record.count = 1;
	if (mem) {
		/* As firmware wrote it: UEFI's layout (kvmtrace/linux/cper.py, MEMORY_WORDS). */
		record.valid = word(mem);
		record.addr = word(mem + 16);
		record.mask = word(mem + 24);
		record.place = word(mem + 32);
		record.kind = word(mem + 72);
	}
	if (fru_text) /* of a fixed size in firmware's record, where it may fill it to the end */
		bpf_probe_read_kernel_str(record.label, FRU_TEXT + 1, (void *)fru_text);
	tell(&record, sizeof(record));
	return 0;
}

static __always_inline int on_mc_event(int severity, u64 message, u64 label, u32 count, u32 place,
				       u64 addr, u32 grain_bits)
{
	struct hw_record record = {};

	fill(&record.h, RECORD_HW, 0);
	record.via = HW_MC_EVENT;
	record.severity = severity;
	record.count = count;
	record.valid = addr; /* EDAC has no word for "not known" but 0 */
	record.addr = addr;
	record.grain_bits = grain_bits & 0xff;
	record.place = place;
	bpf_probe_read_kernel_str(record.message, sizeof(record.message), (void *)message);
	bpf_probe_read_kernel_str(record.label, sizeof(record.label), (void *)label);
	tell(&record, sizeof(record));
	return 0;
}

/* ras:arm_event(proc, ...): behind the section's head, its error informations; the first of them that
 * knows a physical address tells it, a cache error's before others (struct cper_arm_err_info, UEFI's
 * layout; see cper.arm_address). */
#define ARM_INFOS 4
#define ARM_INFO_PHYSICAL 4 /* bit of its validation word */
#define ARM_INFO_CACHE 1    /* bit of its type */

static __always_inline int on_arm_event(u64 proc, int severity)
{
	struct hw_record record = {};
	u64 info = proc + SIZE_cper_sec_proc_arm, valid = 0, cache = 0, addr = 0;
	u32 number, i;

	if (SIZE_cper_sec_proc_arm <= 0 || OFF_cper_arm_err_info_num < 0)
		return 0;
	fill(&record.h, RECORD_HW, 0);
	record.via = HW_ARM;
	record.severity = severity;
	record.count = 1;
	number = half(proc + OFF_cper_arm_err_info_num) & 0xffff;
	/* Without branches: verifying each way through them took a minute of some kernels' time. */
#pragma unroll
	for (i = 0; i < ARM_INFOS; i++) {
		u64 knows = half(info + 2) >> ARM_INFO_PHYSICAL & 1 & -(u64)(i < number);
		u64 is_cache = byte(info + 4) >> ARM_INFO_CACHE & 1 & knows;
		u64 better = (knows & (valid ^ 1)) | (is_cache & (cache ^ 1));

		addr = (addr & (better - 1)) | (word(info + 24) & -better);
		valid |= knows;
		cache |= is_cache;
		info += byte(info + 1);
	}
	record.valid = valid;
	record.addr = addr;
	tell(&record, sizeof(record));
	return 0;
}

static __always_inline int on_non_standard(u64 text, int severity)
{
	struct hw_record record = {};

	fill(&record.h, RECORD_HW, 0);
	record.via = HW_NON_STANDARD;
	record.severity = severity;
	record.count = 1;
	bpf_probe_read_kernel_str(record.message, sizeof(record.message), (void *)text);
	tell(&record, sizeof(record));
	return 0;
}

/* ---- soft_offline, unpoison ---- */

static __always_inline int on_page(u64 pfn, int ret, u32 unpoison)
{
	struct page_record record = {};

	fill(&record.h, RECORD_PAGE, 0);
	record.pfn = pfn;
	record.ret = ret;
	record.unpoison = unpoison;
	tell(&record, sizeof(record));
	return 0;
}

/* ---- where the programs enter: fentry and fexit ---- */

typedef unsigned long long args_t;

#ifdef FN_run
int FN_run(args_t *ctx)
{
	return on_run(ctx[0], (int)ctx[NARGS_run], this_copy());
}
#endif
#ifdef FN_gmem
int FN_gmem(args_t *ctx)
{
	return on_gmem(ctx[0], ctx[2], ctx[3], (int)ctx[NARGS_gmem], this_copy());
}
#endif
#ifdef FN_faultin
int FN_faultin(args_t *ctx)
{
	return on_faultin(ctx[0], ctx[1], (int)ctx[NARGS_faultin], this_copy());
}
#endif
#ifdef FN_gmem_error
int FN_gmem_error(args_t *ctx)
{
	return on_gmem_error(ctx[0], ctx[1]);
}
#endif
#ifdef FN_sigbus
int FN_sigbus(args_t *ctx)
{
	return on_sigbus((int)ctx[0], ctx[1], (int)ctx[2], ctx[3], this_copy());
}
#endif
#ifdef FN_sigbus_forced
int FN_sigbus_forced(args_t *ctx)
{
	return on_sigbus((int)ctx[0], ctx[1], (int)ctx[2], 0, this_copy());
}
#endif
#ifdef FN_sigbus_bare
int FN_sigbus_bare(args_t *ctx)
{
	return on_sigbus_bare((int)ctx[0], this_copy());
}
#endif
#ifdef FN_vm_new
int FN_vm_new(args_t *ctx)
{
	return (int)ctx[NARGS_vm_new] ? 0 : on_vm(ctx[0], RECORD_VM_NEW, this_copy());
}
#endif
#ifdef FN_vm_gone
int FN_vm_gone(args_t *ctx)
{
	return on_vm(ctx[0], RECORD_VM_GONE, this_copy());
}
#endif

#ifdef FN_arm_sea
int FN_arm_sea(args_t *ctx)
{
	return on_arm_sea(ctx[0], (int)ctx[NARGS_arm_sea]);
}
#endif
#ifdef FN_vncr
int FN_vncr(args_t *ctx)
{
	return on_vncr(ctx[0], (int)ctx[NARGS_vncr]);
}
#endif
#ifdef FN_apei
int FN_apei(args_t *ctx)
{
	return on_cper(HW_APEI, (int)ctx[0], ctx[1], 0);
}
#endif
#ifdef FN_soft_offline
int FN_soft_offline(args_t *ctx)
{
	return on_page(ctx[0], (int)ctx[NARGS_soft_offline], 0);
}
#endif
#ifdef FN_unpoison
int FN_unpoison(args_t *ctx)
{
	return on_page(ctx[0], (int)ctx[NARGS_unpoison], 1);
}
#endif

/* ---- raw tracepoints ---- */

int tp_mc_event(struct bpf_raw_tracepoint_args *ctx)
{
	u32 place = (ctx->args[4] & 0xff) | (ctx->args[5] & 0xff) << 8 |
		    (ctx->args[6] & 0xff) << 16 | (ctx->args[7] & 0xff) << 24;

	return on_mc_event((int)ctx->args[0], ctx->args[1], ctx->args[2], (u32)ctx->args[3], place,
			   ctx->args[8], (u32)ctx->args[9]);
}

int tp_extlog(struct bpf_raw_tracepoint_args *ctx)
{
	return on_cper(HW_EXTLOG, (int)(ctx->args[4] & 0xff), ctx->args[0], ctx->args[3]);
}

int tp_arm_event(struct bpf_raw_tracepoint_args *ctx)
{
#if ARG_arm_event_sev >= 0
	return on_arm_event(ctx->args[0], (int)(ctx->args[ARG_arm_event_sev] & 0xff));
#else
	return on_arm_event(ctx->args[0], -1);
#endif
}

int tp_non_standard(struct bpf_raw_tracepoint_args *ctx)
{
	return on_non_standard(ctx->args[2], (int)(ctx->args[3] & 0xff));
}

int tp_poison(struct bpf_raw_tracepoint_args *ctx)
{
	return on_poison(ctx->args[0], (int)ctx->args[1], (int)ctx->args[2]);
}

int tp_mce(struct bpf_raw_tracepoint_args *ctx)
{
	return on_mce(ctx->args[0]);
}

/* ---- kprobes, and kretprobes with the arguments kept from the entry ---- */

struct kept {
	u64 a, b, c;
};
BPF_TABLE("lru_hash", u64, struct kept, kept, 32768);

enum kept_for { KEPT_RUN, KEPT_GMEM, KEPT_FAULTIN, KEPT_VM_NEW, KEPT_SOFT_OFFLINE, KEPT_UNPOISON };

static __always_inline u64 kept_key(u64 probe)
{
	return (bpf_get_current_pid_tgid() << 32) | probe;
}

static __always_inline int keep(u64 probe, u64 a, u64 b, u64 c)
{
	struct kept args = { a, b, c };
	u64 key = kept_key(probe);

	kept.update(&key, &args);
	return 0;
}

static __always_inline struct kept *kept_by(u64 probe)
{
	u64 key = kept_key(probe);

	return kept.lookup(&key);
}

int kp_run(struct pt_regs *ctx)
{
	return keep(KEPT_RUN, PT_REGS_PARM1(ctx), 0, 0);
}

/* kvm:kvm_userspace_exit(reason, errno) is traced right behind KVM_RUN's return, in the same thread. A
 * kretprobe in its place would miss returns: its instances run out where many vCPUs sit in KVM_RUN. */
int tp_run(struct bpf_raw_tracepoint_args *ctx)
{
	struct kept *args;

	if ((int)ctx->args[1] >= 0)
		return 0;
	args = kept_by(KEPT_RUN);
	return args ? on_run(args->a, (int)ctx->args[1], 0) : on_run_under_way((int)ctx->args[1]);
}

int tp_run_under_way(struct bpf_raw_tracepoint_args *ctx)
{
	return (int)ctx->args[1] >= 0 ? 0 : on_run_under_way((int)ctx->args[1]);
}

int kp_gmem(struct pt_regs *ctx)
{
	return keep(KEPT_GMEM, PT_REGS_PARM1(ctx), PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx));
}

int kr_gmem(struct pt_regs *ctx)
{
	struct kept *args = kept_by(KEPT_GMEM);

	return args ? on_gmem(args->a, args->b, args->c, (int)PT_REGS_RC(ctx), 0) : 0;
}

int kp_faultin(struct pt_regs *ctx)
{
	return keep(KEPT_FAULTIN, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0);
}

int kr_faultin(struct pt_regs *ctx)
{
	struct kept *args = kept_by(KEPT_FAULTIN);

	return args ? on_faultin(args->a, args->b, (int)PT_REGS_RC(ctx), 0) : 0;
}

int kp_vm_new(struct pt_regs *ctx)
{
	return keep(KEPT_VM_NEW, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_vm_new(struct pt_regs *ctx)
{
	struct kept *args = kept_by(KEPT_VM_NEW);

	return args && !(int)PT_REGS_RC(ctx) ? on_vm(args->a, RECORD_VM_NEW, 0) : 0;
}

int kp_gmem_error(struct pt_regs *ctx)
{
	return on_gmem_error(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
}

int kp_sigbus(struct pt_regs *ctx)
{
	return on_sigbus((int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), (int)PT_REGS_PARM3(ctx),
			 PT_REGS_PARM4(ctx), 0);
}

int kp_sigbus_forced(struct pt_regs *ctx)
{
	return on_sigbus((int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), (int)PT_REGS_PARM3(ctx), 0,
			 0);
}

int kp_sigbus_bare(struct pt_regs *ctx)
{
	return on_sigbus_bare((int)PT_REGS_PARM1(ctx), 0);
}

int kp_vm_gone(struct pt_regs *ctx)
{
	return on_vm(PT_REGS_PARM1(ctx), RECORD_VM_GONE, 0);
}

int kp_apei(struct pt_regs *ctx)
{
	return on_cper(HW_APEI, (int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0);
}

int kp_soft_offline(struct pt_regs *ctx)
{
	return keep(KEPT_SOFT_OFFLINE, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_soft_offline(struct pt_regs *ctx)
{
	struct kept *args = kept_by(KEPT_SOFT_OFFLINE);

	return args ? on_page(args->a, (int)PT_REGS_RC(ctx), 0) : 0;
}

int kp_unpoison(struct pt_regs *ctx)
{
	return keep(KEPT_UNPOISON, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_unpoison(struct pt_regs *ctx)
{
	struct kept *args = kept_by(KEPT_UNPOISON);

	return args ? on_page(args->a, (int)PT_REGS_RC(ctx), 1) : 0;
}
