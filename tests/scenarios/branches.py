# SPDX-License-Identifier: MIT OR Apache-2.0
"""Indirect branches of a running stock kernel go where the policy `typed` lets them.

The policy is made from the image alone.  Nothing of what is done here was looked at for it, and what it
forbids of this is a fault of it, not of the workload.
"""

from contextlib import contextmanager

from lab import TARGET, branches, chain, filled, kernel, packages, stress

from . import expect, scenario

FOLDER = TARGET / "run" / "branches"

# Reads what can be read without waiting; of files that do not end the next ones are not read.
_READ = ("find {} -type f ! -name kmsg ! -name 'trace_pipe*' ! -name 'kpage*' ! -name kcore ! -path '*/task/*' "
         "2>/dev/null | xargs -n 12 timeout 3 head -c 16384 > /dev/null 2>&1; true")
_TRACING = "/sys/kernel/tracing"

# Beside stress-ng's stressors: what a machine does when it is set up, looked at and taken apart.
WORK = {
    "proc": _READ.format("/proc/[a-z]* /proc/1 /proc/self"),
    "sys": _READ.format("/sys/kernel /sys/module /sys/devices /sys/fs /sys/bus /sys/kernel/tracing -xdev "
                        "-maxdepth 3"),
    "mounts": "mkdir -p /tmp/m/a /tmp/m/b && mount -t tmpfs none /tmp/m/a && echo x > /tmp/m/a/f && "
              "mount --bind /tmp/m/a /tmp/m/b && mount -o remount,ro /tmp/m/a && cat /tmp/m/b/f && "
              "umount /tmp/m/b && umount /tmp/m/a; for fs in cgroup2 debugfs securityfs bpf mqueue ramfs; do "
              "mkdir -p /tmp/m/$fs && mount -t $fs none /tmp/m/$fs && ls -R /tmp/m/$fs | head -200 > /dev/null "
              "&& umount /tmp/m/$fs; done; true",
    "sockets": "ping -c 2 127.0.0.1; ping6 -c 1 ::1; (echo hello | nc -l -p 7777 > /dev/null) & sleep 1; "
               "echo hello | nc -w 2 127.0.0.1 7777; ip addr; ip -6 route; ip link add dummy0 type dummy; "
               "ip rule; ip neigh; netstat -an > /dev/null; true",
    "tracing": f"cd {_TRACING} && for t in function function_graph nop; do echo vfs_read > set_ftrace_filter; "
               "echo $t > current_tracer; cat /proc/uptime; done; echo > set_ftrace_filter; "
               "for e in sched syscalls irq timer; do echo 1 > events/$e/enable; done; ls / > /dev/null; "
               "head -c 20000 trace > /dev/null; echo 0 > events/enable; "
               "echo 'p:penumbra do_sys_openat2' > kprobe_events && echo 1 > events/kprobes/enable; "
               "ls / > /dev/null; echo 0 > events/kprobes/enable; echo > kprobe_events; true",
    "module": "insmod /lib/modules/penumbra_bug.ko; lsmod; rmmod penumbra_bug; true",
    "namespaces": "unshare -m -u -i -n -p -f sh -c 'hostname x; ip link; mount -t proc proc /proc; ps' "
                  "> /dev/null; true",
    "devices": "dd if=/dev/urandom of=/dev/null bs=4k count=16; echo w > /proc/sysrq-trigger; "
               "stty -a < /dev/ttyS0; losetup -a; mdev -s; true",
}


class World:
    """A guest whose branches are written down, and the classes that its kernel's branches have."""

    def __init__(self, guest, classes, recorder):
        self.guest, self.classes, self.recorder = guest, classes, recorder
        self.booted = recorder.edges()

    def look(self, what):
        """What was seen so far; nothing of it may be forbidden."""
        edges = self.recorder.edges()
        seen = self.classes.summary(edges)
        packages.say(f"{self.guest.kernel.release}, {what}: " + ", ".join(f"{n} {of}" for of, n in seen.items()))
        expect(not seen["forbidden"], "\n".join(self.classes.forbidden(edges)))
        return edges

    def work(self, groups):
        """Everything above, and stress-ng's groups."""
        for name, command in WORK.items():
            rc, out = self.guest.run(command, 300)
            expect(rc == 0, name, rc, out)
        for group in groups:
            stress.run(self.guest, group)


