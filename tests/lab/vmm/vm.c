/* VMs: slots over backings, the guest's code in a slot of its own, and vCPUs. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "vmm.h"

struct vm *vms;
int kvm_fd = -1;

int kvm_open(void)
{
	if (kvm_fd < 0)
		kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	return kvm_fd < 0 ? -1 : 0;
}

struct vm *vm_find(const char *name)
{
	for (struct vm *vm = vms; vm; vm = vm->next)
		if (vm->fd >= 0 && !strcmp(vm->name, name))
			return vm;
	return NULL;
}

struct slot *slot_of(struct vm *vm, uint64_t gfn)
{
	for (uint32_t i = 0; i < vm->nr_slots; i++)
		if (gfn >= vm->slots[i].gfn && gfn - vm->slots[i].gfn < vm->slots[i].pages)
			return &vm->slots[i];
	return NULL;
}

uint64_t nth_gfn(struct vm *vm, uint64_t n)
{
	for (uint32_t i = 0; i < vm->nr_slots; i++) {
		if (n < vm->slots[i].pages)
			return vm->slots[i].gfn + n;
		n -= vm->slots[i].pages;
	}
	return UINT64_MAX;
}

uint8_t *hva_of(struct vm *vm, uint64_t gfn)
{
	struct slot *slot = slot_of(vm, gfn);

	if (!slot || !slot->backing->map)
		return NULL;
	return slot->backing->map + slot->offset + (gfn - slot->gfn) * page_size;
}

int set_private(struct vm *vm, uint64_t gfn, uint64_t pages, bool private)
{
	struct kvm_memory_attributes attributes = {
		.address = gfn * page_size,
		.size = pages * page_size,
		.attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0,
	};

	return ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes);
}

static int set_region(struct vm *vm, uint32_t id, uint64_t gfn, uint64_t bytes, void *hva, int gmem_fd, uint64_t offset)
{
	struct kvm_userspace_memory_region2 with = {
		.slot = id, .flags = KVM_MEM_GUEST_MEMFD, .guest_phys_addr = gfn * page_size, .memory_size = bytes,
		.userspace_addr = (uintptr_t)hva, .guest_memfd = (uint32_t)gmem_fd, .guest_memfd_offset = offset,
	};
	struct kvm_userspace_memory_region without = {
		.slot = id, .guest_phys_addr = gfn * page_size, .memory_size = bytes, .userspace_addr = (uintptr_t)hva,
	};

	return gmem_fd < 0 ? ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &without)
			   : ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION2, &with);
}

/*
 * The layout keeps gfn, hva and file offset from matching by accident: `gap` gfns are missing between two slots, and the
 * slots' order in the file is reversed and starts at page `pgoff`.
 */
static int add_slots(struct vm *vm, const struct layout *l, const char **what, bool *unsupported)
{
	uint64_t each = l->pages / l->slots, gfn = l->base, left = l->pages;
	struct backing *common = NULL;
	int ret = 0;

	if (l->share) {
		common = l->share->slots[0].backing;
		common->refs++;
	}
	vm->slots = calloc(l->slots, sizeof(*vm->slots));
	for (uint32_t i = 0; i < l->slots && !ret; i++) {
		uint64_t pages = i + 1 < l->slots ? each : left;
		struct backing *b = common;

		left -= pages;
		if (!b || l->file_per_slot) {
			uint64_t bytes = (l->pgoff + (l->file_per_slot ? pages : l->pages)) * page_size;

			*what = l->kind == GMEM ? "KVM_CREATE_GUEST_MEMFD" : "memory";
			b = backing_new(l->kind, bytes, l->page_bytes, vm->fd, l->private_type, l->path);
			if (!b) {
				*unsupported = l->kind == GMEM || l->kind == HUGETLB;
				ret = -1;
				break;
			}
			if (!l->file_per_slot)
				common = b;
		}
		if (!l->file_per_slot)
			b->refs++;
		vm->slots[i] = (struct slot){
			.id = i + 1, .gfn = gfn, .pages = pages, .backing = b,
			.offset = (l->pgoff + (l->file_per_slot ? 0 : left)) * page_size,
		};
		vm->nr_slots++;
		*what = "KVM_SET_USER_MEMORY_REGION";
		ret = set_region(vm, i + 1, gfn, pages * page_size, b->map + vm->slots[i].offset,
				 b->kind == GMEM ? b->fd : -1, vm->slots[i].offset);
		gfn += pages + l->gap;
	}
	if (common) {
		int saved = errno;

		backing_put(common);
		errno = saved;
	}
	return ret;
}

