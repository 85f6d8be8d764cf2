# SPDX-License-Identifier: MIT OR Apache-2.0
"""A plain Debian guest whose instructions are counted, on any variant's text.

No Xen: the guest runs in QEMU alone, one processor, and its kernel's text is replaced in its
memory, all of it, by what a variant's view would show (`installer fill`).  Every process and the
kernel itself then run on that variant.

`-icount shift=0` has QEMU's virtual clock, and with it the guest's time stamp counter, advance by
one for each instruction executed (QEMU's manual, "TCG Instruction Counting"); `sleep=off` skips
idle time.  Nothing depends on the host's speed.
"""

import json
import math
import time

from . import TARGET, LabError, chain, initramfs, kernel, programs
from .agent import Agent
from .gdb import Gdb
from .qemu import Machine

# Debian's kernels start their text at 16 MiB, physical and (nokaslr) by link address.
TEXT = 0x1000000
_PAGE = 4096
# What one packet of QEMU's gdbstub holds.
_PART = 1024

# MiB.
MEMORY = 512

# norandmaps: the same number of page tables for every process.
_CMDLINE = "console=ttyS0 panic=-1 agent=ttyS1 nokaslr norandmaps nowatchdog"

# The loop of known length: 1000 times two instructions, and what goes around them.
_LOOP = (2000, 2020)


class Guest:
    """One boot.  `with Guest(name) as guest: ...`"""

    def __init__(self, name, extra=()):
        self.folder = TARGET / "run" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        initrd = initramfs.guest(self.folder / "guest.cpio.gz",
                                 [("usr/bin/bench", programs.program("bench"), 0o755), *extra])
        self._gdb_path = self.folder / "gdb"
        self._gdb_path.unlink(missing_ok=True)
        self.machine = Machine(
            ["-icount", "shift=0,sleep=off", "-rtc", "clock=vm,base=2024-01-01", "-cpu", "max",
             "-gdb", f"unix:{self._gdb_path},server=on,wait=off", "-kernel", kernel.cloud().vmlinuz,
             "-initrd", initrd, "-append", _CMDLINE],
            self.folder / "console.log", memory=MEMORY, cpus=1)
        # What stands in the text now beyond what the kernel put there: the bytes' difference.
        self._difference = None

    def __enter__(self):
        try:
            agent = Agent("guest", self.machine.line)
            agent.wait_ready(300)
            self.run = agent.run
            code = self.run("grep 'Kernel code' /proc/iomem").out.split("-")[0].strip()
            if not code or int(code, 16) != TEXT:
                raise LabError(f"the guest's text is at {code or 'no known place'}, not at {TEXT:#x}")
        except BaseException:
            self.machine.close()
            raise
        return self

    def __exit__(self, *_):
        self.machine.close()

    def gdb(self):
        """QEMU's gdbstub; the machine must be stopped."""
        return Gdb(self._gdb_path)

    def _dump(self, size):
        path = self.folder / "text.dump"
        self.machine.qmp("pmemsave", val=TEXT, size=size, filename=str(path))
        return path

    def _write(self, old, new):
        with self.gdb() as gdb:
            for at in range(0, len(new), _PAGE):
                if old[at:at + _PAGE] != new[at:at + _PAGE]:
                    gdb.write_physical(TEXT + at, new[at:at + _PAGE])

    def _restore(self):
        """Takes a variant's edits and cave out; what the kernel wrote elsewhere meanwhile stays."""
        if self._difference is None:
            return
        size = len(self._difference)
        now = self._dump(size).read_bytes()
        back = _xor(now, self._difference)
        self._write(now, back)
        self._difference = None

    def put(self, bundle, variant):
        """The text of `variant` from now on; `None` is the kernel's own.  Returns the number of
        pages that a view would have of its own."""
        self.machine.qmp("stop")
        try:
            self._restore()
            if variant is None:
                return 0
            dump = self._dump((bundle / "text.bin").stat().st_size)
            filled = self.folder / "filled.text"
            said = chain.run([chain.tool("installer"), "fill", "--bundle", bundle, "--variant", variant,
                              "--text", dump, "--output", filled])
            old, new = dump.read_bytes(), filled.read_bytes()
            self._write(old, new)
            self._difference = _xor(old, new)
            return int(said.split()[1])
        finally:
            self.machine.qmp("cont")

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
        pid = self.run("(for i in 1 2 3; do cat /proc/self/maps > /dev/null; done; while :; do :; done) "
                       "> /dev/null & echo $!").out.strip()
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

    def trouble(self):
        """Lines of the kernel's log that a healthy kernel does not print."""
        return self.run("dmesg | grep -E 'invalid opcode|Oops|BUG:|WARNING:|general protection|"
                        "Penumbra:'").out.splitlines()


def _word(gdb, at):
    return int.from_bytes(gdb.read(at, 8), "little")


def _xor(a, b):
    both = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
    return both.to_bytes(len(a), "little")


def geometric_mean(values):
    """Of positive numbers."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(found, stock):
    """What each work costs, relative to `stock`, and their geometric mean."""
    each = {name: found[name] / stock[name] for name in stock}
    return each, geometric_mean(each.values())
