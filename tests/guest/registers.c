// SPDX-License-Identifier: MIT OR Apache-2.0
// registers SECONDS: threads load all vector registers with words of their own, enter the kernel by a system call, a page
// fault, an interrupt or a sleep, and look whether the registers are what they were.  Prints how often, or FAILED and which.

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 4, REGISTERS = 16, PAGE = 4096, SPINS = 20000, NAP_NS = 1000 };

typedef struct {
	uint8_t bytes[REGISTERS][16];
} Vectors;

#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) do(14) do(15)
#define LOAD(n) "movups 16*" #n "(%[given]), %%xmm" #n "\n\t"
#define STORE(n) "movups %%xmm" #n ", 16*" #n "(%[found])\n\t"
#define LOST                                                                                                               \
	"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",    \
		"xmm14", "xmm15"

static atomic_ulong kept;
static atomic_bool over;

static void by_call(const Vectors *given, Vectors *found, long number, const void *argument)
{
	long result = number;

	__asm__ volatile(EACH(LOAD) "syscall\n\t" EACH(STORE)
			 : "+a"(result)
			 : [given] "r"(given), [found] "r"(found), "D"(argument), "S"(0)
			 : "rcx", "r11", "memory", LOST);
}

static void by_fault(const Vectors *given, Vectors *found, uint8_t *page)
{
	__asm__ volatile(EACH(LOAD) "movb $1, (%[page])\n\t" EACH(STORE)
			 :
			 : [given] "r"(given), [found] "r"(found), [page] "r"(page)
			 : "memory", LOST);
}

static void by_interrupt(const Vectors *given, Vectors *found)
{
	long left = SPINS;

	__asm__ volatile(EACH(LOAD) "1: dec %[left]\n\tjnz 1b\n\t" EACH(STORE)
			 : [left] "+r"(left)
			 : [given] "r"(given), [found] "r"(found)
			 : "cc", "memory", LOST);
}

static void *work(void *argument)
{
	const struct timespec nap = { .tv_nsec = NAP_NS };
	uint64_t random = 0x9e3779b97f4a7c15u * (uint64_t)(uintptr_t)argument;
	uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED) {
		perror("mmap");
		exit(2);
	}
	for (unsigned round = 0; !over; round++) {
		static const char *const ways[] = { "system call", "page fault", "interrupt", "sleep" };
		Vectors given, found;

		for (size_t at = 0; at < sizeof(given); at++) {
			random = random * 6364136223846793005u + 1442695040888963407u;
			given.bytes[at / 16][at % 16] = (uint8_t)(random >> 56);
		}
		switch (round % 4) {
		case 0:
			by_call(&given, &found, SYS_getppid, NULL);
			break;
		case 1:
			madvise(page, PAGE, MADV_DONTNEED);
			by_fault(&given, &found, page);
			break;
		case 2:
			by_interrupt(&given, &found);
			break;
		case 3:
			by_call(&given, &found, SYS_nanosleep, &nap);
			break;
		}
		for (int number = 0; number < REGISTERS; number++) {
			if (memcmp(given.bytes[number], found.bytes[number], 16)) {
				printf("FAILED xmm%d after a %s\n", number, ways[round % 4]);
				exit(1);
			}
		}
		kept++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	int seconds = argc == 2 ? atoi(argv[1]) : 0;

	if (seconds <= 0) {
		fprintf(stderr, "usage: registers SECONDS\n");
		return 2;
	}
	for (uintptr_t number = 0; number < THREADS; number++) {
		if (pthread_create(&threads[number], NULL, work, (void *)(number + 1))) {
			perror("pthread_create");
			return 2;
		}
	}
	sleep((unsigned)seconds);
	over = true;
	for (int number = 0; number < THREADS; number++)
		pthread_join(threads[number], NULL);
	printf("kept %lu\n", kept);
	return 0;
}
