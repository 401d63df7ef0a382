/* Exits of KVM_RUN, the faults they come from, and what guest_memfd refuses. */
#define EINTR_ 4
#define EAGAIN_ 11
#define EFAULT_ 14
#define EHWPOISON_ 133
#define KVM_EXIT_MEMORY_FAULT_ 39
#define KVM_EXIT_ARM_SEA_ 41
#define MEMORY_EXIT_FLAG_PRIVATE_ (1ULL << 3)
#define ARM_SEA_GPA_VALID 1
#define KVM_PFN_ERR_HWPOISON_ 0x7ff0000000000001ULL /* include/linux/kvm_host.h */

BPF_TABLE("hash", struct exit_key, struct exit_count, exits, MAX_KEYS);
BPF_TABLE("hash", struct exit_key, struct exit_count, overflow, MAX_OVERFLOW);
BPF_TABLE("hash", struct refusal_key, struct refusal_count, refusals, MAX_OVERFLOW);
BPF_TABLE("array", u32, u32, watching_gmem, 1); /* 1: kvm_gmem_get_pfn has a probe */

/* Per thread: the last kvm_gmem_get_pfn that failed, until the fault that called it returns. */
struct gmem_fail {
	u64 kvm;
	u64 gfn;
	u64 exits;  /* the running vCPU's count of exits, or 0 */
	u64 pfn_at; /* where it would have written the pfn: in the struct of the fault that called it */
	s32 ret;
	u32 pad;
};
BPF_TABLE("lru_hash", u32, struct gmem_fail, gmem_fails, 8192);

/* Per thread: the last fault that failed, until KVM_RUN returns. */
struct fault {
	u64 vcpu;
	u64 exits; /* vcpu->stat.exits: the same at the return if the guest was not entered since */
	u64 gfn;
	s32 gmem;
	u32 access;
};
BPF_TABLE("lru_hash", u32, struct fault, faults, 8192);

struct emit_budget {
	u64 since;
	u64 left;
};
BPF_TABLE("array", u32, struct emit_budget, budget, 1);

/* Whether a VM may have private memory. If BTF has no such member: on x86 it may, on arm64 not. */
static __always_inline int has_private(u64 kvm)
{
#if OFF_kvm_has_private_mem < 0 && defined(__aarch64__)
	return 0;
#else
	return OFF_kvm_has_private_mem < 0 || read_u8(kvm + OFF_kvm_has_private_mem);
#endif
}

static __always_inline int within_budget(u64 now)
{
	u32 zero = 0;
	struct emit_budget *b = budget.lookup(&zero);

	if (!b)
		return 0;
	if (now - b->since > EMIT_WINDOW_NS) {
		b->since = now;
		b->left = EMIT_BURST;
	}
	if (!b->left)
		return 0;
	b->left--;
	return 1;
}

/* ---- run: kvm:kvm_userspace_exit(reason, errno), after each return of kvm_arch_vcpu_ioctl_run ---- */

/* Exits that are part of normal operation: guest_memfd was not called (a conversion), or a flag that
 * mainline does not have asks for the page to be fetched. They come by the ten thousand, page after
 * page, and with a key for each address they would fill the map. */
