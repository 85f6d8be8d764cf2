/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Pipes, unix sockets, TCP over loopback: a child answers every byte plus one. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "load.h"

/* Where this side reads and writes. */
static int from, to;

static void echo(int in, int out)
{
	unsigned char data[1024];

	for (;;) {
		ssize_t n = read(in, data, sizeof data);

		if (n <= 0)
			_exit(0);
		for (ssize_t i = 0; i < n; i++)
			data[i]++;
		put_all(out, data, (size_t)n);
	}
}

/* A child that ends with its parent: true in the child. */
static int child(void)
{
	pid_t pid = fork();

	check("fork", pid >= 0, 1);
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid == 0;
}

/* Sends up to 2,000 bytes, polls, receives, compares. */
static void exchange(uint32_t number)
{
	unsigned char out[2000], in[sizeof out];
	size_t length = 1 + number * 61 % sizeof out;
	struct pollfd wait = { .fd = from, .events = POLLIN };

	fill(out, length, number ^ 0x5a5a);
	put_all(to, out, length);
	check("poll", poll(&wait, 1, 600000), 1);
	get_all(from, in, length);
	for (size_t i = 0; i < length; i++)
		check("echoed byte", in[i], (unsigned char)(out[i] + 1));
}

static void begin_pipe(void)
{
	int there[2], back[2];

	check("pipe", pipe(there) | pipe(back), 0);
	if (child()) {
		close(there[1]);
		close(back[0]);
		echo(there[0], back[1]);
	}
	close(there[0]);
	close(back[1]);
	to = there[1];
	from = back[0];
}

static void begin_unix(void)
{
	int ends[2];

	check("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
	if (child()) {
		close(ends[0]);
		echo(ends[1], ends[1]);
	}
	close(ends[1]);
	from = to = ends[0];
}

static int listener;
static struct sockaddr_in address;

static void begin_tcp(void)
{
	socklen_t size = sizeof address;

	listener = socket(AF_INET, SOCK_STREAM, 0);
	address.sin_family = AF_INET;
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	check("bind", bind(listener, (struct sockaddr *)&address, sizeof address), 0);
	check("listen", listen(listener, 4), 0);
	check("getsockname", getsockname(listener, (struct sockaddr *)&address, &size), 0);
	if (child())
		for (;;) {
			int fd = accept(listener, NULL, NULL);

			if (fd < 0)
				_exit(1);
			if (child())
				echo(fd, fd);
			close(fd);
			while (waitpid(-1, NULL, WNOHANG) > 0)
				;
		}
}

/* A new connection every 16 rounds. */
static void round_tcp(uint32_t number)
{
	if (number % 16 == 1) {
		if (to)
			check("close", close(to), 0);
		to = from = socket(AF_INET, SOCK_STREAM, 0);
		check("connect", connect(to, (struct sockaddr *)&address, sizeof address), 0);
	}
	exchange(number);
}

const struct kind kind_pipe = { "pipe", begin_pipe, exchange };
const struct kind kind_unix = { "unix", begin_unix, exchange };
const struct kind kind_tcp = { "tcp", begin_tcp, round_tcp };
