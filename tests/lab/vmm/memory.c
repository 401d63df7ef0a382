/* Guest memory: its backings, the pfn of an address, and its replacement. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vmm.h"

uint64_t page_size;

int kind_of(const char *name, enum kind *kind, uint64_t *page_bytes)
{
	static const struct { const char *name; enum kind kind; uint64_t bytes; } kinds[] = {
		{ "gmem", GMEM, 0 }, { "anon", ANON, 0 }, { "thp", THP, 0 }, { "memfd", MEMFD, 0 },
		{ "hugetlb2m", HUGETLB, 2 << 20 }, { "hugetlb1g", HUGETLB, 1 << 30 },
	};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		if (!strcmp(name, kinds[i].name)) {
			*kind = kinds[i].kind;
			*page_bytes = kinds[i].bytes ? kinds[i].bytes : page_size;
			return 0;
		}
	}
	if (!strncmp(name, "hugetlb=", 8)) { /* any size of the kernel's, in bytes: 32 MiB on arm64 with 16 KiB pages */
		*kind = HUGETLB;
		*page_bytes = strtoull(name + 8, NULL, 0);
		return *page_bytes ? 0 : -1;
	}
	return -1;
}

int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), saved;
	ssize_t n;

	if (fd < 0)
		return -1;
	n = write(fd, text, strlen(text));
	saved = errno;
	close(fd);
	errno = saved;
	return n < 0 ? -1 : 0;
}

static void reserve_huge_pages(uint64_t bytes, uint64_t page_bytes)
{
	char path[128], text[32] = "";
	unsigned long have = 0, total = 0;

	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%llukB/%s",
			 (unsigned long long)page_bytes / 1024, i ? "nr_hugepages" : "free_hugepages");
		FILE *f = fopen(path, "re");

		if (!f)
			return;
		if (fscanf(f, "%lu", i ? &total : &have) != 1)
			total = 0;
		fclose(f);
	}
	if (have * page_bytes < bytes) {
		snprintf(text, sizeof(text), "%lu", total + (unsigned long)(bytes / page_bytes) - have);
		write_file(path, text);
	}
}

/* Size of a transparent huge page: 2 MiB, but 32 MiB on arm64 with 16 KiB pages. */
static uint64_t thp_size(void)
{
	FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
	unsigned long bytes = 0;

	if (!f)
		return 2 << 20;
	if (fscanf(f, "%lu", &bytes) != 1)
		bytes = 0;
	fclose(f);
	return bytes ? bytes : 2 << 20;
}

/* Map an area whose address is aligned to a huge page. */
static uint8_t *map_aligned(uint64_t bytes, uint64_t align)
{
	uint8_t *area = mmap(NULL, bytes + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			     -1, 0);

	if (area == MAP_FAILED)
		return MAP_FAILED;
	uint8_t *start = (uint8_t *)(((uintptr_t)area + align - 1) & ~(align - 1));

	if (start > area)
		munmap(area, (size_t)(start - area));
	munmap(start + bytes, (size_t)(area + align - start));
	return start;
}

struct backing *backing_new(enum kind kind, uint64_t bytes, uint64_t page_bytes, int vm_fd, bool private_vm,
			    const char *path)
{
	struct backing *b = calloc(1, sizeof(*b));
	struct kvm_create_guest_memfd gmem = {
		.size = bytes,
		.flags = private_vm ? 0 : GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	};
	void *map = MAP_FAILED;
	bool of_file = false;
	int saved, shift = 0;

	if (!b)
		return NULL;
	while ((1ULL << shift) < page_bytes)
		shift++;
	*b = (struct backing){ .kind = kind, .fd = -1, .bytes = bytes, .page_bytes = page_bytes, .refs = 1 };
	switch (kind) {
	case GMEM:
		b->fd = ioctl(vm_fd, KVM_CREATE_GUEST_MEMFD, &gmem);
		if (b->fd >= 0 && private_vm) /* cannot be mapped: userspace_addr is ordinary memory */
			map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		break;
	case MEMFD:
		b->fd = path ? open(path, O_RDWR | O_CLOEXEC) : memfd_create("guest", MFD_CLOEXEC);
		if (b->fd >= 0 && !path && ftruncate(b->fd, (off_t)bytes) < 0) {
			close(b->fd);
			b->fd = -1;
		}
		break;
	case ANON:
		map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (map != MAP_FAILED)
			madvise(map, bytes, MADV_NOHUGEPAGE);
		break;
	case THP:
		map = map_aligned(bytes, thp_size());
		if (map != MAP_FAILED)
			madvise(map, bytes, MADV_HUGEPAGE);
		break;
	case HUGETLB:
		reserve_huge_pages(bytes, page_bytes);
		map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (shift << MAP_HUGE_SHIFT), -1, 0);
		break;
	}
	if (b->fd >= 0 && map == MAP_FAILED) {
		map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
		of_file = true;
	}
	if (map == MAP_FAILED) {
		saved = errno;
		if (b->fd >= 0)
			close(b->fd);
		free(b);
		errno = saved;
		return NULL;
	}
	b->map = map;
	b->map_is_file = of_file;
	return b;
}

/* The mapping holds a reference as well: only without both is the guest_memfd released under its slot. */
void backing_close(struct backing *b)
{
	if (b->map)
		munmap(b->map, b->bytes);
	if (b->fd >= 0)
		close(b->fd);
	b->map = NULL;
	b->fd = -1;
}

void backing_put(struct backing *b)
{
	if (--b->refs)
		return;
	backing_close(b);
	free(b);
}

uint64_t pfn_of(const void *hva)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	if (fd < 0)
		return 0;
	if (pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)hva / page_size * sizeof(entry))) != sizeof(entry))
		entry = 0;
	close(fd);
	return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

/* For tests of huge pages, which check that they had one. */
uint64_t thp_bytes(const struct backing *b)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	char line[512];
	unsigned long start, end, kb;
	uint64_t sum = 0;
	bool inside = false;

	if (!f)
		return 0;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start < (uintptr_t)b->map + b->bytes && end > (uintptr_t)b->map;
		else if (inside && sscanf(line, "AnonHugePages: %lu kB", &kb) == 1)
			sum += kb * 1024;
	}
	fclose(f);
	return sum;
}

/* The kernel copies: on a poisoned or unmapped page that fails without a SIGBUS. */
void plant_code(void *hva)
{
	struct iovec from = { .iov_base = (void *)(uintptr_t)guest_return, .iov_len = guest_return_bytes };
	struct iovec to = { .iov_base = hva, .iov_len = guest_return_bytes };

	if (process_vm_writev(getpid(), &from, 1, &to, 1, 0) < 0)
		return;
}

/* What a VMM that copes does: map fresh memory in place of the poisoned page. */
int replace_page(struct backing *b, uint64_t offset)
{
	uint64_t start = offset & ~(b->page_bytes - 1);
	int flags = MAP_FIXED | (b->map_is_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);

	if (b->fd >= 0 && fallocate(b->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, (off_t)start,
				    (off_t)b->page_bytes) < 0)
		return -1;
	return mmap(b->map + start, b->page_bytes, PROT_READ | PROT_WRITE, flags,
		    b->map_is_file ? b->fd : -1, b->map_is_file ? (off_t)start : 0) == MAP_FAILED ? -1 : 0;
}
