# SPDX-License-Identifier: MIT OR Apache-2.0
"""An installer that is killed or refused at any step: the guest runs on, on its own text or on whole
views, and the next start puts it right."""

import re

from contextlib import contextmanager

from lab import chain, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
APPLY = f"apply {G} --bundle /p/bundle --policy /p/payroll.toml --trust /p/key.pub.pem"
# What the shell says of a program that was ended by SIGABRT: the fault's own end.
ENDED = 128 + 6


class World:
    """The booted lab and the tools in its dom0."""

    def __init__(self, lab):
        self.lab = lab
        self.guest = lab.guest
        self.installer = chain.Installer(lab)
        self.workers = []
        self.before = None
        # Calls of an apply that change something.
        self.steps = 0

    def lab_installer(self, arguments, fault="", expect_rc=None):
        """The installer with a fault; returns (exit code, output)."""
        rc, out = self.lab.dom0.run(f"PENUMBRA_FAULT='{fault}' installer-lab {arguments}", 300)
        expect("panicked" not in out, out)
        if expect_rc is not None:
            expect(rc == expect_rc, f"`{arguments}` with `{fault}`: exit {rc}, expected {expect_rc}: {out}")
        return rc, out

    def steps_of(self, arguments):
        """The calls with which a command changes the guest, from 1: where to end it.  Of a row of the same
        calls (a batch each) the first and the last."""
        _, out = self.lab_installer(arguments, "tell", expect_rc=0)
        calls = re.findall(r"installer: calls (\w+)", out)
        self.steps = len(calls)
        return {n: call for n, call in enumerate(calls, 1)
                if n in (1, self.steps) or not calls[n - 2] == call == calls[n]}

    def runs(self):
        """The guest's work goes on, and nobody paused it."""
        state = self.lab.dom0.run(f"xl list {G} | tail -n 1").out.split()[4]
        expect("p" not in state and "c" not in state, "domain state", state)
        for worker in self.workers:
            worker.lives()

    def as_before(self, when):
        """Nothing is applied, and the text is the guest's own."""
        self.before = self.installer.own_text(self.before, when)
        expect(not self.installer.status()["applied"], when)
        self.runs()


@contextmanager
def world():
    """Builds everything and boots."""
    chain.build_tools()
    extra = chain.build_lab_installer()
    xen = chain.build_xen()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "failure")
    files = chain.dom0_files(bundle, [policy], [public])
    files.append(("usr/bin/installer-lab", extra, 0o755))
    with Lab.boot(xen, extra=files, name="failure", kaslr=True) as lab:
        lab.guest.start()
        w = World(lab)
        w.workers = [victim.Worker(lab.guest, name, cpu) for cpu, name in enumerate(("payroll", "guestbook"))]
        # See tests/demo: ftrace's first use changes static calls for good.
        victim.Pokes(lab.guest).stop()
        w.before = w.installer.host_text()
        yield w


@scenario
def xen_answers_as_the_fake_does(w):
    """Every question that the unit tests ask the fake gets the same answer from Xen."""
    rc, out = w.lab.dom0.run(f"installer-lab contract {G}", 120)
    expect(rc == 0 and "WRONG" not in out and out.count("ok: ") >= 12, rc, out)
    w.as_before("asked")


@scenario
def killed_before_every_call_of_an_apply(w):
    """The installer dies before each call in turn that changes the guest (of a row of batches the first and
    the last); every second time `remove` takes out what it left, else the next apply does."""
    steps = w.steps_of(f"{APPLY} --once")
    w.installer.run(f"remove {G}")
    w.as_before("not killed")
    expect(len(steps) >= 12, f"an apply has only these calls: {steps}")
    for number, (step, call) in enumerate(steps.items()):
        rc, out = w.lab_installer(f"{APPLY} --once", f"end {step}")
        w.runs()
        expect(rc == ENDED and f"ended before {call}" in out, f"step {step}: exit {rc}: {out}")
        if number % 2:
            w.installer.run(APPLY + " --once")
            w.installer.run(f"verify-text {G}")
        w.installer.run(f"remove {G}")
        w.as_before(f"killed before call {step}: {out}")
    print(f"        killed before {len(steps)} of {w.steps} calls: {', '.join(steps.values())}")


