# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which functions of the kernel a guest runs, for the profiles of the pass `debloat`.

QEMU translates a block of instructions when it is first about to run, and its log (`-d in_asm`) lists it
then.  Blocks that are not chained (`nochain`) are other ones to QEMU than those before, so from the
moment that both are switched on every block that runs is listed, once.  Nothing in the guest takes part,
so early code, NMIs and what ftrace must not trace are seen as well as the rest.
"""

import bisect
import json
import re

from . import LabError, filled
from .postcard import Reader

START = 0xffffffff81000000  # of the text, by link address
_UD2 = b"\x0f\x0b"
_BLOCK = re.compile(r"^0x(ffffffff8[0-9a-f]+):", re.M)


class Symbols:
    """The names in a bundle's text."""

    def __init__(self, bundle):
        start = int(json.loads((bundle / "manifest.json").read_text())["text"]["start"], 16)
        reader = Reader(bundle / "symbols.postcard")

        def symbol():
            return start + reader.number(), reader.bytes().decode()

        self.all = sorted(reader.sequence(symbol))
        reader.end()
        self._starts = [at for at, _ in self.all]
        self._count = {}
        for _, name in self.all:
            self._count[name] = self._count.get(name, 0) + 1

    def name(self, address):
        """A line of a profile for the function around `address`: its name, where no other function has
        it, else its address."""
        after = bisect.bisect_right(self._starts, address)
        if not after:
            return None
        at, name = self.all[after - 1]
        return name if self._count[name] == 1 else f"{at:#x}  # {name}"

    def address(self, name):
        """Where the one function of this name is."""
        return next(at for at, known in self.all if known == name)


class Recorder:
    """`with Recorder(guest, symbols) as recorder: ...`; then `recorder.lines()`."""

    def __init__(self, guest, symbols):
        self.guest, self.machine, self.symbols = guest, guest.machine, symbols
        self._path = guest.folder / "blocks.log"

    def __enter__(self):
        self._path.unlink(missing_ok=True)
        for command in (f"logfile {self._path}", "log in_asm,nochain"):
            if said := self.machine.monitor(command).strip():
                raise LabError(f"QEMU answers {said!r} to `{command}`")
        return self

    def __exit__(self, *_):
        if self.machine.process.poll() is None:
            self.machine.monitor("log none")

    def oops(self):
        """Ends a task as a thunk does that stops one: by an invalid instruction in a system call that
        nothing else uses."""
        at = self.symbols.address("__x64_sys_sysinfo")
        physical = at - START + filled.TEXT
        with self.guest.patched(physical, _UD2):
            rc, out = self.guest.run("uptime")
        if rc == 0:
            raise LabError(f"a system call went on behind an invalid instruction: {out}")

    def panic(self):
        """Ends the guest by a panic, and QEMU with it."""
        self.guest.run("(sleep 1; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")
        if not self.machine.wait_off(60):
            raise LabError("the guest lives on after a panic")

    def lines(self):
        """The functions that ran, a line of a profile each."""
        blocks = {int(at, 16) for at in _BLOCK.findall(self._path.read_text(errors="replace"))}
        if not blocks:
            raise LabError("no block of the kernel was recorded")
        return sorted({name for at in blocks if (name := self.symbols.name(at))})
