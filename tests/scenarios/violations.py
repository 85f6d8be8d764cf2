# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a thunk stops is told to dom0, and then happens what the recipe says: kill, log or panic."""

import time
from contextlib import contextmanager

from lab import LabError, chain, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
ACTIONS = ["kill", "log", "panic"]
PASSES = {"pointer": "forward-cfi", "return": "return-cfi"}


class World:
    """The booted lab with a bundle for each action."""

    def __init__(self, lab):
        self.lab = lab
        self.guest = lab.guest
        self.installer = None

    def apply(self, action):
        """Puts the bundle of one action in, in place of the one before."""
        if self.installer:
            self.installer.stop_watching()
            self.installer.run(f"remove {G}")
        self.installer = chain.Installer(self.lab, bundle=f"/p/{action}")
        self.installer.apply()

    def attack(self, kind):
        """One attack from the untrusted program, and the first record that it made."""
        before = len(self.installer.events("violation"))
        found = victim.attack(self.guest, "guestbook", kind,
                              before=lambda pid: self.installer.wait_view(pid, "hardened"))
        return found, self.records(before)[0]

    def records(self, before, timeout=60):
        """The violations behind the first `before`; at least one."""
        deadline = time.monotonic() + timeout
        while len(records := self.installer.events("violation")) <= before:
            expect(time.monotonic() < deadline, "no violation in the audit log")
            time.sleep(0.3)
        return records[before:]


@contextmanager
def world():
    """Three bundles, signed with one key."""
    chain.build_tools()
    xen = chain.build_xen()
    work = chain.WORK / "violations"
    _, policy, secret, public = chain.signed_chain(work)
    files = chain.dom0_files(None, [policy], [public])
    for action in ACTIONS:
        recipe = work / f"{action}.toml"
        recipe.write_text("schema = 1\n" + "".join(f'\n[pass.{name}]\non-violation = "{action}"\n'
                                                    for name in PASSES.values()))
        bundle = chain.emit(work / action, recipe=recipe)
        chain.sign(bundle, secret)
        files += [(f"p/{action}/{f.name}", f, 0o644) for f in bundle.iterdir() if f.is_file()]
    with Lab.boot(xen, extra=files, name="violations", kaslr=True) as lab:
        lab.guest.start()
        victim.prepare_attacks(lab.guest)
        yield World(lab)


def _complete(record, kind, found, action):
    """A record says all that it should."""
    expect(record["pass"] == PASSES[kind] and record["action"] == action, record)
    expect(record["process"]["pid"] == found.pid and record["process"]["comm"] == "guestbook", record)
    expect(record["view"] == "hardened", record)
    if kind == "pointer":
        # simple_attr_write() calls what the attacker wrote over its pointer: inside commit_creds().
        expect("simple_attr_write" in str(record["site"]), record)
        expect("commit_creds" in str(record["target"]), record)
    expect(int(str(record["value"]), 0) >> 32 == 0xffffffff, record)


@scenario
def kill_reports_and_kills(w):
    """kill: both attacks are reported with pass, place, value, process and view, and the process dies."""
    w.apply("kill")
    for kind in PASSES:
        found, record = w.attack(kind)
        expect(found.outcome == "caught", kind, found.outcome, *found.oops)
        _complete(record, kind, found, "kill")


@scenario
def log_reports_and_goes_on(w):
    """log: the same report, and the attack succeeds; the guest's kernel does not notice."""
    w.apply("log")
    for kind in PASSES:
        before = len(w.guest.trouble())
        found, record = w.attack(kind)
        expect(found.outcome == "ran", kind, found.outcome, *found.oops)
        _complete(record, kind, found, "log")
        expect(len(w.guest.trouble()) == before, w.guest.trouble()[before:])


@scenario
def panic_reports_and_ends_the_guest(w):
    """panic: the report comes first, then the guest's kernel panics; once, and Xen runs on."""
    w.apply("panic")
    before = len(w.installer.events("violation"))
    try:
        victim.attack(w.guest, "guestbook", "pointer",
                      before=lambda pid: w.installer.wait_view(pid, "hardened"), timeout=20)
    except LabError:
        pass  # the guest is gone
    records = w.records(before)
    expect(records[0]["action"] == "panic" and records[0]["pass"] == "forward-cfi", records)
    expect(len(records) < 5, "it recursed:", records)
    deadline = time.monotonic() + 120
    while "Kernel panic" not in w.guest.console():
        expect(time.monotonic() < deadline, "no panic:", w.guest.console()[-1500:])
        time.sleep(1)
    rc, out = w.lab.dom0.run("xl list")
    expect(rc == 0 and not w.lab.xen_trouble(), out, w.lab.xen_trouble())
