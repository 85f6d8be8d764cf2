# SPDX-License-Identifier: MIT OR Apache-2.0
"""Everything in a live kernel that writes kernel text, with the views in place.

While each writer's change stands every byte of every view must be explained.  What it leaves behind
shows in the next scenario's look at the text, and in the last one's.
"""

import re
import time
from contextlib import contextmanager

from lab import chain, programs, slots, until, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
F = victim.TRACED


class World:
    """The booted lab, and what the scenarios ask of it."""

    def __init__(self, lab, bundle):
        self.lab = lab
        self.guest = lab.guest
        self.installer = chain.Installer(lab)
        self.bundle = slots.Bundle(bundle)
        self.workers = []
        self.conflicts = 0

    def sh(self, script, timeout=900):
        """A script in the guest that must end with 0; its output."""
        rc, out = self.guest.run(f"cd /sys/kernel/tracing\n{script}", timeout)
        expect(rc == 0, f"{script}: {rc}: {out}")
        return out

    def explained(self, when):
        """Every view is the guest's text plus its edits, every byte."""
        verdict = self.installer.json(f"verify-text {G}", expect=(0, 1))
        text = verdict["text"]
        expect(verdict["explained"], when, text["unexplained"], [v["places"] for v in text["views"]])
        return text["changed_bytes"]

    def healthy(self):
        """No oops, no unexpected conflict, and the workers go on."""
        expect(not self.guest.trouble(), self.guest.trouble())
        expect(not self.lab.xen_trouble(), self.lab.xen_trouble())
        counters = self.installer.status()["counters"]
        expect(counters["conflicts"] == self.conflicts, counters)
        for worker in self.workers:
            worker.lives()


@contextmanager
def world():
    """Boots with one CPU of two: the kernel then runs without lock prefixes until the other comes."""
    chain.build_tools()
    xen = chain.build_xen()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "writers")
    extra = [("usr/bin/bpf", programs.program("bpf"), 0o755),
             ("lib/modules/penumbra_patch.ko", programs.module("penumbra_patch"), 0o644)]
    with Lab.boot(xen, extra=chain.dom0_files(bundle, [policy], [public]), guest_extra=extra,
                  guest_append="maxcpus=1", name="writers", kaslr=True) as lab:
        lab.guest.start()
        w = World(lab, bundle)
        w.sh("mount -t debugfs debugfs /sys/kernel/debug")
        victim.Pokes(lab.guest).stop()
        w.installer.apply()
        yield w


@scenario
def a_second_cpu_comes_and_goes(w):
    """The lock prefixes that a lone CPU has not are poked into every view when the second comes."""
    before = w.installer.status()["counters"]["pokes_mirrored"]
    cpu = "/sys/devices/system/cpu/cpu1/online"
    expect(w.sh("nproc").strip() == "1", "not alone")
    w.sh(f"echo 1 > {cpu}")
    expect(w.sh("nproc").strip() == "2", "no second CPU")
    w.explained("with two")
    pokes = w.installer.status()["counters"]["pokes_mirrored"] - before
    # One poke each, and there are thousands; a kernel that keeps its prefixes would make none.
    expect(pokes > 1000, pokes)
    w.workers = [victim.Worker(w.guest, name, n) for n, name in enumerate(("payroll", "guestbook"))]
    w.sh(f"echo 0 > {cpu}; echo 1 > {cpu}")
    expect(w.sh("nproc").strip() == "2", "it did not come back")
    w.healthy()


@scenario
def jump_labels_and_static_calls(w):
    """A static key and a tracepoint's static call, on and off."""
    for value in "10":
        w.sh(f"echo {value} > /proc/sys/kernel/sched_schedstats; echo {value} > events/sched/sched_switch/enable; "
             f"echo {value} > events/syscalls/sys_enter_openat/enable")
        w.explained(f"keys and tracepoints {value}")
    w.healthy()


def _probe(w, definition, name="probe"):
    """Arms a kprobe event, makes it hit, verifies, disarms; returns kprobes/list as it was meanwhile."""
    w.sh(f"echo '{definition}' > kprobe_events; echo 1 > events/kprobes/{name}/enable")
    # Optimised ones are so after a moment.
    w.sh("for i in 1 2 3 4 5; do stat / > /dev/null; usleep 200000; done")
    hits = int(w.sh(f"grep -c ' {name}: (' trace || true"))
    listed = w.sh("cat /sys/kernel/debug/kprobes/list")
    armed = w.installer.json(f"verify-text {G}", expect=(0, 1))
    w.sh(f"echo 0 > events/kprobes/{name}/enable; echo > kprobe_events; echo > trace")
    expect(hits > 0, definition, "does not hit;", listed)
    # A breakpoint stands in the text, and no table of the image says why: named, or explained.
    named = " ".join(armed["text"]["unexplained"])
    expect(armed["explained"] or F in named, armed["text"])
    for view in armed["text"]["views"]:
        expect(view["differing"] == 0, definition, "armed:", view)
    return listed


