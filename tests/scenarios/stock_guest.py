# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian's kernel as it is, in QEMU without Xen: the attacks are real."""

from contextlib import contextmanager

from lab import TARGET, initramfs, kernel, victim
from lab.agent import Agent
from lab.qemu import Machine

from . import expect, scenario


class PlainGuest:
    """The guest's kernel and programs on QEMU's own virtual machine."""

    def __init__(self, machine):
        self.machine = machine
        self.run = Agent("guest", machine.line).run

    def trouble(self):
        """As of the lab's guest."""
        return self.run("dmesg | grep -E 'invalid opcode|Oops|BUG:|WARNING:|general protection'").out.splitlines()


@contextmanager
def world():
    """One boot of the guest's kernel."""
    (TARGET / "run").mkdir(parents=True, exist_ok=True)
    initrd = initramfs.guest(TARGET / "run" / "plain.cpio.gz")
    args = ["-cpu", "max", "-kernel", kernel.cloud().vmlinuz, "-initrd", initrd,
            "-append", "console=ttyS0 panic=-1 agent=ttyS1"]
    with Machine(args, TARGET / "run" / "plain.log", memory=512) as machine:
        Agent("guest", machine.line).wait_ready(300)
        guest = PlainGuest(machine)
        victim.prepare_attacks(guest)
        yield guest


@scenario
def work_is_right(guest):
    """The worker finds no wrong result on a stock kernel."""
    rc, out = guest.run("/usr/bin/payroll work 0 3")
    expect(rc == 0 and "done, checks" in out and "FAILED" not in out, out)


@scenario
def pointer_attack_runs(guest):
    """On stock text an overwritten function pointer makes uid 1000 root."""
    found = victim.attack(guest, "payroll", "pointer")
    expect(found.outcome == "ran", found)


@scenario
def return_attack_runs(guest):
    """On stock text an overwritten return address makes uid 1000 root."""
    found = victim.attack(guest, "guestbook", "return")
    expect(found.outcome == "ran", found)


@scenario
def attacks_leave_the_kernel_whole(guest):
    """The attacks do not crash the kernel by themselves: a later oops is the hardened text's."""
    expect(not guest.trouble(), guest.trouble())
    rc, out = guest.run("/usr/bin/guestbook work 1 2")
    expect(rc == 0 and "done" in out, out)


@scenario
def text_is_poked(guest):
    """The jump label and ftrace of the storm do change kernel text in this kernel."""
    pokes = victim.Pokes(guest)
    guest.run("sleep 4")
    rounds, hits = pokes.stop()
    expect(rounds > 0 and hits > 0, rounds, hits, guest.run("cat /tmp/pokes.err").out)
