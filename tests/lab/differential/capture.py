# SPDX-License-Identifier: MIT OR Apache-2.0
"""The memory of a booted guest, and the registers that say how to look at it."""

import json
import mmap
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .. import TARGET, LabError, cost, filled, kernel, packages

PAGE = 4096

# What the kernel's own data says about it.
_SYMBOLS = ["init_top_pgt", "page_offset_base", "_text", "__bss_stop"]

# Where the kernel is linked, less where it lies (nokaslr).
LINKED = 0xffffffff80000000

# Something of everything that a kernel has objects for, so that there are some.
_BUSY = """\
mkdir -p /tmp/d && mount -t tmpfs t /tmp/d && echo x > /tmp/d/f
find /proc /sys -maxdepth 3 > /dev/null 2>&1
sleep 600 | cat > /dev/null 2>&1 &
sleep 1
"""


@dataclass(frozen=True)
class Capture:
    """A guest that was stopped."""

    memory: Path       # all its physical memory
    registers: dict    # cr0, cr3, cr4, efer, gs
    page_offset: int   # where the kernel maps all physical memory
    data: tuple        # physical start and end of the kernel's own data

    def map(self):
        """The memory as it was, in a copy that may be written to."""
        with open(self.memory, "rb") as file:
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def text(self, length):
        """The running text."""
        with open(self.memory, "rb") as file:
            file.seek(filled.TEXT)
            return file.read(length)


def capture(say=lambda text: None):
    """The guest's memory; boots one if there is none of this kernel yet."""
    which = kernel.cloud()
    folder = TARGET / "differential" / f"{which.release}_{which.version}"
    with packages.locked("differential"):
        if not (folder / "machine.json").exists():
            say("booting a guest for its memory")
            folder.mkdir(parents=True, exist_ok=True)
            _boot(folder)
    known = json.loads((folder / "machine.json").read_text())
    return Capture(folder / "memory", known["registers"], known["page_offset"], tuple(known["data"]))


def _boot(folder):
    with cost.Guest("differential-guest") as guest:
        guest.run(_BUSY)
        wanted = " ".join(f"-e {name}" for name in _SYMBOLS)
        listed = guest.run(f"grep -w {wanted} /proc/kallsyms").out
        symbols = {name: int(at, 16) for at, _, name in map(str.split, listed.splitlines())}
        guest.machine.qmp("stop")
        for _ in range(100):
            told = guest.machine.monitor("info registers")
            if "CPL=0" in told:
                break
            # In user mode GS is the program's.
            guest.machine.qmp("cont")
            guest.machine.qmp("stop")
        else:
            raise LabError("the guest is never seen in its kernel")
        whole, part = folder / "memory.whole", folder / "memory.part"
        guest.machine.qmp("pmemsave", val=0, size=filled.MEMORY << 20, filename=str(whole))
    subprocess.run(["cp", "--sparse=always", whole, part], check=True)
    whole.unlink()
    part.rename(folder / "memory")
    found = dict(re.findall(r"(CR0|CR4|EFER)=([0-9a-f]+)", told))
    found["GS"] = re.search(r"^GS =\S+ ([0-9a-f]+)", told, re.M)[1]
    registers = {name.lower(): int(value, 16) for name, value in found.items()}
    # The kernel's own page tables: no process's memory, and none of page-table isolation.
    registers["cr3"] = symbols["init_top_pgt"] - LINKED
    with open(folder / "memory", "rb") as file:
        file.seek(symbols["page_offset_base"] - LINKED)
        page_offset = int.from_bytes(file.read(8), "little")
    data = [symbols["init_top_pgt"] - LINKED, symbols["__bss_stop"] - LINKED]
    (folder / "machine.json").write_text(json.dumps(
        {"registers": registers, "page_offset": page_offset, "data": data}, indent=1) + "\n")