static __always_inline int is_routine(struct exit_key *key)
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

	key.kvm = read_u64(vcpu + OFF_kvm_vcpu_kvm);
	key.gen = generation_of(key.kvm);
	key.vcpu = read_u32(vcpu + OFF_kvm_vcpu_vcpu_id);
	key.ret = ret;
	key.gfn = NO_GFN;
	/* Without a faultin record we do not know whether guest_memfd was called, so do not report a
	 * conversion. */
	key.gmem = GMEM_NOT_WATCHED;
	run = read_u64(vcpu + OFF_kvm_vcpu_run);
	key.reason = read_u32(run + OFF_kvm_run_exit_reason);
	/* Only then does the union hold a memory_fault (api.rst), else leftovers of another exit. 0: see
	 * is_ordinary. */
	if (key.reason == KVM_EXIT_MEMORY_FAULT_ &&
	    (ret == -EFAULT_ || ret == -EHWPOISON_ || !ret) && OFF_kvm_run_memory_fault >= 0) {
		key.annotated = 1;
		key.flags = read_u64(run + OFF_kvm_run_memory_fault);
		key.gpa = read_u64(run + OFF_kvm_run_memory_fault + 8);
		key.size = read_u64(run + OFF_kvm_run_memory_fault + 16);
	}

	fault = faults.lookup(&tid);
	if (fault) {
		u64 exits = exits_of(vcpu);
		/* The fault belongs to this return if the vCPU is the same and has had no exit since, so
		 * that the guest was not entered. If the kernel does not count exits, the annotation has
		 * to name the same page. */
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
	/* kvm_handle_vncr_abort: guest_memfd was called in this thread, for this page. */
	gmem = gmem_fails.lookup(&tid);
	if (!ret && key.annotated && gmem && gmem->kvm == key.kvm &&
	    gmem->gfn == key.gpa >> PAGE_SHIFT_)
		key.gmem = gmem->ret;
	gmem_fails.delete(&tid);
	/* A VM without private memory has no conversions, so guest_memfd must have failed although its
	 * probe did not see it. Flags that mainline does not have may mean something else. */
	if (key.annotated && ret == -EFAULT_ && !has_private(key.kvm) &&
	    !(key.flags & ~MEMORY_EXIT_FLAG_PRIVATE_) &&
	    (!key.gmem || key.gmem == GMEM_NOT_WATCHED))
		key.gmem = ret;

	/* struct { flags, esr, gva, gpa } */
	if (!ret && key.reason == KVM_EXIT_ARM_SEA_ && OFF_kvm_run_arm_sea >= 0 &&
	    read_u64(run + OFF_kvm_run_arm_sea) & ARM_SEA_GPA_VALID)
		key.gfn = read_u64(run + OFF_kvm_run_arm_sea + 24) >> PAGE_SHIFT_;

	if (is_routine(&key)) {
		gpa = key.gpa;
		key.gpa = NO_GPA;
		key.gfn = NO_GFN;
	}
	now = bpf_ktime_get_ns();
	count = exits.lookup_or_try_init(&key, &zero);
	if (!count) {
		/* The map is full: count exactly per VM, errno and cause, without the rest of the key. */
		count_lost(LOST_KEYS);
		key.gpa = NO_GPA;
		key.gfn = NO_GFN;
		key.size = 0;
		key.vcpu = NO_VCPU;
		key.access = 0;
		count = overflow.lookup_or_try_init(&key, &zero);
		if (!count) {
			count_lost(LOST_COUNTS);
			return 0;
		}
	} else if (key.gpa == NO_GPA && (count->gpa != gpa || !count->since)) {
		/* A key has one vCPU, and so one writer. `since` is written first: a reader in between
		 * sees a run of addresses that starts too late, never a wrong address. */
		*(volatile u64 *)&count->since = count->total + 1;
		*(volatile u64 *)&count->gpa = gpa;
	}
	__sync_fetch_and_add(&count->total, 1);
	count_activity();
	count->last_ts = now;
	count->tid = tid;
	count->tgid = bpf_get_current_pid_tgid() >> 32;
	if (now - count->last_emit_ts < EMIT_INTERVAL_NS)
		return 0;
	if (!within_budget(now))
		return 0;
	count->last_emit_ts = now;
	fill_header(&record.h, RECORD_EXIT, key.kvm);
	record.key = key;
	record.total = count->total;
	record.gpa = count->gpa;
	record.since = count->since;
	emit(&record, sizeof(record));
	return 0;
}

/* The vCPU of the ioctl whose file descriptor is the argument at `at` of the current system call. It is
 * believed if this thread ran it last: kvm_vcpu_ioctl notes the thread before it calls
 * kvm_arch_vcpu_ioctl_run, under a lock that is held until the tracepoint. A descriptor that another
 * thread has given to another file meanwhile does not pass. */
static __always_inline u64 vcpu_of_argument(u64 task, u64 at)
{
	u64 files = read_u64(task + OFF_task_struct_files);
	u64 table = read_u64(read_u64(files + OFF_files_struct_fdt) + OFF_fdtable_fd);
	u64 file = read_u64(table + 8ULL * read_u32(at));
	u64 vcpu = read_u64(file + OFF_file_private_data), pid = read_u64(task + OFF_task_struct_thread_pid);

	return pid && read_u64(vcpu + OFF_kvm_vcpu_pid) == pid ? vcpu : 0;
}

/* The vCPU whose KVM_RUN returns; 0 if not known. The tracepoint does not have it, and it is no longer
 * the one that this CPU runs. */
static __always_inline u64 returning_vcpu(void)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct fault *fault;
#ifdef HAS_TASK_PT_REGS
	u64 task = current_task(), registers = user_registers(task), vcpu;

#ifdef __aarch64__
	vcpu = vcpu_of_argument(task, registers + OFF_pt_regs_orig_x0);
