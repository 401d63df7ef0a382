/*
 * The lab's VMM: small VMs whose memory is poisoned, taken away and mended on command, and an exact account of what
 * KVM_RUN returned. kvmtrace is compared with that account, so nothing here interprets it: see vcpu.c.
 *
 * vmm.c     the step language (this file; the text below is also `vmm --help`)
 * vm.c      VMs and their slots            vcpu.c    vCPU threads, KVM_RUN and the counts
 * memory.c  what backs a slot              sigbus.c  who got which SIGBUS
 * guest_*.c the guest's loop               json.c    answers
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "vmm.h"

static const char help[] =
"usage: vmm [--name NAME] [--steps FILE|-] [STEP...]\n"
"\n"
"Runs each STEP (one quoted argument), then those of FILE, one per line; without any STEP, those of stdin.\n"
"Every step is answered by exactly one line of JSON on stdout; the last line is {\"step\":\"final\",...}, a report.\n"
"A step that fails answers {\"step\":...,\"error\":...,\"errno\":...}, with \"unsupported\":true where this kernel or\n"
"machine can't do it at all, and the next step runs. Empty lines and lines starting with # are skipped, unanswered.\n"
"-name X, -uuid X, --id X, --platform X are accepted and ignored, so that tests can disguise it as another VMM.\n"
"\n"
"GFN is a guest frame number (8, 0x108) or +N, the Nth page of that VM's memory. VM is the name given to create.\n"
"\n"
"create VM [backing=gmem|anon|thp|hugetlb2m|hugetlb1g|hugetlb=BYTES|memfd] [file=PATH] [shared=VM] [pages=64]\n"
"          [vcpus=1] [base=GFN] [pgoff=PAGES] [slots=1] [gap=5] [files=one|each] [private=1] [nested=1]\n"
"          [prefault=0|1]\n"
"          file= opens PATH as backing=memfd (/proc/PID/fd/N of another process's memfd: two owners of a page);\n"
"          shared= uses a VM's memory of this process; slots= splits the memory, gap= gfns apart, in reverse order\n"
"          in the file, with files=each over one file per slot; private= asks for KVM_X86_SW_PROTECTED_VM,\n"
"          nested= for a guest that is a hypervisor (arm64, kvm-arm.mode=nested)\n"
"touch VM GFN [op=read|write|exec|spin|nested]     enter the guest until its access succeeded or KVM_RUN failed;\n"
"                                      spin: reads until it fails; nested: a guest within the guest reads\n"
"loop VM GFN N [op=] [gap_us=0]        N KVM_RUNs on that access, whatever they return: a VMM that loops\n"
"pio VM N [gap_us=0]                   N ordinary exits (a port on x86, MMIO on arm64)\n"
"prefault VM GFN [n=1]                 KVM_PRE_FAULT_MEMORY: a guest_memfd failure outside KVM_RUN\n"
"    these four take [vcpu=0] [timeout=S] (default: 10 for touch and prefault, else none; on timeout the vCPU is\n"
"    kicked: \"timed_out\") and [bg=1]: the answer comes at once, the result with\n"
"wait [VM]                             results of the steps in the background\n"
"poison VM GFN [how=madvise|inject]    MADV_HWPOISON, or the pfn into hwpoison/corrupt-pfn; answers pfn and hva\n"
"poison pfn=PFN | unpoison pfn=PFN | unpoison VM GFN     by debugfs; VM GFN: the pfn that poison had there\n"
"pfn VM GFN                            pfn and hva of that page now (touches it)\n"
"merge VM GFN [wait=0]                 write a pattern and let KSM merge the page; wait: at most that many seconds\n"
"soft-offline VM GFN                   MADV_SOFT_OFFLINE\n"
"mce VM GFN | mce addr=BYTES  [status=N] [misc=N] [bank=4] [cpu=0]     software machine check by mce-inject\n"
"close-gmem VM [slot=ID]               unmap and close the guest_memfd under its slot(s)\n"
"unmap VM GFN                          munmap that page's HVA\n"
"remap VM GFN                          map fresh memory there: a VMM that copes\n"
"attr VM GFN private|shared [n=1]      KVM_SET_MEMORY_ATTRIBUTES\n"
"convert VM GFN N [pages=1]            mark private, N accesses, mark shared, one access: N conversion exits;\n"
"                                      pages: on each of that many pages; the answer is that of the last\n"
"sigbus ignore|count|default           SIGBUS policy of the process; count (default) records it and continues\n"
"earlykill on|off                      PR_MCE_KILL of the main thread: SIGBUS AO as soon as a page is poisoned\n"
"report [VM]                           totals of everything that KVM_RUN returned so far\n"
"churn N [backing=anon] [pages=4] [vcpus=1] [touch=1]     create, touch, destroy N VMs (kept out of the report)\n"
"destroy VM | info VM | caps | pid | sleep S | exit N\n"
"\n"
"Answers: \"errno\" is a name, \"errno_nr\" the number. \"reason\" is kvm_run.exit_reason; it is valid with ret 0 or with\n"
"\"annotated\" (reason 39 and EFAULT, EHWPOISON or no errno). Only annotated answers have gpa, gfn, flags and size.\n"
"\"mono_ns\" and \"real_ns\" are the clocks at the answer. \"sigbus\" lists the signals of the acting thread meanwhile.\n"
"The report's \"failed\" has every KVM_RUN that failed, but EINTR and EAGAIN are only counted in \"vcpus\".\n";

/* ---- a step's words ---- */
enum { MAX_WORDS = 24 };
static struct {
	const char *step, *word[MAX_WORDS]; /* positional */
	int words;
	const char *option[MAX_WORDS];      /* key=value */
	bool used[MAX_WORDS];
	int options;
} in;
static bool failed; /* this step was answered with an error */

