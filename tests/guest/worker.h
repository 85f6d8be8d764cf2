/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#ifndef WORKER_H
#define WORKER_H

/* As root: collects the kernel's addresses into `file`. */
int attack_prepare(const char *file);

/* Attacks the kernel (`pointer` or `return`) with the addresses in `file`, as soon as the
 * file `go` exists; does not come back. */
int attack(const char *kind, const char *file, const char *go);

#endif
