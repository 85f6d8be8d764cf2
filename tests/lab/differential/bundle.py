# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a bundle says about its variants: the text of each, thunks, slots, what branches may reach."""

import bisect
import copy
import json
import re

from .. import LabError, chain
from ..postcard import Reader
from ..slots import Bundle as Slots
from .text import REGISTERS

_REGISTER = re.compile(r"_(%s)(?=_|$)" % "|".join(REGISTERS))


def symbols(folder):
    """(offset, name) of each symbol of the text."""
    reader = Reader(folder / "symbols.postcard")
    found = reader.sequence(lambda: (reader.number(), reader.bytes().decode()))
    reader.end()
    return found


class Variant:
    """One variant's text in place of the running one."""

    def __init__(self, folder, variant, dump):
        slots = Slots(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        self.start = slots.start
        self.edits = {slots.start + at: edit for at, edit in getattr(slots, variant).items()}
        self.cave = tuple(int(manifest["cave"]["range"][end], 16) for end in ("start", "end"))
        self.traps = {int(trap["at"], 16): trap for trap in manifest["cave"]["traps"]}
        filled = folder / f"{variant}.text"
        chain.run([chain.tool("installer"), "fill", "--bundle", folder, "--variant", variant,
                   "--text", dump, "--output", filled])
        self.content = filled.read_bytes()
        # The bundle's folder holds what the bundle names and nothing else.
        filled.unlink()
        listed = chain.run(["nm", "--defined-only", folder / "cave.elf"])
        symbols = sorted((int(at, 16), kind, name) for at, kind, name in map(str.split, listed.splitlines()))
        self.thunks = {at: name for at, kind, name in symbols if kind == "T"}
        self.tables = {table["name"]: tuple(int(table["range"][end], 16) for end in ("start", "end"))
                       for table in manifest["cave"]["tables"]}
        self._starts = sorted(self.thunks)

    def with_text(self, content):
        """The same with another text."""
        if len(content) != len(self.content):
            raise LabError(f"a text of {len(content)} bytes, the kernel's has {len(self.content)}")
        other = copy.copy(self)
        other.content = content
        return other

    def bytes(self, at, length):
        """Some of its bytes."""
        return self.content[at - self.start:at - self.start + length]

    def thunk(self, at):
        """The name of the thunk that the cave's `at` lies in."""
        return self.thunks[self._starts[bisect.bisect_right(self._starts, at) - 1]]

    def thunk_of(self, slot):
        """The name of the thunk to which the slot at `slot` branches, or None."""
        edit = self.edits.get(slot)
        if edit is None or edit.content[-5] not in (0xe8, 0xe9):
            return None
        target = slot + len(edit.content) + int.from_bytes(edit.content[-4:], "little", signed=True)
        return self.thunk(target) if self.cave[0] <= target < self.cave[1] else None


def kind_of(thunk):
    """A thunk's name without the numbers, registers and addresses in it: its kind."""
    if thunk.startswith("promote_"):
        return "promote"
    return re.sub(r"_c?\d+(?=_|$)", "_N", _REGISTER.sub("_REG", thunk))

