/*
 * The guest, arm64: the same loop as on x86 (x0: address, x1: op), MMU off; it reports by writing to an address that is
 * never memory (x2), which is an MMIO exit.
 */
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm.h"

const uint64_t guest_report_gpa = 0xf0000000;
const uint8_t guest_return[] = { 0xc0, 0x03, 0x5f, 0xd6 };
const size_t guest_return_bytes = sizeof(guest_return);

static const uint32_t program[] = {
	0xf100003f | OP_READ << 10,  /*  0 start: cmp x1, #OP_READ  */
	0x54000120,                  /*  4        b.eq read  (40)   */
	0xf100003f | OP_WRITE << 10, /*  8        cmp x1, #OP_WRITE */
	0x54000120,                  /* 12        b.eq write (48)   */
	0xf100003f | OP_EXEC << 10,  /* 16        cmp x1, #OP_EXEC  */
	0x54000120,                  /* 20        b.eq exec  (56)   */
	0xf100003f | OP_SPIN << 10,  /* 24        cmp x1, #OP_SPIN  */
	0x54000120,                  /* 28        b.eq spin  (64)   */
	0xb9000040,                  /* 32 report: str w0, [x2]     */
	0x17fffff7,                  /* 36        b start           */
	0x39400003,                  /* 40 read:  ldrb w3, [x0]     */
	0x17fffffd,                  /* 44        b report          */
	0x39000003,                  /* 48 write: strb w3, [x0]     */
	0x17fffffb,                  /* 52        b report          */
	0xd63f0000,                  /* 56 exec:  blr x0            */
	0x17fffff9,                  /* 60        b report          */
	0x39400003,                  /* 64 spin:  ldrb w3, [x0]     */
	0x17ffffff,                  /* 68        b spin            */
};

void guest_install(void *code, size_t bytes)
{
	memcpy(code, program, sizeof(program));
	__builtin___clear_cache((char *)code, (char *)code + bytes);
}

static int set_reg(struct vcpu *vcpu, uint64_t offset, uint64_t value)
{
	struct kvm_one_reg reg = {
		.id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | offset / sizeof(uint32_t),
		.addr = (uintptr_t)&value,
	};

	return ioctl(vcpu->fd, KVM_SET_ONE_REG, &reg);
}
#define CORE(member) offsetof(struct kvm_regs, regs.member)

int guest_vcpu_init(struct vm *vm, struct vcpu *vcpu)
{
	struct kvm_vcpu_init init;

	if (ioctl(vm->fd, KVM_ARM_PREFERRED_TARGET, &init) < 0)
		return -1;
	return ioctl(vcpu->fd, KVM_ARM_VCPU_INIT, &init);
}

int guest_set(struct vcpu *vcpu, enum op op, uint64_t gpa, bool restart)
{
	if (restart && set_reg(vcpu, CORE(pc), 0) < 0)
		return -1;
	if (set_reg(vcpu, CORE(regs[0]), gpa) < 0 || set_reg(vcpu, CORE(regs[1]), op) < 0)
		return -1;
	return set_reg(vcpu, CORE(regs[2]), guest_report_gpa);
}

bool guest_reported(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.phys_addr == guest_report_gpa;
}
