/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the guest's kernel does on purpose (probe/xenprobe.c), and Xen is to
 * report or refuse.  Both sides are led from outside: hold, then work in the
 * guest, then events and so on, then release.
 */
#include "check.h"

#define NR_COPIES   16UL
#define HIDDEN      64UL
/* The page of the text that gets a copy: one with nothing in it but cc, at the end. */
#define COPIED      0xa20UL

static void copy_page(uint64_t from, uint64_t to)
{
    void *s = map(from, PROT_READ), *d = map(to, PROT_READ | PROT_WRITE);

    memcpy(d, s, PAGE);
    munmap(s, PAGE);
    munmap(d, PAGE);
}

static void arguments_sample(void)
{
    struct binding b = { .action = SAMPLE, .value = 8, .out = { 1UL << 20, 8 } };

    expect("SAMPLE, far pid", EINVAL, bind_op(&b));
    b = (struct binding){ .action = SAMPLE, .value = 8, .out = { 8, ~0UL } };
    expect("SAMPLE, far comm", EINVAL, bind_op(&b));
    b = (struct binding){ .action = SAMPLE, .value = 8, .out = { 8, 8, 8 } };
    expect("SAMPLE, third offset", EINVAL, bind_op(&b));
    b = (struct binding){ .action = SAMPLE, .view = 1 };
    expect("SAMPLE, view given", EINVAL, bind_op(&b));
}

static int protect(uint16_t view, uint64_t first, uint64_t n, uint64_t *done)
{
    struct binding b = { .action = PROTECT, .view = view, .value = first, .out = { n } };
    int rc = bind_op(&b);

    *done = b.out[0];
    return rc;
}

struct remap {
    uint64_t gfn, copy;
};

static int remap(uint16_t view, uint16_t flags, uint64_t generation, const struct remap *r,
                 uint64_t n, uint64_t *done)
{
    struct binding b = { .action = REMAP, .view = view, .flags = flags, .root = generation, .out = { n } };
    int rc = with_array(&b, r, n * sizeof(*r), NULL);

    *done = b.out[0];
    return rc;
}

/* "gfn" or "gfn ro", as QUERY has it. */
static bool shows(uint16_t view, uint64_t gfn, uint64_t copy, uint16_t flags)
{
    struct binding b = { .action = QUERY, .view = view, .value = gfn };

    return !bind_op(&b) && b.out[0] == copy && b.flags == flags;
}

static void arguments_protect(uint16_t view)
{
    uint64_t done;

    expect("PROTECT, view 0", EINVAL, protect(0, 0x100, 1, &done));
    expect("PROTECT, no such view", EINVAL, protect(9, 0x100, 1, &done));
    expect("PROTECT, none", EINVAL, protect(view, 0x100, 0, &done));
    expect("PROTECT, 513", EINVAL, protect(view, 0x100, 513, &done));
    expect("PROTECT, beyond physical memory", EINVAL, protect(view, 1UL << 40, 1, &done));
    expect("PROTECT, up to there and on", EINVAL, protect(view, ~0UL, 512, &done));
    expect("PROTECT, no memory", ESRCH, protect(view, COPIES - 1, 1, &done));
    expect("PROTECT, the end of memory", ESRCH, protect(view, COPIES + NR_COPIES - 2, 3, &done));
    check(done == 2, "two pages done");
    expect("QUERY, view 8", EINVAL, act(QUERY, 8, 0, 0x100));
    expect("QUERY, far gfn", EINVAL, act(QUERY, view, 0, 1UL << 40));
    expect("QUERY, no memory", ENOENT, act(QUERY, view, 0, COPIES - 1));
    check(shows(view, COPIES + NR_COPIES - 1, COPIES + NR_COPIES - 1, 1) &&
          shows(view, COPIES + NR_COPIES - 2, COPIES + NR_COPIES - 2, 1), "these are read-only now");
}

