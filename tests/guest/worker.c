/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The one program that runs as /usr/bin/payroll and as /usr/bin/guestbook.
 *
 *   worker work CPU [SECONDS [N]]  checked work, a line a second; the echo partner on the other CPU.  Without
 *                                  SECONDS, or with 0, it does not end; after each round it rests N times as long,
 *                                  at most half a second
 *   worker hand FIFO               writes what it is told to, as itself: lines `FILE TEXT`; each is answered
 *   worker prepare FILE            see attack.c
 *   worker attack KIND FILE GO     see attack.c
 *
 * Work is what a wrong kernel would get wrong: fork and exit codes, pipes, unix sockets,
 * files written and read back, files of /proc, signals, memory mappings.  Every result is
 * compared; the first wrong one is printed as `FAILED ...` and ends the program with 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

static const char *self;
static unsigned long checks;

static void failed(const char *what, long got, long wanted)
{
	printf("FAILED %s pid %d: %s: got %ld, wanted %ld (errno %d)\n", self, getpid(), what, got, wanted,
	       errno);
	fflush(stdout);
	_exit(1);
}

static void check(const char *what, long got, long wanted)
{
	checks++;
	if (got != wanted)
		failed(what, got, wanted);
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	/* On a guest with one vCPU there is nothing to choose. */
	if (sched_setaffinity(0, sizeof set, &set) && errno != EINVAL)
		failed("sched_setaffinity", errno, 0);
}

/* A byte sequence that differs from round to round. */
static void fill(unsigned char *data, size_t length, uint32_t seed)
{
	for (size_t i = 0; i < length; i++) {
		seed = seed * 1664525u + 1013904223u;
		data[i] = (unsigned char)(seed >> 24);
	}
}

static void work_fork(uint32_t round)
{
	int code = (int)(round * 7 & 0x7f), status = 0;
	pid_t pid = fork();

	if (pid == 0)
		_exit(code);
	check("waitpid", waitpid(pid, &status, 0), pid);
	check("exit code", WIFEXITED(status) ? WEXITSTATUS(status) : -status, code);
}

static void work_file(uint32_t round)
{
	unsigned char out[3000], in[sizeof out];
	char path[64];
	struct stat st;
	int fd;

	snprintf(path, sizeof path, "/tmp/%s.%d", self, getpid());
	fill(out, sizeof out, round);
	fd = open(path, O_CREAT | O_TRUNC | O_RDWR, 0600);
	check("write file", write(fd, out, sizeof out), sizeof out);
	check("fstat", fstat(fd, &st), 0);
	check("file size", st.st_size, sizeof out);
	check("read file", pread(fd, in, sizeof in, 0), sizeof in);
	check("file content", memcmp(in, out, sizeof in), 0);
	check("close", close(fd), 0);
	check("unlink", unlink(path), 0);
	check("gone", access(path, F_OK), -1);
}

static void work_proc(void)
{
	char text[512];
	int fd = open("/proc/self/stat", O_RDONLY);
	ssize_t n = read(fd, text, sizeof text - 1);

	close(fd);
	text[n > 0 ? n : 0] = 0;
	check("pid in /proc/self/stat", atoi(text), getpid());
}

/* One exchange with the partner, which answers every byte plus one. */
static void work_socket(int fd, uint32_t round)
{
	unsigned char out[256], in[sizeof out];
	size_t length = 1 + round % sizeof out, got = 0;

	fill(out, length, round ^ 0x5a5a);
	check("send", write(fd, out, length), (long)length);
	while (got < length) {
		ssize_t n = read(fd, in + got, length - got);

		if (n <= 0)
			failed("receive", n, 1);
		got += (size_t)n;
	}
	for (size_t i = 0; i < length; i++)
		check("echoed byte", in[i], (unsigned char)(out[i] + 1));
}

static void work_pipe(uint32_t round)
{
	int ends[2];
	uint64_t out = round * 0x9e3779b97f4a7c15ull, in = 0;

	check("pipe", pipe(ends), 0);
	check("pipe write", write(ends[1], &out, sizeof out), sizeof out);
	check("pipe read", read(ends[0], &in, sizeof in), sizeof in);
	check("pipe content", in == out, 1);
	close(ends[0]);
	close(ends[1]);
}

static volatile sig_atomic_t signals;

static void on_signal(int number)
{
	(void)number;
	signals++;
}

static void work_signal(void)
{
	int before = signals;

	check("kill", kill(getpid(), SIGUSR1), 0);
	check("signals", signals, before + 1);
}

