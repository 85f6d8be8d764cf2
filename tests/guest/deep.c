/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Has the kernel look up a path when little of its stack is left.
 *
 *   deep BYTES    so many are left
 *
 * Prints `done` when it was not stopped.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "module/bug.h"

int main(int argc, char **argv)
{
	int fd = open("/dev/penumbra_bug", O_RDWR);

	if (argc != 2 || fd < 0)
		return 2;
	if (ioctl(fd, BUG_DEEP, strtoul(argv[1], NULL, 0)) != -1 || errno != ENOENT)
		return 1;
	puts("done");
	return 0;
}