#else
	vcpu = vcpu_of_argument(task, registers + OFF_pt_regs_di);
	if (!vcpu) /* a program of 32 bits */
		vcpu = vcpu_of_argument(task, registers + OFF_pt_regs_bx);
#endif
	if (vcpu)
		return vcpu;
#endif
	/* The fault that failed, if the guest was not entered since. */
	fault = faults.lookup(&tid);
	return fault && fault->exits == exits_of(fault->vcpu) ? fault->vcpu : 0;
}

/* What KVM_RUN ordinarily returns. Of failures it is a pending signal and a vCPU that is not started yet.
 * arm64 has memory faults without an errno: against api.rst those that kvm_handle_vncr_abort finds, and
 * KVM_EXIT_ARM_SEA. */
static __always_inline int is_ordinary(u32 reason, int ret)
{
#ifdef __aarch64__
	if (!ret)
		return reason != KVM_EXIT_MEMORY_FAULT_ && reason != KVM_EXIT_ARM_SEA_;
#endif
	return ret >= 0 || ret == -EINTR_ || ret == -EAGAIN_;
}

static __always_inline int on_run(int ret, u32 copy)
{
	u64 vcpu = returning_vcpu();

	if (!vcpu) {
		count_lost(LOST_COUNTS);
		return 0;
	}
	return already_handled(CALL_RUN, vcpu, exits_of(vcpu), copy) ? 0 : on_run_failed(vcpu, ret);
}

/* All exits of all VMs come through here: nothing precedes the first comparison. */
int tp_run(struct bpf_raw_tracepoint_args *ctx)
{
	if (is_ordinary((u32)ctx->args[0], (int)ctx->args[1]))
		return 0;
	return on_run((int)ctx->args[1], copy_number());
}

/* The same as a trace event. Preemption is off while such a program runs: it stands for the first copy, and
 * others are needed for a while only (sources/bpf/run_probe.py). */
int te_run(struct userspace_exit *event)
{
	if (is_ordinary(event->reason, event->error))
		return 0;
	return on_run(event->error, 0);
}

/* ---- gmem: kvm_gmem_get_pfn(kvm, slot, gfn, pfn, ...) failed ---- */

static __always_inline void count_refusal(u64 kvm, u64 gfn)
{
	struct refusal_key key = {};
	struct refusal_count zero = {}, *count;

	key.kvm = kvm;
	key.gen = generation_of(kvm);
	key.gfn = gfn;
	count = refusals.lookup_or_try_init(&key, &zero);
	if (!count) {
		count_lost(LOST_COUNTS);
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

	if (ret >= 0 || already_handled(CALL_GMEM, gfn, exits_of(running_vcpu()), copy))
		return 0;
	if (ret == -EHWPOISON_)
		count_refusal(kvm, gfn);
	tid = (u32)bpf_get_current_pid_tgid();
	fail.kvm = kvm;
	fail.gfn = gfn;
	fail.pfn_at = pfn_at;
	fail.exits = exits_of(running_vcpu());
	fail.ret = ret;
	gmem_fails.update(&tid, &fail);
	return 0;
}

#ifdef FN_gmem
int FN_gmem(args_t *ctx)
{
	return on_gmem(ctx[0], ctx[2], ctx[3], (int)ctx[NARGS_gmem], copy_number());
}
#endif

#ifdef KP_gmem
int kp_gmem(struct pt_regs *ctx)
{
	return save_args(SAVED_GMEM, PT_REGS_PARM1(ctx), PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx));
}

int kr_gmem(struct pt_regs *ctx)
{
	struct saved_args *args = saved_args(SAVED_GMEM);

	return args ? on_gmem(args->a, args->b, args->c, (int)PT_REGS_RC(ctx), 0) : 0;
}
#endif

/* ---- faultin: the fault handler; on x86 (vcpu, fault, ...), on arm64 (vcpu) ---- */

/* On arm64 the vCPU keeps the fault's registers (arch/arm64/include/asm/{kvm_emulate,esr}.h): bits 39:4
 * of HPFAR_EL2 are bits 47:12 of the address, and ESR_EL2 has the kind of access. */
#define IN_REGISTERS (OFF_kvm_page_fault_gfn < 0)
#define ESR_EC_IABT_LOW 0x20
#define ESR_WNR (1 << 6)

static __always_inline u64 gfn_of(u64 vcpu, u64 fault)
{
	if (!IN_REGISTERS)
		return read_u64(fault + OFF_kvm_page_fault_gfn);
	return ((read_u64(vcpu + OFF_kvm_vcpu_hpfar) & 0xffffffffff0ULL) << 8) >> PAGE_SHIFT_;
}

