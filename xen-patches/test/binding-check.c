/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Drives HVMOP_altp2m_binding on a live guest, from dom0.
 *
 *   binding-check api|witness|lost DOMID GUEST
 *   binding-check storm DOMID GUEST TEXT END SECONDS
 *   binding-check hold DOMID GUEST TEXT END CURRENT_TASK PID COMM
 *   binding-check events|release DOMID
 *   binding-check word|query DOMID GFN
 *
 * GUEST is POKING_MM POKING_ADDR PGD_OFFSET.
 * POKING_MM and POKING_ADDR are the addresses of the guest kernel's variables
 * of these names, PGD_OFFSET that of pgd in its struct mm_struct, TEXT and END
 * the bounds of its text.  The guest's own work is up to the caller.
 *
 * api: what has to be refused, then each action once and what it has to show.
 * witness: bindings that lapse, pairs of roots (in a guest with pti=on), and
 * the ring of events.  The guest has to switch between processes.
 * storm: two views, each with its own copy of the whole text, bound to the
 * roots the guest uses; the default view changes all the time.  Afterwards all
 * copies have to equal the guest's text, whatever it wrote to it meanwhile.
 * lost: takes away a page that a bound view needs; the guest has to be crashed.
 * hold: checks what is to be said about the arguments of the actions that follow
 * here, and leaves the guest in a view with read-only text, hidden copies, and
 * remaps with the key 0x7777.  CURRENT_TASK, PID, COMM: as for SAMPLE.  Then it's
 * the guest's turn (probe/xenprobe.c); events, word and query tell what came of
 * it, and release ends it.
 *
 * One line per check, "ok ..." or "FAIL ...".  Exit code 0: all ok, 1: not
 * all, 2: could not be run.
 */
#include "check.h"

