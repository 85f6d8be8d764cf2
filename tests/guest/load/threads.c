/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Threads of one address space: a counter under a futex, a relay, a barrier, exits and joins. */
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>

#include "load.h"

#define THREADS 4
#define ADDS 50

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t barrier;
static long total;
static sem_t relay[THREADS];
static long passed;

static void nothing(void)
{
}

static void *body(void *argument)
{
	long self = (long)argument;

	for (int i = 0; i < ADDS; i++) {
		pthread_mutex_lock(&lock);
		total++;
		pthread_mutex_unlock(&lock);
	}
	pthread_barrier_wait(&barrier);
	check("total", total, THREADS * ADDS);
	/* Each waits for the one before it, so every wake-up is another thread's. */
	for (int i = 0; i < 4; i++) {
		sem_wait(&relay[self]);
		check("turn", passed++ % THREADS, self);
		sem_post(&relay[(self + 1) % THREADS]);
	}
	return (void *)(self + 100);
}

static void round_of(uint32_t number)
{
	pthread_t threads[THREADS];

	(void)number;
	total = passed = 0;
	check("barrier", pthread_barrier_init(&barrier, NULL, THREADS), 0);
	for (long i = 0; i < THREADS; i++)
		check("sem_init", sem_init(&relay[i], 0, i == 0), 0);
	for (long i = 0; i < THREADS; i++)
		check("pthread_create", pthread_create(&threads[i], NULL, body, (void *)i), 0);
	for (long i = 0; i < THREADS; i++) {
		void *result;

		check("pthread_join", pthread_join(threads[i], &result), 0);
		check("its result", (long)result, i + 100);
	}
	check("passed", passed, 4 * THREADS);
	pthread_barrier_destroy(&barrier);
}

const struct kind kind_thread = { "thread", nothing, round_of };
