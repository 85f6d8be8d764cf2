/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/* /dev/penumbra_bug: what its callers and the module agree on. */
#ifndef PENUMBRA_BUG_H
#define PENUMBRA_BUG_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* One access to an array of 64-bit words, at an index that nobody checks. */
struct bug_access {
	__s64 index;
	__u64 count;  /* words, at most BUG_WORDS */
	__u64 words;  /* user address of the words */
};

#define BUG_WORDS 64

/* Writes words into the heap object behind the open file. */
#define BUG_HEAP_WRITE  _IOW('P', 1, struct bug_access)
/* Reads, and writes, words of the ioctl's own stack. */
#define BUG_STACK_READ  _IOW('P', 2, struct bug_access)
#define BUG_STACK_WRITE _IOW('P', 3, struct bug_access)
/*
 * Stands for a pointer that was overwritten before: the argument is a kernel address that
 * the kernel's own text calls once, a little later, from an interrupt on this CPU, or at
 * every NMI until the file is closed.
 */
#define BUG_TIMER _IO('P', 4)
#define BUG_NMI   _IO('P', 5)
/* Looks up a path, /none/of/it, with so many bytes of the stack left. */
#define BUG_DEEP  _IO('P', 6)

#endif
