# SPDX-License-Identifier: MIT OR Apache-2.0
"""The same with page-table isolation (two roots per process) on a single vCPU."""

from contextlib import contextmanager

from . import address_spaces, expect, scenario


@contextmanager
def world():
    """pti=on, one vCPU."""
    with address_spaces.booted("spaces-pti", append="pti=on", vcpus=1) as w:
        # PTI can be seen in the flags that the kernel gives each CPU.
        rc, out = w.guest.run("grep -m1 -ow pti /proc/cpuinfo")
        expect(rc == 0, "the kernel has no page-table isolation:", out)
        yield w


@scenario
def both_roots_are_one_process(w):
    """With the user's half and the kernel's half of the page tables, trusted programs become fast, and no
    untrusted one ever is."""
    before = w.lapsed()
    found = w.drive("exec")
    expect(found["bound"] == found["trusted"], found)
    expect(w.lapsed() > before, "no root was used again: the scenario proves nothing", found)
    w.drive("vfork", 5)


@scenario
def exec_and_setuid_too(w):
    """exec and setuid take the view away here too."""
    w.drive("change", 5)
    found = w.drive("setuid", 3)
    expect(found["kept"] == 0, found)
    expect(not w.guest.trouble(), w.guest.trouble())
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())