static void fail(const char *what, int err, bool unsupported)
{
	char text[256];

	failed = true;
	if (err)
		snprintf(text, sizeof(text), "%s: %s", what, strerror(err));
	json_str("error", err ? text : what);
	if (err)
		json_errno(err);
	if (unsupported)
		json_bool("unsupported", true);
}

static const char *option(const char *key, const char *otherwise)
{
	size_t n = strlen(key);

	for (int i = 0; i < in.options; i++) {
		if (!strncmp(in.option[i], key, n) && in.option[i][n] == '=') {
			in.used[i] = true;
			return in.option[i] + n + 1;
		}
	}
	return otherwise;
}

static bool number(const char *what, const char *text, uint64_t *out)
{
	char *end;

	if (text && *text >= '0' && *text <= '9') {
		*out = strtoull(text, &end, 0);
		if (!*end)
			return true;
	}
	if (!failed) {
		char message[128];

		snprintf(message, sizeof(message), "%s: not a number: %.64s", what, text ? text : "(missing)");
		fail(message, 0, false);
	}
	return false;
}

static uint64_t number_option(const char *key, uint64_t otherwise)
{
	const char *text = option(key, NULL);

	if (text)
		number(key, text, &otherwise);
	return otherwise;
}

static struct vm *vm_word(int at)
{
	struct vm *vm = at < in.words ? vm_find(in.word[at]) : NULL;

	if (!vm)
		fail(at < in.words ? "no such VM" : "which VM?", 0, false);
	return vm;
}

static bool gfn_word(int at, struct vm *vm, uint64_t *gfn)
{
	const char *text = at < in.words ? in.word[at] : NULL;
	bool nth = text && *text == '+';

	if (!number("GFN", nth ? text + 1 : text, gfn))
		return false;
	if (nth)
		*gfn = nth_gfn(vm, *gfn);
	if (nth && *gfn == UINT64_MAX) {
		fail("the VM has fewer pages", 0, false);
		return false;
	}
	return true;
}

static bool unknown_options(void)
{
	for (int i = 0; i < in.options; i++) {
		if (!in.used[i]) {
			char message[128];

			snprintf(message, sizeof(message), "unknown option: %.64s", in.option[i]);
			if (!failed)
				fail(message, 0, false);
			return true;
		}
	}
	return failed;
}

/* ---- VMs ---- */
static void json_vm(struct vm *vm)
{
	json_str("vm", vm->name);
	json_int("pid", getpid());
	json_uint("page_size", page_size);
	json_open("vcpus", '[');
	for (uint32_t i = 0; i < vm->nr_vcpus; i++) {
		json_open(NULL, '{');
		json_uint("vcpu", vm->vcpus[i]->id);
		json_int("tid", vm->vcpus[i]->tid);
		json_close('}');
	}
	json_close(']');
	json_open("slots", '[');
	for (uint32_t i = 0; i < vm->nr_slots; i++) {
		struct slot *slot = &vm->slots[i];

		json_open(NULL, '{');
		json_uint("slot", slot->id);
		json_uint("gfn", slot->gfn);
		json_uint("pages", slot->pages);
		json_uint("pgoff", slot->offset / page_size);
		if (slot->backing->fd >= 0)
			json_int("fd", slot->backing->fd);
		if (slot->backing->map)
			json_uint("hva", (uintptr_t)(slot->backing->map + slot->offset));
		json_close('}');
	}
	json_close(']');
	if (vm->nr_slots && vm->slots[0].backing->kind == THP)
		json_uint("thp_bytes", thp_bytes(vm->slots[0].backing));
}

