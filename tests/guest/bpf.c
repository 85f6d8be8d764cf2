/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Attaches a BPF program that counts to one kernel function, until the file GO exists.
 *
 *   bpf fentry|fexit|kprobe|kretprobe FUNCTION GO
 *
 * fentry and fexit go through a BPF trampoline at the function's entry, the others through perf's
 * kprobes.  Prints `attached`, then after GO `hits N`.  No library: the program is six instructions.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* include/uapi/linux/btf.h */
struct header {
	uint16_t magic;
	uint8_t version, flags;
	uint32_t hdr_len, type_off, type_len, str_off, str_len;
};

struct type {
	uint32_t name_off, info, size;
};

#define KIND_FUNC 12

/* Bytes that follow a type of each kind: fixed, and for each member. */
static const struct { uint8_t fixed, each; } tails[] = {
	[1] = { 4, 0 }, [3] = { 12, 0 }, [4] = { 0, 12 }, [5] = { 0, 12 }, [6] = { 0, 8 }, [13] = { 0, 8 },
	[14] = { 4, 0 }, [15] = { 0, 12 }, [17] = { 4, 0 }, [19] = { 0, 12 },
};

static char log_text[16384];

static void die(const char *what)
{
	printf("cannot %s: %s\n%s", what, strerror(errno), log_text);
	exit(1);
}

static long bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof *attr);
}

/* The number of a function's type in the kernel's own BTF. */
static uint32_t btf_id(const char *function)
{
	static unsigned char data[16 << 20];
	int fd = open("/sys/kernel/btf/vmlinux", O_RDONLY);
	size_t size = 0;
	ssize_t n;

	if (fd < 0)
		die("open the kernel's BTF");
	while ((n = read(fd, data + size, sizeof data - size)) > 0)
		size += (size_t)n;
	close(fd);
	const struct header *head = (void *)data;
	const unsigned char *at = data + head->hdr_len + head->type_off, *end = at + head->type_len;
	const char *names = (char *)data + head->hdr_len + head->str_off;

	if (size < sizeof *head || head->hdr_len + head->str_off + head->str_len > size)
		die("read the kernel's BTF");
	for (uint32_t id = 1; at < end; id++) {
		const struct type *type = (void *)at;
		unsigned kind = type->info >> 24 & 31, members = type->info & 0xffff;

		if (kind == KIND_FUNC && strcmp(names + type->name_off, function) == 0)
			return id;
		at += sizeof *type;
		if (kind < sizeof tails / sizeof *tails)
			at += tails[kind].fixed + tails[kind].each * members;
	}
	errno = ENOENT;
	die("find the function in the kernel's BTF");
	return 0;
}

static int new_map(void)
{
	union bpf_attr attr = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 8, .max_entries = 1 };
	long fd = bpf(BPF_MAP_CREATE, &attr);

	if (fd < 0)
		die("make a map");
	return (int)fd;
}

static uint64_t hits(int map)
{
	uint32_t key = 0;
	uint64_t value = 0;
	union bpf_attr attr = { .map_fd = (uint32_t)map, .key = (uintptr_t)&key, .value = (uintptr_t)&value };

	if (bpf(BPF_MAP_LOOKUP_ELEM, &attr))
		die("read the map");
	return value;
}

/* Adds 1 to the map's only value. */
static int new_program(int map, uint32_t type, uint32_t attach, uint32_t id)
{
	struct bpf_insn code[] = {
		{ .code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = 1, .src_reg = BPF_PSEUDO_MAP_VALUE, .imm = map },
		{ 0 },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 2, .imm = 1 },
		{ .code = BPF_STX | BPF_ATOMIC | BPF_DW, .dst_reg = 1, .src_reg = 2, .imm = BPF_ADD },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr = { 0 };
	long fd;

	attr.prog_type = type;
	attr.expected_attach_type = attach;
	attr.attach_btf_id = id;
	attr.insns = (uintptr_t)code;
	attr.insn_cnt = sizeof code / sizeof *code;
	attr.license = (uintptr_t) "GPL";
	attr.log_buf = (uintptr_t)log_text;
	attr.log_size = sizeof log_text;
	attr.log_level = 1;
	fd = bpf(BPF_PROG_LOAD, &attr);
	if (fd < 0)
		die("load the program");
	return (int)fd;
}

static void attach_tracing(int map, uint32_t attach, const char *function)
{
	union bpf_attr attr = { 0 };

	attr.raw_tracepoint.prog_fd = (uint32_t)new_program(map, BPF_PROG_TYPE_TRACING, attach, btf_id(function));
	if (bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0)
		die("attach the program");
}

static void attach_kprobe(int map, int on_return, const char *function)
{
	struct perf_event_attr event = { .size = sizeof event, .config = (uint64_t)on_return };
	FILE *type = fopen("/sys/bus/event_source/devices/kprobe/type", "r");
	int fd;

	if (!type || fscanf(type, "%u", &event.type) != 1)
		die("find perf's kprobes");
	fclose(type);
	event.kprobe_func = (uintptr_t)function;
	fd = (int)syscall(SYS_perf_event_open, &event, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);
	if (fd < 0)
		die("open the kprobe");
	if (ioctl(fd, PERF_EVENT_IOC_SET_BPF, new_program(map, BPF_PROG_TYPE_KPROBE, 0, 0)) ||
	    ioctl(fd, PERF_EVENT_IOC_ENABLE, 0))
		die("attach the program");
}

int main(int argc, char **argv)
{
	int map;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 4) {
		fprintf(stderr, "usage: bpf fentry|fexit|kprobe|kretprobe FUNCTION GO\n");
		return 2;
	}
	map = new_map();
	if (strcmp(argv[1], "fentry") == 0)
		attach_tracing(map, BPF_TRACE_FENTRY, argv[2]);
	else if (strcmp(argv[1], "fexit") == 0)
		attach_tracing(map, BPF_TRACE_FEXIT, argv[2]);
	else
		attach_kprobe(map, strcmp(argv[1], "kretprobe") == 0, argv[2]);
	printf("attached\n");
	while (access(argv[3], F_OK))
		usleep(20000);
	/* A hit on every CPU's path through the function: this process makes some itself. */
	for (int i = 0; i < 10; i++) {
		struct stat st;

		stat("/", &st);
	}
	printf("hits %llu\n", (unsigned long long)hits(map));
	return 0;
}
