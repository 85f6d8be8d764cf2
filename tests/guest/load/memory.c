/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Mappings: protections that fault, moves, copies on write, shared files. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "load.h"

#define PAGE 4096
#define PAGES 16

static sigjmp_buf back;
static void *volatile fault_at;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	fault_at = info->si_addr;
	siglongjmp(back, 1);
}

static void begin(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };

	check("sigaction", sigaction(SIGSEGV, &action, NULL), 0);
}

/* Does a write there fault, at that address? */
static int write_faults(volatile unsigned char *at)
{
	fault_at = NULL;
	if (sigsetjmp(back, 1) == 0) {
		*at = 1;
		return 0;
	}
	return fault_at == at;
}

static void pages(const unsigned char *map, uint32_t number)
{
	for (int page = 0; page < PAGES; page++)
		check("page", map[page * PAGE], (unsigned char)(number + page));
}

static void copy_on_write(unsigned char *map, uint32_t number)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		for (int page = 0; page < PAGES; page++) {
			check("child's page", map[page * PAGE], (unsigned char)(number + page));
			map[page * PAGE] = 0;
		}
		_exit(0);
	}
	check("waitpid", waitpid(pid, &status, 0), pid);
	check("child", status, 0);
	pages(map, number);
}

static void shared_file(uint32_t number)
{
	unsigned char in[8];
	int fd = memfd_create("load", 0);
	unsigned char *map;

	check("ftruncate", ftruncate(fd, PAGE), 0);
	map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	check("mmap of a file", map != MAP_FAILED, 1);
	fill(map + 100, sizeof in, number);
	check("pread", pread(fd, in, sizeof in, 100), sizeof in);
	check("content", memcmp(in, map + 100, sizeof in), 0);
	check("munmap", munmap(map, PAGE), 0);
	close(fd);
}

static void round_of(uint32_t number)
{
	size_t length = PAGES * PAGE;
	unsigned char *map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check("mmap", map != MAP_FAILED, 1);
	for (int page = 0; page < PAGES; page++)
		map[page * PAGE] = (unsigned char)(number + page);
	check("mprotect", mprotect(map, length, PROT_READ), 0);
	check("write is refused", write_faults(map + (number % PAGES) * PAGE + 5), 1);
	pages(map, number);
	check("mprotect", mprotect(map, length, PROT_READ | PROT_WRITE), 0);
	check("write is allowed", write_faults(map + (number % PAGES) * PAGE + 5), 0);
	map = mremap(map, length, 2 * length, MREMAP_MAYMOVE);
	check("mremap", map != MAP_FAILED, 1);
	pages(map, number);
	check("new part is zero", map[length], 0);
	copy_on_write(map, number);
	check("munmap", munmap(map, 2 * length), 0);
	check("gone", write_faults(map), 1);
	shared_file(number);
}

const struct kind kind_memory = { "memory", begin, round_of };
