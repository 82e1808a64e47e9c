// SPDX-License-Identifier: GPL-2.0
/*
 * A Linux guest on libkrun, through its C interface: krun KERNEL INITRD CPUS MIB COMMAND-LINE. The kernel is a bzImage compressed with
 * zstd; the guest's first serial port is standard output. The guest has neither disks nor network.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int32_t krun_set_log_level(uint32_t level);
int32_t krun_create_ctx(void);
int32_t krun_set_vm_config(uint32_t ctx, uint8_t cpus, uint32_t mib);
int32_t krun_set_kernel(uint32_t ctx, const char *kernel, uint32_t format, const char *initrd, const char *cmdline);
int32_t krun_disable_implicit_console(uint32_t ctx);
int32_t krun_disable_implicit_vsock(uint32_t ctx);
int32_t krun_add_serial_console_default(uint32_t ctx, int input, int output);
int32_t krun_start_enter(uint32_t ctx);

enum { LOG_ERROR = 1, KERNEL_IMAGE_ZSTD = 5, NO_INPUT = -1, STDOUT = 1 };

static void must(const char *what, int32_t result)
{
	if (result < 0) {
		fprintf(stderr, "krun: %s: error %d\n", what, -result);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	int32_t ctx;

	if (argc != 6) {
		fprintf(stderr, "usage: krun KERNEL INITRD CPUS MIB COMMAND-LINE\n");
		return 2;
	}
	must("log", krun_set_log_level(LOG_ERROR));
	ctx = krun_create_ctx();
	must("context", ctx);
	must("size", krun_set_vm_config(ctx, atoi(argv[3]), atoi(argv[4])));
	must("kernel", krun_set_kernel(ctx, argv[1], KERNEL_IMAGE_ZSTD, argv[2], argv[5]));
	must("console", krun_disable_implicit_console(ctx));
	must("vsock", krun_disable_implicit_vsock(ctx));
	must("serial port", krun_add_serial_console_default(ctx, NO_INPUT, STDOUT));
	// Comes back only with an error: libkrun ends the process with its guest.
	must("start", krun_start_enter(ctx));
	return 0;
}