static bool layout_options(struct layout *l, const char *backing, uint64_t pages)
{
	const char *share = option("shared", NULL);
	uint64_t align;

	l->path = option("file", NULL);
	if (kind_of(option("backing", l->path ? "memfd" : backing), &l->kind, &l->page_bytes) < 0) {
		fail("unknown backing", 0, false);
		return false;
	}
	if (share) {
		l->share = vm_find(share);
		if (!l->share || !l->share->nr_slots) {
			fail("shared: no such VM", 0, false);
			return false;
		}
		l->kind = l->share->slots[0].backing->kind;
		l->page_bytes = l->share->slots[0].backing->page_bytes;
		pages = 0;
		for (uint32_t i = 0; i < l->share->nr_slots; i++)
			pages += l->share->slots[i].pages;
	}
	align = (l->kind == THP ? 2 << 20 : l->page_bytes) / page_size;
	l->pages = (number_option("pages", pages) + align - 1) / align * align;
	l->base = number_option("base", (0x100 + align - 1) / align * align);
	l->pgoff = number_option("pgoff", 0);
	l->slots = number_option("slots", 1);
	l->gap = number_option("gap", 5);
	l->vcpus = number_option("vcpus", 1);
	l->file_per_slot = !strcmp(option("files", "one"), "each");
	l->private_type = number_option("private", 0);
	l->nested = number_option("nested", 0);
	l->prefault = number_option("prefault", l->kind == THP);
	if (failed)
		return false;
	if (!l->slots || l->slots > MAX_SLOTS || l->slots > l->pages || l->vcpus > MAX_VCPUS || l->base * page_size < 2 * page_size ||
	    (l->base + l->pages + l->slots * l->gap) * page_size > 0xe0000000) {
		fail("pages, slots, vcpus or base out of range (memory lies between gfn 2 and 3.5 GiB)", 0, false);
		return false;
	}
	if (l->share && (l->pgoff + l->pages) * page_size > l->share->slots[0].backing->bytes) {
		fail("shared: more pages than there are", 0, false);
		return false;
	}
	return true;
}

static void step_create(void)
{
	struct layout l = { 0 };
	const char *what;
	bool unsupported;
	struct vm *vm;

	if (in.words != 1 || strlen(in.word[0]) >= NAME_BYTES || vm_find(in.word[0])) {
		fail("create NAME, once", 0, false);
		return;
	}
	l.name = in.word[0];
	if (!layout_options(&l, "gmem", 64) || unknown_options())
		return;
	vm = vm_create(&l, &what, &unsupported);
	if (vm)
		json_vm(vm);
	else
		fail(what, errno, unsupported);
}

static void step_info(void)
{
	struct vm *vm = vm_word(0);

	if (vm)
		json_vm(vm);
}

static void step_destroy(void)
{
	struct vm *vm = vm_word(0);

	if (vm) {
		json_str("vm", vm->name);
		vm_destroy(vm);
	}
}

static void step_churn(void)
{
	struct layout l = { .name = "churn" };
	uint64_t n, done = 0, touch = number_option("touch", 1);
	const char *what = "";
	bool unsupported = false;

	if (!number("N", in.word[0], &n) || !layout_options(&l, "anon", 4) || unknown_options())
		return;
	for (; done < n; done++) {
		struct vm *vm = vm_create(&l, &what, &unsupported);
		struct job job = { .kind = JOB_TOUCH, .op = OP_READ, .gfn = l.base };

		if (!vm) {
			fail(what, errno, unsupported);
			break;
		}
		if (touch && vm->nr_vcpus && !vcpu_post(vm->vcpus[0], &job)) {
			vcpu_wait(vm->vcpus[0], 10, &job);
			free(job.returns.v);
		}
		vm_destroy(vm);
		vm_forget(vm);
	}
	json_uint("vms", done);
}

/* ---- running the guest ---- */
static const char *const job_names[] = {
	[JOB_TOUCH] = "touch", [JOB_LOOP] = "loop", [JOB_PIO] = "pio", [JOB_PREFAULT] = "prefault",
};

