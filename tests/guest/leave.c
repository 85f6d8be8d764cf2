/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Leaves what a profile has of the kernel.
 *
 *   leave call      mq_open(), which nothing else does
 *   leave branch    writes to /dev/full: vfs_write() calls write_full() by its address
 *
 * Prints `done` when it was not stopped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";

	if (!strcmp(how, "call")) {
		if (syscall(SYS_mq_open, "none", O_RDONLY, 0, 0) != -1 || errno != ENOENT)
			return 1;
	} else if (!strcmp(how, "branch")) {
		int fd = open("/dev/full", O_WRONLY);

		if (fd < 0 || write(fd, "x", 1) != -1 || errno != ENOSPC)
			return 1;
	} else {
		return 2;
	}
	puts("done");
	return 0;
}
