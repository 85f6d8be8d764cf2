# SPDX-License-Identifier: MIT OR Apache-2.0
"""The lab: the real Xen, a Debian dom0 and a Debian guest inside QEMU's TCG.

Nothing here needs hardware virtualisation, a network at run time, or anything
installed beyond what `lab.packages` installs by name.  Everything downloaded or
built is kept under `target/lab`, so a second run only boots.

    packages   Debian packages: installed, or downloaded and only unpacked
    kernel     where the kernels' files are
    programs   the guest's programs and the module with the planted bug
    cpio       the initramfs archive format
    initramfs  what dom0 and the guest find in their root file system
    agent      commands and their results over a serial line
    qemu       QEMU processes: started, watched, always ended
    lab        dom0 and guest together, as the scenarios see them
    chain      the tools, as a user runs them
    victim     what runs in the guest: load, attacks, text pokes
    postcard   a bundle's tables, read
    forward    what a bundle says of its indirect branches
    slots      what a bundle's views have at their slots
    spaces     processes that see from inside which view they are on
    gdb        QEMU's gdbstub: physical memory, breakpoints, registers
    filled     a guest without Xen, of any kernel, on any variant's text
    cost       the same, whose instructions are counted
    stress     stress-ng in a guest: a mix of what kernels do
    fuzz       the fuzz targets: built, seeded, run
    differential   functions on stock text and on a variant, in an emulator, compared
    storm      live processes flipped between all views
"""

import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "target" / "lab"

# How much longer than on a machine of its own a lab is waited for: `tests/run` has several at a time.
PATIENCE = float(os.environ.get("PENUMBRA_PATIENCE", "1"))


class LabError(Exception):
    """The lab could not do what was asked; the message says what and where to look."""


def until(seconds):
    """The moment (of `time.monotonic`) until which to wait for what takes at most so long on a machine of its own."""
    return time.monotonic() + seconds * PATIENCE
