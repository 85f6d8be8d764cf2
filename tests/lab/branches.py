# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where the indirect branches of a running kernel go, and whether a bundle's classes let them.

QEMU's translator runs a plugin (branches.c) before each branch through a retpoline of the kernel's text.
Nothing in the guest takes part, and the guest's kernel is the stock one: what the classes would have stopped
happens, and is written down.
"""

import json

from . import LabError, programs
from .forward import forward_sets
from .recorder import Symbols

_THUNK = "__x86_indirect_thunk_"
_REGISTERS = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16))}
# What decides a class that is typed.
_BY_TYPE = {"functions", "prototype", "prototypes"}


class Classes:
    """What a bundle claims of each indirect branch, by link address.  That its thunks let exactly this
    through is the checker's to prove."""

    def __init__(self, bundle):
        manifest = json.loads((bundle / "manifest.json").read_text())
        self.start, self.end = (int(manifest["text"][name], 16) for name in ("start", "end"))
        self.symbols = Symbols(bundle)
        self._thunks = {}
        for at, name in self.symbols.all:
            if name.startswith(_THUNK):
                self._thunks.setdefault(at, set()).add(name.removeprefix(_THUNK))
        self.text = (bundle / "text.bin").read_bytes()
        sets = forward_sets(bundle)
        self.sites = {self.start + at: one for at, one in sets.classes.items()}
        self.patched = {self.start + at: one for at, one in sets.patched.items()}
        trampolines = "__static_call_text_start", "__static_call_text_end"
        self._trampolines = range(*(self.symbols.address(name) for name in trampolines))
        self._return = self.symbols.address("__x86_return_thunk")

    def _register(self, at):
        """The register that holds the target: the branch's thunk is named after it."""
        offset = at - self.start
        prefix = self.text[offset] == 0x2e
        rel = int.from_bytes(self.text[offset + prefix + 1:offset + prefix + 5], "little", signed=True)
        thunk = at + prefix + 5 + rel
        # The table of all thunks starts with the first one.
        names = self._thunks.get(thunk, set())
        if not names & _REGISTERS:
            raise LabError(f"no retpoline stands at {thunk:#x}, where {at:#x} goes")
        return (names & _REGISTERS).pop()

    def write_sites(self, path):
        """The branches for the plugin."""
        path.write_text("".join(f"{at:x} {self._register(at)}\n" for at in sorted(self.sites)))

    def allows(self, edge):
        """Whether the branch lets the target through: what lies outside the text passes."""
        site, target = edge
        outside = not self.start <= target < self.end
        return outside or target - self.start in self.sites[site].entries

    def forbidden(self, edges):
        """The edges that would be stopped, for people."""
        name = self.symbols.name
        return [f"{name(site)} ({site:#x}) -> {name(to)} ({to:#x}): {self.sites[site].by}"
                for site, to in sorted(edges) if not self.allows((site, to))]

    def made_direct(self, text):
        """(branch, target) of all that a running kernel has made direct in its text: paravirt and static calls."""
        found = set()
        for at in self.patched:
            code = text[at - self.start:at - self.start + 5]
            target = at + 5 + int.from_bytes(code[1:], "little", signed=True)
            # Through its trampoline it is as it was built; a tail call of nothing returns.
            if code[0] in (0xe8, 0xe9) and target not in self._trampolines and target != self._return:
                found.add((at, target))
        return found

    def forbidden_direct(self, edges):
        """Those of them that are not in their classes, for people."""
        name = self.symbols.name
        return [f"{name(site)} ({site:#x}) -> {name(to)} ({to:#x}): {self.patched[site].by}"
                for site, to in sorted(edges) if self.start <= to < self.end
                and to - self.start not in self.patched[site].entries]

    def summary(self, edges):
        """How many edges at how many branches of which kind there are."""
        inside = {edge for edge in edges if self.start <= edge[1] < self.end}
        typed = {edge for edge in inside if self.sites[edge[0]].by in _BY_TYPE}
        unique = {edge for edge in typed if self.sites[edge[0]].by != "prototypes"}
        return {"edges": len(edges), "sites": len({site for site, _ in edges}), "inside": len(inside),
                "typed": len(typed), "unique": len(unique),
                "unique sites": len({site for site, _ in unique}),
                "forbidden": len(self.forbidden(edges))}


class Recorder:
    """The edges of one guest: `qemu` are the arguments that it is started with."""

    def __init__(self, folder, classes):
        self.classes = classes
        folder.mkdir(parents=True, exist_ok=True)
        sites, self._edges = folder / "branches.sites", folder / "branches.edges"
        classes.write_sites(sites)
        self._edges.write_text("")
        plugin = programs.plugin("branches")
        self.qemu = ("-plugin", f"{plugin},sites={sites},edges={self._edges}")

    def edges(self):
        """All that were seen so far: (branch, target)."""
        lines = self._edges.read_text().split("\n")[:-1]
        return {tuple(int(word, 16) for word in line.split()) for line in lines}
