# SPDX-License-Identifier: MIT OR Apache-2.0
"""The view storm: live processes flipped between all views while they and the kernel work.

Each process checks its own results (tests/guest/load), the kernel's text is poked all the
time, and at the end every copy must still be explained by the guest's text.
"""

import random
import threading
import time
from contextlib import contextmanager

from . import LabError, chain, victim

# Flips of one call of `installer storm`, and after how many of these the text is verified.
PART = 10_000
VERIFIED = 2
# Where QEMU translates each instruction alone now and then, and for how long it does, and does not: seconds.  All the
# time would be too much: everything takes hundreds of times as long then, and timers alone ask for more than it does.
SLOW_PART = 500
WINDOW, BETWEEN = 0.1, 0.3


class Storm:
    """One storm in a booted lab; `report` is what was seen so far."""

    def __init__(self, lab, seed=None, say=lambda text: None, one_by_one=False):
        self.lab = lab
        self.say = say
        self.installer = chain.Installer(lab)
        self.seeds = random.Random(seed)
        self.loads = []
        self.pokes = None
        self.before = None
        self.slow = one_by_one
        self.begun = time.monotonic()
        self.report = {
            "schema": "penumbra.storm-report/v1", "ok": False, "seed": seed, "flips": 0, "per_view": {},
            "view_switches": 0, "pokes_mirrored": 0, "conflicts": 0, "poke_rounds": 0, "tracer_hits": 0,
            "failures": [], "guest_complaints": [], "xen_complaints": [], "copies_equal": None,
            "text_restored": None, "processes": [], "one_instruction_windows": 0, "one_instruction_seconds": 0,
            "seconds": 0, "flipping_seconds": 0}

    def begin(self):
        """Starts all loads, warms the tracer up, applies, starts the pokes."""
        guest = self.lab.guest
        # See tests/demo: ftrace's first use changes static calls for good.
        victim.Pokes(guest).stop()
        self.before = self.installer.host_text()
        self.loads = [victim.Load(guest, kind) for kind in victim.Load.KINDS]
        # One that the policy trusts: its children are flipped by the watcher.
        self.loads.append(victim.Worker(guest, "payroll", 0))
        self.say(self.installer.apply())
        self.pokes = victim.Pokes(guest)

    def _one_by_one(self, now):
        """Has QEMU translate each instruction alone, so that a flip may land before any; or not."""
        self.lab.machine.monitor(f"one-insn-per-tb {'on' if now else 'off'}")

    @contextmanager
    def _windows(self):
        """Does so in short windows for as long as the context is open, when it is wanted at all."""
        if not self.slow:
            yield
            return
        self._one_by_one(True)
        said = self.lab.machine.monitor("info jit")
        self._one_by_one(False)
        if "one-insn-per-tb: on" not in " ".join(said.split()):
            raise LabError(f"QEMU does not translate single instructions: {said[:300]}")
        done = threading.Event()

        def run():
            while not done.wait(BETWEEN):
                begun = time.monotonic()
                self._one_by_one(True)
                time.sleep(WINDOW)
                self._one_by_one(False)
                self.report["one_instruction_windows"] += 1
                self.report["one_instruction_seconds"] += time.monotonic() - begun

        windows = threading.Thread(target=run)
        windows.start()
        try:
            yield
        finally:
            done.set()
            windows.join()
            self.report["one_instruction_seconds"] = round(self.report["one_instruction_seconds"], 1)

    def flip(self, flips, go_on=lambda: True, longest_wait_us=1000):
        """Flips in parts until there are so many, something fails, or `go_on` says no."""
        with self._windows():
            self._flip(flips, go_on, longest_wait_us)

    def _flip(self, flips, go_on, longest_wait_us):
        pids = " ".join(f"--pid {load.pid}" for load in self.loads)
        report = self.report
        parts = 0
        while report["flips"] < flips and go_on() and not report["failures"]:
            part = min(SLOW_PART if self.slow else PART, flips - report["flips"])
            parts += 1
            verify = "" if parts % VERIFIED == 0 else "--no-verify"
            try:
                seen = self.installer.json(
                    f"storm {chain.GUEST} {pids} --flips {part} --seed {self.seeds.getrandbits(63)} "
                    f"--wait-us {longest_wait_us} {verify}", timeout=3600)
            except LabError as error:
                self.failed(str(error))
                break
            report["flipping_seconds"] = round(report["flipping_seconds"] + seen["seconds"], 1)
            for key in ("flips", "view_switches", "pokes_mirrored", "conflicts"):
                report[key] += seen[key]
            for view, count in seen["per_view"].items():
                report["per_view"][view] = report["per_view"].get(view, 0) + count
            self.say(f"{report['flips']:7} flips, {report['pokes_mirrored']} pokes, "
                     f"{report['flipping_seconds']:.0f} s, {len(report['failures'])} failures")

    def failed(self, what):
        """Writes a failure down."""
        self.report["failures"].append(what)
        self.say(f"FAILED: {what}")

    def end(self, remove=True):
        """Stops the pokes, looks at everything once more, takes the views out; returns the report."""
        report, guest = self.report, self.lab.guest
        for step in (self._end_pokes, self._look_at_loads, self._look_at_text):
            try:
                step(remove)
            except LabError as error:
                self.failed(str(error))
        try:
            report["guest_complaints"] = self._complaints(guest.trouble())
        except LabError as error:
            self.failed(str(error))
        report["xen_complaints"] = self.lab.xen_trouble()
        report["seconds"] = round(time.monotonic() - self.begun, 1)
        report["ok"] = bool(
            report["flips"] and report["pokes_mirrored"] and report["tracer_hits"] and not report["failures"]
            and not report["guest_complaints"] and not report["xen_complaints"] and not report["conflicts"]
            and report["copies_equal"] and report["text_restored"] is not False)
        return report

    def _complaints(self, lines):
        # A guest that gets one instruction at a time looks stuck to its own watchdogs.
        stuck = ("soft lockup", "detected stalls", "self-detected stall")
        return [l for l in lines if not (self.slow and any(word in l for word in stuck))]

    def _end_pokes(self, _remove):
        self.report["poke_rounds"], self.report["tracer_hits"] = self.pokes.stop(timeout=600)

    def _look_at_loads(self, _remove):
        for load in self.loads:
            load.wait_past(load.progress().rounds, timeout=300)
            now = load.progress()
            self.report["processes"].append(
                {"kind": load.program, "pid": now.pid, "rounds": now.rounds, "checks": now.checks})

    def _look_at_text(self, remove):
        verdict = self.installer.json(f"verify-text {chain.GUEST}", expect=(0, 1))
        self.report["copies_equal"] = verdict["explained"]
        if not verdict["explained"]:
            self.failed(f"the text is not explained: {verdict['text']}")
        if remove:
            self.installer.stop_watching()
            said = self.installer.run(f"remove {chain.GUEST}")
            self.report["text_restored"] = self._restored("stays in the guest's cave" in said)

    def _restored(self, hook_code_stays):
        """Is the text the guest's own again?  It may have switched some of its jump labels and static calls for good
        meanwhile, as when its clock turns out to be unstable under load; the report names the tables.  And `remove`
        may have said that the hook code stays, as a process stands in it."""
        now = self.installer.host_text()
        (digest, _, _), (digest_now, _, in_use) = self.before, now
        tables = chain.tables_changed(self.before, now)
        self.report["tables_changed_by_guest"] = sorted(tables)
        self.report["hook_code_stays"] = hook_code_stays
        same = digest == digest_now or chain.switched(self.before, now) or in_use and not tables
        return in_use == hook_code_stays and same