static void arguments_remap(uint16_t view)
{
    struct remap r[1025];
    uint64_t done, generation = stats().out[3];
    struct binding b;
    unsigned int i;

    for ( i = 0; i < 1025; i++ )
        r[i] = (struct remap){ 0x100, COPIES };
    expect("REMAP, view 0", EINVAL, remap(0, 0, 0, r, 1, &done));
    expect("REMAP, no such view", EINVAL, remap(9, 0, 0, r, 1, &done));
    expect("REMAP, none", EINVAL, remap(view, 0, 0, r, 0, &done));
    expect("REMAP, 1025", EINVAL, remap(view, 0, 0, r, 1025, &done));
    expect("REMAP, unknown flag", EINVAL, remap(view, 0x80, 0, r, 1, &done));
    expect("REMAP, generation without CHECK", EINVAL, remap(view, 0, generation + 1, r, 1, &done));
    expect("REMAP, other generation", EAGAIN, remap(view, 2, generation + 1, r, 1, &done));
    check(!done, "none done");
    b = (struct binding){ .action = REMAP, .view = view, .value = 8, .out = { 1 } };
    expect("REMAP, bad array", EFAULT, bind_op(&b));
    b = (struct binding){ .action = REMAP, .view = view, .value = 8, .out = { 1, 0, 1 } };
    expect("REMAP, start beyond the end", EINVAL, bind_op(&b));
    b = (struct binding){ .action = REMAP, .view = view, .value = 8, .out = { 1, 0, 0, 1 } };
    expect("REMAP, out field used", EINVAL, bind_op(&b));
    r[3].copy = COPIES - 1;
    expect("REMAP, fourth has no copy", ESRCH, remap(view, 0, 0, r, 8, &done));
    check(done == 3, "three done");
    r[3].copy = 1UL << 40;
    expect("REMAP, copy beyond physical memory", EINVAL, remap(view, 0, 0, r, 8, &done));
    r[3].copy = COPIES;
    r[3].gfn = 0xfee00;
    expect("REMAP, of the APIC's page", ESRCH, remap(view, 0, 0, r, 8, &done));
    r[3].gfn = 0x100;

    /* 1024 at a time, over several superpages of the guest's. */
    for ( i = 0; i < 1024; i++ )
        r[i] = (struct remap){ 0x4000 + i, COPIES + i % NR_COPIES };
    generation = stats().out[3];
    expect("REMAP, 1024 read-only with CHECK", 0, remap(view, 3, generation, r, 1024, &done));
    check(done == 1024, "all done");
    for ( i = 0; i < 1024; i++ )
        if ( !shows(view, r[i].gfn, r[i].copy, 1) )
            break;
    check(i == 1024, "QUERY agrees");
    check(!shows(view, 0x4000 + 1024, COPIES, 1) && !shows(view, 0x3fff, COPIES, 1), "and no others");
    for ( i = 0; i < 1024; i++ )
        r[i].copy = ~0UL;
    expect("REMAP, to the host's, read-only", 0, remap(view, 1, 0, r, 512, &done));
    expect("REMAP, to the host's", 0, remap(view, 0, 0, r + 512, 512, &done));
    for ( i = 0; i < 1024; i++ )
        if ( !shows(view, r[i].gfn, r[i].gfn, i < 512) )
            break;
    check(i == 1024, "QUERY agrees");
    expect("REMAP, to the host's", 0, remap(view, 0, 0, r, 512, &done));
    r[0] = (struct remap){ 0x100, ~0UL };
    expect("REMAP, to the host's", 0, remap(view, 0, 0, r, 1, &done));

    /* The older way to do the same respects what is read-only. */
    expect("PROTECT", 0, protect(view, 0x4000, 1, &done));
    check(!xc_altp2m_change_gfn(xch, dom, view, 0x4000, COPIES) && shows(view, 0x4000, COPIES, 1),
          "change_gfn leaves it read-only");
    check(!xc_altp2m_change_gfn(xch, dom, view, 0x4000, ~0UL), "change_gfn, to the host's");
    expect("QUERY", ENOENT, act(QUERY, view, 0, 0x4000));
    expect("REMAP, to the host's", 0, remap(view, 0, 0, (struct remap[]){ { 0x4000, ~0UL } }, 1, &done));
}

