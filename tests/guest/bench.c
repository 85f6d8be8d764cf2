/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What works of the kernel cost, by the time stamp counter.
 *
 *   bench ROUNDS      for each work a line `NAME median minimum maximum`: counts per work, with one decimal
 *   bench exit        what the last work executes
 *
 * Under QEMU's -icount shift=0 the counter is the number of instructions executed, in user mode and in
 * the kernel.  The first line is a loop of known length: it proves that.  The works are those of lmbench
 * (McVoy and Staelin, 1996), each done by one process alone: nothing waits for anything but a child.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#define PAGE 4096
#define PAGES 16
#define FDS 10
#define MAX_ROUNDS 10000

static const char *const path = "/tmp/bench";
static int zero, null, ends[2], pair[2];
static struct pollfd fds[FDS];
static volatile sig_atomic_t caught;

static void must(const char *what, long got, long wanted)
{
	if (got == wanted)
		return;
	fprintf(stderr, "bench: %s: got %ld, wanted %ld\n", what, got, wanted);
	exit(1);
}

static void on_signal(int number)
{
	(void)number;
	caught++;
}

/* 2 * 1000 instructions and a few. */
static void do_loop(void)
{
	unsigned long left = 1000;

	__asm__ volatile("1: dec %0\n\tjnz 1b" : "+r"(left));
}

static void do_getppid(void)
{
	syscall(SYS_getppid);
}

static void do_read(void)
{
	char byte;

	must("read", read(zero, &byte, 1), 1);
}

static void do_write(void)
{
	must("write", write(null, "x", 1), 1);
}

static void do_stat(void)
{
	struct stat found;

	must("stat", stat(path, &found), 0);
}

static void do_open(void)
{
	int fd = open(path, O_RDONLY);

	must("open", fd >= 0, 1);
	must("close", close(fd), 0);
}

static void there_and_back(int to, int from)
{
	char byte = 'x';

	must("write", write(to, &byte, 1), 1);
	must("read", read(from, &byte, 1), 1);
}

static void do_pipe(void)
{
	there_and_back(ends[1], ends[0]);
}

static void do_unix(void)
{
	there_and_back(pair[1], pair[0]);
}

static void do_poll(void)
{
	must("poll", poll(fds, FDS, 0), 0);
}

static void do_signal(void)
{
	int before = caught;

	must("kill", kill(getpid(), SIGUSR1), 0);
	must("handler ran", caught, before + 1);
}

static void do_mmap(void)
{
	volatile char *map = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	must("mmap", map != MAP_FAILED, 1);
	for (int page = 0; page < PAGES; page++)
		map[page * PAGE] = 1;
	must("munmap", munmap((void *)map, PAGES * PAGE), 0);
}

static void wait_for(pid_t pid)
{
	int status;

	must("waitpid", waitpid(pid, &status, 0), pid);
	must("exit status", status, 0);
}

static void do_fork(void)
{
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	wait_for(pid);
}

static void do_exec(void)
{
	char *argv[] = { "bench", "exit", NULL }, *envp[] = { NULL };
	pid_t pid = fork();

	if (pid == 0) {
		execve("/proc/self/exe", argv, envp);
		_exit(126);
	}
	wait_for(pid);
}

static const struct work {
	const char *name;
	void (*once)(void);
	int times; /* in one round: enough that caches of objects are refilled in each */
} works[] = {
	{ "loop", do_loop, 20 },       { "getppid", do_getppid, 200 }, { "read", do_read, 100 },
	{ "write", do_write, 100 },    { "stat", do_stat, 20 },	       { "open+close", do_open, 20 },
	{ "pipe", do_pipe, 50 },       { "unix", do_unix, 30 },	       { "poll", do_poll, 50 },
	{ "signal", do_signal, 50 },   { "mmap+touch", do_mmap, 4 },   { "fork+wait", do_fork, 1 },
	{ "fork+exec", do_exec, 1 },
};

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void measure(const struct work *work, int rounds)
{
	static uint64_t counts[MAX_ROUNDS];

	for (int warm = 0; warm < 3 * work->times; warm++)
		work->once();
	for (int round = 0; round < rounds; round++) {
		uint64_t begin = __rdtsc();

		for (int time = 0; time < work->times; time++)
			work->once();
		counts[round] = __rdtsc() - begin;
	}
	qsort(counts, rounds, sizeof *counts, by_size);
	printf("%s %.1f %.1f %.1f\n", work->name, (double)counts[rounds / 2] / work->times,
	       (double)counts[0] / work->times, (double)counts[rounds - 1] / work->times);
}

static void prepare(void)
{
	struct sigaction action = { .sa_handler = on_signal };
	int fd = open(path, O_RDWR | O_CREAT, 0600);

	must("open a file", fd >= 0, 1);
	close(fd);
	zero = open("/dev/zero", O_RDONLY);
	null = open("/dev/null", O_WRONLY);
	must("open devices", zero >= 0 && null >= 0, 1);
	must("pipe", pipe(ends), 0);
	must("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	must("sigaction", sigaction(SIGUSR1, &action, NULL), 0);
	for (int i = 0; i < FDS; i++) {
		int idle[2];

		must("pipe", pipe(idle), 0);
		fds[i] = (struct pollfd){ .fd = idle[0], .events = POLLIN };
	}
}

int main(int argc, char **argv)
{
	int rounds = argc == 2 ? atoi(argv[1]) : 0;

	if (argc == 2 && strcmp(argv[1], "exit") == 0)
		return 0;
	if (rounds < 1 || rounds > MAX_ROUNDS) {
		fprintf(stderr, "usage: bench ROUNDS | bench exit\n");
		return 2;
	}
	prepare();
	for (size_t i = 0; i < sizeof works / sizeof *works; i++)
		measure(&works[i], rounds);
	return 0;
}