static void json_job(struct vcpu *vcpu, struct job *job)
{
	json_str("vm", vcpu->vm->name);
	json_uint("vcpu", vcpu->id);
	json_int("tid", vcpu->tid);
	if (job->kind != JOB_PIO)
		json_uint("page", job->gfn); /* the page of the step; gfn is the kernel's */
	json_bool("ok", job->ok);
	if (job->kind == JOB_PREFAULT) {
		json_int("ret", job->last.ret);
		if (job->last.ret < 0)
			json_errno(job->last.err);
		json_uint("run_reason", job->last.reason);
		if (job->last.ret < 0 && ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY) <= 0)
			fail("KVM_PRE_FAULT_MEMORY", job->last.err, true);
	} else {
		json_uint("runs", job->runs);
		if (job->kind == JOB_TOUCH) {
			json_outcome(&job->last);
		} else {
			json_uint("ns", job->ns);
			json_open("returns", '[');
			for (size_t i = 0; i < job->returns.n; i++) {
				json_open(NULL, '{');
				json_outcome(&job->returns.v[i]);
				json_uint("count", job->returns.v[i].count);
				json_close('}');
			}
			json_close(']');
		}
	}
	if (job->timed_out)
		json_bool("timed_out", true);
	json_sigbus_list("sigbus", job->sigbus, job->nr_sigbus);
	free(job->returns.v);
}

static bool parse_job(enum job_kind kind, struct job *job, struct vcpu **vcpu, double *timeout)
{
	const char *op = option("op", "read");
	struct vm *vm = vm_word(0);
	uint64_t id = number_option("vcpu", 0);
	int at = 1;

	if (!vm || failed)
		return false;
	*job = (struct job){ .kind = kind, .n = 1 };
	job->op = !strcmp(op, "exec") ? OP_EXEC : !strcmp(op, "write") ? OP_WRITE :
		  !strcmp(op, "spin") ? OP_SPIN : !strcmp(op, "nested") ? OP_NESTED : OP_READ;
	job->bg = number_option("bg", !strcmp(in.step, "pio-bg"));
	job->gap_us = number_option("gap_us", 0);
	*timeout = strtod(option("timeout", kind == JOB_TOUCH || kind == JOB_PREFAULT ? "10" : "0"), NULL);
	if (kind == JOB_PREFAULT)
		job->n = number_option("n", 1);
	if (id >= vm->nr_vcpus) {
		fail("no such vCPU", 0, false);
		return false;
	}
	if (kind != JOB_PIO && !gfn_word(at++, vm, &job->gfn))
		return false;
	if ((kind == JOB_LOOP || kind == JOB_PIO) && !number("N", at < in.words ? in.word[at] : NULL, &job->n))
		return false;
	if (job->op == OP_EXEC)
		job->plant = hva_of(vm, job->gfn);
	*vcpu = vm->vcpus[id];
	return !unknown_options();
}

static void run_step(enum job_kind kind)
{
	struct job job;
	struct vcpu *vcpu;
	double timeout;

	if (!parse_job(kind, &job, &vcpu, &timeout))
		return;
	if (vcpu_post(vcpu, &job) < 0) {
		fail("the vCPU is busy: wait first", 0, false);
		return;
	}
	if (job.bg) {
		json_str("vm", vcpu->vm->name);
		json_uint("vcpu", vcpu->id);
		json_int("tid", vcpu->tid);
		json_bool("started", true);
		return;
	}
	vcpu_wait(vcpu, timeout, &job);
	json_job(vcpu, &job);
}

static void step_touch(void) { run_step(JOB_TOUCH); }
static void step_loop(void) { run_step(JOB_LOOP); }
static void step_pio(void) { run_step(JOB_PIO); }
static void step_prefault(void) { run_step(JOB_PREFAULT); }

static void step_wait(void)
{
	struct vm *only = in.words ? vm_word(0) : NULL;
	double timeout = strtod(option("timeout", "0"), NULL);

	if (failed)
		return;
	json_open("results", '[');
	for (struct vm *vm = vms; vm; vm = vm->next) {
		for (uint32_t i = 0; vm->fd >= 0 && (!only || vm == only) && i < vm->nr_vcpus; i++) {
			struct vcpu *vcpu = vm->vcpus[i];
			struct job job;

			if (vcpu->state == IDLE) /* only this thread posts */
				continue;
			vcpu_wait(vcpu, timeout, &job);
			json_open(NULL, '{');
			json_str("step", job_names[job.kind]);
			json_job(vcpu, &job);
			json_close('}');
		}
	}
	json_close(']');
}

/* ---- breaking and mending memory ---- */
static bool page_flag(uint64_t pfn, int bit)
{
	FILE *f = fopen("/proc/kpageflags", "re");
	uint64_t flags = 0;

	if (!f)
		return false;
	if (fseeko(f, (off_t)(pfn * 8), SEEK_SET) || fread(&flags, 8, 1, f) != 1)
		flags = 0;
	fclose(f);
	return flags >> bit & 1;
}
enum { KPF_THP = 22, KPF_HUGE = 17, KPF_HWPOISON = 19, KPF_KSM = 21 };