static void api(uint64_t poking_root, uint64_t poking_addr)
{
    struct altp2m_op op;
    struct binding b;
    uint16_t view;
    uint64_t root;
    unsigned int i;

    expect("altp2m not active", EOPNOTSUPP, act(STATS, 0, 0, 0));
    if ( xc_altp2m_set_domain_state(xch, dom, true) )
        die("altp2m for the domain");
    view = new_view();

    op = (struct altp2m_op){ .version = 1, .cmd = CMD_BINDING, .domain = 0x7000 };
    expect("no such domain", ESRCH, raw(&op));
    op.domain = 0x7ff1; /* DOMID_XEN */
    check(raw(&op) != 0, "a domain that is none");
    op.domain = 0;
    check(raw(&op) != 0, "dom0, which has no views");
    op.domain = 0x7ff0; /* DOMID_SELF */
    check(raw(&op) != 0, "the caller's own domain");
    op.domain = dom;
    op.version = 2;
    expect("other interface version", EINVAL, raw(&op));
    op.version = 1;
    op.pad2 = 1;
    expect("padding used", EINVAL, raw(&op));
    op.pad2 = 0;
    op.cmd = 250;
    expect("unknown sub-command", EOPNOTSUPP, raw(&op));

    expect("unknown action", EINVAL, act(QUERY + 1, 0, 0, 0));
    expect("far unknown action", EINVAL, act(~0u, 0, 0, 0));
    expect("ENABLE before ARM", ENODEV, act(ENABLE, view, 0, 0));
    expect("SET before ARM", ENODEV, act(SET, view, 0x1000, 0));
    expect("CLEAR before ARM", ENODEV, act(CLEAR, 0, 0x1000, 0));
    expect("GET before ARM", ENODEV, act(GET, 0, 0, 0));
    expect("DEFAULT before ARM", ENODEV, act(DEFAULT, view, 0, 0));
    expect("FLAGS before ARM", ENODEV, act(FLAGS, view, 0, 0));
    expect("DISABLE before ARM", 0, act(DISABLE, 0, 0, 0));
    b = stats();
    check(!b.flags && !b.value, "STATS before ARM: neither armed nor enabled");

    expect("ARM, root with PCID bits", EINVAL, act(ARM, 0, poking_root | 1, poking_addr));
    expect("ARM, root with no-flush bit", EINVAL, act(ARM, 0, poking_root | 1UL << 63, poking_addr));
    expect("ARM, root beyond physical memory", EINVAL, act(ARM, 0, 1UL << 52, poking_addr));
    expect("ARM, no root", EINVAL, act(ARM, 0, 0, poking_addr));
    expect("ARM, address not canonical", EINVAL, act(ARM, 0, poking_root, 1UL << 60));
    expect("ARM, second page not canonical", EINVAL,
           act(ARM, 0, poking_root, (1UL << 47) - PAGE));
    expect("ARM, address not page aligned", EINVAL, act(ARM, 0, poking_root, poking_addr + 8));
    expect("ARM, view given", EINVAL, act(ARM, view, poking_root, poking_addr));
    if ( xc_altp2m_switch_to_view(xch, dom, view) )
        die("switch to a view");
    expect("ARM, vCPUs not in view 0", EBUSY, act(ARM, 0, poking_root, poking_addr));
    if ( xc_altp2m_switch_to_view(xch, dom, 0) )
        die("switch to view 0");
    expect("ARM", 0, act(ARM, 0, poking_root, poking_addr));
    expect("ARM again, same values", 0, act(ARM, 0, poking_root, poking_addr));
    expect("ARM again, other root", EBUSY, act(ARM, 0, poking_root + PAGE, poking_addr));
    expect("ARM again, other address", EBUSY, act(ARM, 0, poking_root, poking_addr + PAGE));
    b = stats();
    check(b.flags == 2, "armed only");

    expect("ENABLE, view not there", EINVAL, act(ENABLE, 9, 0, b.out[3]));
    expect("ENABLE, view out of range", EINVAL, act(ENABLE, 10, 0, b.out[3]));
    expect("ENABLE, view far out of range", EINVAL, act(ENABLE, 0xffff, 0, b.out[3]));
    expect("ENABLE, other generation", EAGAIN, act(ENABLE, view, 0, b.out[3] + 1));
    expect("ENABLE, root given", EINVAL, act(ENABLE, view, 0x1000, b.out[3]));
    expect("DEFAULT before ENABLE", ENODEV, act(DEFAULT, view, 0, 0));
    check(view_of(0) == 0, "still in view 0");
    i = enable(view);
    check(stats().flags == 3, "enabled (on try %u)", i);
    check(view_of(0) == view, "vCPU 0 in the default view");

    errno = 0;
    check(xc_altp2m_switch_to_view(xch, dom, 0) && errno == EBUSY, "switching by hand is refused");
    errno = 0;
    check(xc_altp2m_destroy_view(xch, dom, view) && errno == EBUSY, "the default view stays");

    expect("SET, root not aligned", EINVAL, act(SET, view, 0x1008, 0));
    expect("SET, root beyond physical memory", EINVAL, act(SET, view, 1UL << 52, 0));
    expect("SET, view not there", EINVAL, act(SET, 9, 0x1000, 0));
    expect("SET, view out of range", EINVAL, act(SET, 10, 0x1000, 0));
    expect("SET, poking_mm's root", EINVAL, act(SET, view, poking_root, 0));
    expect("SET, value given", EINVAL, act(SET, view, 0x1000, 1));
    b = (struct binding){ .action = SET, .view = view, .root = 0x1000, .out = { 0, 0, 0, 0, 1 } };
    expect("SET, out field used", EINVAL, bind_op(&b));
    expect("CLEAR, not bound", ENOENT, act(CLEAR, 0, 0x1000, 0));
    expect("CLEAR, poking_mm's root", ENOENT, act(CLEAR, 0, poking_root, 0));
    expect("GET, none there", ENOENT, act(GET, 0, 0, 0));
    expect("GET, far index", ENOENT, act(GET, 0, 0, ~0UL));
    expect("FLAGS, unknown bit", EINVAL,
           (b = (struct binding){ .action = FLAGS, .view = view, .flags = 2 }, bind_op(&b)));
    expect("FLAGS, view not there", EINVAL, act(FLAGS, 9, 0, 0));
    expect("FLAGS", 0, (b = (struct binding){ .action = FLAGS, .view = view, .flags = 1 }, bind_op(&b)));

    /* A root nobody uses: no vCPU changes, the table does. */
    expect("SET", 0, act(SET, view, 0x1000, 0));
    expect("SET again, view 0", 0, act(SET, 0, 0x1000, 0));
    b = (struct binding){ .action = GET };
    check(!bind_op(&b) && b.root == 0x1000 && b.view == 0, "GET shows the later one");
    check(stats().value == 1, "one binding");
    expect("CLEAR", 0, act(CLEAR, 0, 0x1000, 0));
    expect("CLEAR again", ENOENT, act(CLEAR, 0, 0x1000, 0));

    /* All of the table, in an order that makes chains and holes. */
    for ( i = 1; i <= 8192; i++ )
        if ( act(SET, i & 1 ? view : 0, 0x100000UL * i, 0) )
            break;
    check(i == 8193 && stats().value == 8192, "8192 bindings");
    expect("one more", ENOSPC, act(SET, view, 0x2000, 0));
    for ( i = 1; i <= 8192; i += 3 )
        if ( act(CLEAR, 0, 0x100000UL * i, 0) )
            break;
    for ( i = 8192; i; i-- )
    {
        int rc = act(CLEAR, 0, 0x100000UL * i, 0);

        if ( rc != (i % 3 == 1 ? ENOENT : 0) )
            break;
    }
    check(!i && !stats().value, "all cleared again");

    /*
     * The root of a vCPU: it has to change with the binding.  The guest may
     * have loaded another root meanwhile, so try until it hasn't.
     */
    for ( i = 0; i < 100; i++ )
    {
        uint16_t seen;

        root = cr3_of(0);
        if ( root == poking_root || act(SET, 0, root, 0) )
            continue;
        seen = view_of(0);
        if ( cr3_of(0) == root && !seen )
            break;
        act(CLEAR, 0, root, 0);
    }
    check(i < 100, "a vCPU follows SET at once (try %u)", i + 1);
    b = (struct binding){ .action = GET };
    check(!bind_op(&b) && b.out[0], "the binding counts its switches");
    expect("CLEAR of a root in use", 0, act(CLEAR, 0, root, 0));
    check(view_of(0) == view, "back to the default at once");

    expect("DEFAULT 0", 0, act(DEFAULT, 0, 0, 0));
    check(view_of(0) == 0, "vCPU 0 follows the default");
    expect("DEFAULT, view not there", EINVAL, act(DEFAULT, 9, 0, 0));
    expect("DEFAULT back", 0, act(DEFAULT, view, 0, 0));
    expect("SET", 0, act(SET, view, 0x1000, 0));
    expect("DEFAULT 0", 0, act(DEFAULT, 0, 0, 0));
    errno = 0;
    check(xc_altp2m_destroy_view(xch, dom, view) && errno == EBUSY, "a bound view stays");
    b = stats();
    check(b.out[0] > 0 && b.out[1] > 0, "%lu CR3 writes, %lu view switches", b.out[0], b.out[1]);

    expect("DISABLE", 0, act(DISABLE, 0, 0, 0));
    expect("DISABLE again", 0, act(DISABLE, 0, 0, 0));
    check(view_of(0) == 0 && !stats().flags && !stats().value, "nothing is left");
    check(!xc_altp2m_destroy_view(xch, dom, view), "the view can be destroyed");

    /* Switching altp2m off takes all of it along. */
    view = new_view();
    act(ARM, 0, poking_root, poking_addr);
    enable(view);
    check(stats().flags == 3, "enabled once more");
    check(!xc_altp2m_set_domain_state(xch, dom, false), "altp2m off while enabled");
    check(!xc_altp2m_set_domain_state(xch, dom, true), "and on");
    check(!stats().flags, "not armed any more");
    check(!xc_altp2m_set_domain_state(xch, dom, false), "and off");
}

