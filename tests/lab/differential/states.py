# SPDX-License-Identifier: MIT OR Apache-2.0
"""Random states: registers, flags, a stack, a return address.  A seed gives the same ones again."""

import random
from array import array
from dataclasses import dataclass, field

from .. import LabError
from .capture import PAGE
from .text import REGISTERS, THUNK

# Free memory of the guest that a run gets: things that pointers point to, then stacks.
_THINGS = 1 << 20
_STACKS = 256 << 10
_SCRATCH = _THINGS + _STACKS

# So far from either end of the stacks a run begins.
_MARGIN = 64 << 10

RSP = REGISTERS.index("rsp")

# CF, PF, AF, ZF, SF, OF; DF is clear at a call (System V ABI, 3.2.1). Bit 1 is always set.
_FLAGS = [1 << bit for bit in (0, 2, 4, 6, 7, 11)]
_FIXED = 1 << 1

# Kinds of return addresses.
CALLER, INDIRECT, OTHER, NOWHERE, DATA, WILD = (
    "caller", "indirect", "another's caller", "no call", "data", "unmapped")

# Code that the kernel puts on stacks as a return address (new tasks, kretprobes, function graph): legal
# though no call stands before it.
_PUSHED = {"ret_from_fork", "ret_from_fork_asm", "arch_rethook_trampoline", "__kretprobe_trampoline",
           "return_to_handler"}


@dataclass(frozen=True)
class State:
    """Where a run begins, and with what."""

    seed: str
    start: int
    registers: tuple           # in the processor's order
    flags: int
    stack: dict = field(hash=False)   # words put on the stack, by virtual address
    home: int                  # the return address
    home_kind: str


class Scratch:
    """The random part of all memory, the same in every copy, and what states are made from."""

    def __init__(self, capture, text, behind, seed):
        self._behind = behind   # return addresses of indirect calls
        memory = capture.map()
        self.page_offset = capture.page_offset
        self.text = text
        self.physical = _free(memory)
        self.start = self.physical + self.page_offset
        self.stacks = self.start + _THINGS
        self.end = self.start + _SCRATCH
        chance = random.Random(f"{seed}/scratch")
        words = array("Q", memory[capture.data[0]:capture.data[1]])
        last = self.page_offset + len(memory)
        self.objects = sorted({word for word in words if self.page_offset + (1 << 20) <= word < last
                               and word % 8 == 0})
        self.entries = [at for at in sorted(text.functions) if text.kind(at) != THUNK]
        # A caller that returns to a word of a random stack must not find a function there.
        words = [self.value(chance) for _ in range(_THINGS // 8)]
        words += [self.value(chance, code=False) for _ in range(_STACKS // 8)]
        self.content = array("Q", words).tobytes()
        self._padded = [at for at in self.entries if text.bytes(at - 5, 5) == b"\xcc" * 5
                        and text.functions[at].name not in _PUSHED]
        self._interior = [f for f in text.functions.values() if f.end - f.start > 64 and text.is_traced(f.start)]

    def fill(self, memory):
        """Puts it into a copy of the guest's memory."""
        memory[self.physical:self.physical + _SCRATCH] = self.content

    def value(self, chance, code=True):
        """What a word or a register may be: mostly what can be worked with."""
        what = chance.random()
        if what < 0.4:
            return self.start + chance.randrange(0, _THINGS - PAGE, 16)
        if what < 0.55:
            return chance.choice(self.objects)
        if what < 0.77:
            return chance.randrange(65)
        if what < 0.87:
            return 0
        if what < 0.92 and code:
            return chance.choice(self.entries)
        return chance.getrandbits(32 if what < 0.96 else 64)

    def state(self, seed, function, start, kinds):
        """The state that `seed` gives for a run from `start` in `function`, which returns as one of `kinds`."""
        chance = random.Random(f"{seed}/{start:x}")
        registers = [self.value(chance) for _ in REGISTERS]
        # At a function's entry RSP is 8 less than a multiple of 16 (System V ABI, 3.2.2).
        registers[RSP] = self.stacks + chance.randrange(_MARGIN, _STACKS - _MARGIN, 16) + 8
        flags = _FIXED | sum(flag for flag in _FLAGS if chance.random() < 0.5)
        home, kind = self._home(chance, function, kinds)
        return State(seed, start, tuple(registers), flags, {registers[RSP]: home}, home, kind)

    def _home(self, chance, function, kinds):
        kind = chance.choice(kinds)
        if kind == CALLER:
            if callers := self.text.callers(function.start):
                return chance.choice(callers), CALLER
            kind = INDIRECT
        if kind == OTHER:
            for _ in range(50):
                other = chance.choice(self.entries)
                if other != function.start and (callers := self.text.callers(other)):
                    return chance.choice(callers), OTHER
        if kind == NOWHERE:
            # INT3 may be a kprobe over a call, so the thunks look further there; before an entry it is filler.
            return chance.choice(self._padded) if chance.random() < 0.2 else self.nowhere(chance), NOWHERE
        if kind == DATA:
            # In no text, as a module's or a BPF program's: let through, though nothing is executable there.
            return self.start + chance.randrange(64, _THINGS, 16), DATA
        if kind == WILD:
            return chance.getrandbits(chance.choice([31, 47, 64])), WILD
        return chance.choice(self._behind), INDIRECT

    def nowhere(self, chance):
        """Inside a function, behind an instruction that is no branch, neither in the file nor now."""
        while True:
            instructions = self.text.instructions(chance.choice(self._interior))
            at, length, word, _ = chance.choice(instructions[:-1])
            branches = word.startswith(("call", "j", "ret", "int", "ud", "nop"))
            before = self.text.bytes(at + length - 8, 8)
            if not branches and before == self.text.in_file(at + length - 8, 8) and before[3] not in (0xe8, 0xcc):
                return at + length


def _free(memory):
    """Physical memory that nobody has used: zeroes, as much as a run gets."""
    zero, run = bytes(PAGE), 0
    for at in range(len(memory) - PAGE, 16 << 20, -PAGE):
        run = run + PAGE if memory[at:at + PAGE] == zero else 0
        if run == _SCRATCH + 2 * PAGE:
            return at + PAGE
    raise LabError(f"the guest has no {_SCRATCH >> 10} KiB of unused memory in one piece")