@contextmanager
def recorded(which, name):
    """A guest of the kernel `which` that is recorded from its first instruction on."""
    chain.build_tools()
    folder = FOLDER / which.release
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "typed.toml"
    recipe.write_text('schema = 1\n[pass.forward-cfi]\npolicy = "typed"\n')
    classes = branches.Classes(chain.emit(folder / "bundle", vmlinuz=which.vmlinuz, recipe=recipe))
    recorder = branches.Recorder(folder, classes)
    with filled.Guest(name, which, qemu=("-cpu", "max", *recorder.qemu), extra=stress.files(),
                      libraries=packages.STRESS, memory=1024) as guest:
        yield World(guest, classes, recorder)


@contextmanager
def world():
    """One boot of the cloud kernel."""
    with recorded(kernel.cloud(), "branches") as one:
        yield one


@scenario
def a_known_branch_is_seen(w):
    """What reads a file of /proc calls the function that shows it, and the recorder sees it."""
    at = w.classes.symbols.address
    to = at("uptime_proc_show")
    expect(not [edge for edge in w.booted if edge[1] == to], "the kernel shows its uptime at boot")
    w.guest.run("cat /proc/uptime")
    names = {w.classes.symbols.name(site) for site, target in w.recorder.edges() if target == to}
    expect(names == {"seq_read_iter"}, names)


@scenario
def nothing_that_happens_is_forbidden(w):
    """Under work that the policy was not made for, each branch goes where its class lets it."""
    w.work(["messages", "processes"])
    edges = w.look("in all")
    expect(len(edges) > 2500 and len(edges - w.booted) > 500, len(edges), len(w.booted))


@scenario
def what_the_kernel_makes_direct_is_in_its_class(w):
    """Paravirt and static calls go, as the kernel has patched them, where their classes let them: as booted, and with
    every tracepoint on."""
    seen, size = set(), len(w.classes.text)
    for step in ["true", f"echo 1 > {_TRACING}/events/enable"]:
        rc, out = w.guest.run(step, 300)
        expect(rc == 0, step, rc, out)
        now = w.classes.made_direct(w.guest.text(size))
        expect(not (found := w.classes.forbidden_direct(now)), "\n".join(found[:20]))
        expect(now - seen, step)
        seen |= now
    w.guest.run(f"echo 0 > {_TRACING}/events/enable", 300)
    by = {}
    for site, _ in seen:
        by[w.classes.patched[site].by] = by.get(w.classes.patched[site].by, 0) + 1
    packages.say(f"{w.guest.kernel.release}, made direct: {len(seen)} edges at {len({site for site, _ in seen})} "
                 f"of {len(w.classes.patched)} branches, by {by}")
    expect(len(seen) > 2000, len(seen))
    # The comparison can fail.
    site = next(site for site, _ in sorted(seen) if w.classes.patched[site].by == "functions")
    expect(len(w.classes.forbidden_direct({(site, w.classes.start + 0x1000)})) == 1, hex(site))


@scenario
def an_edge_outside_its_class_is_found(w):
    """The comparison can fail: edges of one branch, taken for another's, are forbidden and named."""
    edges = sorted(w.recorder.edges())
    site, target = next(edge for edge in edges if w.classes.sites[edge[0]].by == "prototype"
                        and w.classes.start <= edge[1] < w.classes.end)
    own = w.classes.sites[site].entries
    others = {to - w.classes.start for _, to in edges if w.classes.start <= to < w.classes.end}.difference(own)
    expect(len(others) > 500, len(others))
    for other in others:
        wrong = (site, w.classes.start + other)
        found = w.classes.forbidden({(site, target), wrong})
        expect(len(found) == 1 and f"{site:#x}" in found[0] and f"{wrong[1]:#x}" in found[0], found)
    expect(w.classes.allows((site, target)), hex(site), hex(target))
