/* SPDX-License-Identifier: GPL-2.0-only */
/* Bindings with witnesses, pairs of roots, and the records of what lapsed. */
#include "check.h"

/* The page that the witnesses are in: the guest's, but unknown to it. */
static volatile uint64_t *words;

static int set(uint16_t view, uint16_t flags, uint64_t root, const struct witness *w, unsigned int n)
{
    struct binding b = { .action = SET, .view = view, .flags = flags, .root = root, .out = { n } };

    return with_array(&b, w, n * sizeof(*w), NULL);
}

static void arguments(uint16_t view, uint64_t poking_root)
{
    struct witness w[9];
    unsigned int i;
    struct binding b;

    for ( i = 0; i < 9; i++ )
        w[i] = (struct witness){ COPIES * PAGE + 8 * i, ~0UL, i };
    for ( i = 0; i < 512; i++ )
        words[i] = i;

    expect("SET, 9 witnesses", EINVAL, set(view, 0, 0x1000, w, 9));
    b = (struct binding){ .action = SET, .view = view, .root = 0x1000, .out = { 1UL << 32 } };
    expect("SET, 2^32 witnesses", EINVAL, bind_op(&b));
    expect("SET, array without number", EINVAL, act(SET, view, 0x1000, 0x1000));
    b = (struct binding){ .action = SET, .view = view, .root = 0x1000, .value = 8, .out = { 1 } };
    expect("SET, bad array", EFAULT, bind_op(&b));
    b.value = 0xffff830000000000;
    expect("SET, array in Xen", EFAULT, bind_op(&b));
    expect("SET, unknown flag", EINVAL, set(view, 2, 0x1000, w, 1));
    w[1].gpa += 4;
    expect("SET, witness not aligned", EINVAL, set(view, 0, 0x1000, w, 2));
    w[1].gpa = 1UL << 52;
    expect("SET, witness beyond physical memory", EINVAL, set(view, 0, 0x1000, w, 2));
    w[1].gpa = COPIES * PAGE + 8;
    w[1].mask = 0;
    w[1].value = 0;
    expect("SET, witness of nothing", EINVAL, set(view, 0, 0x1000, w, 2));
    w[1].mask = 0xff;
    w[1].value = 0x101;
    expect("SET, value outside of the mask", EINVAL, set(view, 0, 0x1000, w, 2));
    w[1].value = 2;
    expect("SET, witness that doesn't hold", ESTALE, set(view, 0, 0x1000, w, 2));
    w[1].value = 1;
    words[1] = 0x101;
    w[7].value++;
    expect("SET, last of 8 doesn't hold", ESTALE, set(view, 0, 0x1000, w, 8));
    w[7].value--;
    w[7].gpa = (COPIES + 1) * PAGE;
    expect("SET, witness where there is no memory", ESTALE, set(view, 0, 0x1000, w, 8));
    w[7].gpa = 0xfee00000;
    expect("SET, witness in the APIC's page", ESTALE, set(view, 0, 0x1000, w, 8));
    check(!stats().value, "nothing was bound");

    w[7].gpa = COPIES * PAGE + 4088;
    w[7].value = 511;
    expect("SET, 8 witnesses, one masked", 0, set(view, 0, 0x1000, w, 8));
    w[0].value++;
    expect("SET again, stale", ESTALE, set(0, 1, 0x4000, w, 8));
    expect("SET again, stale, other view", ESTALE, set(0, 0, 0x1000, w, 8));
    b = (struct binding){ .action = GET };
    check(!bind_op(&b) && b.root == 0x1000 && b.view == view && !b.flags && b.out[1] == 8,
          "GET: the earlier binding is what it was, with 8 witnesses");
    expect("SET again, none", 0, set(view, 0, 0x1000, NULL, 0));
    b = (struct binding){ .action = GET };
    check(!bind_op(&b) && !b.out[1], "GET: no witnesses");
    expect("CLEAR", 0, act(CLEAR, 0, 0x1000, 0));

    expect("SET, PAIR with bit 12", EINVAL, set(view, 1, 0x1000, NULL, 0));
    expect("SET, pair of poking_mm's root", EINVAL,
           set(view, 1, poking_root & ~PAGE, NULL, 0));
    expect("SET, PAIR", 0, set(view, 1, 0x2000, NULL, 0));
    b = (struct binding){ .action = GET };
    check(!bind_op(&b) && b.flags == 1, "GET shows the flag");
    expect("CLEAR of the other half", ENOENT, act(CLEAR, 0, 0x3000, 0));
    expect("CLEAR of the pair", 0, act(CLEAR, 0, 0x2000, 0));

    b = (struct binding){ .action = EVENTS };
    check(!bind_op(&b) && !b.out[0], "EVENTS without room: the counters");
    b = (struct binding){ .action = EVENTS, .value = 8 };
    expect("EVENTS, pointer without room", EINVAL, bind_op(&b));
    b = (struct binding){ .action = EVENTS, .out = { 65 } };
    expect("EVENTS, too much room", EINVAL, bind_op(&b));
    b = (struct binding){ .action = EVENTS, .view = 1, .out = { 1 } };
    expect("EVENTS, view given", EINVAL, bind_op(&b));
}