static int remap_group(uint16_t view, uint16_t flags, uint64_t key, const struct remap *r, uint64_t n)
{
    struct binding b = { .action = REMAP, .view = view, .flags = flags, .root = stats().out[3],
                         .out = { n, key } };

    if ( !(flags & 2) )
        b.root = 0;
    return with_array(&b, r, n * sizeof(*r), NULL);
}

/* Leaves a group of three pages, with the key 0x7777, for the guest to end. */
static void arguments_group(uint16_t view)
{
    struct remap r[3] = { { 0x4000, COPIES }, { 0x4001, COPIES + 1 }, { 0x4002, COPIES } };

    expect("REMAP, GROUP without key", EINVAL, remap_group(view, 6, 0, r, 3));
    expect("REMAP, key without GROUP", EINVAL, remap_group(view, 2, 0x7777, r, 3));
    expect("REMAP, GROUP without CHECK", EINVAL, remap_group(view, 4, 0x7777, r, 3));
    expect("REMAP, GROUP", 0, remap_group(view, 7, 0x7777, r, 3));
    check(shows(view, 0x4000, COPIES, 1) && shows(view, 0x4001, COPIES + 1, 1) &&
          shows(view, 0x4002, COPIES, 1), "QUERY agrees");
}

static void no_saving(void)
{
    static uint8_t buf[65536];

    errno = 0;
    check(xc_domain_hvm_getcontext(xch, dom, NULL, 0) < 0 && errno == EBUSY, "size of the context: busy");
    errno = 0;
    check(xc_domain_hvm_getcontext(xch, dom, buf, sizeof(buf)) < 0 && errno == EBUSY, "the context: busy");
    errno = 0;
    check(xc_logdirty_control(xch, dom, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0, 0, NULL) < 0 &&
          errno == EBUSY, "log-dirty mode: busy");
}

static int hide(uint64_t first, uint64_t n)
{
    struct binding b = { .action = HIDE, .value = first, .out = { n } };

    return bind_op(&b);
}

static void arguments_hide(uint16_t view)
{
    uint64_t done;

    expect("HIDE, none that there are", EINVAL, hide(0x100, 0));
    expect("HIDE, 65537", EINVAL, hide(COPIES, 65537));
    expect("HIDE, beyond physical memory", EINVAL, hide(1UL << 40, 1));
    expect("HIDE, with view", EINVAL, act(HIDE, view, 0, COPIES));
    expect("HIDE, nothing hidden", 0, hide(0, 0));
    /* One which the view has an entry for, in a superpage perhaps. */
    expect("HIDE, a page of RAM", 0, hide(0x4000, 1));
    check(shows(view, 0x4000, ~0UL, 2) && !shows(view, 0x4001, ~0UL, 2) && shows(0, 0x4000, ~0UL, 2),
          "QUERY agrees");
    expect("PROTECT, hidden", ESRCH, protect(view, 0x4000, 1, &done));
    expect("HIDE, drop it", 0, hide(0, 0));
    expect("QUERY", ENOENT, act(QUERY, view, 0, 0x4000));
    expect("HIDE, the copies and more", 0, hide(COPIES, HIDDEN));
    expect("HIDE, the same", 0, hide(COPIES, HIDDEN));
    expect("HIDE, others", EBUSY, hide(COPIES + 1, HIDDEN));
}

/* The frame of the guest's text as it is in the host, read by a mapping of the toolstack's. */
static uint64_t word_of(uint64_t gfn)
{
    uint64_t *p = map(gfn, PROT_READ), word = *p;

    munmap(p, PAGE);
    return word;
}

void query(uint64_t gfn)
{
    struct binding b = { .action = QUERY, .view = view_of(0), .value = gfn };
    int rc = bind_op(&b);

    printf("query rc=%d gfn=%#lx flags=%u\n", rc, b.out[0], b.flags);
}

void word(uint64_t gfn)
{
    printf("word %#lx\n", word_of(gfn));
}

