/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * agent: runs commands that arrive on a terminal and answers on it.
 *
 *   agent serve TTY           serve until the terminal goes away
 *   agent tail FILE FROM MS [MARKER]
 *                             print FILE from byte FROM on, after a wait of up to MS for
 *                             MARKER in it, or for the first byte
 *
 * One request is one line:
 *   RUN <id> <seconds> <base64 of a shell command>
 *   GET <id>                  send the answer of <id> again
 *   PING <id>
 * One answer is the lines
 *   ~P <id> <number> <crc32> <base64>   a part of the output
 *   ~E <id> <parts> <exit code> <crc32 of this line's earlier fields>
 * The terminal may be the kernel's console, where its own messages break lines apart:
 * hence the checksums, and GET.  Exit code 124 means the command ran out of time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define STORE "/run/agent"
#define PART 240 /* bytes of output in one line */

static uint32_t crc32(const char *data, size_t len)
{
	uint32_t crc = ~0u;

	while (len--) {
		crc ^= (unsigned char)*data++;
		for (int i = 0; i < 8; i++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
	}
	return ~crc;
}

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void encode(const unsigned char *in, size_t len, char *out)
{
	for (size_t i = 0; i < len; i += 3) {
		uint32_t v = in[i] << 16 | (i + 1 < len ? in[i + 1] << 8 : 0) | (i + 2 < len ? in[i + 2] : 0);

		*out++ = alphabet[v >> 18];
		*out++ = alphabet[v >> 12 & 63];
		*out++ = i + 1 < len ? alphabet[v >> 6 & 63] : '=';
		*out++ = i + 2 < len ? alphabet[v & 63] : '=';
	}
	*out = 0;
}

static size_t decode(const char *in, char *out)
{
	size_t n = 0;
	uint32_t v = 0;
	int bits = 0;

	for (; *in && *in != '='; in++) {
		const char *p = strchr(alphabet, *in);

		if (!p)
			continue;
		v = v << 6 | (uint32_t)(p - alphabet);
		bits += 6;
		if (bits >= 8) {
			bits -= 8;
			out[n++] = (char)(v >> bits);
		}
	}
	out[n] = 0;
	return n;
}

static void put(int fd, const char *data, size_t len)
{
	while (len) {
		ssize_t n = write(fd, data, len);

		if (n < 0 && errno != EINTR && errno != EAGAIN)
			exit(1);
		if (n > 0) {
			data += n;
			len -= (size_t)n;
		}
	}
}

/* Runs the command; its output goes to STORE/id.out and its exit code to STORE/id.rc. */
static void run(const char *id, unsigned seconds, const char *command)
{
	char path[128];
	int rc = 126;
	time_t start = time(NULL);

	snprintf(path, sizeof path, STORE "/%s.out", id);
	pid_t pid = fork();
	if (pid == 0) {
		int out = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
		int in = open("/dev/null", O_RDONLY);

		setsid();
		dup2(in, 0);
		dup2(out, 1);
		dup2(out, 2);
		for (int fd = 3; fd < 64; fd++)
			close(fd);
		execl("/bin/sh", "sh", "-c", command, (char *)NULL);
		_exit(126);
	}
	while (pid > 0) {
		int status;
		pid_t got = waitpid(pid, &status, WNOHANG);

		if (got == pid) {
			rc = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
			break;
		}
		if (time(NULL) - start > (time_t)seconds) {
			kill(-pid, SIGKILL);
			waitpid(pid, &status, 0);
			rc = 124;
			break;
		}
		poll(NULL, 0, 10);
	}
	snprintf(path, sizeof path, STORE "/%s.rc", id);
	FILE *f = fopen(path, "w");
	if (f) {
		fprintf(f, "%d\n", rc);
		fclose(f);
	}
}

static void answer(int tty, const char *id)
{
	char path[128], line[PART * 2 + 128], text[PART * 2];
	unsigned char part[PART];
	unsigned number = 0;
	int rc = 125, n;

	snprintf(path, sizeof path, STORE "/%s.out", id);
	FILE *f = fopen(path, "r");
	while (f && (n = (int)fread(part, 1, PART, f)) > 0) {
		encode(part, (size_t)n, text);
		n = snprintf(line, sizeof line, "\n~P %s %u %08x %s\n", id, number,
			     crc32(text, strlen(text)) ^ number, text);
		put(tty, line, (size_t)n);
		number++;
	}
	if (f)
		fclose(f);
	snprintf(path, sizeof path, STORE "/%s.rc", id);
	f = fopen(path, "r");
	if (f) {
		if (fscanf(f, "%d", &rc) != 1)
			rc = 125;
		fclose(f);
	}
	n = snprintf(text, sizeof text, "%s %u %d", id, number, rc);
	n = snprintf(line, sizeof line, "\n~E %s %08x\n", text, crc32(text, (size_t)n));
	put(tty, line, (size_t)n);
}

static int serve(const char *name)
{
	static char line[65536], command[65536];
	struct termios raw;
	size_t used = 0;
	int tty = open(name, O_RDWR | O_NOCTTY);

	if (tty < 0)
		return 1;
	if (tcgetattr(tty, &raw) == 0) {
		cfmakeraw(&raw);
		raw.c_cflag |= CLOCAL;
		tcsetattr(tty, TCSANOW, &raw);
	}
	mkdir(STORE, 0700);
	put(tty, "\n~READY\n", 8);
	for (;;) {
		char id[64], c;
		unsigned seconds;
		int at = 0;
		ssize_t n = read(tty, &c, 1);

		if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
			return 0;
		if (n < 0)
			continue;
		if (c != '\n' && c != '\r') {
			if (used + 1 < sizeof line)
				line[used++] = c;
			continue;
		}
		line[used] = 0;
		used = 0;
		if (sscanf(line, "RUN %63[0-9a-z] %u %n", id, &seconds, &at) == 2 && at) {
			decode(line + at, command);
			run(id, seconds, command);
			answer(tty, id);
		} else if (sscanf(line, "GET %63[0-9a-z]", id) == 1) {
			answer(tty, id);
		} else if (sscanf(line, "PING %63[0-9a-z]", id) == 1) {
			put(tty, "\n~PONG ", 7);
			put(tty, id, strlen(id));
			put(tty, "\n", 1);
		}
	}
}

static int tail(const char *name, off_t from, int ms, const char *marker)
{
	static char data[1 << 20];
	size_t used = 0;
	int fd = -1;

	for (;; ms -= 10, poll(NULL, 0, 10)) {
		ssize_t n;

		if (fd < 0)
			fd = open(name, O_RDONLY);
		while (fd >= 0 && used < sizeof data &&
		       (n = pread(fd, data + used, sizeof data - used, from + (off_t)used)) > 0)
			used += (size_t)n;
		if (ms <= 0 || used == sizeof data)
			break;
		if (marker ? memmem(data, used, marker, strlen(marker)) != NULL : used > 0)
			break;
	}
	put(1, data, used);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "serve") == 0)
		return serve(argv[2]);
	if ((argc == 5 || argc == 6) && strcmp(argv[1], "tail") == 0)
		return tail(argv[2], atoll(argv[3]), atoi(argv[4]), argv[5]);
	fprintf(stderr, "usage: agent serve TTY | agent tail FILE FROM MS [MARKER]\n");
	return 2;
}