struct vm *vm_create(const struct layout *l, const char **what, bool *unsupported)
{
	struct vm *vm = calloc(1, sizeof(*vm));
	int flags, saved;

	*unsupported = false;
	*what = "vm";
	if (!vm)
		return NULL;
	snprintf(vm->name, sizeof(vm->name), "%s", l->name);
	vm->fd = -1;
	vm->nested = l->nested;
	vm->code = MAP_FAILED;
	*what = "/dev/kvm";
	if (kvm_open() < 0) {
		*unsupported = true;
		goto failed;
	}
	*what = "KVM_CREATE_VM";
	if (l->private_type) {
		int types = ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES);

		if (types <= 0 || !(types & 1 << VM_TYPE_SW_PROTECTED)) {
			*what = "VM type KVM_X86_SW_PROTECTED_VM";
			*unsupported = true;
			errno = EOPNOTSUPP;
			goto failed;
		}
	}
	vm->fd = ioctl(kvm_fd, KVM_CREATE_VM, l->private_type ? VM_TYPE_SW_PROTECTED : 0);
	if (vm->fd < 0)
		goto failed;
	if (l->kind == GMEM && !l->private_type && !l->share) {
		flags = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS);
		if (flags < 0 || (flags & 3) != 3) {
			*what = "guest_memfd that can be mapped (KVM_CAP_GUEST_MEMFD_FLAGS)";
			*unsupported = true;
			errno = EOPNOTSUPP;
			goto failed;
		}
	}
	vm->code_bytes = 2 * page_size;
	vm->code = mmap(NULL, vm->code_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	*what = "guest code";
	if (vm->code == MAP_FAILED)
		goto failed;
	guest_install(vm->code, vm->code_bytes);
	if (set_region(vm, 0, 0, vm->code_bytes, vm->code, -1, 0) < 0)
		goto failed;
	if (add_slots(vm, l, what, unsupported) < 0)
		goto failed;
	/* By write faults: a read would map the huge zero page, which a later write splits. */
	for (uint32_t i = 0; l->prefault && i < vm->nr_slots; i++)
		madvise(vm->slots[i].backing->map + vm->slots[i].offset, vm->slots[i].pages * page_size,
			MADV_POPULATE_WRITE);
	*what = "vCPU";
	for (uint32_t i = 0; i < l->vcpus; i++)
		if (vcpu_start(vm, i) < 0)
			goto failed;
	*what = "a guest that is a hypervisor";
	if (l->nested && guest_make_nested(vm) < 0) {
		*unsupported = true;
		goto failed;
	}
	vm->next = vms;
	vms = vm;
	return vm;

failed:
	saved = errno;
	vm->next = vms;
	vms = vm;
	vm_destroy(vm);
	vm_forget(vm);
	errno = saved;
	return NULL;
}

void vm_destroy(struct vm *vm)
{
	for (uint32_t i = 0; i < vm->nr_vcpus; i++)
		vcpu_stop(vm->vcpus[i]);
	if (vm->fd >= 0)
		close(vm->fd);
	vm->fd = -1;
	for (uint32_t i = 0; i < vm->nr_slots; i++)
		backing_put(vm->slots[i].backing);
	vm->nr_slots = 0;
	free(vm->slots);
	vm->slots = NULL;
	if (vm->code != MAP_FAILED)
		munmap(vm->code, vm->code_bytes);
	vm->code = MAP_FAILED;
}

void vm_forget(struct vm *vm)
{
	for (struct vm **at = &vms; *at; at = &(*at)->next) {
		if (*at == vm) {
			*at = vm->next;
			break;
		}
	}
	for (uint32_t i = 0; i < vm->nr_vcpus; i++) {
		free(vm->vcpus[i]->failed.v);
		free(vm->vcpus[i]);
	}
	free(vm);
}
