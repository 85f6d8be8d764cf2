# SPDX-License-Identifier: MIT OR Apache-2.0
"""The running text: its functions, who calls them, and instructions at which a run ends."""

import bisect
import re
from dataclasses import dataclass

from capstone import CS_ARCH_X86, CS_MODE_64, Cs

PLAIN, END, THUNK, INDIRECT, SAVES_FLAGS = range(5)

# Depend on the machine, change what is outside the registers and memory that are put back, or leave
# the kernel.
_ENDS = re.compile(
    r"rd(tsc|tscp|rand|seed|pid|pmc|msr)|wrmsr|(in|out)(s[bwdl]?)?|hlt|u?iret[qd]?"
    r"|sys(ret|retq|exit|exitq|call|enter)|swapgs|[ls][gil]dt|ltr|str|lmsw|invlpg|invpcid|wbinvd|wbnoinvd|invd|int\d?|ud[012]b?|[xf]x?(save|rstor)\w*"
    r"|xsetbv|xgetbv|vm\w+|mwaitx?|monitorx?|stac|clac|encls|enclu|stgi|clgi|skinit|pconfig|cldemote|cpuid|umwait"
    r"|tpause|serialize|wrpkru|rdpkru|retf\w*|lcall|ljmp|f\w+|(rd|wr)(fs|gs)base")

# Control, debug, vector and segment registers.
_OTHER_REGISTERS = re.compile(r"\b([cd]r\d|[xyz]mm\d+|mm\d|[d-g]s), |, ([cd]r\d|[xyz]?mm\d+|[d-g]s)$")

REGISTERS = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]


@dataclass(frozen=True)
class Function:
    """A symbol and the text up to the next one."""

    name: str
    start: int
    end: int


class Text:
    """The text of a running guest, at its link address."""

    def __init__(self, start, content, file, symbols):
        self.start, self.content, self.end = start, content, start + len(content)
        self._file = file
        self._capstone = Cs(CS_ARCH_X86, CS_MODE_64)
        places = {}
        for at, name in symbols:
            places.setdefault(start + at, name)
        self._starts = sorted(places)
        ends = [*self._starts[1:], self.end]
        self.functions = {at: Function(places[at], at, end) for at, end in zip(self._starts, ends)}
        self.named = {}
        for at, name in symbols:
            self.named.setdefault(name, []).append(start + at)
        # The first one is `__x86_indirect_thunk_array` too.
        self._thunks = {place: number for number, name in enumerate(REGISTERS)
                        for place in self.named.get(f"__x86_indirect_thunk_{name}", [])}
        self._kinds = {}
        self._decoded = {}
        self._calls = None

    def around(self, at):
        """The function that `at` lies in, or None."""
        number = bisect.bisect_right(self._starts, at) - 1
        return self.functions[self._starts[number]] if number >= 0 and at < self.end else None

    def place(self, at):
        """`at` for a person."""
        function = self.around(at) if self.start <= at < self.end else None
        return f"{function.name}+{at - function.start:#x}" if function else f"{at:#x}"

    def bytes(self, at, length):
        """Some of its bytes."""
        return self.content[at - self.start:at - self.start + length]

    def in_file(self, at, length):
        """The same in the image file."""
        return self._file[at - self.start:at - self.start + length]

    def is_traced(self, entry):
        """Whether a function was compiled for tracing: a five-byte NOP stands where `__fentry__` was called."""
        return self.bytes(entry, 5) == b"\x0f\x1f\x44\x00\x00"

    def instructions(self, function):
        """(address, length, mnemonic, operands) of a function, decoded from its start."""
        if function.start not in self._decoded:
            content = self.bytes(function.start, function.end - function.start)
            self._decoded[function.start] = list(self._capstone.disasm_lite(content, function.start))
        return self._decoded[function.start]

    def kind(self, at):
        """What a run does at the instruction there."""
        known = self._kinds.get(at)
        if known is None:
            known = self._kinds[at] = self._kind(at)
        return known

    def _kind(self, at):
        if (function := self.around(at)) and function.name.startswith("__x86_"):
            return THUNK
        if function and function.start == at and self._saves_dead(function):
            return END
        found = list(self._capstone.disasm_lite(self.bytes(at, 15), at, 1))
        if not found:
            return END
        _, _, mnemonic, operands = found[0]
        word = mnemonic.split()[-1]
        if _ENDS.fullmatch(word) or _OTHER_REGISTERS.search(operands):
            return END
        return SAVES_FLAGS if word.startswith("pushf") else PLAIN

    def _saves_dead(self, function):
        """Whether it puts registers on its stack that its callers do not set: one that takes any number of
        arguments saves all argument registers, r9 the last (System V ABI, 3.5.7); one that aligns its stack
        saves r10."""
        r10 = r9 = True
        for _, _, word, operands in self.instructions(function)[:30]:
            if r10 and word == "push" and operands == "r10" \
                    or r9 and re.fullmatch(r"qword ptr \[r[sb]p.*\], r9", operands):
                return True
            r10 &= not operands.startswith("r10")
            r9 &= not operands.startswith("r9")
        return False

    def indirect_register(self, at):
        """The number of the register through which the retpoline site at `at` branches."""
        content = self.bytes(at, 6)
        skip = content[0] == 0x2e
        displacement = int.from_bytes(content[1 + skip:5 + skip], "little", signed=True)
        return self._thunks[at + skip + 5 + displacement]

    def callers(self, entry):
        """Return addresses of the direct calls of `entry`, as they are in the running text."""
        if self._calls is None:
            self._calls = {}
            for match in re.finditer(rb"\xe8(?=(.{4}))", self.content, re.S):
                back = self.start + match.start() + 5
                called = back + int.from_bytes(match[1], "little", signed=True)
                if called in self.functions:
                    self._calls.setdefault(called, []).append(back)
        return [back for back in self._calls.get(entry, []) if self._is_call(back)]

    def _is_call(self, back):
        function = self.around(back - 5)
        return any(at == back - 5 for at, *_ in self.instructions(function))
