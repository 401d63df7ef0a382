/*
 * vCPUs: each has a thread that does one job at a time and records what KVM_RUN returned, with which kvmtrace is
 * compared. Each return is a `struct outcome`, read from errno and kvm_run at once. It is interpreted only as far as the
 * kernel's contract goes: memory_fault is valid only with reason 39 and errno EFAULT or EHWPOISON.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "vmm.h"

static struct outcome enter(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct outcome o = { .count = 1 };

	o.ret = ioctl(vcpu->fd, KVM_RUN, 0);
	o.err = o.ret < 0 ? errno : 0;
	o.reason = run->exit_reason;
	/* Without errno: nested virtualization on arm64, arch/arm64/kvm/nested.c. */
	o.annotated = o.reason == KVM_EXIT_MEMORY_FAULT && (!o.err || o.err == EFAULT || o.err == EHWPOISON);
	if (o.annotated) {
		const struct vmm_memory_fault *fault = memory_fault_of(run);

		o.flags = fault->flags;
		o.gpa = fault->gpa;
		o.size = fault->size;
	}
	if (o.ret >= 0 && o.reason == KVM_EXIT_INTERNAL_ERROR)
		o.suberror = run->internal.suberror;
	vcpu->io_pending = o.ret == 0 && guest_reported(run);
	vcpu->strange = o.ret == 0 && !vcpu->io_pending;

	pthread_mutex_lock(&vcpu->lock);
	if (o.ret >= 0 && o.reason < 64)
		vcpu->exits[o.reason]++;
	else if (o.ret >= 0)
		vcpu->other_exits++;
	else if (o.err == EINTR)
		vcpu->eintr++;
	else if (o.err == EAGAIN)
		vcpu->eagain++;
	else
		outcomes_add(&vcpu->failed, &o);
	pthread_mutex_unlock(&vcpu->lock);
	return o;
}

static void pause_us(uint64_t us)
{
	struct timespec t = { .tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000 };

	if (us)
		nanosleep(&t, NULL);
}

/* After an MMIO exit of a gfn without memory, a shutdown …: let KVM finish the instruction, then reset the vCPU. */
static int start_over(struct vcpu *vcpu)
{
	if (!vcpu->strange)
		return 0;
	vcpu->run->immediate_exit = 1;
	enter(vcpu);
	vcpu->run->immediate_exit = 0;
	return guest_vcpu_init(vcpu->vm, vcpu);
}

static void prefault(struct vcpu *vcpu, struct job *job)
{
	struct kvm_pre_fault_memory range = { .gpa = job->gfn * page_size, .size = job->n * page_size };
	int ret = ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range);

	/* Not a KVM_RUN: reported here, but not in the totals. The reason in kvm_run may be stale, or of this call. */
	job->last = (struct outcome){ .ret = ret, .err = ret < 0 ? errno : 0, .reason = vcpu->run->exit_reason };
	job->ok = ret == 0;
}

