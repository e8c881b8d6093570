// SPDX-License-Identifier: Apache-2.0
/*
 * guest COUNT: runs a virtual machine of one CPU that writes COUNT bytes to an I/O port, and then halts. Reports exits=
 * (of KVM to this program, one for each byte) and halts=. Needs /dev/kvm, and a machine of x86.
 *
 * Each write to a port that nothing in the kernel serves leaves the guest, once. What else makes it leave (pages that are
 * not there yet, interrupts) is the machine's affair, and not counted here.
 */
#define _GNU_SOURCE
#include "workload.h"

#if defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define START 0x1000
#define MEMORY_BYTES 0x1000

static int must(int result, const char *what)
{
	if (result < 0)
		workload_fail_errno("%s", what);
	return result;
}

int main(int argc, char **argv)
{
	char **operands = workload_arguments(argc, argv, "COUNT", (struct flag[]){ { 0 } }, 1, 1);
	unsigned int count = workload_number(operands[0], 1);
	/* Real mode: mov $COUNT, %ecx; again: out %al, $0xe9; dec %ecx; jnz again; hlt */
	unsigned char code[] = { 0x66, 0xb9, 0, 0, 0, 0, 0xe6, 0xe9, 0x66, 0x49, 0x75, 0xfa, 0xf4 };
	struct kvm_userspace_memory_region region = { 0, 0, START, MEMORY_BYTES, 0 };
	struct kvm_regs registers = { .rip = START, .rflags = 2 };
	struct kvm_sregs segments;
	struct kvm_run *run;
	long exits = 0;
	int kvm, machine, cpu;
	void *memory;

	memcpy(code + 2, &count, sizeof(count));
	kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
	machine = must(ioctl(kvm, KVM_CREATE_VM, 0), "make a virtual machine");
	memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		workload_fail_errno("memory");
	memcpy(memory, code, sizeof(code));
	region.userspace_addr = (unsigned long)memory;
	must(ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region), "give it memory");
	cpu = must(ioctl(machine, KVM_CREATE_VCPU, 0), "give it a CPU");
	run = mmap(NULL, must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "ask for the size"), PROT_READ | PROT_WRITE,
		   MAP_SHARED, cpu, 0);
	if (run == MAP_FAILED)
		workload_fail_errno("what it says");
	must(ioctl(cpu, KVM_GET_SREGS, &segments), "read its segments");
	segments.cs.base = 0;
	segments.cs.selector = 0;
	must(ioctl(cpu, KVM_SET_SREGS, &segments), "set its segments");
	must(ioctl(cpu, KVM_SET_REGS, &registers), "set its registers");

	workload_ready("");
	for (;;) {
		if (ioctl(cpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			workload_fail_errno("run it");
		}
		if (run->exit_reason == KVM_EXIT_HLT)
			break;
		if (run->exit_reason != KVM_EXIT_IO)
			workload_fail("it left for reason %u", run->exit_reason);
		exits++;
		workload_pause();
	}
	workload_done("exits=%ld halts=1", exits);
	return 0;
}

#else

int main(void)
{
	workload_fail("this guest is one of x86");
}

#endif
