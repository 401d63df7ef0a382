/* Shared by the parts of the lab's VMM. Start reading at vmm.c, which has the step language. */
#ifndef VMM_H
#define VMM_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "kvm_extra.h"

enum { NAME_BYTES = 64, MAX_SLOTS = 4096, MAX_VCPUS = 32, JOB_SIGBUS = 8 };

/* ---- json.c: one object per answer, written by the main thread only ---- */
void json_begin(const char *step);
void json_key(const char *key); /* NULL inside an array */
void json_str(const char *key, const char *value);
void json_int(const char *key, long long value);
void json_uint(const char *key, unsigned long long value);
void json_bool(const char *key, bool value);
void json_open(const char *key, char bracket);
void json_close(char bracket);
void json_end(void); /* adds the times, writes the line, flushes */
const char *errno_name(int nr);
void json_errno(int nr); /* "errno" by name and "errno_nr" */

/* ---- returns of KVM_RUN ---- */
struct outcome {
	int ret, err;       /* err 0 where ret >= 0 */
	uint32_t reason;    /* kvm_run.exit_reason, raw */
	bool annotated;     /* reason 39 and errno EFAULT, EHWPOISON or none: only then are the next three valid */
	uint64_t flags, gpa, size;
	uint32_t suberror;  /* of KVM_EXIT_INTERNAL_ERROR */
	uint64_t count;
};
struct outcomes {
	struct outcome *v;
	size_t n, cap;
};
void outcomes_add(struct outcomes *list, const struct outcome *o);
void json_outcome(const struct outcome *o); /* its fields, into the object that is open */

/* ---- sigbus.c ---- */
struct sigbus {
	int code, lsb;
	uintptr_t hva;
	pid_t tid;
	uint64_t count;
};
extern _Thread_local struct sigbus tl_sigbus[JOB_SIGBUS]; /* of this thread, since sigbus_forget() */
extern _Thread_local unsigned tl_sigbus_n;
extern _Thread_local uint64_t tl_sigbus_total;
extern _Thread_local sigjmp_buf *tl_guard;
int sigbus_policy(const char *name); /* 0, or -1: no such policy */
void sigbus_forget(void);
void json_sigbus_list(const char *key, const struct sigbus *list, unsigned n);
void json_sigbus_report(void);
bool touch_hva(volatile uint8_t *hva, bool write); /* false: it raised a SIGBUS, which is recorded */

/* ---- memory.c ---- */
enum kind { GMEM, ANON, THP, HUGETLB, MEMFD };
struct backing {            /* a file or an anonymous area; slots and VMs may share it */
	enum kind kind;
	int fd;             /* -1: none */
	uint8_t *map;       /* NULL: not mapped */
	bool map_is_file;   /* or anonymous, beside a guest_memfd that can't be mapped */
	uint64_t bytes, page_bytes;
	int refs;
};
struct slot {
	uint32_t id;
	uint64_t gfn, pages;
	uint64_t offset;    /* bytes into the backing */
	struct backing *backing;
};
extern uint64_t page_size;
int kind_of(const char *name, enum kind *kind, uint64_t *page_bytes);
struct backing *backing_new(enum kind kind, uint64_t bytes, uint64_t page_bytes, int vm_fd, bool private_vm,
			    const char *path); /* NULL: errno says why */
void backing_put(struct backing *b);
void backing_close(struct backing *b);
uint64_t pfn_of(const void *hva); /* 0: unknown */
uint64_t thp_bytes(const struct backing *b);
void plant_code(void *hva);       /* a `return` for op=exec; no SIGBUS if the page is poisoned */
int replace_page(struct backing *b, uint64_t offset);
int write_file(const char *path, const char *text);

/* ---- vm.c ---- */
struct vm;
struct vcpu;
struct layout {
	const char *name;
	enum kind kind;
	uint64_t page_bytes;
	const char *path;      /* memfd: an existing file instead of a new one */
	struct vm *share;      /* another VM's memory instead of its own */
	uint64_t pages, base, pgoff, slots, gap, vcpus;
	bool file_per_slot, private_type, nested, prefault;
};
extern struct vm *vms;
extern int kvm_fd;
int kvm_open(void); /* -1: errno */
struct vm *vm_find(const char *name);
/* NULL: *what failed, with errno; *unsupported: this kernel can't */
struct vm *vm_create(const struct layout *layout, const char **what, bool *unsupported);
void vm_destroy(struct vm *vm); /* the VM stays in the list, with its totals */
void vm_forget(struct vm *vm);
struct slot *slot_of(struct vm *vm, uint64_t gfn);
uint64_t nth_gfn(struct vm *vm, uint64_t n);
uint8_t *hva_of(struct vm *vm, uint64_t gfn); /* NULL: not memory, or not mapped */
int set_private(struct vm *vm, uint64_t gfn, uint64_t pages, bool private);

struct vm {
	char name[NAME_BYTES];
	int fd; /* -1: destroyed, kept for the report */
	bool nested; /* the guest is a hypervisor */
	uint32_t nr_slots, nr_vcpus;
	struct slot *slots;
	void *code; /* the guest's program and stack; in a slot of its own, which is never poisoned */
	uint64_t code_bytes;
	struct vcpu *vcpus[MAX_VCPUS];
	struct vm *next;
};

/* ---- vcpu.c: each vCPU has a thread that does one job at a time ---- */
enum job_kind { JOB_TOUCH, JOB_LOOP, JOB_PIO, JOB_PREFAULT, JOB_QUIT };
enum op { OP_NONE, OP_READ, OP_WRITE, OP_EXEC, OP_SPIN, OP_NESTED };
struct job {
	enum job_kind kind;
	enum op op;
	uint64_t gfn, n, gap_us;
	void *plant;               /* op=exec: where to plant a `return` first */
	bool bg;
	/* answer */
	bool ok, timed_out;
	uint64_t runs;
	struct outcome last;
	struct outcomes returns;    /* every return of KVM_RUN in this job, ordinary ones too */
	struct sigbus sigbus[JOB_SIGBUS];
	unsigned nr_sigbus;
	uint64_t ns;
};
struct vcpu {
	struct vm *vm;
	uint32_t id;
	int fd;
	struct kvm_run *run;
	size_t run_bytes;
	pthread_t thread;
	pid_t tid;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum { IDLE, POSTED, DONE } state;
	volatile bool kick;
	bool io_pending;           /* the last exit was the guest's own report: KVM completes it at the next entry */
	bool strange;              /* the last exit was not caused by the guest's program: restart it */
	struct job job;
	/* totals for the report */
	struct outcomes failed;
	uint64_t exits[64], other_exits, eintr, eagain;
};
int vcpu_start(struct vm *vm, uint32_t id); /* -1: errno */
void vcpu_stop(struct vcpu *vcpu);
int vcpu_post(struct vcpu *vcpu, const struct job *job); /* -1: busy */
void vcpu_wait(struct vcpu *vcpu, double timeout_s, struct job *out); /* timeout 0: none */

/* ---- guest_*.c ---- */
extern const uint64_t guest_report_gpa; /* an address that is never memory (0: reports by port) */
extern const uint8_t guest_return[];
extern const size_t guest_return_bytes;
void guest_install(void *code, size_t bytes);
int guest_vcpu_init(struct vm *vm, struct vcpu *vcpu);
int guest_make_nested(struct vm *vm); /* once it has its vCPUs; -1: errno */
int guest_set(struct vcpu *vcpu, enum op op, uint64_t gpa, bool restart);
bool guest_reported(const struct kvm_run *run);

#endif
