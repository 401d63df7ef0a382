/* Memory errors as hardware and firmware report them. */

/* ---- mce: mce:mce_record(struct mce_hw_err * or struct mce *) ---- */

static __always_inline int on_mce(u64 mce)
{
	struct mce_record_ record = {};

	if (OFF_mce_status < 0)
		return 0;
	fill_header(&record.h, RECORD_MCE, 0);
	record.status = read_u64(mce + OFF_mce_status);
	record.addr = read_u64(mce + OFF_mce_addr);
	record.misc = read_u64(mce + OFF_mce_misc);
	record.bank = read_u8(mce + OFF_mce_bank);
	record.mce_cpu = read_u32(mce + OFF_mce_extcpu);
	record.socket = read_u32(mce + OFF_mce_socketid);
#if OFF_mce_ipid >= 0
	record.ipid = read_u64(mce + OFF_mce_ipid);
#endif
#if OFF_mce_vendor >= 0
	/* struct mce_hw_err begins with struct mce. */
	bpf_probe_read_kernel(record.vendor_data, sizeof(record.vendor_data),
			      (void *)(mce + OFF_mce_vendor));
#endif
	emit(&record, sizeof(record));
	return 0;
}

int tp_mce(struct bpf_raw_tracepoint_args *ctx)
{
	return on_mce(ctx->args[0]);
}

/* ---- extlog, apei: CPER memory sections; mc_event; arm_event; non_standard ---- */

#define FRU_TEXT 20 /* struct acpi_hest_generic_data */

static __always_inline int on_cper(u32 via, int severity, u64 mem, u64 fru_text)
{
	struct hw_record record = {};

	fill_header(&record.h, RECORD_HW, 0);
	record.via = via;
	record.severity = severity;
	record.count = 1;
	if (mem) {
		/* In UEFI's layout, as firmware wrote it (kvmtrace/linux/cper.py, MEMORY_WORDS). */
		record.valid = read_u64(mem);
		record.addr = read_u64(mem + 16);
		record.mask = read_u64(mem + 24);
		record.place = read_u64(mem + 32);
		record.kind = read_u64(mem + 72);
	}
	if (fru_text) /* in a field of fixed size, which it may fill without a final 0 */
		bpf_probe_read_kernel_str(record.label, FRU_TEXT + 1, (void *)fru_text);
	emit(&record, sizeof(record));
	return 0;
}

int tp_extlog(struct bpf_raw_tracepoint_args *ctx)
{
	return on_cper(HW_EXTLOG, (int)(ctx->args[4] & 0xff), ctx->args[0], ctx->args[3]);
}

#ifdef FN_apei
int FN_apei(args_t *ctx)
{
	return on_cper(HW_APEI, (int)ctx[0], ctx[1], 0);
}
#endif

#ifdef KP_apei
int kp_apei(struct pt_regs *ctx)
{
	return on_cper(HW_APEI, (int)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0);
}
#endif

static __always_inline int on_mc_event(int severity, u64 message, u64 label, u32 count, u32 place,
				       u64 addr, u32 grain_bits)
{
	struct hw_record record = {};

	fill_header(&record.h, RECORD_HW, 0);
	record.via = HW_MC_EVENT;
	record.severity = severity;
	record.count = count;
	record.valid = addr; /* EDAC has 0 for an unknown address */
	record.addr = addr;
	record.grain_bits = grain_bits & 0xff;
	record.place = place;
	bpf_probe_read_kernel_str(record.message, sizeof(record.message), (void *)message);
	bpf_probe_read_kernel_str(record.label, sizeof(record.label), (void *)label);
	emit(&record, sizeof(record));
	return 0;
}

int tp_mc_event(struct bpf_raw_tracepoint_args *ctx)
{
	u32 place = (ctx->args[4] & 0xff) | (ctx->args[5] & 0xff) << 8 |
		    (ctx->args[6] & 0xff) << 16 | (ctx->args[7] & 0xff) << 24;

	return on_mc_event((int)ctx->args[0], ctx->args[1], ctx->args[2], (u32)ctx->args[3], place,
			   ctx->args[8], (u32)ctx->args[9]);
}

/* ras:arm_event(proc, ...). Error informations follow the section's head (struct cper_arm_err_info, in
 * UEFI's layout). The address is that of the first with a physical address, one of a cache error before
 * others: see cper.arm_address. */
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
	fill_header(&record.h, RECORD_HW, 0);
	record.via = HW_ARM;
	record.severity = severity;
	record.count = 1;
	number = read_u32(proc + OFF_cper_arm_err_info_num) & 0xffff;
	/* Without branches: some kernels took a minute to verify all paths through them. */
#pragma unroll
	for (i = 0; i < ARM_INFOS; i++) {
		u64 knows = read_u32(info + 2) >> ARM_INFO_PHYSICAL & 1 & -(u64)(i < number);
		u64 is_cache = read_u8(info + 4) >> ARM_INFO_CACHE & 1 & knows;
		u64 better = (knows & (valid ^ 1)) | (is_cache & (cache ^ 1));

		addr = (addr & (better - 1)) | (read_u64(info + 24) & -better);
		valid |= knows;
		cache |= is_cache;
		info += read_u8(info + 1);
	}
	record.valid = valid;
	record.addr = addr;
	emit(&record, sizeof(record));
	return 0;
}

int tp_arm_event(struct bpf_raw_tracepoint_args *ctx)
{
#if ARG_arm_event_sev >= 0
	return on_arm_event(ctx->args[0], (int)(ctx->args[ARG_arm_event_sev] & 0xff));
#else
	return on_arm_event(ctx->args[0], -1);
#endif
}

static __always_inline int on_non_standard(u64 text, int severity)
{
	struct hw_record record = {};

	fill_header(&record.h, RECORD_HW, 0);
	record.via = HW_NON_STANDARD;
	record.severity = severity;
	record.count = 1;
	bpf_probe_read_kernel_str(record.message, sizeof(record.message), (void *)text);
	emit(&record, sizeof(record));
	return 0;
}

int tp_non_standard(struct bpf_raw_tracepoint_args *ctx)
{
	return on_non_standard(ctx->args[2], (int)(ctx->args[3] & 0xff));
}