/* The guest's text and the two views' copies of it, mapped once: a text write must be able to
 * miss the time that filling the copies takes. */
static unsigned long pages;
static unsigned char *text_map, *copy_map[2];

static void *map_all(const xen_pfn_t *gfns, int prot)
{
    void *p = xenforeignmemory_map(fmem, dom, prot, pages, gfns, NULL);

    if ( !p )
        die("map the text");
    return p;
}

static unsigned long differing(unsigned int copy)
{
    unsigned long i, n = 0;

    for ( i = 0; i < pages * PAGE; i++ )
    {
        if ( !(i % PAGE) && !memcmp(text_map + i, copy_map[copy] + i, PAGE) )
            i += PAGE - 1;
        else if ( text_map[i] != copy_map[copy][i] && n++ < 5 )
            printf("   offset %#lx: %02x in the text, %02x in copy %u\n",
                   i, text_map[i], copy_map[copy][i], copy);
    }
    return n;
}

static void storm(const struct guest *guest, unsigned int seconds)
{
    uint64_t text = guest->text, end = guest->end;
    uint16_t view[3] = { 0 };
    xen_pfn_t *gfns, *text_gfn;
    unsigned long i;
    unsigned int copy, tries, flips = 0, bound = 0;
    uint64_t generation;
    struct binding s = { 0 };
    time_t until;

    pages = (end - text + PAGE - 1) / PAGE;
    text_gfn = calloc(pages, sizeof(*text_gfn));
    gfns = calloc(2 * pages, sizeof(*gfns));
    if ( !text_gfn || !gfns )
        die("memory");
    /* Linux maps its text with 2 MiB pages. */
    for ( i = 0; i < pages; i++ )
        text_gfn[i] = i && ((text >> 12) + i) % 512 ? text_gfn[i - 1] + 1
                                                    : phys(text + i * PAGE) >> 12;
    for ( i = 0; i < 2 * pages; i++ )
        gfns[i] = COPIES + i;

    if ( xc_domain_setmaxmem(xch, dom, 1UL << 20) ||
         xc_domain_populate_physmap_exact(xch, dom, 2 * pages, 0, 0, gfns) )
        die("memory for the copies");
    text_map = map_all(text_gfn, PROT_READ);
    copy_map[0] = map_all(gfns, PROT_READ | PROT_WRITE);
    copy_map[1] = map_all(gfns + pages, PROT_READ | PROT_WRITE);
    if ( xc_altp2m_set_domain_state(xch, dom, true) )
        die("altp2m for the domain");
    if ( act(ARM, 0, guest->root, guest->addr) )
        die("ARM");
    for ( copy = 0; copy < 2; copy++ )
    {
        view[copy + 1] = new_view();
        for ( i = 0; i < pages; i++ )
            if ( xc_altp2m_change_gfn(xch, dom, view[copy + 1], text_gfn[i],
                                      COPIES + copy * pages + i) )
                die("change_gfn");
    }
    for ( tries = 1; ; tries++ )
    {
        generation = stats().out[3];
        memcpy(copy_map[0], text_map, pages * PAGE);
        memcpy(copy_map[1], text_map, pages * PAGE);
        i = act(ENABLE, view[1], 0, generation);
        if ( !i )
            break;
        if ( i != EAGAIN || tries == 200 )
            die("ENABLE");
    }
    check(true, "%lu pages of text in 2 views, enabled on try %u, text writes while filling: %s",
          pages, tries, generation ? "yes" : "no");

    until = time(NULL) + seconds;
    srand(1);
    /* Longer, if the guest hasn't got around to writing to its text. */
    while ( time(NULL) < until || (!stats().out[2] && time(NULL) < until + 9 * seconds) )
    {
        /* Bind what runs, in turn to all views; now and then let go of one. */
        uint64_t root = cr3_of(flips & 1);

        if ( root && root != guest->root && !act(SET, view[rand() % 3], root, 0) )
            bound++;
        if ( root && rand() % 4 == 0 )
            act(CLEAR, 0, root, 0);
        if ( act(DEFAULT, view[rand() % 3], 0, 0) )
            die("DEFAULT");
        flips++;
        usleep(2000 + rand() % 10000);
    }

    /* Compare at a moment without a write under way. */
    for ( tries = 1; tries <= 200; tries++ )
    {
        unsigned long n0, n1;

        s = stats();
        n0 = differing(0);
        n1 = differing(1);
        if ( s.out[3] != stats().out[3] )
            continue;
        check(!n0 && !n1, "copies equal the text (%lu and %lu bytes differ, try %u)", n0, n1, tries);
        break;
    }
    check(tries <= 200, "a quiet moment was found");
    printf("   %u default changes, %u bindings, %lu roots bound, %lu CR3 writes, %lu view switches, "
           "%lu text writes copied, generation %lu, conflicts %lu\n", flips, bound,
           (unsigned long)s.value, s.out[0], s.out[1], s.out[2], s.out[3], s.out[4]);
    check(s.out[1] > flips, "views were switched");
    check(s.out[4] == 0, "no conflicts");
    check(s.out[2] > 0, "text writes were copied");

    munmap(text_map, pages * PAGE);
    munmap(copy_map[0], pages * PAGE);
    munmap(copy_map[1], pages * PAGE);

    expect("DISABLE", 0, act(DISABLE, 0, 0, 0));
    for ( copy = 1; copy < 3; copy++ )
        check(!xc_altp2m_destroy_view(xch, dom, view[copy]), "view %u destroyed", view[copy]);
    check(!xc_altp2m_set_domain_state(xch, dom, false), "altp2m off");
    check(!xc_domain_decrease_reservation_exact(xch, dom, 2 * pages, 0, gfns), "copies freed");
}

