/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* fork, vfork, exec, exit codes; signals with and without a handler. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

static void nothing(void)
{
}

int executed(const char *number)
{
	printf("executed %s\n", number);
	return atoi(number) % 100;
}

static int status_of(pid_t pid)
{
	int status = 0;

	check("waitpid", waitpid(pid, &status, 0), pid);
	return status;
}

static void forked(uint32_t number)
{
	int code = (int)(number * 7 & 0x7f);
	pid_t pid = fork();

	if (pid == 0)
		_exit(code);
	check("exit status", status_of(pid), code << 8);
}

/* The child's output comes through a pipe; every other round by vfork. */
static void execed(uint32_t number)
{
	char text[16], want[32], got[32] = { 0 };
	char *argv[] = { "load", "executed", text, NULL }, *envp[] = { NULL };
	int ends[2];
	pid_t pid;

	snprintf(text, sizeof text, "%u", number);
	snprintf(want, sizeof want, "executed %u\n", number);
	check("pipe", pipe(ends), 0);
	pid = number % 2 ? vfork() : fork();
	if (pid == 0) {
		dup2(ends[1], 1);
		execve("/usr/bin/load", argv, envp);
		_exit(126);
	}
	close(ends[1]);
	get_all(ends[0], got, strlen(want));
	check("output", strcmp(got, want), 0);
	check("end of output", read(ends[0], got, 1), 0);
	close(ends[0]);
	check("exit status", status_of(pid), (int)(number % 100) << 8);
}

static void round_exec(uint32_t number)
{
	forked(number);
	execed(number);
}

static volatile sig_atomic_t caught;
static volatile sig_atomic_t value;

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	caught++;
	value = info->si_value.sival_int;
}

static void begin_signal(void)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };

	check("sigaction", sigaction(SIGUSR1, &action, NULL), 0);
	check("sigaction", sigaction(SIGALRM, &action, NULL), 0);
}

static void round_signal(uint32_t number)
{
	union sigval payload = { .sival_int = (int)number };
	struct timespec pause = { 0, 2000000 };
	timer_t timer;
	struct itimerspec soon = { .it_value = { 0, 100000 } };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM };
	sigset_t set;
	int before = caught;
	pid_t pid;

	check("sigqueue", sigqueue(getpid(), SIGUSR1, payload), 0);
	check("handler ran", caught, before + 1);
	check("its value", value, (int)number);
	/* Blocked, pending, then delivered. */
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	check("kill", kill(getpid(), SIGUSR1), 0);
	check("blocked", caught, before + 1);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	check("delivered", caught, before + 2);
	check("timer_create", timer_create(CLOCK_MONOTONIC, &event, &timer), 0);
	check("timer_settime", timer_settime(timer, 0, &soon, NULL), 0);
	while (caught == before + 2)
		nanosleep(&pause, NULL);
	check("timer_delete", timer_delete(timer), 0);
	check("one alarm", caught, before + 3);
	pid = fork();
	if (pid == 0)
		for (;;)
			pause.tv_sec = 1000, nanosleep(&pause, NULL);
	check("kill", kill(pid, SIGTERM), 0);
	check("killed by", status_of(pid), SIGTERM);
}

const struct kind kind_exec = { "exec", nothing, round_exec };
const struct kind kind_signal = { "signal", begin_signal, round_signal };