/* pfns of `poison`, for `unpoison VM GFN`: by then the page table no longer has them */
static struct { char vm[NAME_BYTES]; uint64_t gfn, pfn; } poisoned[256];
static unsigned nr_poisoned;

static bool memory_words(struct vm **vm, uint64_t *gfn, uint8_t **hva)
{
	*vm = vm_word(0);
	if (!*vm || !gfn_word(1, *vm, gfn))
		return false;
	*hva = hva_of(*vm, *gfn);
	if (!*hva) {
		fail("that gfn has no mapped memory", 0, false);
		return false;
	}
	return true;
}

static void json_place(struct vm *vm, uint64_t gfn, uint8_t *hva)
{
	json_str("vm", vm->name);
	json_uint("gfn", gfn);
	json_uint("hva", (uintptr_t)hva);
}

static int by_debugfs(const char *path, uint64_t value)
{
	char text[32];

	snprintf(text, sizeof(text), "0x%llx", (unsigned long long)value);
	return write_file(path, text);
}

static void step_poison(void)
{
	static const char corrupt[] = "/sys/kernel/debug/hwpoison/corrupt-pfn";
	bool by_pfn = option("pfn", NULL), inject = by_pfn || !strcmp(option("how", "madvise"), "inject");
	uint64_t pfn = number_option("pfn", 0), gfn = 0;
	struct vm *vm = NULL;
	uint8_t *hva = NULL;
	int ret, err;

	if (failed || unknown_options() || (!by_pfn && !memory_words(&vm, &gfn, &hva)))
		return;
	sigbus_forget();
	if (!by_pfn) {
		json_place(vm, gfn, hva);
		if (!touch_hva(hva, true)) { /* private memory must be a page of its own, not the zero page */
			fail("the page can't be touched", 0, false);
			json_sigbus_list("sigbus", tl_sigbus, tl_sigbus_n);
			return;
		}
		pfn = pfn_of(hva);
	}
	if (!pfn) {
		fail("the pfn is unknown (pagemap needs root)", 0, false);
		return;
	}
	json_uint("pfn", pfn);
	if (!by_pfn) {
		bool huge = slot_of(vm, gfn)->backing->kind == HUGETLB;

		json_bool("huge", huge || page_flag(pfn, KPF_THP) || page_flag(pfn, KPF_HUGE));
	}
	ret = inject ? by_debugfs(corrupt, pfn) : madvise(hva, page_size, MADV_HWPOISON);
	err = ret < 0 ? errno : 0;
	json_int("ret", ret);
	if (err)
		json_errno(err); /* EBUSY for guest_memfd, and poisoned all the same */
	json_bool("poisoned", page_flag(pfn, KPF_HWPOISON));
	json_sigbus_list("sigbus", tl_sigbus, tl_sigbus_n);
	if (err && err != EBUSY)
		fail(inject ? corrupt : "MADV_HWPOISON", 0, err == ENOENT || err == EINVAL || err == EPERM);
	if (!by_pfn && (!err || err == EBUSY) && nr_poisoned < sizeof(poisoned) / sizeof(poisoned[0])) {
		memcpy(poisoned[nr_poisoned].vm, vm->name, NAME_BYTES);
		poisoned[nr_poisoned].gfn = gfn;
		poisoned[nr_poisoned++].pfn = pfn;
	}
}

static void step_pfn(void)
{
	struct vm *vm;
	uint64_t gfn, pfn;
	uint8_t *hva;

	if (unknown_options() || !memory_words(&vm, &gfn, &hva))
		return;
	json_place(vm, gfn, hva);
	if (!touch_hva(hva, true) || !(pfn = pfn_of(hva)))
		fail("the pfn is unknown (no memory there, or pagemap needs root)", 0, false);
	else
		json_uint("pfn", pfn);
}

/* All VMMs write the same content, so a running KSM merges the pages. They are not written to after that. */
static void step_merge(void)
{
	uint64_t wait = number_option("wait", 0), gfn, pfn = 0;
	struct vm *vm;
	uint8_t *hva;

	if (unknown_options() || !memory_words(&vm, &gfn, &hva))
		return;
	json_place(vm, gfn, hva);
	if (!wait) {
		memset(hva, 0x5a, page_size);
		if (madvise(hva, page_size, MADV_MERGEABLE) < 0)
			fail("MADV_MERGEABLE", errno, errno == EINVAL);
		return;
	}
	for (uint64_t tries = 10 * wait; tries; tries--, usleep(100000)) {
		pfn = pfn_of(hva);
		if (pfn && page_flag(pfn, KPF_KSM))
			break;
	}
	json_uint("pfn", pfn);
	if (!pfn || !page_flag(pfn, KPF_KSM))
		fail("not merged", 0, false);
}

