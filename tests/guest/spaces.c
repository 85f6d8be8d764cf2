/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Address spaces that come and go, each of which looks which view of the kernel's text it is on.
 *
 *   spaces drive HOW ROUNDS ADDRESS STOCK FAST HARDENED
 *   spaces look FD OFFSET STOCK FAST HARDENED REPORT HOW     what the children execute
 *
 * ADDRESS is an address of kernel text whose four bytes differ in all views (as /proc/kcore shows
 * them); STOCK, FAST and HARDENED are these bytes, in hex.  The driver executes
 * /usr/bin/trusted and, as soon as that has seen the fast view and ended, some of /usr/bin/untrusted: a
 * page-table root that was just freed is the first to be used again.  Both are this program.
 *
 * HOW: `exec` (fork, exec), `vfork` (vfork, exec), `change` (the trusted process itself executes the
 * untrusted program), `setuid` (the trusted process gives up root: it must lose its view), `leader`
 * (the trusted process's first thread ends before the others).
 *
 * Prints one line of JSON: how many looked, how many untrusted ones saw the fast view (and how
 * often), and for each trusted one the microseconds from its first instruction of main() to its first
 * sight of the fast view.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_US 20000000u
#define UNTRUSTED 4       /* of them after each trusted one */
#define LOOKS 40

enum view { STOCK, FAST, HARDENED, OTHER };

/* What one process tells the driver. */
struct report {
	uint32_t trusted, pid;
	uint32_t looks[4];
	uint32_t after[4];    /* looks after the change that HOW makes */
	uint64_t us_to_fast;  /* 0: never */
	uint64_t us_to_loss;  /* `setuid`: until the fast view was gone */
};

static int kcore, reports;
static off_t place;
static uint32_t bytes[3];
static const char *how;

static void die(const char *what)
{
	perror(what);
	_exit(3);
}

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static enum view look(void)
{
	uint32_t seen;

	if (pread(kcore, &seen, sizeof seen, place) != sizeof seen)
		die("/proc/kcore");
	for (int view = STOCK; view < OTHER; view++)
		if (seen == bytes[view])
			return view;
	return OTHER;
}

/* Until the fast view is there. */
static void wait_for_fast(struct report *report)
{
	uint64_t start = now_us();

	for (;;) {
		enum view view = look();
		uint64_t waited = now_us() - start;

		report->looks[view]++;
		if (view == FAST) {
			report->us_to_fast = waited + 1;
			return;
		}
		if (waited > PATIENCE_US)
			return;
	}
}

static void look_often(uint32_t *counts)
{
	for (int i = 0; i < LOOKS; i++) {
		counts[look()]++;
		if (i % 8 == 7)
			usleep(500);
	}
}

/* Is the fast view lost, and does it stay so? */
static void lose_it(struct report *report)
{
	uint64_t start = now_us();

	while (look() == FAST && now_us() - start < PATIENCE_US)
		usleep(200);
	report->us_to_loss = now_us() - start;
	look_often(report->after);
}

static void send_report(const struct report *report)
{
	if (write(reports, report, sizeof *report) != sizeof *report)
		die("report");
}

static void *second_thread(void *leader)
{
	struct report report = { .trusted = 1, .pid = (uint32_t)getpid() };

	pthread_join(*(pthread_t *)leader, NULL);
	wait_for_fast(&report);
	send_report(&report);
	exit(0);
}

static int child(char **argv, int trusted)
{
	struct report report = { .trusted = (uint32_t)trusted, .pid = (uint32_t)getpid() };
	static pthread_t leader, second;

	kcore = atoi(argv[2]);
	place = (off_t)strtoull(argv[3], NULL, 0);
	for (int view = STOCK; view < OTHER; view++)
		bytes[view] = (uint32_t)strtoul(argv[4 + view], NULL, 16);
	reports = atoi(argv[7]);
	how = argv[8];
	if (!trusted) {
		look_often(report.looks);
		send_report(&report);
		return 0;
	}
	if (strcmp(how, "leader") == 0) {
		leader = pthread_self();
		if (pthread_create(&second, NULL, second_thread, &leader))
			die("pthread_create");
		pthread_exit(NULL);
	}
	wait_for_fast(&report);
	if (strcmp(how, "setuid") == 0) {
		if (setuid(1000))
			die("setuid");
		lose_it(&report);
	}
	send_report(&report);
	if (strcmp(how, "change") == 0) {
		argv[0] = "/usr/bin/untrusted";
		execv(argv[0], argv);
		die(argv[0]);
	}
	return 0;
}

static void start(const char *program, char **argv)
{
	pid_t pid = strcmp(how, "vfork") == 0 ? vfork() : fork();

	argv[0] = (char *)program;
	if (pid == 0) {
		execv(program, argv);
		_exit(126);
	}
	if (pid < 0)
		die("fork");
}

/* Where /proc/kcore has `address`. */
static off_t kcore_offset(uint64_t address)
{
	Elf64_Ehdr head;
	Elf64_Phdr segment;

	if (pread(kcore, &head, sizeof head, 0) != sizeof head)
		die("/proc/kcore");
	for (int i = 0; i < head.e_phnum; i++) {
		off_t at = (off_t)(head.e_phoff + (uint64_t)i * sizeof segment);

		if (pread(kcore, &segment, sizeof segment, at) != sizeof segment)
			die("/proc/kcore");
		if (segment.p_type == PT_LOAD && address >= segment.p_vaddr &&
		    address - segment.p_vaddr < segment.p_memsz)
			return (off_t)(segment.p_offset + (address - segment.p_vaddr));
	}
	fprintf(stderr, "/proc/kcore has no segment with %#llx\n", (unsigned long long)address);
	_exit(3);
}

static struct report next_report(int fd)
{
	struct report report;

	if (read(fd, &report, sizeof report) != sizeof report)
		die("no report");
	return report;
}

static int drive(long rounds, char **argv)
{
	static char words[8][32];
	char *child_argv[] = { NULL, "look", words[0], words[1], argv[5], argv[6], argv[7], words[2], argv[2], NULL };
	unsigned long trusted = 0, untrusted = 0, untrusted_fast = 0, fast_looks = 0, kept = 0, other = 0, bound = 0;
	int ends[2];

	how = argv[2];
	kcore = open("/proc/kcore", O_RDONLY);
	if (kcore < 0 || pipe(ends))
		die("/proc/kcore");
	snprintf(words[0], sizeof words[0], "%d", kcore);
	snprintf(words[1], sizeof words[1], "%lld", (long long)kcore_offset(strtoull(argv[4], NULL, 0)));
	snprintf(words[2], sizeof words[2], "%d", ends[1]);
	printf("{\"how\": \"%s\", \"us_to_fast\": [", how);
	for (long round = 0; round < rounds; round++) {
		int children = strcmp(how, "change") == 0 ? 0 : UNTRUSTED;
		int expected = 1 + (children ? children : 1);

		start("/usr/bin/trusted", child_argv);
		for (int i = 0; i < expected; i++) {
			struct report report = next_report(ends[0]);

			other += report.looks[OTHER];
			if (report.trusted) {
				trusted++;
				bound += report.us_to_fast != 0;
				kept += report.after[FAST] + (report.us_to_loss > PATIENCE_US);
				printf("%s%llu", round ? ", " : "", (unsigned long long)report.us_to_fast);
				/* It has ended, or is about to: now is its root free. */
				if (children)
					wait(NULL);
				for (int c = 0; c < children; c++)
					start("/usr/bin/untrusted", child_argv);
			} else {
				untrusted++;
				untrusted_fast += report.looks[FAST] != 0;
				fast_looks += report.looks[FAST];
			}
		}
		while (waitpid(-1, NULL, strcmp(how, "change") == 0 ? 0 : WNOHANG) > 0)
			;
	}
	printf("], \"trusted\": %lu, \"bound\": %lu, \"untrusted\": %lu, \"untrusted_fast\": %lu, \"fast_looks\": %lu, "
	       "\"kept\": %lu, \"other\": %lu}\n", trusted, bound, untrusted, untrusted_fast, fast_looks, kept, other);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 8 && strcmp(argv[1], "drive") == 0)
		return drive(atol(argv[3]), argv);
	if (argc == 9 && strcmp(argv[1], "look") == 0)
		return child(argv, strcmp(argv[0], "/usr/bin/trusted") == 0);
	fprintf(stderr, "usage: spaces drive exec|vfork|change|setuid|leader ROUNDS ADDRESS STOCK FAST HARDENED\n");
	return 2;
}
