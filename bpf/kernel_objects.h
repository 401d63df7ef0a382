/* From one kernel object to the next by offsets from BTF. No maps are used in here, because bcc rewrites
 * their use in the main file only. A read of memory that is gone returns 0. */
#ifndef KVMTRACE_KERNEL_OBJECTS_H
#define KVMTRACE_KERNEL_OBJECTS_H

#include "record.h"

static __always_inline u64 read_u64(u64 at)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
	return value;
}

static __always_inline u32 read_u32(u64 at)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
	return value;
}

static __always_inline u8 read_u8(u64 at)
{
	u8 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
	return value;
}

/* The process that runs a VM: the mm's owner, if the kernel keeps it. kvm->userspace_pid is the thread
 * that created the VM, which may have ended or handed it over. */
static __always_inline u32 pid_of(u64 kvm)
{
	u64 mm, task;

	if (OFF_kvm_mm >= 0 && OFF_mm_struct_owner >= 0) {
		mm = read_u64(kvm + OFF_kvm_mm);
		task = mm ? read_u64(mm + OFF_mm_struct_owner) : 0;
		if (task)
			return read_u32(task + OFF_task_struct_tgid);
	}
	return OFF_kvm_userspace_pid >= 0 ? read_u32(kvm + OFF_kvm_userspace_pid) : 0;
}

/* An entry of an xarray (include/linux/xarray.h): nodes end in binary 10 and are large, siblings end
 * in 10 and are small, slots are pointers. */
static __always_inline u64 xarray_load(u64 xarray, u64 index)
{
	u64 entry = read_u64(xarray + OFF_xarray_xa_head);
	int depth;

#pragma unroll
	for (depth = 0; depth < 11; depth++) {
		u64 node, shift, at;

		if ((entry & 3) != 2 || entry <= 4096)
			break;
		node = entry & ~3ULL;
		shift = read_u8(node + OFF_xa_node_shift) & 63;
		if (depth == 0 && shift < 58 && index >> (shift + 6))
			return 0;
		at = (index >> shift) & 63;
		entry = read_u64(node + OFF_xa_node_slots + at * 8);
		if ((entry & 3) == 2 && (entry >> 2) < 64)
			entry = read_u64(node + OFF_xa_node_slots + (entry >> 2) * 8);
		if (!entry)
			return 0;
	}
	return entry & 3 ? 0 : entry;
}

/* The VMs whose memslots bind page `index` of a guest_memfd, by all its files and their bindings. The
 * caller sets the owners' generation. */
static __always_inline void gmem_owners(struct gmem_walk *walk, u64 mapping, u64 index)
{
	u64 inode = read_u64(mapping + OFF_address_space_host), head, entry;
	u32 n = 0;
	int i;

	walk->inode = OFF_inode_i_ino >= 0 ? read_u64(inode + OFF_inode_i_ino) : 0;
	walk->index = index;
	walk->seen = 1;
	walk->complete = 0;
	walk->nr_owners = 0;
	if (OFF_gmem_inode_gmem_file_list >= 0)
		head = inode - OFF_gmem_inode_vfs_inode + OFF_gmem_inode_gmem_file_list;
	else if (OFF_address_space_i_private_list >= 0)
		head = mapping + OFF_address_space_i_private_list;
	else
		return;
	if (OFF_gmem_file_entry < 0 || OFF_kvm_memory_slot_gmem_pgoff < 0)
		return;
	entry = read_u64(head);
	for (i = 0; i < MAX_OWNERS; i++) {
		u64 file, slot, pgoff;

		if (!entry || entry == head)
			break;
		file = entry - OFF_gmem_file_entry;
		slot = xarray_load(file + OFF_gmem_file_bindings, index);
		if (slot && n < MAX_OWNERS) {
			struct owner *owner = &walk->owners[n & (MAX_OWNERS - 1)];
			u64 page;

			pgoff = read_u64(slot + OFF_kvm_memory_slot_gmem_pgoff);
			page = index - pgoff;
			owner->kvm = read_u64(file + OFF_gmem_file_kvm);
			owner->gen = 0;
			owner->gfn = read_u64(slot + OFF_kvm_memory_slot_base_gfn) + page;
			owner->pid = pid_of(owner->kvm);
			owner->hva = read_u64(slot + OFF_kvm_memory_slot_userspace_addr);
			if (owner->hva)
				owner->hva += page << PAGE_SHIFT_;
			n++;
		}
		entry = read_u64(entry);
	}
	walk->nr_owners = n;
	walk->complete = entry == head;
}
#endif