static void step_unpoison(void)
{
	static const char path[] = "/sys/kernel/debug/hwpoison/unpoison-pfn";
	uint64_t pfn = number_option("pfn", 0), gfn;
	struct vm *vm;

	if (failed || unknown_options())
		return;
	if (!pfn) {
		vm = vm_word(0);
		if (!vm || !gfn_word(1, vm, &gfn))
			return;
		for (unsigned i = 0; i < nr_poisoned; i++)
			if (poisoned[i].gfn == gfn && !strcmp(poisoned[i].vm, vm->name))
				pfn = poisoned[i].pfn;
		if (!pfn) {
			fail("not poisoned by this process", 0, false);
			return;
		}
	}
	json_uint("pfn", pfn);
	if (by_debugfs(path, pfn) < 0)
		fail(path, errno, errno == ENOENT);
	json_bool("poisoned", page_flag(pfn, KPF_HWPOISON));
}

static void step_soft_offline(void)
{
	uint64_t gfn;
	struct vm *vm;
	uint8_t *hva;

	if (!memory_words(&vm, &gfn, &hva))
		return;
	json_place(vm, gfn, hva);
	touch_hva(hva, true);
	json_uint("pfn", pfn_of(hva));
	if (madvise(hva, page_size, MADV_SOFT_OFFLINE) < 0)
		fail("MADV_SOFT_OFFLINE", errno, errno == EINVAL || errno == EPERM || errno == EOPNOTSUPP);
	else
		json_uint("new_pfn", pfn_of(hva));
}

static void step_mce(void)
{
	/* valid, uncorrected, enabled, with address and misc: a memory read error as memory controllers report it */
	uint64_t addr = number_option("addr", 0), status = number_option("status", 0xbc00000000000135), gfn;
	uint64_t values[] = { number_option("cpu", 0), status, number_option("misc", 0x8c), 0, number_option("bank", 4) };
	static const char *const files[] = { "cpu", "status", "misc", "addr", "bank" }; /* bank last: it triggers */
	struct vm *vm;
	uint8_t *hva;

	if (failed || unknown_options())
		return;
	if (!addr) {
		if (!memory_words(&vm, &gfn, &hva))
			return;
		json_place(vm, gfn, hva);
		touch_hva(hva, true);
		addr = pfn_of(hva) * page_size;
	}
	values[3] = addr;
	json_uint("addr", addr);
	json_uint("pfn", addr / page_size);
	json_uint("status", status);
	json_uint("bank", values[4]);
	if (write_file("/sys/kernel/debug/mce-inject/flags", "sw\n") < 0) {
		fail("/sys/kernel/debug/mce-inject", errno, errno == ENOENT);
		return;
	}
	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
		char path[64];

		snprintf(path, sizeof(path), "/sys/kernel/debug/mce-inject/%s", files[i]);
		if (by_debugfs(path, values[i]) < 0) {
			fail(path, errno, false);
			return;
		}
	}
}

static void step_close_gmem(void)
{
	struct vm *vm = vm_word(0);
	uint64_t only = number_option("slot", 0), closed = 0;

	if (!vm || unknown_options())
		return;
	for (uint32_t i = 0; i < vm->nr_slots; i++) {
		struct backing *b = vm->slots[i].backing;

		if (b->kind == GMEM && b->fd >= 0 && (!only || vm->slots[i].id == only)) {
			backing_close(b);
			closed++;
		}
	}
	json_str("vm", vm->name);
	json_uint("closed", closed);
	if (!closed)
		fail("no open guest_memfd there", 0, false);
}

static void step_unmap(void)
{
	uint64_t gfn, bytes;
	struct vm *vm;
	uint8_t *hva;

	if (!memory_words(&vm, &gfn, &hva))
		return;
	bytes = slot_of(vm, gfn)->backing->page_bytes;
	hva = (uint8_t *)((uintptr_t)hva & ~(bytes - 1));
	json_place(vm, gfn, hva);
	if (munmap(hva, bytes) < 0)
		fail("munmap", errno, false);
}

static void step_remap(void)
{
	struct slot *slot;
	uint64_t gfn;
	struct vm *vm;
	uint8_t *hva;

	if (!memory_words(&vm, &gfn, &hva))
		return;
	json_place(vm, gfn, hva);
	slot = slot_of(vm, gfn);
	if (replace_page(slot->backing, slot->offset + (gfn - slot->gfn) * page_size) < 0)
		fail("remap", errno, false);
}

