/* Programs that look up VMs, memslots and pages. They are never attached: sources/bpf/lookup.py runs them
 * on demand (BPF_PROG_TEST_RUN of raw tracepoints), with arguments in the context and the result in a
 * map. Nothing is locked, so every walk is bounded and its result shows how it ended. The structs of
 * results are mirrored in sources/bpf/lookup.py. */
#include <asm/ptrace.h>
#include "record.h"
#include "kernel_objects.h"

#define VM_ROWS 64
#define SLOT_STEPS 128
#define ID_BUCKETS 128 /* DECLARE_HASHTABLE(id_hash, 7) */

struct vm_row {
	u64 kvm;
	u64 pid;
};
struct vms_result {
	u64 rows;
	u64 next;  /* where to continue; 0: the list ended */
	u64 ended; /* 1: at its head, as it should */
	struct vm_row row[VM_ROWS];
};
BPF_TABLE("array", u32, struct vms_result, vms_results, 1);

/* (vm_list, next): virt/kvm/kvm_main.c's list of all VMs. */
int walk_vms(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0;
	struct vms_result *result = vms_results.lookup(&zero);
	u64 head = ctx->args[0], entry = ctx->args[1];
	int i;

	if (!result)
		return 0;
	if (!entry)
		entry = read_u64(head);
	for (i = 0; i < VM_ROWS; i++) {
		if (!entry || entry == head)
			break;
		result->row[i].kvm = entry - OFF_kvm_vm_list;
		result->row[i].pid = pid_of(entry - OFF_kvm_vm_list);
		entry = read_u64(entry);
	}
	result->rows = i;
	result->ended = entry == head;
	result->next = entry == head ? 0 : entry;
	return 0;
}

struct slot_row {
	u64 gfn;
	u64 pages;
	u64 hva;
	u64 id;
};
struct slots_result {
	u64 slots;      /* the set that was read, and its generation: start again if they change */
	u64 generation;
	u64 bucket;     /* where to continue: at this node, if any, then with this bucket */
	u64 node;
	struct slot_row row[SLOT_STEPS]; /* without pages: no slot */
};
BPF_TABLE("array", u32, struct slots_result, slots_results, 1);

/* (kvm, address space, bucket, node). State that changes from step to step is kept in the map: then all
 * steps look alike to the verifier, and it does not follow every combination. */
int walk_slots(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0;
	volatile struct slots_result *result = slots_results.lookup(&zero);
	u64 slots, id_node;
	int i;

	if (!result)
		return 0;
	slots = read_u64(ctx->args[0] + OFF_kvm_slots + 8 * ctx->args[1]);
	id_node = OFF_slot_id_node + 16 * (read_u32(slots + OFF_slots_node_idx) & 1);
	result->slots = slots;
	result->generation = read_u64(slots + OFF_slots_generation);
	result->bucket = ctx->args[2];
	result->node = ctx->args[3];
	for (i = 0; i < SLOT_STEPS; i++) {
		u64 node = result->node, bucket = result->bucket, slot = node - id_node;

		result->row[i].pages = 0;
		if (node) {
			result->row[i].gfn = read_u64(slot + OFF_kvm_memory_slot_base_gfn);
			result->row[i].pages = read_u64(slot + OFF_slot_npages);
			result->row[i].hva = read_u64(slot + OFF_kvm_memory_slot_userspace_addr);
			result->row[i].id = read_u32(slot + OFF_slot_id) & 0xffff;
			result->node = read_u64(node);
		} else if (bucket < ID_BUCKETS) {
			result->node = read_u64(slots + OFF_slots_id_hash + 8 * bucket);
			result->bucket = bucket + 1;
		}
	}
	return 0;
}

struct entry_result {
	u64 entry; /* the page table entry that is not present */
	u64 shift; /* log2 of the bytes it stands for */
};
BPF_TABLE("array", u32, struct entry_result, entry_results, 1);

#ifndef __aarch64__
/* (kvm, hva, &page_offset_base, &pgdir_shift, &sme_me_mask): the VMM's page table on x86-64, down to the
 * first entry that is not present. pagemap does not show the entry of a poisoned hugetlb page. */
