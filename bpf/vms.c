/* The beginning and the end of VMs. */

BPF_TABLE("array", u32, u64, generations, 1);

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

	if (already_handled(CALL_VM, kvm, type, copy))
		return 0;
	/* Both change the generation: if one is missed, the other still separates two VMs. */
	if (type == RECORD_VM_NEW)
		next_generation(kvm);
	fill_header(&record.h, type, kvm);
	bpf_get_current_comm(record.comm, sizeof(record.comm));
	emit(&record, sizeof(record));
	if (type == RECORD_VM_GONE)
		next_generation(kvm);
	return 0;
}

#ifdef FN_vm_new
int FN_vm_new(args_t *ctx)
{
	return (int)ctx[NARGS_vm_new] ? 0 : on_vm(ctx[0], RECORD_VM_NEW, copy_number());
}
#endif

#ifdef KP_vm_new
int kp_vm_new(struct pt_regs *ctx)
{
	return save_args(SAVED_VM_NEW, PT_REGS_PARM1(ctx), 0, 0);
}

int kr_vm_new(struct pt_regs *ctx)
{
	struct saved_args *args = saved_args(SAVED_VM_NEW);

	return args && !(int)PT_REGS_RC(ctx) ? on_vm(args->a, RECORD_VM_NEW, 0) : 0;
}
#endif

#ifdef FN_vm_gone
int FN_vm_gone(args_t *ctx)
{
	return on_vm(ctx[0], RECORD_VM_GONE, copy_number());
}
#endif

#ifdef KP_vm_gone
int kp_vm_gone(struct pt_regs *ctx)
{
	return on_vm(PT_REGS_PARM1(ctx), RECORD_VM_GONE, 0);
}
#endif