static void step_attr(void)
{
	struct vm *vm = vm_word(0);
	uint64_t gfn, n = number_option("n", 1);

	if (!vm || !gfn_word(1, vm, &gfn) || unknown_options())
		return;
	if (in.words != 3 || (strcmp(in.word[2], "private") && strcmp(in.word[2], "shared")))
		fail("private or shared?", 0, false);
	else if (set_private(vm, gfn, n, !strcmp(in.word[2], "private")) < 0)
		fail("KVM_SET_MEMORY_ATTRIBUTES", errno, errno == EINVAL || errno == ENOTTY);
}

static void step_convert(void)
{
	struct job base, job, after;
	struct vcpu *vcpu;
	double timeout;
	uint64_t pages = number_option("pages", 1);

	if (!parse_job(JOB_LOOP, &base, &vcpu, &timeout))
		return;
	if (set_private(vcpu->vm, base.gfn, pages, true) < 0) {
		fail("KVM_SET_MEMORY_ATTRIBUTES", errno, errno == EINVAL || errno == ENOTTY);
		return;
	}
	for (uint64_t i = 0; i < pages; i++) {
		job = base;
		job.gfn += i;
		if (vcpu_post(vcpu, &job) < 0) {
			fail("the vCPU is busy: wait first", 0, false);
			return;
		}
		vcpu_wait(vcpu, timeout, &job);
		if (i + 1 < pages)
			free(job.returns.v);
	}
	after = (struct job){ .kind = JOB_TOUCH, .op = job.op, .gfn = job.gfn };
	json_job(vcpu, &job);
	set_private(vcpu->vm, base.gfn, pages, false);
	vcpu_post(vcpu, &after);
	vcpu_wait(vcpu, 10, &after);
	json_bool("shared_again_ok", after.ok);
	free(after.returns.v);
}

/* ---- the process ---- */
static void step_sigbus(void)
{
	if (in.words != 1 || sigbus_policy(in.word[0]) < 0)
		fail("sigbus ignore|count|default", 0, false);
}

static void step_earlykill(void)
{
	bool on = in.words == 1 && !strcmp(in.word[0], "on");

	if (prctl(PR_MCE_KILL, on ? PR_MCE_KILL_SET : PR_MCE_KILL_CLEAR, on ? PR_MCE_KILL_EARLY : 0, 0, 0) < 0)
		fail("PR_MCE_KILL", errno, true);
}

static void step_caps(void)
{
	static const struct { const char *name; int nr; } caps[] = {
		{ "memory_fault_info", KVM_CAP_MEMORY_FAULT_INFO }, { "memory_attributes", KVM_CAP_MEMORY_ATTRIBUTES },
		{ "guest_memfd", KVM_CAP_GUEST_MEMFD }, { "guest_memfd_flags", KVM_CAP_GUEST_MEMFD_FLAGS },
		{ "vm_types", KVM_CAP_VM_TYPES }, { "pre_fault_memory", KVM_CAP_PRE_FAULT_MEMORY },
	};

	if (kvm_open() < 0) {
		fail("/dev/kvm", errno, true);
		return;
	}
	for (size_t i = 0; i < sizeof(caps) / sizeof(caps[0]); i++)
		json_int(caps[i].name, ioctl(kvm_fd, KVM_CHECK_EXTENSION, caps[i].nr));
}

static void step_pid(void)
{
	json_int("pid", getpid());
	json_uint("page_size", page_size);
}

static void step_sleep(void)
{
	if (in.words == 1)
		usleep((useconds_t)(strtod(in.word[0], NULL) * 1e6));
}

