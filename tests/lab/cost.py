# SPDX-License-Identifier: MIT OR Apache-2.0
"""A plain guest on any variant's text (see filled.py), whose instructions are counted.

One processor.  `-icount shift=0` has QEMU's virtual clock, and with it the guest's time stamp counter, advance by
one for each instruction executed (QEMU's manual, "TCG Instruction Counting"); `sleep=off` skips
idle time.  Nothing depends on the host's speed.
"""

import json
import math
import time

from . import LabError, filled, programs

# What one packet of QEMU's gdbstub holds.
_PART = 1024

_COUNTING = ["-icount", "shift=0,sleep=off", "-rtc", "clock=vm,base=2024-01-01", "-cpu", "max"]

# norandmaps: the same number of page tables for every process.
_CMDLINE = "norandmaps nowatchdog"

# The loop of known length: 1000 times two instructions, and what goes around them.
_LOOP = (2000, 2020)


class Guest(filled.Guest):
    """One boot of the cloud kernel.  `with Guest(name) as guest: ...`"""

    def __init__(self, name, extra=()):
        super().__init__(name, qemu=_COUNTING, append=_CMDLINE, cpus=1,
                         extra=[("usr/bin/bench", programs.program("bench"), 0o755), *extra])

    def measure(self, rounds):
        """Instructions per work, by its name: the median of `rounds`."""
        rc, out = self.run(f"/usr/bin/bench {rounds}", 1800)
        if rc:
            raise LabError(f"bench ended with {rc}: {out}\n{self.machine.log()[-3000:]}")
        found = {name: float(median) for name, median, *_ in map(str.split, out.splitlines())}
        loop = found.pop("loop")
        if not _LOOP[0] <= loop <= _LOOP[1]:
            raise LabError(f"the time stamp counter does not count instructions: {loop} for a loop of "
                           f"{_LOOP[0]}")
        return found

    def stack_in_user_mode(self, bundle):
        """The kernel stack of a process that computes in user mode after some system calls, from its
        lowest byte to its highest."""
        layout = json.loads((bundle / "manifest.json").read_text())["layout"]
        current = int(self.run("awk '$3 == \"current_task\" {print $1}' /proc/kallsyms").out, 16)
        pid = self.run("(while read line; do :; done < /proc/self/smaps; while :; do :; done) "
                       "> /dev/null 2>&1 & echo $!").out.strip()
        try:
            return self._stack(current, layout)
        finally:
            self.run(f"kill -9 {pid}")

    def _stack(self, current, layout):
        for _ in range(50):
            time.sleep(0.2)
            self.machine.qmp("stop")
            try:
                with self.gdb() as gdb:
                    if gdb.registers()["rip"] >= 1 << 47:
                        continue
                    task = _word(gdb, gdb.kernel_gs_base() + current)
                    start = _word(gdb, task + layout["task_struct.stack"])
                    return b"".join(gdb.read(start + at, _PART)
                                    for at in range(0, layout["const.THREAD_SIZE"], _PART))
            finally:
                self.machine.qmp("cont")
        raise LabError("no process was seen in user mode")


def _word(gdb, at):
    return int.from_bytes(gdb.read(at, 8), "little")


def geometric_mean(values):
    """Of positive numbers."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(found, stock):
    """What each work costs, relative to `stock`, and their geometric mean."""
    each = {name: found[name] / stock[name] for name in stock}
    return each, geometric_mean(each.values())