/* Wait for a vCPU to run on a root with bit 12 set, bind the other half, see it follow. */
static void pairs(uint16_t dflt)
{
    unsigned int i, vcpu = 0, halves = 0;

    for ( i = 0; i < 5000; i++ )
    {
        uint64_t root = cr3_of(vcpu = i & 1);
        uint16_t seen;

        halves += !!(root & PAGE);
        if ( !(root & PAGE) || set(0, 1, root & ~PAGE, NULL, 0) )
            continue;
        seen = view_of(vcpu);
        if ( cr3_of(vcpu) == root && !seen )
        {
            /* Its own binding goes first. */
            expect("SET of the half itself", 0, set(dflt, 0, root, NULL, 0));
            seen = view_of(vcpu);
            check(cr3_of(vcpu) != root || seen == dflt, "its own binding goes first");
            act(CLEAR, 0, root, 0);
            act(CLEAR, 0, root & ~PAGE, 0);
            seen = view_of(vcpu);
            check(cr3_of(vcpu) != root || seen == dflt, "back in the default view");
            break;
        }
        act(CLEAR, 0, root & ~PAGE, 0);
    }
    /* Linux has no such roots without it. */
    if ( !halves )
        printf("-- no pairs of roots: the guest is to be booted with pti=on\n");
    else
        check(i < 5000, "a vCPU follows the binding of its root's pair (try %u)", i + 1);
}

/* Bind what runs to view 0; spoil the witness; bindings have to go by themselves. */
static void lapses(uint16_t dflt)
{
    static const struct event none;
    struct witness w[3] = {
        { COPIES * PAGE, ~0UL, 1 }, { COPIES * PAGE + 16, 0xff, 2 }, { COPIES * PAGE + 8, ~0UL, 3 },
    };
    struct event e[64] = { none };
    uint64_t counts[5], root[64], bound = 0, lapsed;
    unsigned int i, k, n = 0, wrong = 0;

    words[0] = 1;
    words[2] = 0xf02;
    words[1] = 3;

    while ( events(e, 64, counts) )
        ;
    lapsed = counts[2];

    for ( i = 0; i < 400 && n < 64; i++ )
    {
        uint64_t r = cr3_of(i & 1);

        for ( k = 0; k < n && root[k] != r; k++ )
            ;
        if ( r && k == n && !set(0, 0, r, w, 3) )
            root[n++] = r;
        usleep(2000);
    }
    bound = stats().value;
    check(n && bound == n, "%u roots bound", n);
    check(!events(e, 64, counts) && counts[2] == lapsed, "none has lapsed");

    words[2] = 0x103;
    for ( i = 0; i < 100 && stats().value == bound; i++ )
        usleep(100000);
    check(stats().value < bound, "bindings lapse once a witness has changed (%lu of %lu left)",
          (unsigned long)stats().value, bound);
    expect("SET now", ESTALE, set(0, 0, root[0], w, 3));

    /* Those which are not loaded any more stay, until the toolstack has a look. */
    sleep(1);
    bound -= stats().value;
    k = events(e, 64, counts);
    check(k >= bound && counts[2] - lapsed == k && !counts[1],
          "%u records, %lu lapsed, %lu lost", k, counts[2] - lapsed, counts[1]);
    for ( i = 0; i < k; i++ )
    {
        unsigned int j;

        for ( j = 0; j < n && root[j] != e[i].root; j++ )
            ;
        if ( j < n && e[i].kind == LAPSED && !e[i].view && e[i].addr == 1 && e[i].vcpu < 2 &&
             e[i].time && e[i].rip && e[i].gpr[4] == e[i].rsp )
            continue;
        if ( !wrong++ )
            printf("   %u: kind %u view %u vcpu %u time %lu root %#lx (%sbound) rip %#lx rsp %#lx/%#lx "
                   "addr %#lx\n", i, e[i].kind, e[i].view, e[i].vcpu, e[i].time, e[i].root,
                   j < n ? "" : "not ", e[i].rip, e[i].rsp, e[i].gpr[4], e[i].addr);
    }
    check(!wrong, "records: lapsed, root, view, witness 1, vCPU, time, registers (first: root %#lx rip %#lx)",
          e[0].root, e[0].rip);
    for ( i = 0; i < n; i++ )
        act(CLEAR, 0, root[i], 0);
    check(view_of(0) == dflt, "in the default view");
    while ( events(e, 64, counts) )
        ;
}