def _inside(w):
    """An address in F that is no ftrace site: the instruction behind it."""
    sites = w.bundle.text
    lines = w.sh(f"grep -w -A1 {F} /proc/kallsyms").splitlines()
    start, end = (int(line.split()[0], 16) for line in lines[:2])
    slide = int(w.installer.status()["slide"], 16)
    offset = start - slide - w.bundle.start
    # `call __fentry__` (e8), behind an endbr64 or not.
    first = 4 if sites[offset] != 0xe8 else 0
    return offset, end - start, first + 5


@scenario
def probes_of_ordinary_functions(w):
    """A kprobe by ftrace, one by a breakpoint (or a jump, once optimised), and a kretprobe."""
    _probe(w, f"p:probe {F}")
    _, _, inside = _inside(w)
    listed = _probe(w, f"p:probe {F}+{inside}")
    expect("FTRACE" not in listed, listed)
    _probe(w, f"r:probe {F}")
    w.healthy()


@scenario
def optimised_probes(w):
    """A probe that the kernel makes a jump: on and off, many times over one function's entry path."""
    _, size, inside = _inside(w)
    optimised = 0
    for at in range(inside, min(size, inside + 40)):
        rc, _ = w.guest.run(f"echo 'p:probe {F}+{at}' > /sys/kernel/tracing/kprobe_events")
        if rc:
            continue  # no instruction begins there
        listed = _probe(w, f"p:probe {F}+{at}")
        optimised += "OPTIMIZED" in listed
        if optimised:
            break
    expect(optimised, "the kernel optimised none of them:", listed)
    w.healthy()


@scenario
def probes_on_edited_slots(w):
    """A kprobe on a return site that the hardened view has edited, defined and taken away by processes on
    either view: it hits in both, `remove` is refused meanwhile, and then each view has its own bytes again."""
    offset, size, _ = _inside(w)
    sites = w.bundle.slots_in(offset, offset + size, "return")
    expect(sites, f"{F} has no return site")
    definition = f"p:probe {F}+{sites[-1].at - offset}"
    hand = victim.Hand(w.guest, "payroll")
    w.installer.wait_view(hand.pid, "fast")
    tracing = "/sys/kernel/tracing"

    def shell(file, text):
        return w.guest.run(f"echo '{text}' > {file}")[0]

    for define in (shell, hand.write):
        for take in (shell, hand.write):
            case = f"defined by {define.__name__}, taken away by {take.__name__}"
            rc = define(f"{tracing}/kprobe_events", definition)
            expect(rc == 0, case, rc)
            rc = define(f"{tracing}/events/kprobes/probe/enable", "1")
            expect(rc == 0, case, rc)
            w.sh("for i in 1 2 3; do stat / > /dev/null; stat /none > /dev/null 2>&1 || true; done")
            for worker in w.workers:
                worker.lives()
            hits = int(w.sh("grep -c ' probe: (' trace || true"))
            # The returns of one function: whichever a call takes, the last in the text is one of them.
            print(f"        {case}: {hits} hits")
            displaced = w.installer.status()["counters"]["displaced"]
            expect(displaced > 0, case, "nothing displaced")
            refusal = w.installer.run(f"remove {G}", expect=2)
            expect("kprobes/list" in refusal, refusal)
            rc = take(f"{tracing}/events/kprobes/probe/enable", "0")
            expect(rc == 0, case, rc)
            w.explained(case)
            counters = w.installer.status()["counters"]
            expect(counters["displaced"] == 0, case, counters)
            expect(not w.guest.trouble(), w.guest.trouble())
            w.sh("echo > kprobe_events; echo > trace")
    w.conflicts = w.installer.status()["counters"]["conflicts"]
    w.healthy()


@scenario
def bpf_programs(w):
    """BPF on fentry, fexit (a trampoline each), kprobe and kretprobe: attached, hit, detached."""
    kinds = ("fentry", "fexit", "kprobe", "kretprobe")
    wait = "for i in $(seq 100); do grep -q {0} {1} && break; usleep 100000; done; cat {1}"
    for kind in kinds:
        w.guest.run(f"bpf {kind} {F} /tmp/bpf.go > /tmp/bpf.{kind} 2>&1 &")
        out = w.sh(wait.format(".", f"/tmp/bpf.{kind}"))
        expect("attached" in out, kind, out)
    w.explained("BPF attached")
    w.sh("touch /tmp/bpf.go")
    for kind in kinds:
        out = w.sh(wait.format("hits", f"/tmp/bpf.{kind}"))
        hits = re.search(r"hits (\d+)", out)
        expect(hits and int(hits[1]) >= 10, kind, out)
    w.explained("BPF detached")
    w.healthy()