@scenario
def killed_before_every_call_of_a_remove(w):
    """The same for `remove`: repeated, it finishes the work, and once more it says that nothing is there."""
    applied = w.steps
    w.installer.run(APPLY + " --once")
    steps = w.steps_of(f"remove {G}")
    w.steps = applied
    expect("nothing was applied" in w.installer.run(f"remove {G}"), "removed twice")
    expect(len(steps) >= 4, f"a remove has only these calls: {steps}")
    for step in steps:
        w.installer.run(APPLY + " --once")
        rc, out = w.lab_installer(f"remove {G}", f"end {step}")
        expect(rc == ENDED, f"step {step}: exit {rc}: {out}")
        w.runs()
        w.installer.run(f"remove {G}")
        w.as_before(f"remove killed before call {step}: {out}")


@scenario
def killed_while_watching(w):
    """A watcher that dies before or after it binds leaves whole views; its bindings end with their
    processes, and the next apply takes over."""
    for step in (w.steps + 1, w.steps + 2):
        rc, out = w.lab.dom0.run(f"PENUMBRA_FAULT='end {step}' timeout 60 installer-lab {APPLY}", 300)
        if "ended before" not in out:
            # Nothing more to bind: it watched until it was stopped.
            expect(rc in (0, 143), rc, out)
        w.runs()
        w.installer.run(f"verify-text {G}")
        w.installer.apply()
        w.installer.wait_view(w.workers[0].pid, "fast")
        w.installer.stop_watching()
        w.installer.run(f"remove {G}")
        w.as_before(f"watcher killed before call {step}: {out}")


@scenario
def refusals_of_xen_are_said_and_undone(w):
    """No memory for the copies, no room for a view, a page that cannot be mapped, a range that cannot
    be hidden: exit 2, the reason, and nothing left."""
    for fault, words in (("populate 12", "MiB"), ("create_view 22", "create_view"), ("Remap 28", "Remap"),
                         ("Protect 12", "Protect"), ("Hide 16", "Hide"), ("Enable 5", "Enable")):
        _, out = w.lab_installer(f"{APPLY} --once", f"fail {fault}", expect_rc=2)
        expect(words in out, out)
        w.as_before(f"{fault}: {out}")


@scenario
def a_failing_call_does_not_end_the_watching(w):
    """One refused call while watching is said and tried again."""
    w.installer.apply(command="PENUMBRA_FAULT='fail Set 5' installer-lab")
    w.installer.wait_view(w.workers[0].pid, "fast", timeout=120)
    said = w.lab.dom0.run(f"cat {w.installer.log}.err").out
    expect("trying again" in said, said)
    w.installer.stop_watching()
    w.installer.run(f"remove {G}")
    w.as_before("watched with a failing call")


@scenario
def full_disk(w):
    """Without room for the journal nothing is done to the guest, or it is undone; and what is applied
    can be taken out with a full disk."""
    run = w.lab.dom0.run
    for size in ("4k", "8k", "16k"):
        rc, out = run(f"mkdir -p /run/small && mount -t tmpfs -o size={size} small /run/small && "
                      f"PENUMBRA_RUN=/run/small installer {APPLY} --once; rc=$?; umount /run/small; exit $rc", 300)
        expect(rc == 2 and "/run/small" in out, size, rc, out)
        w.as_before(f"{size}: {out}")
    w.installer.run(APPLY + " --once")
    run("dd if=/dev/zero of=/run/fill bs=64k 2>/dev/null")
    try:
        rc, out = run(f"installer remove {G}", 300)
        expect(rc == 0, rc, out)
    finally:
        run("rm -f /run/fill")
    w.as_before("removed with a full disk")


@scenario
def nobody_complained(w):
    """Neither Xen nor the guest's kernel printed an assertion or a warning in all of this."""
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())
    expect(not w.guest.trouble(), w.guest.trouble())
