/*
 * SIGBUS is recorded by the thread that gets it. A vCPU thread gets it in KVM_RUN, which then returns EINTR; the main
 * thread gets it from MADV_HWPOISON, from a guarded access, or as an "action optional" notice.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "vmm.h"

enum { MAX_SIGBUS = 1024 };

_Thread_local struct sigbus tl_sigbus[JOB_SIGBUS];
_Thread_local unsigned tl_sigbus_n;
_Thread_local uint64_t tl_sigbus_total;
_Thread_local sigjmp_buf *tl_guard;

static struct sigbus all[MAX_SIGBUS];
static unsigned nr_all;
static uint64_t lost;
static atomic_flag busy = ATOMIC_FLAG_INIT; /* taken in the handler, so others block SIGBUS before they take it */

static bool note(struct sigbus *list, unsigned *n, unsigned max, const struct sigbus *one)
{
	for (unsigned i = *n; i-- > 0;) {
		if (list[i].code == one->code && list[i].hva == one->hva && list[i].lsb == one->lsb &&
		    list[i].tid == one->tid) {
			list[i].count++;
			return true;
		}
	}
	if (*n == max)
		return false;
	list[(*n)++] = *one;
	return true;
}

static void handler(int nr, siginfo_t *info, void *context)
{
	int saved = errno;
	struct sigbus one = { .code = info->si_code, .hva = (uintptr_t)info->si_addr, .tid = gettid(), .count = 1 };

	(void)nr, (void)context;
	if (one.code == BUS_MCEERR_AR || one.code == BUS_MCEERR_AO)
		one.lsb = info->si_addr_lsb;
	tl_sigbus_total++;
	note(tl_sigbus, &tl_sigbus_n, JOB_SIGBUS, &one);
	while (atomic_flag_test_and_set(&busy))
		;
	if (!note(all, &nr_all, MAX_SIGBUS, &one))
		lost++;
	atomic_flag_clear(&busy);
	if (tl_guard)
		siglongjmp(*tl_guard, 1);
	errno = saved;
}

int sigbus_policy(const char *name)
{
	struct sigaction action = { .sa_flags = 0 };

	if (!strcmp(name, "count")) {
		action.sa_sigaction = handler;
		action.sa_flags = SA_SIGINFO | SA_RESTART;
	} else if (!strcmp(name, "ignore")) {
		action.sa_handler = SIG_IGN;
	} else if (!strcmp(name, "default")) {
		action.sa_handler = SIG_DFL;
	} else {
		return -1;
	}
	return sigaction(SIGBUS, &action, NULL);
}

void sigbus_forget(void)
{
	tl_sigbus_n = 0;
	tl_sigbus_total = 0;
}

bool touch_hva(volatile uint8_t *hva, bool write)
{
	sigjmp_buf here;
	bool ok = false;

	if (!sigsetjmp(here, 1)) {
		tl_guard = &here;
		if (write)
			*hva = *hva;
		else
			(void)*hva;
		ok = true;
	}
	tl_guard = NULL;
	return ok;
}

void json_sigbus_list(const char *key, const struct sigbus *list, unsigned n)
{
	json_open(key, '[');
	for (unsigned i = 0; i < n; i++) {
		char code[16];

		snprintf(code, sizeof(code), "%d", list[i].code);
		json_open(NULL, '{');
		json_str("code", list[i].code == BUS_MCEERR_AR ? "AR" : list[i].code == BUS_MCEERR_AO ? "AO" : code);
		json_uint("hva", list[i].hva);
		json_int("lsb", list[i].lsb);
		json_int("tid", list[i].tid);
		json_uint("count", list[i].count);
		json_close('}');
	}
	json_close(']');
}

void json_sigbus_report(void)
{
	static struct sigbus copy[MAX_SIGBUS];
	sigset_t block, old;
	unsigned n;
	uint64_t missing;

	sigemptyset(&block);
	sigaddset(&block, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &block, &old);
	while (atomic_flag_test_and_set(&busy))
		;
	n = nr_all;
	missing = lost;
	memcpy(copy, all, n * sizeof(copy[0]));
	atomic_flag_clear(&busy);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	json_sigbus_list("sigbus", copy, n);
	json_uint("sigbus_not_listed", missing);
}
