/*
 * The guest on x86: flat 32-bit protected mode without paging, so that it reaches every gfn below 4 GiB. It is a loop:
 * do the operation in ecx on the address in edi, then report by writing to a port. The host sets the registers between
 * two entries; after a failed access it also sets the guest back to the start of the loop.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm.h"

enum { REPORT_PORT = 0x10 };

const uint64_t guest_report_gpa = 0;
const uint8_t guest_return[] = { 0xc3 };
const size_t guest_return_bytes = sizeof(guest_return);

static const uint8_t program[] = {
	0x80, 0xf9, OP_READ,  /* start: cmp cl, OP_READ  */
	0x74, 0x13,           /*        je read          */
	0x80, 0xf9, OP_WRITE, /*        cmp cl, OP_WRITE */
	0x74, 0x12,           /*        je write         */
	0x80, 0xf9, OP_EXEC,  /*        cmp cl, OP_EXEC  */
	0x74, 0x11,           /*        je exec          */
	0x80, 0xf9, OP_SPIN,  /*        cmp cl, OP_SPIN  */
	0x74, 0x10,           /*        je spin          */
	0xe6, REPORT_PORT,    /* report: out REPORT, al  */
	0xeb, 0xe8,           /*        jmp start        */
	0x8a, 0x07,           /* read:  mov al, [edi]    */
	0xeb, 0xf8,           /*        jmp report       */
	0x88, 0x07,           /* write: mov [edi], al    */
	0xeb, 0xf4,           /*        jmp report       */
	0xff, 0xd7,           /* exec:  call edi         */
	0xeb, 0xf0,           /*        jmp report       */
	0x8a, 0x07,           /* spin:  mov al, [edi]    */
	0xeb, 0xfc,           /*        jmp spin         */
};

void guest_install(void *code, size_t bytes)
{
	(void)bytes;
	memcpy(code, program, sizeof(program));
}

int guest_vcpu_init(struct vm *vm, struct vcpu *vcpu)
{
	struct kvm_sregs s;

	(void)vm;
	if (ioctl(vcpu->fd, KVM_GET_SREGS, &s) < 0)
		return -1;
	s.cr0 = (s.cr0 | 1) & ~0x80000000ULL; /* protected, not paged */
	s.cs = (struct kvm_segment){ .limit = ~0U, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1 };
	s.ds = s.es = s.fs = s.gs = s.ss = (struct kvm_segment){
		.limit = ~0U, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	return ioctl(vcpu->fd, KVM_SET_SREGS, &s);
}

int guest_make_nested(struct vm *vm)
{
	(void)vm;
	errno = EOPNOTSUPP;
	return -1;
}

int guest_set(struct vcpu *vcpu, enum op op, uint64_t gpa, bool restart)
{
	struct kvm_regs r;

	if (ioctl(vcpu->fd, KVM_GET_REGS, &r) < 0)
		return -1;
	if (restart) {
		r.rip = 0;
		r.rflags = 2;
		r.rsp = vcpu->vm->code_bytes - 64 * vcpu->id; /* a few words of stack for each vCPU */
	}
	r.rdi = gpa;
	r.rcx = op;
	return ioctl(vcpu->fd, KVM_SET_REGS, &r);
}

bool guest_reported(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT && run->io.port == REPORT_PORT;
}