@scenario
def a_live_patch(w):
    """A live patch of /proc/cmdline: loaded, in effect everywhere, disabled, unloaded."""
    patch = "/sys/kernel/livepatch/penumbra_patch"
    settled = f"for i in $(seq 600); do [ \"$(cat {patch}/transition 2>/dev/null)\" = 0 ] && break; " \
              "usleep 100000; done"
    w.sh(f"insmod /lib/modules/penumbra_patch.ko; {settled}; [ $(cat {patch}/transition) = 0 ]")
    expect("live patched" in w.sh("cat /proc/cmdline"), "not in effect")
    w.explained("patched")
    w.sh(f"echo 0 > {patch}/enabled; for i in $(seq 600); do [ -e {patch} ] || break; usleep 100000; done; "
         "rmmod penumbra_patch")
    expect("console=" in w.sh("cat /proc/cmdline"), "still in effect")
    trouble = [line for line in w.guest.trouble() if "livepatch" not in line]
    expect(not trouble, trouble)


@scenario
def modules_come_and_go(w):
    """A module loaded, used and unloaded, twenty times."""
    w.sh("load module 20")
    w.explained("unloaded")
    w.healthy()


@scenario
def ftrace_of_all_functions(w):
    """The function tracer on every function, then off."""
    w.sh("echo > set_ftrace_filter; echo > trace; echo function > current_tracer; sleep 1; "
         "echo 0 > tracing_on")  # the trace of everything has no end
    # Its last lines: the write to tracing_on, by a shell on the hardened view.
    tail = w.sh("tail -n 5000 trace > /tmp/tail; grep -c ' sh-.* vfs_write <-' /tmp/tail || true; "
                "sed 's/.*: //; s/ <-.*//' /tmp/tail | sort -u | wc -l; tail -n 3 /tmp/tail")
    hits, functions, *last = tail.split("\n")
    expect(int(hits) > 0 and int(functions) > 50, f"{hits} hits, {functions} functions", last)
    changed = w.explained("ftrace on")
    w.sh("echo nop > current_tracer; echo > trace; echo 1 > tracing_on")
    off = w.explained("ftrace off")
    # In the file each site is a call, too: its first byte is as there while ftrace is on.
    expect(off - changed > 30_000, "changed bytes with ftrace", changed, "without", off)
    w.healthy()


@scenario
def function_graph(w):
    """The function graph tracer, whose returns go to return_to_handler, on some hundred functions, then off."""
    w.sh("echo 'vfs_*' > set_ftrace_filter; echo function_graph > current_tracer; stat / > /dev/null; "
         "echo 0 > tracing_on")
    expect(int(w.sh(f"grep -c {F} trace || true")) > 0, "no hit")
    w.explained("function graph on")
    w.sh("echo nop > current_tracer; echo > set_ftrace_filter; echo > trace; echo 1 > tracing_on")
    w.healthy()


SECOND_WRITER = f"""\
cd /sys/kernel/tracing
while [ ! -e /tmp/second.stop ]; do
    echo 'r:second {F}' >> kprobe_events; echo 1 > events/kprobes/second/enable
    stat / > /dev/null
    echo 0 > events/kprobes/second/enable; echo '-:second' >> kprobe_events
    echo 1 > events/sched/sched_switch/enable; echo 0 > events/sched/sched_switch/enable
    echo . >> /tmp/second.count
done
"""


@contextmanager
def _two_writers(w):
    w.guest.run("rm -f /tmp/second.*")
    w.guest.run(f"cat > /tmp/second.sh <<'EOS'\n{SECOND_WRITER}EOS\nsh /tmp/second.sh > /tmp/second.err 2>&1 &")
    pokes = victim.Pokes(w.guest)
    try:
        yield pokes
    finally:
        w.guest.run("touch /tmp/second.stop")
        pokes.stop(timeout=300)


def _wait_for_rounds(w, pokes, rounds, timeout=300):
    deadline = until(timeout)
    while pokes.rounds() < rounds or int(w.sh("wc -l < /tmp/second.count")) < rounds:
        expect(time.monotonic() < deadline, "the writers make no progress", w.sh("cat /tmp/second.err"))
        time.sleep(0.5)


@scenario
def two_writers_at_once(w):
    """Two processes poke text at the same time; every view follows."""
    with _two_writers(w) as pokes:
        _wait_for_rounds(w, pokes, 5)
        counters = w.installer.status()["counters"]
        expect(counters["conflicts"] == w.conflicts, counters)
    w.explained("two writers")
    w.healthy()


@scenario
def remove_and_apply_while_text_is_poked(w):
    """remove, and a new apply, while two processes poke text all the time, twice."""
    with _two_writers(w) as pokes:
        for _ in range(2):
            rounds = pokes.rounds()
            w.installer.stop_watching()
            w.installer.run(f"remove {G}")
            _wait_for_rounds(w, pokes, rounds + 2)
            w.installer.apply()
            rounds = pokes.rounds()
            _wait_for_rounds(w, pokes, rounds + 2)
    w.explained("applied anew")
    w.conflicts = 0
    w.healthy()