static void work_memory(uint32_t round)
{
	size_t length = 64 << 10;
	unsigned char *map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check("mmap", map != MAP_FAILED, 1);
	for (size_t at = 0; at < length; at += 4096)
		map[at] = (unsigned char)(round + at / 4096);
	check("mprotect", mprotect(map, length, PROT_READ), 0);
	for (size_t at = 0; at < length; at += 4096)
		check("page", map[at], (unsigned char)(round + at / 4096));
	check("munmap", munmap(map, length), 0);
}

static void echo(int fd)
{
	unsigned char data[256];

	for (;;) {
		ssize_t n = read(fd, data, sizeof data);

		if (n <= 0)
			_exit(0);
		for (ssize_t i = 0; i < n; i++)
			data[i]++;
		if (write(fd, data, (size_t)n) != n)
			_exit(1);
	}
}

/* Microseconds: whoever waits for progress sees some. */
#define MAX_REST 500000

static long micros_between(const struct timespec *from, const struct timespec *to)
{
	return (to->tv_sec - from->tv_sec) * 1000000 + (to->tv_nsec - from->tv_nsec) / 1000;
}

static int work(int cpu, long seconds, long rest)
{
	int ends[2];
	struct timespec start, begun, now;
	long last = -1;
	struct sigaction action = { .sa_handler = on_signal };

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGUSR1, &action, NULL);
	check("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
	pid_t partner = fork();
	if (partner == 0) {
		/* A crossed pair of workers has both programs on each CPU. */
		pin(1 - cpu);
		close(ends[0]);
		echo(ends[1]);
	}
	close(ends[1]);
	pin(cpu);
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (uint32_t round = 0;; round++) {
		clock_gettime(CLOCK_MONOTONIC, &begun);
		work_socket(ends[0], round);
		work_pipe(round);
		work_proc();
		work_signal();
		if (round % 4 == 0)
			work_file(round);
		if (round % 8 == 0)
			work_fork(round);
		if (round % 8 == 4)
			work_memory(round);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec - start.tv_sec != last) {
			struct rusage usage;

			last = now.tv_sec - start.tv_sec;
			getrusage(RUSAGE_SELF, &usage);
			printf("%s pid %d partner %d rounds %u checks %lu switches %ld\n", self, getpid(),
			       partner, round, checks, usage.ru_nvcsw + usage.ru_nivcsw);
		}
		if (seconds && last >= seconds)
			break;
		if (rest) {
			long pause = rest * micros_between(&begun, &now);

			usleep((useconds_t)(pause < MAX_REST ? pause : MAX_REST));
		}
	}
	close(ends[0]);
	int status = 0;
	check("partner", waitpid(partner, &status, 0), partner);
	check("partner's exit", status, 0);
	printf("%s pid %d done, checks %lu\n", self, getpid(), checks);
	return 0;
}

/* Each line of @fifo names a file and what is to be written there, in one call. */
static int hand(const char *fifo)
{
	char line[512];
	FILE *in;

	printf("hand: pid %d\n", getpid());
	fflush(stdout);
	/* For writing, too: there is no end of file, then. */
	in = fopen(fifo, "r+");
	while (in && fgets(line, sizeof(line), in)) {
		char *text = strchr(line, ' ');
		int file, error = EINVAL;

		if (text) {
			*text++ = 0;
			file = open(line, O_WRONLY | O_TRUNC);
			error = file < 0 || write(file, text, strlen(text)) < 0 ? errno : 0;
			if (file >= 0)
				close(file);
		}
		printf("hand: %d\n", error);
		fflush(stdout);
	}
	return 1;
}

int main(int argc, char **argv)
{
	self = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	if (argc >= 3 && strcmp(argv[1], "work") == 0)
		return work(atoi(argv[2]), argc > 3 ? atol(argv[3]) : 0, argc > 4 ? atol(argv[4]) : 0);
	if (argc == 3 && strcmp(argv[1], "hand") == 0)
		return hand(argv[2]);
	if (argc == 3 && strcmp(argv[1], "prepare") == 0)
		return attack_prepare(argv[2]);
	if (argc == 5 && strcmp(argv[1], "attack") == 0)
		return attack(argv[2], argv[3], argv[4]);
	fprintf(stderr, "usage: %s work CPU [SECONDS [N]] | hand FIFO | prepare FILE | attack pointer|return|timer|nmi FILE GO\n", self);
	return 2;
}
