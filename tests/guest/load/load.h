/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What the kinds of load share: checks that end the program, and patterns. */
#ifndef LOAD_H
#define LOAD_H

#include <stddef.h>
#include <stdint.h>

/* Ends the program with `FAILED ...` unless `got` is `wanted`; counted. */
void check(const char *what, long got, long wanted);

/* A byte sequence that differs from round to round. */
void fill(unsigned char *data, size_t length, uint32_t seed);

/* Reads or writes all of `length`, checked. */
void get_all(int fd, void *data, size_t length);
void put_all(int fd, const void *data, size_t length);

/* Each kind: one call before the first round, one for each round. */
struct kind {
	const char *name;
	void (*begin)(void);
	void (*round)(uint32_t number);
};

extern const struct kind kind_file, kind_pipe, kind_unix, kind_tcp, kind_exec, kind_memory, kind_signal,
	kind_thread, kind_module;

/* What the program executed by `exec` prints for `number`, and its exit code. */
int executed(const char *number);

#endif