static void lost(uint64_t poking_root, uint64_t poking_addr)
{
    xen_pfn_t gfn = COPIES;
    xc_domaininfo_t info;
    struct event e[64];
    uint64_t counts[5];
    unsigned int i, n;
    uint16_t view;

    if ( xc_domain_setmaxmem(xch, dom, 1UL << 20) ||
         xc_domain_populate_physmap_exact(xch, dom, 1, 0, 0, &gfn) ||
         xc_altp2m_set_domain_state(xch, dom, true) )
        die("prepare");
    view = new_view();
    /* Any page of the guest's will do, as long as nobody runs in the view. */
    if ( xc_altp2m_change_gfn(xch, dom, view, 0x100, gfn) ||
         act(ARM, 0, poking_root, poking_addr) )
        die("prepare");
    enable(0);
    expect("SET", 0, act(SET, view, 0x1000, 0));
    check(!xc_domain_decrease_reservation_exact(xch, dom, 1, 0, &gfn), "page taken away");
    if ( xc_domain_getinfolist(xch, dom, 1, &info) != 1 || info.domain != dom )
        die("state of the domain");
    check((info.flags & XEN_DOMINF_shutdown) &&
          ((info.flags >> XEN_DOMINF_shutdownshift) & XEN_DOMINF_shutdownmask) == SHUTDOWN_crash,
          "the guest has been crashed");
    n = events(e, 64, counts);
    for ( i = 0; i < n && e[i].kind != LOST; i++ )
        ;
    check(i < n && e[i].view == view && e[i].addr == gfn && e[i].vcpu == 0xffff, "and it's said why");
}

