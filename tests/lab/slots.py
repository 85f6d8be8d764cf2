# SPDX-License-Identifier: MIT OR Apache-2.0
"""A bundle's slots: what each view has at them.

Edits are a sequence of {at: u32, slot: enum, bytes: sequence}; symbols come from the guest's own kallsyms.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from . import LabError
from .postcard import Reader

KINDS = ["call", "return", "indirect"]


@dataclass(frozen=True)
class Edit:
    """One slot's bytes in one view."""

    at: int      # offset in the text
    kind: str
    content: bytes


class Bundle:
    """The parts of a bundle that the scenarios look into."""

    def __init__(self, folder):
        self.folder = Path(folder)
        manifest = json.loads((self.folder / "manifest.json").read_text())
        start = manifest["text"]["start"]
        self.start = int(start, 16) if isinstance(start, str) else start
        self.text = (self.folder / "text.bin").read_bytes()
        self.hardened, self.fast = (self._edits(f"{name}.edits") for name in ("hardened", "fast"))

    def _edits(self, name):
        reader = Reader(self.folder / name)

        def edit():
            return Edit(reader.number(), KINDS[reader.number()], reader.bytes())

        edits = {edit.at: edit for edit in reader.sequence(edit)}
        reader.end()
        return edits

    def left_out(self):
        """The calls that `fast` does not make (pass `no-self-checks`), and what stands for them:
        {offset: bytes}."""
        return {edit.at: edit.content for edit in self.fast.values()
                if edit.kind == "call" and edit.content[0] != 0xe8}

    def telling(self):
        """A slot whose first four bytes differ in all three views, and what they are there:
        (offset, {view: bytes}).  Retpoline sites run as they are in the file."""
        for edit in self.hardened.values():
            other = self.fast.get(edit.at)
            if edit.kind != "indirect" or not other or len(edit.content) < 5:
                continue
            views = {"stock": self.text[edit.at:edit.at + 4], "fast": other.content[:4],
                     "hardened": edit.content[:4]}
            if len(set(views.values())) == 3:
                return edit.at, views
        raise LabError("no slot differs in all views")

    def slots_in(self, start, end, kind):
        """The hardened view's edits of one kind with offsets in [start, end)."""
        return [e for e in self.hardened.values() if start <= e.at < end and e.kind == kind]
