/*
 * The guest on arm64: the same loop as on x86 (x0: address, x1: operation), with the MMU off. It reports by writing to
 * the address in x2, which is never memory: an MMIO exit.
 *
 * OP_NESTED is for a VM with nested=1, whose guest is a hypervisor (EL2). A guest within the guest (EL1, NV2) reads
 * HCR_EL2, which becomes a load from the page in VNCR_EL2 (x0). KVM faults that page in by kvm_handle_vncr_abort.
 */
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmm.h"

const uint64_t guest_report_gpa = 0xf0000000;
const uint8_t guest_return[] = { 0xc0, 0x03, 0x5f, 0xd6 };
const size_t guest_return_bytes = sizeof(guest_return);

static const uint32_t program[] = {
	0xf100003f | OP_READ << 10,   /*  0 start: cmp x1, #OP_READ   */
	0x54000160,                   /*  4        b.eq read   (48)   */
	0xf100003f | OP_WRITE << 10,  /*  8        cmp x1, #OP_WRITE  */
	0x54000160,                   /* 12        b.eq write  (56)   */
	0xf100003f | OP_EXEC << 10,   /* 16        cmp x1, #OP_EXEC   */
	0x54000160,                   /* 20        b.eq exec   (64)   */
	0xf100003f | OP_SPIN << 10,   /* 24        cmp x1, #OP_SPIN   */
	0x54000160,                   /* 28        b.eq spin   (72)   */
	0xf100003f | OP_NESTED << 10, /* 32        cmp x1, #OP_NESTED */
	0x54000160,                   /* 36        b.eq nested (80)   */
	0xb9000040,                   /* 40 report: str w0, [x2]      */
	0x17fffff5,                   /* 44        b start            */
	0x39400003,                   /* 48 read:  ldrb w3, [x0]      */
	0x17fffffd,                   /* 52        b report           */
	0x39000003,                   /* 56 write: strb w3, [x0]      */
	0x17fffffb,                   /* 60        b report           */
	0xd63f0000,                   /* 64 exec:  blr x0             */
	0x17fffff9,                   /* 68        b report           */
	0x39400003,                   /* 72 spin:  ldrb w3, [x0]      */
	0x17ffffff,                   /* 76        b spin             */
	0xd51c2200,                   /* 80 nested: msr vncr_el2, x0  */
	0xd2b00003,                   /* 84        mov x3, RW         */
	0xf2c48083,                   /* 88        movk x3, E2H | NV | NV2, lsl 32 */
	0xd51c1103,                   /* 92        msr hcr_el2, x3    */
	0xd28078a3,                   /* 96        mov x3, EL1h, masked */
	0xd51c4003,                   /* 100       msr spsr_el2, x3   */
	0x10000083,                   /* 104       adr x3, inner      */
	0xd51c4023,                   /* 108       msr elr_el2, x3    */
	0xd5033fdf,                   /* 112       isb                */
	0xd69f03e0,                   /* 116       eret               */
	0xd53c1103,                   /* 120 inner: mrs x3, hcr_el2   */
	0x17ffffeb,                   /* 124       b report           */
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
	if (vm->nested)
		init.features[0] |= 1 << KVM_ARM_VCPU_HAS_EL2;
	return ioctl(vcpu->fd, KVM_ARM_VCPU_INIT, &init);
}

/* KVM does not run a hypervisor without a GIC, which gives it its interrupts. */
int guest_make_nested(struct vm *vm)
{
	struct kvm_create_device gic = { .type = KVM_DEV_TYPE_ARM_VGIC_V3 };
	uint64_t dist = 0xf1000000, redist = 0xf2000000;
	struct kvm_device_attr attr[] = {
		{ .group = KVM_DEV_ARM_VGIC_GRP_ADDR, .attr = KVM_VGIC_V3_ADDR_TYPE_DIST, .addr = (uintptr_t)&dist },
		{ .group = KVM_DEV_ARM_VGIC_GRP_ADDR, .attr = KVM_VGIC_V3_ADDR_TYPE_REDIST, .addr = (uintptr_t)&redist },
		{ .group = KVM_DEV_ARM_VGIC_GRP_CTRL, .attr = KVM_DEV_ARM_VGIC_CTRL_INIT },
	};

	if (ioctl(vm->fd, KVM_CREATE_DEVICE, &gic) < 0)
		return -1;
	for (size_t i = 0; i < sizeof(attr) / sizeof(attr[0]); i++)
		if (ioctl((int)gic.fd, KVM_SET_DEVICE_ATTR, &attr[i]) < 0)
			return -1;
	return 0; /* the descriptor stays open to the end of the process */
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
