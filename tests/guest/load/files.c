/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Files: written, read back, renamed, listed, unlinked; and files of /proc. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "load.h"

static char folder[64];

static void begin(void)
{
	snprintf(folder, sizeof folder, "/tmp/load.%d", getpid());
	check("mkdir", mkdir(folder, 0700), 0);
}

static int entries(void)
{
	DIR *dir = opendir(folder);
	int count = 0;

	check("opendir", dir != NULL, 1);
	for (struct dirent *entry; (entry = readdir(dir));)
		count += entry->d_name[0] != '.';
	closedir(dir);
	return count;
}

static void own_pid_in_proc(void)
{
	char text[512];
	int fd = open("/proc/self/stat", O_RDONLY);
	ssize_t n = read(fd, text, sizeof text - 1);

	close(fd);
	text[n > 0 ? n : 0] = 0;
	check("pid in /proc/self/stat", atoi(text), getpid());
}

static void round_of(uint32_t number)
{
	unsigned char out[9000], in[sizeof out];
	size_t length = 1 + number * 37 % sizeof out;
	char path[96], other[96];
	struct stat st;
	int fd;

	snprintf(path, sizeof path, "%s/a", folder);
	snprintf(other, sizeof other, "%s/b", folder);
	fill(out, length, number);
	fd = open(path, O_CREAT | O_EXCL | O_RDWR, 0600);
	check("open", fd >= 0, 1);
	put_all(fd, out, length);
	check("ftruncate", ftruncate(fd, (off_t)length + 100), 0);
	check("fstat", fstat(fd, &st), 0);
	check("size", st.st_size, (long)length + 100);
	check("seek", lseek(fd, 0, SEEK_SET), 0);
	get_all(fd, in, length);
	check("content", memcmp(in, out, length), 0);
	check("rename", rename(path, other), 0);
	check("old name", access(path, F_OK), -1);
	check("entries", entries(), 1);
	check("unlink", unlink(other), 0);
	check("links", fstat(fd, &st) == 0 && st.st_nlink == 0, 1);
	check("close", close(fd), 0);
	own_pid_in_proc();
}

const struct kind kind_file = { "file", begin, round_of };
