# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian's kernel as it is, in QEMU without Xen: the attacks are real."""

import json
import os
import subprocess
from contextlib import contextmanager

from lab import TARGET, chain, initramfs, kernel, victim
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
    initrd = initramfs.guest(TARGET / "run" / "plain.cpio")
    args = ["-cpu", "max", "-kernel", kernel.cloud().vmlinuz, "-initrd", initrd,
            "-append", "console=ttyS0 panic=-1 agent=ttyS1"]
    with Machine(args, TARGET / "run" / "plain.log", memory=512) as machine:
        Agent("guest", machine.line).wait_ready(300)
        guest = PlainGuest(machine)
        victim.prepare_attacks(guest)
        yield guest


def _cargo_test(dump, bundle):
    """installer's own tests over a dump of running text; their output."""
    argv = ["cargo", "test", "--release", "--locked", "--workspace", "--features", "installer/dump",
            "--test", "explain_dump"]
    env = os.environ | {"PENUMBRA_DUMP": str(dump), "PENUMBRA_BUNDLE": str(bundle)}
    done = subprocess.run(argv, cwd=chain.ROOT, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr[-3000:]


@scenario
def running_text_is_explained(guest):
    """Every byte of this kernel's running text, moved by KASLR, is explained; one changed byte is not."""
    slide = int(guest.run("grep ' _stext$' /proc/kallsyms").out.split()[0], 16) - 0xffffffff81000000
    expect(slide, "KASLR has not moved the kernel")
    code = guest.run("grep 'Kernel code' /proc/iomem").out.split("-")[0]
    chain.build_tools()
    bundle = chain.emit(TARGET / "run" / "plain.bundle")
    size = (bundle / "text.bin").stat().st_size
    dump = TARGET / "run" / "plain.json"
    guest.machine.qmp("pmemsave", val=int(code, 16), size=size, filename=str(dump.with_suffix(".full.bin")))
    dump.write_text(json.dumps({"slide": hex(slide)}))
    rc, out = _cargo_test(dump, bundle)
    expect(rc == 0 and "6 passed" in out, out)


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
