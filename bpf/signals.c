/* SIGBUS to VMMs. */
#define SIGBUS_ 7
#define SI_KERNEL_ 0x80

BPF_TABLE("hash", struct sigbus_key, struct sigbus_count, signals, MAX_OVERFLOW);

/* ---- sigbus: force_sig_mceerr(code, addr, lsb), send_sig_mceerr(code, addr, lsb, task) ---- */

/* Count a signal. Returns 0 if there were enough records of its key for now. */
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
	if (record->h.ts - count->since > SIGNAL_WINDOW_NS) {
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
	u32 tid = (u32)bpf_get_current_pid_tgid(), target = task ? read_u32(task + OFF_task_struct_pid) : tid;
	/* memory_failure in a vCPU's thread also sends to other processes that have the page. */
	u64 vcpu = target == tid ? running_vcpu() : 0, exits = exits_of(vcpu);

	/* The task's address would do, too, but the verifier refuses arithmetic on it. */
	if (already_handled(CALL_SIGBUS, hva, ((u64)target << 32) + exits, copy))
		return 0;
	fill_header(&record.h, RECORD_SIGBUS, vcpu ? read_u64(vcpu + OFF_kvm_vcpu_kvm) : 0);
	record.hva = hva;
	record.code = code;
	record.lsb = (short)lsb;
#ifdef SYM_KVM_RUNNING_VCPU
	record.vcpu = vcpu ? read_u32(vcpu + OFF_kvm_vcpu_vcpu_id) : -1;
#else
	record.vcpu = -2;
#endif
	record.target_tid = target;
	record.target_tgid = task ? read_u32(task + OFF_task_struct_tgid) : record.h.tgid;
	if (!count_signal(&record, &count)) {
		forget_signal(record.h.tid);
		return 0;
	}
#ifdef SYM_KVM_RUNNING_VCPU
	if (vcpu) /* else no fault will return in this thread */
#endif
		remember_signal(record.h.tid, exits);
	if (!task)
		bpf_get_current_comm(record.comm, sizeof(record.comm));
	else if (OFF_task_struct_comm >= 0)
		bpf_probe_read_kernel(record.comm, sizeof(record.comm), (void *)(task + OFF_task_struct_comm));
	if (!count)
		emit(&record, sizeof(record));
	else if (!ring.ringbuf_output(&record, sizeof(record), 0))
		count->sent = record.total;
	return 0;
}

/* force_sig(sig): sent to a thread that consumed poison which memory_failure could not handle */
static __always_inline int on_sigbus_bare(int sig, u32 copy)
{
	return sig == SIGBUS_ ? on_sigbus(SI_KERNEL_, 0, 0, 0, copy) : 0;
}

#ifdef FN_sigbus
int FN_sigbus(args_t *ctx)
{
	return on_sigbus((int)ctx[0], ctx[1], (int)ctx[2], ctx[3], copy_number());
}
#endif

#ifdef FN_sigbus_forced
int FN_sigbus_forced(args_t *ctx)
{
	return on_sigbus((int)ctx[0], ctx[1], (int)ctx[2], 0, copy_number());
}
#endif

#ifdef FN_sigbus_bare
int FN_sigbus_bare(args_t *ctx)
{
	return on_sigbus_bare((int)ctx[0], copy_number());
}
#endif

#ifdef KP_sigbus
int kp_sigbus(struct pt_regs *ctx)
{
	return on_sigbus((int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), (int)PT_REGS_PARM3(ctx),
			 PT_REGS_PARM4(ctx), 0);
}
#endif

#ifdef KP_sigbus_forced
int kp_sigbus_forced(struct pt_regs *ctx)
{
	return on_sigbus((int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), (int)PT_REGS_PARM3(ctx), 0,
			 0);
}
#endif

#ifdef KP_sigbus_bare
int kp_sigbus_bare(struct pt_regs *ctx)
{
	return on_sigbus_bare((int)PT_REGS_PARM1(ctx), 0);
}
#endif