static __always_inline u32 access_of(u64 vcpu, u64 fault)
{
	u32 access = ACCESS_KNOWN;

	if (IN_REGISTERS) {
		u32 esr = read_u32(vcpu + OFF_kvm_vcpu_esr);

		if (OFF_kvm_vcpu_esr < 0)
			return 0;
		if (esr >> 26 == ESR_EC_IABT_LOW)
			return access | ACCESS_EXEC;
		return access | (esr & ESR_WNR ? ACCESS_WRITE : ACCESS_READ);
	}
	if (OFF_kvm_page_fault_write < 0 || OFF_kvm_page_fault_exec < 0)
		return 0;
	if (read_u8(fault + OFF_kvm_page_fault_write))
		access |= ACCESS_WRITE;
	else if (read_u8(fault + OFF_kvm_page_fault_exec))
		access |= ACCESS_EXEC;
	else
		access |= ACCESS_READ;
	if (OFF_kvm_page_fault_is_private >= 0)
		access |= ACCESS_PRIVATE_KNOWN;
	if (OFF_kvm_page_fault_is_private >= 0 && read_u8(fault + OFF_kvm_page_fault_is_private))
		access |= ACCESS_PRIVATE;
	return access;
}

/* Whether a fault that the handler completed was on a poisoned page. */
static __always_inline int is_poisoned(u64 vcpu, u64 fault, u64 *sent)
{
	/* The signal was sent from this fault if the guest was not entered since. */
	if (IN_REGISTERS)
		return *sent && *sent == exits_of(vcpu);
	return OFF_kvm_page_fault_pfn >= 0 &&
	       read_u64(fault + OFF_kvm_page_fault_pfn) == KVM_PFN_ERR_HWPOISON_;
}

static __always_inline int on_faultin(u64 vcpu, u64 fault, int ret, u32 copy)
{
	struct gmem_fail *gmem;
	struct fault state = {};
	u32 tid, zero = 0, *watching;

	if (ret == 0) /* RET_PF_CONTINUE */
		return 0;
	if (ret > 0) {
		struct fault_record record = {};
		u64 slot, *sent;

		if (!is_any_signalled())
			return 0;
		tid = (u32)bpf_get_current_pid_tgid();
		sent = signalled.lookup(&tid);
		if (!sent || !is_poisoned(vcpu, fault, sent))
			return 0;
		forget_signal(tid);
		fill_header(&record.h, RECORD_FAULT, read_u64(vcpu + OFF_kvm_vcpu_kvm));
		record.vcpu = read_u32(vcpu + OFF_kvm_vcpu_vcpu_id);
		record.gfn = gfn_of(vcpu, fault);
		record.access = access_of(vcpu, fault);
		slot = OFF_kvm_page_fault_slot >= 0 ? read_u64(fault + OFF_kvm_page_fault_slot) : 0;
		if (slot)
			record.hva = read_u64(slot + OFF_kvm_memory_slot_userspace_addr) +
				     ((record.gfn - read_u64(slot + OFF_kvm_memory_slot_base_gfn))
				      << PAGE_SHIFT_);
		emit(&record, sizeof(record));
		return 0;
	}
	tid = (u32)bpf_get_current_pid_tgid();
	state.vcpu = vcpu;
	state.exits = exits_of(vcpu);
	if (already_handled(CALL_FAULTIN, vcpu, state.exits, copy))
		return 0;
	state.gfn = gfn_of(vcpu, fault);
	state.access = access_of(vcpu, fault);
	watching = watching_gmem.lookup(&zero);
	state.gmem = watching && *watching ? 0 : GMEM_NOT_WATCHED;
	gmem = gmem_fails.lookup(&tid);
	if (gmem) {
		/* kvm_gmem_get_pfn was called for this fault if it was for this gfn, would have written to
		 * this fault, and the guest was not entered since. */
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

#ifdef FN_faultin
int FN_faultin(args_t *ctx)
{
	return on_faultin(ctx[0], ctx[1], (int)ctx[NARGS_faultin], copy_number());
}
#endif

#ifdef KP_faultin
int kp_faultin(struct pt_regs *ctx)
{
	return save_args(SAVED_FAULTIN, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0);
}

int kr_faultin(struct pt_regs *ctx)
{
	struct saved_args *args = saved_args(SAVED_FAULTIN);

	return args ? on_faultin(args->a, args->b, (int)PT_REGS_RC(ctx), 0) : 0;
}
#endif
