/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * hold ADDRESS    sleeps with a word of its choice on its kernel stack
 *
 * select() copies sets of up to 832 descriptors to the kernel's stack (fs/select.c, core_sys_select) and leaves them
 * there for as long as it waits. The set is the address: descriptors with those bits are open, and never readable.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	unsigned long word = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
	int ends[2];
	fd_set set;

	if (!word || pipe(ends) || dup2(ends[1], 64) < 0 || dup2(ends[0], 65) < 0)
		return 2;
	printf("holds %#lx, pid %d\n", word, getpid());
	fflush(stdout);
	for (int fd = 0; fd < 64; fd++)
		if (dup2(65, fd) < 0)
			return 1;
	FD_ZERO(&set);
	memcpy(&set, &word, sizeof(word));
	return select(64, &set, NULL, NULL, NULL) < 0;
}
