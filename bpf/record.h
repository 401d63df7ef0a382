/* What the programs send to user space: one header, one body per type, without holes. The ctypes mirrors
 * are in sources/bpf/{records,exits,signals,poison,hardware}.py. */
#ifndef KVMTRACE_RECORD_H
#define KVMTRACE_RECORD_H

enum record_type {
	RECORD_EXIT = 1,   /* a failed KVM_RUN: struct exit_record */
	RECORD_POISON = 2, /* memory_failure handled a page: struct poison_record */
	RECORD_SIGBUS = 3, /* struct sigbus_record */
	RECORD_FAULT = 4,  /* a fault on a poisoned HVA, after its SIGBUS: struct fault_record */
	RECORD_MCE = 5,    /* struct mce_record_ */
	RECORD_VM_NEW = 6, /* struct vm_record */
	RECORD_VM_GONE = 7, /* struct vm_record */
	RECORD_HW = 8,      /* a memory error that hardware or firmware reported: struct hw_record */
	RECORD_PAGE = 9     /* soft offline or unpoison: struct page_record */
};

struct header {
	u64 ts;  /* CLOCK_MONOTONIC, ns */
	u64 kvm; /* struct kvm *, 0 if not known */
	u64 gen; /* together with kvm it identifies one VM: see generation_of() */
	u32 type;
	u32 tid;  /* the thread that ran the program */
	u32 tgid; /* its process */
	u32 cpu;
};

/* Bits of `access`: the two KNOWN ones say which of the others are valid. */
#define ACCESS_READ 1
#define ACCESS_WRITE 2
#define ACCESS_EXEC 4
#define ACCESS_PRIVATE 8
#define ACCESS_KNOWN 16
#define ACCESS_PRIVATE_KNOWN 32

#define GMEM_NOT_WATCHED (-0x7fffffff) /* kvm_gmem_get_pfn has no probe */
#define NO_GFN (~0ULL)
#define NO_GPA (~0ULL) /* annotated, but exits of this key differ in it */
#define NO_VCPU (~0U)

/* The key of the exact counters: exits with equal keys differ in nothing that matters. In the map
 * `overflow` gpa, gfn, size, vcpu and access are left out; errno and cause still follow from the rest. */
struct exit_key {
	u64 kvm;
	u64 gen;
	u64 gpa;   /* gpa, size, flags: 0 unless annotated */
	u64 size;
	u64 flags;
	u64 gfn;   /* of the fault, NO_GFN if faultin did not see it */
	s32 ret;   /* of KVM_RUN, negative errno */
	u32 reason;
	s32 gmem;  /* what kvm_gmem_get_pfn returned to this fault, 0: not called; GMEM_NOT_WATCHED */
	u32 vcpu;
	u32 access;
	u32 annotated;
};

struct exit_count {
	u64 total;
	u64 last_ts;
	u64 last_emit_ts; /* when an event of this key was last emitted */
	u32 tid;
	u32 tgid;
	/* For keys without an address: the address of the last exit, and the number of the exit from
	 * which on all had that address. 0: unknown. */
	u64 gpa;
	u64 since;
};

struct exit_record {
	struct header h;
	struct exit_key key;
	u64 total;
	u64 gpa; /* gpa, since: see exit_count */
	u64 since;
};

#define MAX_OWNERS 8
struct owner {
	u64 kvm;
	u64 gen;
	u64 gfn;
	u64 hva;
	u32 pid; /* process whose memory the VM lives in, 0 if not known */
	u32 pad;
};

struct gmem_walk {
	u64 inode;
	u64 index;
	u32 seen;     /* the page is of a guest_memfd */
	u32 complete; /* all bindings were read */
	u32 nr_owners;
	u32 pad;
	struct owner owners[MAX_OWNERS];
};

struct poison_record {
	struct header h;
	u64 pfn;
	s32 page_type;
	s32 result;
	struct gmem_walk gmem;
};

struct sigbus_record {
	struct header h; /* kvm, gen: of the vCPU that runs in the sending thread, if any */
	u64 hva;
	s32 code;
	s32 lsb;
	u32 target_tid;
	u32 target_tgid;
	s32 vcpu; /* -1: the sending thread is not in KVM_RUN, -2: unknown */
	u32 pad;
	u64 total; /* of its key in the map `signals`; 0: the map is full */
	char comm[16]; /* of the target, which the signal may kill before its name is read from /proc */
};

/* Signals that differ in time only: key and value of the map `signals`. */
struct sigbus_key {
	u64 kvm;
	u64 gen;
	u64 hva;
	s32 code;
	s32 lsb;
	u32 target_tid;
	u32 target_tgid;
	s32 vcpu;
	u32 sender;
};

struct sigbus_count {
	u64 total;
	u64 sent; /* total when a record was last emitted: records report all signals up to it */
	u64 last_ts;
	u64 since; /* start of the window in which `left` more records may be emitted */
	u64 left;
};

struct fault_record {
	struct header h;
	u64 gfn;
	u64 hva;
	s32 vcpu;
	u32 access;
};

struct mce_record_ {
	struct header h;
	u64 status;
	u64 addr;
	u64 misc;
	u32 bank;
	u32 mce_cpu;
	u32 socket;
	u32 pad;
	u64 ipid;       /* AMD; 0 if not known */
	u8 vendor_data[16]; /* AMD: SYND1 and SYND2 */
};

struct vm_record {
	struct header h;
	char comm[16];
};

enum hw_via { HW_MC_EVENT, HW_EXTLOG, HW_APEI, HW_ARM, HW_NON_STANDARD };

#define HW_TEXT 96
struct hw_record {
	struct header h;
	/* CPER: words of struct cper_sec_mem_err, see kvmtrace/linux/cper.py; others: addr, where valid.
	 * mc_event: place is the memory controller and three layers, a byte each. */
	u64 valid;
	u64 addr;
	u64 mask;
	u64 place;
	u64 kind;
	u32 via;        /* enum hw_via */
	s32 severity;   /* in the numbers of `via`: see sources/bpf/hardware.py */
	u32 count;
	u32 grain_bits; /* mc_event */
	char label[HW_TEXT]; /* mc_event; extlog: FRU text */
	char message[HW_TEXT];
};

struct page_record {
	struct header h;
	u64 pfn;
	s32 ret;
	u32 unpoison; /* else soft offline */
};

/* How often kvm_gmem_get_pfn returned EHWPOISON: key and value of the map `refusals`. */
struct refusal_key {
	u64 kvm;
	u64 gen;
	u64 gfn;
};

struct refusal_count {
	u64 total;
	u64 last_ts;
	u32 tgid;
	u32 pad;
};

/* What is lost, and where: indices into the map `lost`. */
enum lost_place {
	LOST_RING,     /* ring buffer full: a record was not emitted */
	LOST_KEYS,     /* counter map full: counted in `overflow` */
	LOST_COUNTS,   /* counted nowhere */
	LOST_PLACES
};
#endif
