# SPDX-License-Identifier: MIT OR Apache-2.0
"""The hypervisor's interface itself, driven from dom0 without the installer (xen-patches/test)."""

import json
import re
import subprocess
from contextlib import contextmanager

from lab import ROOT, TARGET, LabError, chain, victim
from lab.lab import Lab

from . import expect, scenario

SOURCES = ROOT / "xen-patches" / "test"
SYMBOLS = ["poking_mm", "poking_addr", "_stext", "_etext"]


def _program():
    """binding-check, built against this machine's Xen headers."""
    target = TARGET / "guest" / "binding-check"
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", target, *SOURCES.glob("*.c"),
                           "-lxenctrl", "-lxencall", "-lxenforeignmemory"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"binding-check does not build:\n{done.stderr}")
    return target


class World:
    """The booted lab with a guest at work, and where its kernel keeps what the checks need."""

    def __init__(self, lab, pgd):
        self.lab = lab
        self.pgd = pgd
        wanted = "|".join(SYMBOLS)
        out = lab.guest.run(f"grep -E ' ({wanted})$' /proc/kallsyms").out
        self.at = {name: f"0x{at}" for at, name in re.findall(r"^(\w+) \w (\w+)$", out, re.M)}
        expect(set(self.at) == set(SYMBOLS), out)

    def check(self, verb, *more, timeout=300):
        """Runs one group of checks; all must be ok."""
        guest = f"{self.at['poking_mm']} {self.at['poking_addr']} {self.pgd}"
        rc, out = self.lab.dom0.run(
            f"binding-check {verb} {self.lab.guest.domid()} {guest} {' '.join(map(str, more))}", timeout)
        lines = out.splitlines()
        failed = [line for line in lines if line.startswith("FAIL")]
        expect(rc == 0 and not failed and lines[-1:] == ["all ok"],
               f"binding-check {verb} ended with {rc}:", *(failed or lines[-30:]))
        expect(not self.lab.xen_trouble(), *self.lab.xen_trouble())
        return out


@contextmanager
def world():
    """Xen, dom0 with binding-check, a guest that switches between processes."""
    chain.build_tools()
    xen = chain.build_xen()
    bundle = chain.emit(chain.WORK / "interface" / "bundle")
    layout = json.loads((bundle / "manifest.json").read_text())["layout"]
    files = [("usr/bin/binding-check", _program(), 0o755)]
    # With pti=on a process has a pair of roots.
    with Lab.boot(xen, extra=files, guest_append="pti=on", name="interface") as lab:
        lab.guest.start()
        for kind in ("pipe", "file"):
            victim.Load(lab.guest, kind)
        yield World(lab, layout["mm_struct.pgd"])


@scenario
def each_action_is_refused_or_done(w):
    """api: every bad argument is refused with its error, and each action does what it says."""
    expect(w.check("api").count("ok ") > 50, "few checks ran")


@scenario
def bindings_lapse_with_their_witnesses(w):
    """witness: a binding ends by itself when a word that it depends on changes."""
    w.check("witness")


@scenario
def copies_follow_the_guest(w):
    """storm: two copies of the whole text equal the guest's after 20 s of view changes and pokes."""
    pokes = victim.Pokes(w.lab.guest)
    w.check("storm", w.at["_stext"], w.at["_etext"], 20)
    rounds, _ = pokes.stop(timeout=300)
    expect(rounds > 0, "nothing was poked")


@scenario
def a_lost_page_crashes_the_guest(w):
    """lost: a page that a bound view needs is taken away: the guest is crashed, not run on other text."""
    w.check("lost")
