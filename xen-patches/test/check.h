/* SPDX-License-Identifier: GPL-2.0-only */
/* What the checks of HVMOP_altp2m_binding share: see binding-check.c. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <xencall.h>
#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xen/hvm/save.h>

/* The interface, spelled out: a change of it has to break this test. */
#define OP_HVM          34
#define HVMOP_ALTP2M    25
#define CMD_BINDING     17
enum { ARM, ENABLE, DISABLE, SET, CLEAR, GET, STATS, DEFAULT, FLAGS, EVENTS, SAMPLE,
       PROTECT, HIDE, REMAP, QUERY };
enum { VIOLATION = 1, FATAL, LAPSED, REFUSED, LOST };

struct binding {
    uint32_t action;
    uint16_t view, flags;
    uint64_t root, value, out[5];
};

struct altp2m_op {
    uint32_t version, cmd;
    uint16_t domain, pad1;
    uint32_t pad2;
    struct binding u;
};

struct witness {
    uint64_t gpa, mask, value;
};

struct event {
    uint32_t kind;
    uint16_t vcpu, view;
    uint64_t time, root, rip, rsp, addr, gpr[16], stack[3];
    uint32_t pid, tgid;
    char comm[16];
    uint8_t pad[32];
};

#define PAGE    4096UL
/* Where the copies go: above the RAM of any guest this is used with. */
#define COPIES  0x40000UL

extern xc_interface *xch;
extern xencall_handle *call;
extern xenforeignmemory_handle *fmem;
extern uint32_t dom;
extern unsigned int failed;

/* The guest's own: poking_mm's root, poking_addr, bounds of its text. */
struct guest {
    uint64_t root, addr, text, end;
};

void die(const char *what) __attribute__((noreturn));
void check(bool ok, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void expect(const char *what, int want, int got);
/* All of these return 0 or a positive errno. */
int raw(struct altp2m_op *op);
int bind_op(struct binding *b);
int act(uint32_t action, uint16_t view, uint64_t root, uint64_t value);
/* With an array of IN or OUT data, which @b->value is made to point to. */
int with_array(struct binding *b, const void *in, size_t size, void *out);
struct binding stats(void);
/* Returns the number of records; @counts are the action's OUT values. */
unsigned int events(struct event *e, unsigned int room, uint64_t counts[5]);
uint64_t cr3_of(unsigned int vcpu);
uint64_t phys(uint64_t va);
void *map(uint64_t gfn, int prot);
uint64_t read64(uint64_t va);
uint16_t view_of(unsigned int vcpu);
uint16_t new_view(void);
/* ENABLE, again while text writes get in between. */
unsigned int enable(uint16_t view);

void witnesses(const struct guest *guest);
/* @sample: offsets of current_task, pid and comm. */
void hold(const struct guest *guest, const uint64_t sample[3]);
void print_events(void);
void release(void);
void word(uint64_t gfn);
void query(uint64_t gfn);

#endif