static void json_report(struct vm *only)
{
	json_int("pid", getpid());
	json_open("vcpus", '[');
	for (struct vm *vm = vms; vm; vm = vm->next) {
		for (uint32_t i = 0; (!only || vm == only) && i < vm->nr_vcpus; i++) {
			struct vcpu *vcpu = vm->vcpus[i];

			pthread_mutex_lock(&vcpu->lock);
			json_open(NULL, '{');
			json_str("vm", vm->name);
			json_uint("vcpu", vcpu->id);
			json_int("tid", vcpu->tid);
			json_bool("alive", vm->fd >= 0);
			json_open("exits", '{');
			for (unsigned reason = 0; reason < 64; reason++) {
				char key[8];

				snprintf(key, sizeof(key), "%u", reason);
				if (vcpu->exits[reason])
					json_uint(key, vcpu->exits[reason]);
			}
			json_close('}');
			json_uint("eintr", vcpu->eintr);
			json_uint("eagain", vcpu->eagain);
			json_close('}');
			pthread_mutex_unlock(&vcpu->lock);
		}
	}
	json_close(']');
	json_open("failed", '[');
	for (struct vm *vm = vms; vm; vm = vm->next) {
		for (uint32_t i = 0; (!only || vm == only) && i < vm->nr_vcpus; i++) {
			struct vcpu *vcpu = vm->vcpus[i];

			pthread_mutex_lock(&vcpu->lock);
			for (size_t k = 0; k < vcpu->failed.n; k++) {
				json_open(NULL, '{');
				json_str("vm", vm->name);
				json_uint("vcpu", vcpu->id);
				json_int("tid", vcpu->tid);
				json_outcome(&vcpu->failed.v[k]);
				json_uint("count", vcpu->failed.v[k].count);
				json_close('}');
			}
			pthread_mutex_unlock(&vcpu->lock);
		}
	}
	json_close(']');
	json_sigbus_report();
}

static void step_report(void)
{
	struct vm *only = NULL;

	for (struct vm *vm = vms; in.words && vm && !only; vm = vm->next) /* destroyed ones too */
		only = strcmp(vm->name, in.word[0]) ? NULL : vm;
	if (in.words && !only)
		fail("no such VM", 0, false);
	else
		json_report(only);
}

static void final(int status)
{
	json_begin("final");
	json_report(NULL);
	json_int("status", status);
	json_end();
	exit(status);
}

static const struct { const char *name; void (*run)(void); } steps[] = {
	{ "create", step_create }, { "info", step_info }, { "destroy", step_destroy }, { "churn", step_churn },
	{ "touch", step_touch }, { "loop", step_loop }, { "pio", step_pio }, { "pio-bg", step_pio },
	{ "prefault", step_prefault }, { "wait", step_wait }, { "poison", step_poison }, { "unpoison", step_unpoison },
	{ "pfn", step_pfn }, { "merge", step_merge },
	{ "soft-offline", step_soft_offline }, { "mce", step_mce }, { "close-gmem", step_close_gmem },
	{ "unmap", step_unmap }, { "remap", step_remap }, { "attr", step_attr }, { "convert", step_convert },
	{ "sigbus", step_sigbus }, { "earlykill", step_earlykill }, { "caps", step_caps }, { "pid", step_pid },
	{ "sleep", step_sleep }, { "report", step_report },
};

static void run_line(char *line)
{
	char *save, *word;

	memset(&in, 0, sizeof(in));
	failed = false;
	for (word = strtok_r(line, " \t\r\n", &save); word; word = strtok_r(NULL, " \t\r\n", &save)) {
		if (!in.step)
			in.step = word;
		else if (strchr(word, '=') && in.options < MAX_WORDS)
			in.option[in.options++] = word;
		else if (in.words < MAX_WORDS)
			in.word[in.words++] = word;
	}
	if (!in.step || *in.step == '#')
		return;
	if (!strcmp(in.step, "exit"))
		final(in.words ? atoi(in.word[0]) : 0);
	json_begin(in.step);
	for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
		if (!strcmp(steps[i].name, in.step)) {
			steps[i].run();
			json_end();
			return;
		}
	}
	fail("unknown step: see vmm --help", 0, false);
	json_end();
}

static void run_file(FILE *f)
{
	char *line = NULL;
	size_t bytes = 0;

	while (getline(&line, &bytes, f) >= 0)
		run_line(line);
	free(line);
}

static void nothing(int nr) { (void)nr; }

int main(int argc, char **argv)
{
	struct sigaction kick = { .sa_handler = nothing }; /* without SA_RESTART: it is there to interrupt KVM_RUN */
	const char *file = NULL;
	bool any = false;

	page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	sigaction(SIGUSR1, &kick, NULL);
	sigbus_policy("count");
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--help")) {
			fputs(help, stdout);
			return 0;
		}
		if (argv[i][0] == '-' && i + 1 < argc) {
			const char *value = argv[++i];

			if (!strcmp(argv[i - 1], "--name"))
				prctl(PR_SET_NAME, value);
			else if (!strcmp(argv[i - 1], "--steps"))
				file = value;
			continue;
		}
		char *line = strdup(argv[i]);

		run_line(line);
		free(line);
		any = true;
	}
	if (!any && !file)
		file = "-";
	if (file) {
		FILE *f = strcmp(file, "-") ? fopen(file, "re") : stdin;

		if (!f) {
			perror(file);
			return 1;
		}
		run_file(f);
	}
	final(0);
}