int huge_entry(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0;
	struct entry_result *result = entry_results.lookup(&zero);
	u64 hva = ctx->args[1], base = read_u64(ctx->args[2]), secret, table, entry = 0;
	u32 shift = ctx->args[3] ? read_u32(ctx->args[3]) : 39;
	int level;

	if (!result)
		return 0;
	secret = ctx->args[4] ? read_u64(ctx->args[4]) : 0;
	result->entry = 0;
	result->shift = 0;
	table = read_u64(read_u64(ctx->args[0] + OFF_kvm_mm) + OFF_mm_struct_pgd);
#pragma unroll
	for (level = 0; level < 4; level++) {
		if (!table || shift > 48 || shift < 21)
			return 0;
		entry = read_u64(table + ((hva >> shift) & 511) * 8);
		if (!(entry & 0x101)) { /* _PAGE_PRESENT, _PAGE_PROTNONE */
			result->entry = entry;
			result->shift = shift;
			return 0;
		}
		if (entry & 0x80) /* _PAGE_PSE: mapped */
			return 0;
		table = base + (entry & 0xffffffffff000ULL & ~secret);
		shift -= 9;
	}
	return 0;
}
#endif

#ifdef __aarch64__
/* (kvm, hva, &memstart_addr): the same on arm64 (arch/arm64/include/asm/memory.h, pgtable-hwdef.h). The
 * top table lies in the linear map, so its address gives where that map begins, and from that follow
 * the size of addresses and the number of levels. */
int huge_entry_arm64(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0, bits = PAGE_SHIFT_ - 3, shift = PAGE_SHIFT_, size = 0, tried;
	struct entry_result *result = entry_results.lookup(&zero);
	u64 hva = ctx->args[1], start = read_u64(ctx->args[2]), map = 0, table, entry;
	int level;

	if (!result)
		return 0;
	result->entry = 0;
	result->shift = 0;
	table = read_u64(read_u64(ctx->args[0] + OFF_kvm_mm) + OFF_mm_struct_pgd);
#pragma unroll
	for (tried = 36; tried <= 52; tried++) {
		if ((long long)table >> (tried - 1) == -2) {
			size = tried;
			map = -1ULL << tried;
		}
	}
	if (!size)
		return 0;
#pragma unroll
	for (level = 0; level < 4; level++) {
		if (shift + bits < size)
			shift += bits;
	}
#pragma unroll
	for (level = 0; level < 5; level++) {
		if (shift < PAGE_SHIFT_ || shift > 52)
			return 0;
		entry = read_u64(table + ((hva >> shift) & ((1ULL << bits) - 1)) * 8);
		if (!(entry & 1)) { /* PTE_VALID */
			result->entry = entry;
			result->shift = shift;
			return 0;
		}
		if (!(entry & 2)) /* a block: mapped */
			return 0;
		table = ((entry & (1ULL << 50) - (1ULL << PAGE_SHIFT_)) - start) | map;
		shift -= bits;
	}
	return 0;
}
#endif

struct page_result {
	u64 file;   /* 1: the page is in a file's page cache, and the rest is valid */
	u64 device; /* dev_t inside the kernel: 12 bits major, 20 bits minor */
	struct gmem_walk gmem;
};
BPF_TABLE("array", u32, struct page_result, page_results, 1);

/* (pfn, &vmemmap_base, &kvm_gmem_aops) */
int page_of(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0;
	struct page_result *result = page_results.lookup(&zero);
	u64 page, info, folio, mapping, host, index;

	if (!result)
		return 0;
	result->file = 0;
	result->gmem.seen = 0;
	page = read_u64(ctx->args[1]) + ctx->args[0] * SIZE_page;
	info = read_u64(page + OFF_page_compound_head);
	folio = page;
	if (info & 1) /* a tail page: its head's address or (7.x) the mask that gives it */
		folio = info >> 32 == 0xffffffff ? page & info : info - 1;
	mapping = read_u64(folio + OFF_folio_mapping);
	if (!mapping || mapping & 3) /* FOLIO_MAPPING_FLAGS: anonymous, KSM */
		return 0;
	host = read_u64(mapping + OFF_address_space_host);
	/* Other kinds of pages use the field for other things; a file's mapping is part of its inode. */
	if (mapping != host + OFF_inode_i_data)
		return 0;
	index = read_u64(folio + OFF_folio_index) + (page - folio) / SIZE_page;
	result->file = 1;
	result->device = read_u32(read_u64(host + OFF_inode_i_sb) + OFF_super_block_s_dev);
	result->gmem.inode = OFF_inode_i_ino >= 0 ? read_u64(host + OFF_inode_i_ino) : 0;
	result->gmem.index = index;
	if (ctx->args[2] && read_u64(mapping + OFF_address_space_a_ops) == ctx->args[2])
		gmem_owners(&result->gmem, mapping, index);
	return 0;
}