void hold(const struct guest *guest, const uint64_t sample[3])
{
    struct binding b = { .action = SAMPLE, .value = sample[0], .out = { sample[1], sample[2] } };
    uint64_t first = phys(guest->text) >> 12, n = (guest->end - guest->text + PAGE - 1) / PAGE;
    uint64_t i, k, done;
    xen_pfn_t gfns[NR_COPIES];
    uint16_t view;
    int rc = 0;

    for ( i = 0; i < NR_COPIES; i++ )
        gfns[i] = COPIES + i;
    if ( xc_domain_setmaxmem(xch, dom, 1UL << 20) ||
         xc_domain_populate_physmap_exact(xch, dom, NR_COPIES, 0, 0, gfns) ||
         xc_altp2m_set_domain_state(xch, dom, true) )
        die("prepare");
    view = new_view();
    expect("SAMPLE before ARM", ENODEV, bind_op(&b));
    expect("PROTECT before ARM", ENODEV, protect(view, 0x100, 1, &done));
    expect("REMAP before ARM", ENODEV, act(REMAP, view, 0, 0));
    expect("QUERY before ARM", ENODEV, act(QUERY, view, 0, 0));
    expect("HIDE before ARM", ENODEV, hide(COPIES, HIDDEN));
    check(xc_domain_hvm_getcontext(xch, dom, NULL, 0) > 0, "size of the context, as long as not armed");
    check(!xc_logdirty_control(xch, dom, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0, 0, NULL),
          "log-dirty mode on");
    expect("ARM in log-dirty mode", EBUSY, act(ARM, 0, guest->root, guest->addr));
    xc_logdirty_control(xch, dom, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0, 0, NULL);
    if ( act(ARM, 0, guest->root, guest->addr) )
        die("ARM");
    no_saving();
    arguments_sample();
    arguments_protect(view);
    arguments_remap(view);
    expect("SAMPLE", 0, bind_op(&b));
    for ( i = 0; i < n && !rc; i += k )
    {
        k = n - i < 512 ? n - i : 512;
        rc = protect(view, first + i, k, &done);
    }
    check(!rc, "%lu pages of text are read-only", n);
    /* One page has a copy: what there is, with a word changed. */
    copy_page(first + COPIED, COPIES);
    expect("REMAP", 0, remap(view, 1, 0, (struct remap[]){ { first + COPIED, COPIES } }, 1, &done));
    arguments_hide(view);
    arguments_group(view);
    enable(view);
    check(view_of(0) == view, "in view %u", view);
    check(shows(view, first + COPIED, COPIES, 1) && shows(view, COPIES, ~0UL, 2), "hidden copy in use");
    printf("text %#lx copied %#lx copy %#lx\n", first, first + COPIED, COPIES);
}

void print_events(void)
{
    struct event e[64];
    uint64_t counts[5];
    unsigned int i, n;

    while ( (n = events(e, 64, counts)) != 0 )
        for ( i = 0; i < n; i++ )
            printf("event kind=%u vcpu=%u view=%u root=%#lx rip=%#lx addr=%#lx rbx=%#lx r15=%#lx "
                   "stack=%#lx,%#lx,%#lx pid=%u tgid=%u comm=%.16s\n",
                   e[i].kind, e[i].vcpu, e[i].view, e[i].root, e[i].rip, e[i].addr, e[i].gpr[3],
                   e[i].gpr[15], e[i].stack[0], e[i].stack[1], e[i].stack[2], e[i].pid, e[i].tgid,
                   e[i].comm);
    printf("counts lost=%lu lapsed=%lu refused=%lu violations=%lu\n",
           counts[1], counts[2], counts[3], counts[4]);
}

void release(void)
{
    uint16_t view = view_of(0);
    xen_pfn_t gfns[NR_COPIES];
    unsigned int i;

    for ( i = 0; i < NR_COPIES; i++ )
        gfns[i] = COPIES + i;
    expect("DISABLE", 0, act(DISABLE, 0, 0, 0));
    check(!xc_altp2m_destroy_view(xch, dom, view), "view destroyed");
    check(!xc_altp2m_set_domain_state(xch, dom, false), "altp2m off");
    check(!xc_domain_decrease_reservation_exact(xch, dom, NR_COPIES, 0, gfns), "copies given back");
}
