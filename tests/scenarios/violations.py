# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a thunk stops is told to dom0, and then happens what the recipe says: kill, log or panic."""

import time
from contextlib import contextmanager

from lab import LabError, chain, programs, recorder, until, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
ACTIONS = ["kill", "log", "panic"]
PASSES = {"pointer": "forward-cfi", "return": "return-cfi"}
# The functions that the profile of the bundle `profile` lacks.
OUTSIDE = ["__x64_sys_mq_open", "__ia32_sys_mq_open", "do_mq_open"]
# What it probes: nothing but `uptime` makes this system call.
PROBED = "__x64_sys_sysinfo"
# Who calls what the attacker wrote, where no process is at work.
INTERRUPTS = {"timer": "__hrtimer_run_queues", "nmi": "nmi_handle"}


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

    def start_again(self):
        """A new guest in place of the one that panicked."""
        self.installer.stop_watching()
        guest = self.guest.successor()
        rc, out = self.lab.dom0.run(f"xl destroy {G}")
        expect(rc == 0, out)
        self.guest = guest
        guest.start()
        victim.prepare_attacks(guest)
        self.installer = None

    def attack(self, kind):
        """One attack from the untrusted program, and the first record that it made."""
        before = len(self.installer.events("violation"))
        found = victim.attack(self.guest, "guestbook", kind,
                              before=lambda pid: self.installer.wait_view(pid, "hardened"))
        return found, self.records(before)[0]

    def interrupt(self, kind):
        """A violation in an interrupt or an NMI of the untrusted program, and its first record."""
        before = len(self.installer.events("violation"))

        def send(cpu):
            if kind == "nmi":
                rc, out = self.lab.dom0.run(f"xl trigger {G} nmi {cpu}")
                expect(rc == 0, out)

        found = victim.attack(self.guest, "guestbook", kind, during=send,
                              before=lambda pid: self.installer.wait_view(pid, "hardened"))
        return found, self.records(before)[0]

    def records(self, before, timeout=60):
        """The violations behind the first `before`; at least one."""
        deadline = until(timeout)
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
        files += _signed(chain.emit(work / action, recipe=recipe), secret)
    names = {name for _, name in recorder.Symbols(work / "kill").all} - set(OUTSIDE)
    (work / "most.profile").write_text("".join(f"{name}\n" for name in sorted(names)))
    recipe = work / "profile.toml"
    recipe.write_text('schema = 1\n[pass.debloat]\nprofile = "most.profile"\n'
                      '[pass.probe]\nfunctions = "probed"\n')
    (work / "probed").write_text(f"{PROBED}\n")
    files += _signed(chain.emit(work / "profile", recipe=recipe), secret)
    leave = ("usr/bin/leave", programs.program("leave"), 0o755)
    with Lab.boot(xen, extra=files, guest_extra=[leave], name="violations", kaslr=True) as lab:
        lab.guest.start()
        victim.prepare_attacks(lab.guest)
        yield World(lab)


def _signed(bundle, secret):
    """A bundle's files for dom0."""
    chain.sign(bundle, secret)
    return [(f"p/{bundle.name}/{f.name}", f, 0o644) for f in bundle.iterdir() if f.is_file()]


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
def interrupts_report_and_go_on(w):
    """log, in an interrupt and in an NMI: the same report, once, with the caller's name; the guest goes on."""
    for kind, caller in INTERRUPTS.items():
        before = len(w.guest.trouble())
        found, record = w.interrupt(kind)
        expect(found.outcome == "no effect", kind, found.outcome, *found.oops)
        expect(record["pass"] == "forward-cfi" and record["action"] == "log", kind, record)
        expect(caller in str(record["site"]), kind, record)
        expect("noop_fsync" in str(record["target"]), kind, record)
        expect(record["view"] == "hardened" and record["process"]["pid"] == found.pid, kind, record)
        expect(len(w.guest.trouble()) == before, kind, w.guest.trouble()[before:])


@scenario
def who_leaves_the_profile_is_reported_and_killed(w):
    """debloat: a system call that the profile lacks is reported with its function, and the process dies; others do not
    notice."""
    w.apply("profile")
    before = len(w.installer.events("violation"))
    trouble = len(w.guest.trouble())
    expect("done" not in w.guest.run("/usr/bin/leave call").out)
    expect("done" in w.guest.run("/usr/bin/leave branch").out)
    records = w.records(before)
    expect(len(records) == 1, records)
    record = records[0]
    expect(record["pass"] == "debloat" and record["action"] == "kill", record)
    expect("__x64_sys_mq_open" in str(record["target"]) and record["view"] == "hardened", record)
    expect(record["process"]["comm"] == "leave", record)
    expect(any("invalid opcode" in line for line in w.guest.trouble()[trouble:]), w.guest.trouble())


@scenario
def probes_are_counted(w):
    """probe: each call of a chosen function by a process on the view is an event, with who it was; `events --count` sums
    them up."""
    trouble = len(w.guest.trouble())
    for _ in range(3):
        rc, out = w.guest.run("uptime")
        expect(rc == 0, out)
    deadline = until(60)
    while len(entered := w.installer.events("entered")) < 3:
        expect(time.monotonic() < deadline, entered)
        time.sleep(0.3)
    expect(all(one["function"]["symbol"] == PROBED and one["view"] == "hardened" for one in entered), entered)
    said = w.installer.json(f"events {G} --count --only entered")["counts"]
    expect(sum(one["count"] for one in said) == 3 and all(one["function"] == PROBED for one in said), said)
    # Who is gone before the watcher looks is known by its name only.
    expect(all(one["program"] in ("uptime", "/bin/busybox") for one in said), said)
    expect(len(w.guest.trouble()) == trouble, w.guest.trouble()[trouble:])


def _ends_the_guest(w, action, attack):
    """The report comes first, then the guest's kernel panics; once, and Xen runs on."""
    w.apply(action)
    before = len(w.installer.events("violation"))
    try:
        attack()
    except LabError:
        pass  # the guest is gone
    records = w.records(before)
    expect(records[0]["action"] == action and records[0]["pass"] == "forward-cfi", records)
    expect(len(records) < 5, "it recursed:", records)
    deadline = until(120)
    while "Kernel panic" not in w.guest.console():
        expect(time.monotonic() < deadline, "no panic:", w.guest.console()[-1500:])
        time.sleep(1)
    rc, out = w.lab.dom0.run("xl list")
    expect(rc == 0 and not w.lab.xen_trouble(), out, w.lab.xen_trouble())


@scenario
def panic_reports_and_ends_the_guest(w):
    """panic: the report comes first, then the guest's kernel panics; once, and Xen runs on."""
    _ends_the_guest(w, "panic", lambda: victim.attack(
        w.guest, "guestbook", "pointer", before=lambda pid: w.installer.wait_view(pid, "hardened"), timeout=20))


@scenario
def kill_in_an_nmi_ends_the_guest(w):
    """kill, where there is no process to kill: reported, then Linux panics as for any oops in an NMI."""
    w.start_again()
    _ends_the_guest(w, "kill", lambda: w.interrupt("nmi"))
