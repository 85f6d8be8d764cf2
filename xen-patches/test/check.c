/* SPDX-License-Identifier: GPL-2.0-only */
/* Asking Xen, and saying what it answered. */
#include "check.h"

xc_interface *xch;
xencall_handle *call;
xenforeignmemory_handle *fmem;
uint32_t dom;
unsigned int failed;

void die(const char *what)
{
    printf("cannot: %s: %s\n", what, strerror(errno));
    exit(2);
}

void check(bool ok, const char *fmt, ...)
{
    va_list args;

    failed += !ok;
    printf("%s ", ok ? "ok" : "FAIL");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}

/* Returns 0 or a positive errno. */
int raw(struct altp2m_op *op)
{
    struct altp2m_op *buf = xencall_alloc_buffer(call, sizeof(*buf));
    int rc;

    if ( !buf )
        die("hypercall buffer");
    *buf = *op;
    rc = xencall2(call, OP_HVM, HVMOP_ALTP2M, (uintptr_t)buf);
    rc = rc < 0 ? errno : 0;
    *op = *buf;
    xencall_free_buffer(call, buf);
    return rc;
}

int bind_op(struct binding *b)
{
    struct altp2m_op op = { .version = 1, .cmd = CMD_BINDING, .domain = dom };
    int rc;

    op.u = *b;
    rc = raw(&op);
    *b = op.u;
    return rc;
}

int act(uint32_t action, uint16_t view, uint64_t root, uint64_t value)
{
    struct binding b = { .action = action, .view = view, .root = root, .value = value };

    return bind_op(&b);
}

int with_array(struct binding *b, const void *in, size_t size, void *out)
{
    void *buf;
    int rc;

    if ( !size )
        return bind_op(b);
    buf = xencall_alloc_buffer(call, size);
    if ( !buf )
        die("hypercall buffer");
    memset(buf, 0, size);
    if ( in )
        memcpy(buf, in, size);
    b->value = (uintptr_t)buf;
    rc = bind_op(b);
    if ( out )
        memcpy(out, buf, size);
    xencall_free_buffer(call, buf);
    return rc;
}

struct binding stats(void)
{
    struct binding b = { .action = STATS };

    if ( bind_op(&b) )
        die("STATS");
    return b;
}

void expect(const char *what, int want, int got)
{
    if ( want == got )
        check(true, "%s: %s", what, want ? strerror(want) : "done");
    else
        check(false, "%s: %s instead of %s", what, strerror(got), strerror(want));
}

/* The root a vCPU has loaded; 0 if it is down. */
uint64_t cr3_of(unsigned int vcpu)
{
    struct hvm_hw_cpu cpu;
    xc_vcpuinfo_t info;

    if ( xc_vcpu_getinfo(xch, dom, vcpu, &info) )
        die("vCPU info");
    if ( !info.online )
        return 0;
    if ( xc_domain_hvm_getcontext_partial(xch, dom, HVM_SAVE_CODE(CPU), vcpu, &cpu, sizeof(cpu)) )
        die("vCPU context");
    return cpu.cr3 & ~0xfffUL & ~(1UL << 63);
}

uint64_t phys(uint64_t va)
{
    unsigned int tries;

    /* With page table isolation, user mode's tables map next to nothing. */
    for ( tries = 0; tries < 2000; tries++ )
    {
        unsigned long pfn = xc_translate_foreign_address(xch, dom, 0, va);

        if ( pfn )
            return ((uint64_t)pfn << 12) | (va & 0xfff);
        usleep(1000);
    }
    die("translate a guest address");
}

void *map(uint64_t gfn, int prot)
{
    xen_pfn_t pfn = gfn;
    void *p = xenforeignmemory_map(fmem, dom, prot, 1, &pfn, NULL);

    if ( !p )
        die("map a guest page");
    return p;
}

uint64_t read64(uint64_t va)
{
    uint64_t pa = phys(va), value;
    char *p = map(pa >> 12, PROT_READ);

    memcpy(&value, p + (pa & 0xfff), sizeof(value));
    munmap(p, PAGE);
    return value;
}

uint16_t view_of(unsigned int vcpu)
{
    uint16_t view = 0xffff;

    if ( xc_altp2m_get_vcpu_p2m_idx(xch, dom, vcpu, &view) )
        die("view of a vCPU");
    return view;
}

uint16_t new_view(void)
{
    uint16_t view = 0;

    if ( xc_altp2m_create_view(xch, dom, XENMEM_access_default, &view) )
        die("create a view");
    return view;
}

unsigned int enable(uint16_t view)
{
    unsigned int tries;
    int rc;

    for ( tries = 1; (rc = act(ENABLE, view, 0, stats().out[3])) != 0; tries++ )
        if ( rc != EAGAIN || tries == 200 )
            die("ENABLE");
    return tries;
}

unsigned int events(struct event *e, unsigned int room, uint64_t counts[5])
{
    struct binding b = { .action = EVENTS, .out = { room } };

    if ( with_array(&b, NULL, room * sizeof(*e), e) )
        die("EVENTS");
    memcpy(counts, b.out, sizeof(b.out));
    return b.out[0];
}