static void run_job(struct vcpu *vcpu, struct job *job)
{
	struct timespec from, to;

	sigbus_forget();
	if (job->plant)
		plant_code(job->plant);
	clock_gettime(CLOCK_MONOTONIC, &from);
	if (job->kind == JOB_PREFAULT) {
		prefault(vcpu, job);
	} else if (start_over(vcpu) < 0 || guest_set(vcpu, job->kind == JOB_PIO ? OP_NONE : job->op,
						    job->gfn * page_size, !vcpu->io_pending) < 0) {
		job->last = (struct outcome){ .ret = -1, .err = errno };
	} else {
		uint64_t limit = job->kind == JOB_TOUCH ? UINT64_MAX : job->n;

		while (job->runs < limit && !vcpu->kick) {
			uint64_t sigbus_before = tl_sigbus_total;

			job->last = enter(vcpu);
			job->runs++;
			outcomes_add(&job->returns, &job->last);
			job->ok = vcpu->io_pending;
			if (job->kind == JOB_TOUCH) {
				bool nothing = job->last.err == EAGAIN ||
					       (job->last.err == EINTR && tl_sigbus_total == sigbus_before);

				if (!nothing) /* not interrupted because of the guest: enter again */
					break;
			}
			pause_us(job->gap_us);
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	job->ns = (uint64_t)(to.tv_sec - from.tv_sec) * 1000000000ULL + (uint64_t)to.tv_nsec - (uint64_t)from.tv_nsec;
	job->nr_sigbus = tl_sigbus_n;
	memcpy(job->sigbus, tl_sigbus, tl_sigbus_n * sizeof(tl_sigbus[0]));
}

static void *vcpu_main(void *arg)
{
	struct vcpu *vcpu = arg;
	char name[16];

	snprintf(name, sizeof(name), "CPU %u/KVM", vcpu->id);
	pthread_setname_np(pthread_self(), name);
	pthread_mutex_lock(&vcpu->lock);
	vcpu->tid = gettid();
	pthread_cond_broadcast(&vcpu->changed);
	for (;;) {
		while (vcpu->state != POSTED)
			pthread_cond_wait(&vcpu->changed, &vcpu->lock);
		struct job job = vcpu->job;

		if (job.kind == JOB_QUIT)
			break;
		pthread_mutex_unlock(&vcpu->lock);
		run_job(vcpu, &job);
		pthread_mutex_lock(&vcpu->lock);
		vcpu->job = job;
		vcpu->state = DONE;
		vcpu->kick = false;
		vcpu->run->immediate_exit = 0;
		pthread_cond_broadcast(&vcpu->changed);
	}
	pthread_mutex_unlock(&vcpu->lock);
	return NULL;
}

int vcpu_start(struct vm *vm, uint32_t id)
{
	struct vcpu *vcpu = calloc(1, sizeof(*vcpu));
	int bytes = ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0), saved;
	pthread_condattr_t clock;

	if (!vcpu || bytes < 0)
		return -1;
	vcpu->vm = vm;
	vcpu->id = id;
	vcpu->run = MAP_FAILED;
	vcpu->run_bytes = (size_t)bytes;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)id);
	if (vcpu->fd >= 0)
		vcpu->run = mmap(NULL, vcpu->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->fd < 0 || vcpu->run == MAP_FAILED || guest_vcpu_init(vm, vcpu) < 0) {
		saved = errno;
		if (vcpu->run != MAP_FAILED)
			munmap(vcpu->run, vcpu->run_bytes);
		if (vcpu->fd >= 0)
			close(vcpu->fd);
		free(vcpu);
		errno = saved;
		return -1;
	}
	pthread_mutex_init(&vcpu->lock, NULL);
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&vcpu->changed, &clock);
	pthread_create(&vcpu->thread, NULL, vcpu_main, vcpu);
	pthread_mutex_lock(&vcpu->lock);
	while (!vcpu->tid)
		pthread_cond_wait(&vcpu->changed, &vcpu->lock);
	pthread_mutex_unlock(&vcpu->lock);
	vm->vcpus[vm->nr_vcpus++] = vcpu;
	return 0;
}

int vcpu_post(struct vcpu *vcpu, const struct job *job)
{
	int ret = -1;

	pthread_mutex_lock(&vcpu->lock);
	if (vcpu->state == IDLE) {
		vcpu->job = *job;
		vcpu->state = POSTED;
		pthread_cond_broadcast(&vcpu->changed);
		ret = 0;
	}
	pthread_mutex_unlock(&vcpu->lock);
	return ret;
}

/* Call with the lock held. A kick may come between two entries, so it is repeated until the thread has reacted. */
static void kick_until_done(struct vcpu *vcpu)
{
	while (vcpu->state == POSTED) {
		struct timespec until;

		vcpu->kick = true;
		vcpu->run->immediate_exit = 1;
		pthread_kill(vcpu->thread, SIGUSR1);
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += 20000000;
		if (until.tv_nsec >= 1000000000) {
			until.tv_nsec -= 1000000000;
			until.tv_sec++;
		}
		pthread_cond_timedwait(&vcpu->changed, &vcpu->lock, &until);
	}
}

void vcpu_wait(struct vcpu *vcpu, double timeout_s, struct job *out)
{
	struct timespec until;
	int err = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)timeout_s;
	until.tv_nsec += (long)((timeout_s - (double)(time_t)timeout_s) * 1e9);
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_mutex_lock(&vcpu->lock);
	while (vcpu->state == POSTED && err != ETIMEDOUT) {
		if (timeout_s > 0)
			err = pthread_cond_timedwait(&vcpu->changed, &vcpu->lock, &until);
		else
			pthread_cond_wait(&vcpu->changed, &vcpu->lock);
	}
	if (vcpu->state == POSTED) {
		kick_until_done(vcpu);
		vcpu->job.timed_out = true;
	}
	*out = vcpu->job;
	vcpu->state = IDLE;
	pthread_mutex_unlock(&vcpu->lock);
}

/* Ends the thread and the vCPU; the totals stay for the report. */
void vcpu_stop(struct vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->lock);
	kick_until_done(vcpu);
	if (vcpu->state == DONE)
		free(vcpu->job.returns.v);
	vcpu->job = (struct job){ .kind = JOB_QUIT };
	vcpu->state = POSTED;
	pthread_cond_broadcast(&vcpu->changed);
	pthread_mutex_unlock(&vcpu->lock);
	pthread_join(vcpu->thread, NULL);
	munmap(vcpu->run, vcpu->run_bytes);
	close(vcpu->fd);
	vcpu->run = NULL;
	vcpu->fd = -1;
}