/* More than the ring holds: bind the running root, spoil the witness, have all vCPUs look again. */
static void overflow(uint16_t dflt)
{
    struct witness w = { COPIES * PAGE, ~0UL, 1 };
    struct event e[64];
    uint64_t counts[5], before[5];
    struct binding b;
    unsigned int i, n, total, lapsed = 0;

    while ( events(e, 64, before) )
        ;
    for ( i = 0; i < 20000 && lapsed < 300; i++ )
    {
        uint64_t r = cr3_of(0);

        words[0] = 1;
        if ( !r || set(dflt, 0, r, &w, 1) )
            continue;
        words[0] = 0;
        act(DEFAULT, dflt, 0, 0);
        lapsed += act(CLEAR, 0, r, 0) == ENOENT;
    }
    b = (struct binding){ .action = EVENTS, .value = 8, .out = { 1 } };
    expect("EVENTS, bad array", EFAULT, bind_op(&b));
    for ( total = 0; (n = events(e, 64, counts)) != 0; total += n )
        ;
    check(lapsed == 300 && counts[2] - before[2] >= 300, "%u lapses, %lu counted", lapsed,
          counts[2] - before[2]);
    check(total == 255 && counts[1] - before[1] == counts[2] - before[2] - total,
          "%u records, %lu lost: one by the bad array, the rest for want of space", total,
          counts[1] - before[1]);
}

void witnesses(const struct guest *guest)
{
    xen_pfn_t gfn = COPIES;
    uint16_t view;

    if ( xc_domain_setmaxmem(xch, dom, 1UL << 20) ||
         xc_domain_populate_physmap_exact(xch, dom, 1, 0, 0, &gfn) ||
         xc_altp2m_set_domain_state(xch, dom, true) )
        die("prepare");
    words = map(COPIES, PROT_READ | PROT_WRITE);
    view = new_view();
    expect("EVENTS before ARM", ENODEV, act(EVENTS, 0, 0, 0));
    if ( act(ARM, 0, guest->root, guest->addr) )
        die("ARM");
    arguments(view, guest->root);
    enable(view);
    pairs(view);
    lapses(view);
    overflow(view);

    /* With bindings that have witnesses in the table. */
    words[0] = 1;
    expect("SET", 0, set(view, 0, 0x5000, &(struct witness){ COPIES * PAGE, ~0UL, 1 }, 1));
    expect("DISABLE", 0, act(DISABLE, 0, 0, 0));
    check(!xc_altp2m_destroy_view(xch, dom, view), "view destroyed");
    check(!xc_altp2m_set_domain_state(xch, dom, false), "altp2m off");
    munmap((void *)words, PAGE);
    check(!xc_domain_decrease_reservation_exact(xch, dom, 1, 0, &gfn), "page given back");
}
