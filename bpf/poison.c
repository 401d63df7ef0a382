/* Poisoned pages, with the VMs that a guest_memfd page belongs to; soft offline and unpoison. */

/* Per thread: from kvm_gmem_error_folio to the memory_failure_event that follows it. */
BPF_TABLE("lru_hash", u32, struct gmem_walk, walks, 256);
BPF_TABLE("percpu_array", u32, struct gmem_walk, walk_scratch, 1);

/* ---- gmem_error: kvm_gmem_error_folio(mapping, folio), and from there to VMs and gfns ---- */

static __always_inline int on_gmem_error(u64 mapping, u64 folio)
{
	u32 zero = 0, tid = (u32)bpf_get_current_pid_tgid();
	struct gmem_walk *walk = walk_scratch.lookup(&zero);
	int i;

	if (!walk)
		return 0;
	gmem_owners(walk, mapping, read_u64(folio + OFF_folio_index));
	for (i = 0; i < MAX_OWNERS; i++)
		if (i < walk->nr_owners)
			walk->owners[i].gen = generation_of(walk->owners[i].kvm);
	walks.update(&tid, walk);
	return 0;
}

#ifdef FN_gmem_error
int FN_gmem_error(args_t *ctx)
{
	return on_gmem_error(ctx[0], ctx[1]);
}
#endif

#ifdef KP_gmem_error
int kp_gmem_error(struct pt_regs *ctx)
{
	return on_gmem_error(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
}
#endif

/* ---- poison: memory_failure_event(pfn, type, result) ---- */

static __always_inline int on_poison(u64 pfn, int page_type, int result)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct gmem_walk *walk = walks.lookup(&tid);
	struct poison_record record = {};

	fill_header(&record.h, RECORD_POISON, 0);
	record.pfn = pfn;
	record.page_type = page_type;
	record.result = result;
	if (walk) {
		record.gmem = *walk;
		walks.delete(&tid);
	}
	emit(&record, sizeof(record));
	return 0;
}

int tp_poison(struct bpf_raw_tracepoint_args *ctx)
{
	return on_poison(ctx->args[0], (int)ctx->args[1], (int)ctx->args[2]);
}

/* ---- soft_offline, unpoison ---- */

static __always_inline int on_page(u64 pfn, int ret, u32 unpoison)
{
	struct page_record record = {};

	fill_header(&record.h, RECORD_PAGE, 0);
	record.pfn = pfn;
	record.ret = ret;
	record.unpoison = unpoison;
	emit(&record, sizeof(record));
	return 0;
}

#ifdef FN_soft_offline
int FN_soft_offline(args_t *ctx)
{
	return on_page(ctx[0], (int)ctx[NARGS_soft_offline], 0);
}
#endif

#ifdef KP_soft_offline
int kp_soft_offline(struct pt_regs *ctx)
{
	return save_args(SAVED_SOFT_OFFLINE, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_soft_offline(struct pt_regs *ctx)
{
	struct saved_args *args = saved_args(SAVED_SOFT_OFFLINE);

	return args ? on_page(args->a, (int)PT_REGS_RC(ctx), 0) : 0;
}
#endif

#ifdef FN_unpoison
int FN_unpoison(args_t *ctx)
{
	return on_page(ctx[0], (int)ctx[NARGS_unpoison], 1);
}
#endif

#ifdef KP_unpoison
int kp_unpoison(struct pt_regs *ctx)
{
	return save_args(SAVED_UNPOISON, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_unpoison(struct pt_regs *ctx)
{
	struct saved_args *args = saved_args(SAVED_UNPOISON);

	return args ? on_page(args->a, (int)PT_REGS_RC(ctx), 1) : 0;
}
#endif