/* What there is to do, and how many numbers after DOMID it takes. */
static const struct {
    const char *name;
    int takes;
} verbs[] = {
    { "api", 3 }, { "witness", 3 }, { "lost", 3 }, { "storm", 6 }, { "hold", 8 }, { "events", 0 },
    { "release", 0 }, { "word", 1 }, { "query", 1 },
};

int main(int argc, char **argv)
{
    uint64_t arg[8] = { 0 };
    struct guest guest = { 0 };
    unsigned int i;
    int takes = -1, k;

    for ( i = 0; argc > 2 && i < sizeof(verbs) / sizeof(*verbs); i++ )
        if ( !strcmp(argv[1], verbs[i].name) )
            takes = verbs[i].takes;
    if ( takes != argc - 3 )
    {
        fprintf(stderr, "usage: %s api|witness|lost DOMID GUEST\n"
                "       %s storm DOMID GUEST TEXT END SECONDS\n"
                "       %s hold DOMID GUEST TEXT END CURRENT_TASK PID COMM\n"
                "       %s events|release DOMID\n"
                "       %s word|query DOMID GFN\n"
                "GUEST: POKING_MM POKING_ADDR PGD_OFFSET\n", argv[0], argv[0], argv[0], argv[0], argv[0]);
        return 2;
    }

    xch = xc_interface_open(NULL, NULL, 0);
    call = xencall_open(NULL, 0);
    fmem = xenforeignmemory_open(NULL, 0);
    if ( !xch || !call || !fmem )
        die("open Xen's interfaces");
    dom = strtoull(argv[2], NULL, 0);
    for ( k = 0; k < takes; k++ )
        arg[k] = strtoull(argv[k + 3], NULL, 0);
    if ( takes > 1 )
        guest = (struct guest){
            .root = phys(read64(read64(arg[0]) + arg[2])),
            .addr = read64(arg[1]),
            .text = arg[3],
            .end = arg[4],
        };

    if ( !strcmp(argv[1], "api") )
        api(guest.root, guest.addr);
    else if ( !strcmp(argv[1], "witness") )
        witnesses(&guest);
    else if ( !strcmp(argv[1], "lost") )
        lost(guest.root, guest.addr);
    else if ( !strcmp(argv[1], "storm") )
        storm(&guest, arg[5]);
    else if ( !strcmp(argv[1], "hold") )
        hold(&guest, arg + 5);
    else if ( !strcmp(argv[1], "events") )
        print_events();
    else if ( !strcmp(argv[1], "query") )
        query(arg[0]);
    else if ( !strcmp(argv[1], "word") )
        word(arg[0]);
    else
        release();

    printf("%s\n", failed ? "FAILED" : "all ok");
    return failed ? 1 : 0;
}
