# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bindings follow processes: root reuse, exec, vfork, setuid, threads, KPTI's second root, one vCPU.

Each process looks from inside which view it is on (tests/guest/spaces.c): it reads a slot of the
kernel's text, whose bytes differ from view to view.
"""

from contextlib import contextmanager

from lab import chain, spaces
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
ROUNDS = 12


class World:
    """The booted lab with the views applied."""

    def __init__(self, lab, installer, slot):
        self.lab = lab
        self.guest = lab.guest
        self.installer = installer
        self.slot = slot

    def lapsed(self):
        """Bindings that Xen itself has dropped because a witness no longer held."""
        return len(self.installer.events("lapsed"))

    def drive(self, how, rounds=ROUNDS):
        """One run; nobody untrusted may ever have seen the fast view."""
        found = spaces.drive(self.guest, self.slot, how, rounds)
        expect(found["other"] == 0, "bytes of no view:", found)
        expect(found["untrusted_fast"] == 0, "untrusted processes on the fast view:", found)
        return found


@contextmanager
def booted(name, append="", vcpus=2):
    """A guest with the programs and their policy applied."""
    chain.build_tools()
    xen = chain.build_xen()
    # Both worlds of this kind may be made at the same time.
    work = chain.WORK / name
    bundle, _, secret, public = chain.signed_chain(work)
    policy = spaces.policy(work, secret)
    with Lab.boot(xen, extra=chain.dom0_files(bundle, [policy], [public]), guest_extra=spaces.files(),
                  guest_append=append, vcpus=vcpus, name=name, kaslr=True) as lab:
        lab.guest.start()
        installer = chain.Installer(lab, policy=policy.name)
        installer.apply()
        yield World(lab, installer, spaces.Slot(bundle, installer))


@contextmanager
def world():
    """Two vCPUs, no page-table isolation (the emulated processor needs none)."""
    with booted("spaces") as w:
        yield w


@scenario
def reused_roots_are_never_fast(w):
    """Trusted processes come and go so fast that their page-table roots are used again by untrusted ones:
    none of these ever sees the fast view, and Xen has caught reused roots."""
    before = w.lapsed()
    found = w.drive("exec")
    expect(found["bound"] == found["trusted"] == ROUNDS, "not all trusted ones became fast:", found)
    expect(found["untrusted"] >= 4 * ROUNDS, found)
    expect(w.lapsed() > before, "no root was used again: the scenario proves nothing", found)


@scenario
def vfork_shares_no_view(w):
    """The same with vfork, whose child runs on its parent's root until it executes something."""
    found = w.drive("vfork")
    expect(found["bound"] == ROUNDS, found)


@scenario
def exec_takes_the_view_away(w):
    """A fast process that executes an untrusted program: the program never sees the fast view."""
    found = w.drive("change")
    expect(found["bound"] == found["untrusted"] == ROUNDS, found)


@scenario
def giving_up_root_takes_the_view_away(w):
    """A fast process that gives up the user id its rule asks for loses the fast view, for good."""
    found = w.drive("setuid", 5)
    expect(found["bound"] == 5 and found["kept"] == 0, found)


@scenario
def threads_without_their_first(w):
    """Threads whose first one has ended: whatever view they have, nobody untrusted gets theirs."""
    w.drive("leader", 3)


@scenario
def the_text_is_explained(w):
    """After all of this every view is whole, and nobody complained."""
    w.installer.run(f"verify-text {G}")
    expect(not w.guest.trouble(), w.guest.trouble())
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())
