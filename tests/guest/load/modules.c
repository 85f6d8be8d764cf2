/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A module, loaded, used and unloaded.  Every load relocates and patches its text. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../module/bug.h"
#include "load.h"

static int image;

static void begin(void)
{
	image = open("/lib/modules/penumbra_bug.ko", O_RDONLY);
	check("open the module", image >= 0, 1);
}

static void round_of(uint32_t number)
{
	uint64_t out = number, in = 0;
	struct bug_access access = { .index = 0, .count = 1 };
	int fd;

	check("finit_module", syscall(SYS_finit_module, image, "", 0), 0);
	fd = open("/dev/penumbra_bug", O_RDWR);
	check("open its device", fd >= 0, 1);
	/* Within the ioctl's own array: nothing is overwritten. */
	access.words = (uintptr_t)&out;
	check("write a word", ioctl(fd, BUG_STACK_WRITE, &access), 0);
	access.words = (uintptr_t)&in;
	check("read a word", ioctl(fd, BUG_STACK_READ, &access), 0);
	check("close", close(fd), 0);
	check("delete_module", syscall(SYS_delete_module, "penumbra_bug", O_NONBLOCK), 0);
	usleep(20000);
}

const struct kind kind_module = { "module", begin, round_of };
