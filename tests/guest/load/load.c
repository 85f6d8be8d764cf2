/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One kind of work for the kernel, in rounds that check their own results, until killed.
 *
 *   load KIND [ROUNDS]     file, pipe, unix, tcp, exec, memory, signal, thread or module
 *   load executed NUMBER   what `load exec` executes
 *
 * A line a second: `KIND pid P partner 0 rounds N checks M switches S`, as worker.c's.  The first
 * wrong result is printed as `FAILED ...` and ends the program with 1.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

static const char *name;
static unsigned long checks;

static const struct kind *const kinds[] = { &kind_file, &kind_pipe, &kind_unix, &kind_tcp, &kind_exec,
					    &kind_memory, &kind_signal, &kind_thread, &kind_module };

void check(const char *what, long got, long wanted)
{
	/* Threads count too, roughly. */
	__atomic_add_fetch(&checks, 1, __ATOMIC_RELAXED);
	if (got == wanted)
		return;
	printf("FAILED %s pid %d: %s: got %ld, wanted %ld (errno %d)\n", name, getpid(), what, got, wanted,
	       errno);
	fflush(stdout);
	_exit(1);
}

void fill(unsigned char *data, size_t length, uint32_t seed)
{
	for (size_t i = 0; i < length; i++) {
		seed = seed * 1664525u + 1013904223u;
		data[i] = (unsigned char)(seed >> 24);
	}
}

void get_all(int fd, void *data, size_t length)
{
	for (size_t got = 0; got < length;) {
		ssize_t n = read(fd, (char *)data + got, length - got);

		check("read", n > 0, 1);
		got += (size_t)n;
	}
}

void put_all(int fd, const void *data, size_t length)
{
	for (size_t put = 0; put < length;) {
		ssize_t n = write(fd, (const char *)data + put, length - put);

		check("write", n > 0, 1);
		put += (size_t)n;
	}
}

static void run(const struct kind *kind, uint32_t rounds)
{
	struct timespec now;
	time_t last = 0;

	kind->begin();
	for (uint32_t round = 1; !rounds || round <= rounds; round++) {
		kind->round(round);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec != last || round == rounds) {
			struct rusage usage;

			last = now.tv_sec;
			getrusage(RUSAGE_SELF, &usage);
			printf("%s pid %d partner 0 rounds %u checks %lu switches %ld\n", name, getpid(), round,
			       checks, usage.ru_nvcsw + usage.ru_nivcsw);
		}
	}
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 3 && strcmp(argv[1], "executed") == 0)
		return executed(argv[2]);
	for (size_t i = 0; argc >= 2 && i < sizeof kinds / sizeof *kinds; i++)
		if (strcmp(argv[1], kinds[i]->name) == 0) {
			name = kinds[i]->name;
			run(kinds[i], argc > 2 ? (uint32_t)atol(argv[2]) : 0);
			return 0;
		}
	fprintf(stderr, "usage: load file|pipe|unix|tcp|exec|memory|signal|thread|module [ROUNDS] | load executed NUMBER\n");
	return 2;
}
