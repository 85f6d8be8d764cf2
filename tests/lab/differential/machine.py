# SPDX-License-Identifier: MIT OR Apache-2.0
"""Unicorn with one text over a guest's memory.

Writes are seen by physical address.  What was written is taken back after each run, so all runs
of all machines begin in the same memory.
"""

import ctypes
import random
import re
from dataclasses import dataclass, field

from unicorn import (UC_ARCH_X86, UC_HOOK_CODE, UC_HOOK_INTR, UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE, UC_MODE_64,
                     UC_PROT_ALL, Uc, UcError, x86_const)

from .. import filled
from .capture import LINKED
from .states import CALLER, RSP
from .text import END, INDIRECT, REGISTERS, SAVES_FLAGS, THUNK

_IDS = [getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in REGISTERS] + [x86_const.UC_X86_REG_EFLAGS]
FLAGS = len(REGISTERS)
_CPU = x86_const.UC_CPU_X86_ICELAKE_SERVER
_EFER = 0xc0000080

# CF, PF, AF, ZF, SF, OF; and with DF those that are compared.
_STATUS = 0x8d5
_COMPARED = _STATUS | 1 << 10

# Vectors (SDM volume 3, 6.15).
DEBUG, PAGE_FAULT = 1, 14

# Instructions in thunks one after another: more is a loop.  What clears the stack is one, and may go on to
# its end.
_THUNK_LIMIT = 500
_CLEAR_LIMIT = 12000
# Of the caller, after a return.
AFTER = 30
# How far below the stack pointer a thunk may write: what it saves; what clears the stack, all of that;
# what marks a large frame, one word each _SPACING bytes.
RED = 128
_STACK = 0x4000
_SPACING = 112

# Parts of the runs in which an indirect branch's target is made one that it may reach, or one inside a function.
_LEGAL, _BAD = 0.6, 0.12


@dataclass
class Run:
    """What one run did."""

    end: tuple = ()                             # what ended it, and where
    trace: list = field(default_factory=list)   # addresses of executed instructions, without thunks
    writes: list = field(default_factory=list)  # (physical address, length, value), without thunks
    registers: tuple = ()                       # at the end, flags last
    returned: tuple = ()                        # the same where the function went back to its caller
    inside: str = ""                            # the thunk in which it ended
    wrong: list = field(default_factory=list)   # what thunks did that they must not
    stopped: list = field(default_factory=list)  # (slot, offending value, place in the trace) of reports
    chosen: dict = field(default_factory=dict)  # indirect branches whose target was set, by place in the trace
    slots: set = field(default_factory=set)     # slots whose thunks were executed
    thunks: set = field(default_factory=set)    # addresses executed in the cave


class Machine:
    """One text.  `variant` is None for the running one."""

    def __init__(self, capture, scratch, text, targets, variant=None):
        self.text, self.scratch, self.variant, self.targets = text, scratch, variant, targets
        self.pristine, self.memory = capture.map(), capture.map()
        for memory in (self.pristine, self.memory):
            scratch.fill(memory)
        content = (variant or text).content
        self.memory[filled.TEXT:filled.TEXT + len(content)] = content
        self.cave = variant.cave if variant else (0, 0)
        self._kinds = {}
        self._emulator(capture, len(content))

    def _emulator(self, capture, length):
        self.uc = uc = Uc(UC_ARCH_X86, UC_MODE_64, _CPU)
        self._host = (ctypes.c_char * len(self.memory)).from_buffer(self.memory)
        uc.mem_map_ptr(0, len(self.memory), UC_PROT_ALL, ctypes.addressof(self._host))
        known = capture.registers
        # Long mode is on once paging is (SDM volume 3, 9.8.5).
        uc.reg_write(x86_const.UC_X86_REG_MSR, (_EFER, known["efer"]))
        uc.reg_write(x86_const.UC_X86_REG_CR4, known["cr4"])
        uc.reg_write(x86_const.UC_X86_REG_CR3, known["cr3"])
        uc.reg_write(x86_const.UC_X86_REG_CR0, known["cr0"])
        uc.reg_write(x86_const.UC_X86_REG_GS_BASE, known["gs"])
        self._fresh = uc.context_save()
        uc.hook_add(UC_HOOK_CODE, self._code)
        uc.hook_add(UC_HOOK_MEM_WRITE, self._write)
        uc.hook_add(UC_HOOK_MEM_READ, self._read, begin=filled.TEXT, end=filled.TEXT + length - 1)
        uc.hook_add(UC_HOOK_INTR, self._interrupt)
        count = len(_IDS)
        self._ids = (ctypes.c_int * count)(*_IDS)
        self._values = (ctypes.c_uint64 * count)()
        self._pointers = (ctypes.c_void_p * count)(
            *(ctypes.addressof(self._values) + 8 * number for number in range(count)))

    # The binding's public calls make some objects for each register: 0.4 ms for all, these 0.01.
    def _get(self):
        self.uc._do_reg_read_batch(self._ids, self._pointers, len(_IDS))
        values = tuple(self._values)
        return (*values[:FLAGS], values[FLAGS] & _COMPARED)

    def _put(self, registers, flags):
        self._values[:] = [*registers, flags]
        self.uc._do_reg_write_batch(self._ids, self._pointers, len(_IDS))

    def run(self, state, budget):
        """Runs from `state` through at most `budget` instructions that are not a thunk's."""
        self.now = Run()
        self.state, self.limit = state, budget
        self.over = self.gone_on = False
        self.entered = None    # registers at the entry of the thunk that runs
        self.undo = []
        for at, word in state.stack.items():
            at = self._physical(at)
            self.undo.append((at, 8))
            self.memory[at:at + 8] = word.to_bytes(8, "little")
        # A fault that no handler took would make the next one a double fault (SDM volume 3, 6.15).
        self.uc.context_restore(self._fresh)
        self._put(state.registers, state.flags)
        try:
            self.uc.emu_start(state.start, 0)
            if not self.over:
                self._end("halted", self.now.trace[-1] if self.now.trace else state.start)
        except UcError as error:
            if not self.over:
                # A device's memory, mostly.
                self._end("not executed", self.now.trace[-1] if self.now.trace else state.start, str(error))
        for at, length in self.undo:
            self.memory[at:at + length] = self.pristine[at:at + length]
        return self.now

    def _end(self, *end, registers=None):
        self.over = True
        self.now.end = end
        self.now.registers = registers or self._get()
        if self.entered and self.variant and self.first:
            self.now.inside = self.variant.thunk(self.first)
        self.uc.emu_stop()

    def _code(self, _uc, at, _size, _data):
        if self.over:
            return
        kind = self._kinds.get(at)
        if kind is None:
            kind = self._kinds[at] = self._kind(at)
        if kind == THUNK:
            self._in_thunk(at)
            return
        if self.entered:
            self._leave()
            if self.gone_on:
                # What was reported goes on; by which rules, nobody says.
                self._end("stopped", self.slot, at)
                return
        now = self.now
        if at == self.state.home and not now.returned:
            registers = self._get()
            if registers[RSP] == self.state.registers[RSP] + 8:
                now.returned = registers
                # Of another than its caller nobody says which registers it reads.
                self.limit = min(self.limit, len(now.trace) + AFTER * (self.state.home_kind == CALLER))
        if kind == END:
            self._end("ends at", at)
            return
        if len(now.trace) >= self.limit:
            self._end("budget", at)
            return
        if kind == INDIRECT:
            self._choose(at)
        elif kind == SAVES_FLAGS:
            # Whoever disables interrupts saves all flags for the one of them, dead ones too.
            self.uc.reg_write(_IDS[FLAGS], self.uc.reg_read(_IDS[FLAGS]) & ~_STATUS)
        now.trace.append(at)

    def _kind(self, at):
        if self.cave[0] <= at < self.cave[1]:
            return THUNK
        if not self.text.start <= at < self.text.end:
            return END
        if at in self.targets:
            return INDIRECT
        return self.text.kind(at)

    def _choose(self, at):
        """Sets the target of an indirect branch, by what the state's seed says; all machines do the same."""
        now = self.now
        chance = random.Random(f"{self.state.seed}/{at:x}/{len(now.trace)}")
        what = chance.random()
        entries, register, fitting = self.targets[at]
        if what < _LEGAL and entries:
            target, legal = self.text.start + chance.choice(entries), True
        elif what > 1 - _BAD:
            target, legal = self.scratch.nowhere(chance), False
        else:
            # As it comes; where a random word points to, no rules hold either.
            if self.text.start <= self.uc.reg_read(_IDS[register]) < self.text.end:
                self.limit = len(now.trace) + 1
            return
        if not legal or target - self.text.start not in fitting or not self.text.is_traced(target):
            # In the middle of a function, in one whose prototype is not known to fit, and in assembly, which
            # has none, registers may be read that this branch does not set.
            self.limit = len(now.trace) + 1
        now.chosen[len(now.trace)] = target, legal
        self.uc.reg_write(_IDS[register], target)

    def _in_thunk(self, at):
        if not self.entered:
            self.entered = self._get()
            self.slot = self.now.trace[-1] if self.now.trace else self.state.start
            self.first = 0
            self.below = []
            self.steps = 0
        self.steps += 1
        if self.steps > (_CLEAR_LIMIT if self._fronts("clear") else _THUNK_LIMIT):
            self._end("a thunk does not end", at)
            return
        if not self.cave[0] <= at < self.cave[1]:
            return
        if not self.first:
            self.first = at
            self.now.slots.add(self.slot)
        self.now.thunks.add(at)
        trap = self.variant.traps.get(at)
        if trap:
            self._trap(at, trap)

    def _trap(self, at, trap):
        registers = self._get()
        offending = trap["offending"]
        if "register" in offending:
            value = registers[offending["register"]]
        else:
            place = self._physical(registers[RSP]) + 8 * offending["stack"]
            value = int.from_bytes(self.memory[place:place + 8], "little")
        self.now.stopped.append((self.slot, value, len(self.now.trace)))
        self._kept(registers, "reports")
        if registers[RSP] != self.entered[RSP]:
            self.now.wrong.append((self.slot, self.variant.thunk(self.first), "reports with another rsp"))
        self.gone_on = trap["action"] == "log"
        if not self.gone_on:
            self._end("stopped", self.slot, value, registers=registers)

    def _leave(self):
        """The first instruction behind a thunk: takes back what it left below the stack pointer (an
        interrupt may do so at any time), and looks whether it kept what it must."""
        for place, old in reversed(self.below):
            self.memory[place:place + len(old)] = old
        if self.first:
            self._kept(self._get(), "changes")
        self.entered = None

    def _kept(self, registers, what):
        free, zero, pops = self._contract()
        for number, (before, after) in enumerate(zip(self.entered, registers)):
            if number == RSP:
                wrong = what == "changes" and after != before + pops
            elif number in zero and what == "changes":
                wrong = after != 0
            else:
                wrong = after != before and number not in free
            if wrong:
                name = [*REGISTERS, "flags"][number]
                self.now.wrong.append((self.slot, self.variant.thunk(self.first),
                                       f"{what} {name}: {before:#x} to {after:#x}"))

    def _contract(self):
        """Of the thunk that runs: registers that it may change, those that it clears, how far it moves RSP."""
        name, kind = self.variant.thunk_of(self.slot), self.variant.edits[self.slot].kind
        r10, r11 = 10, 11
        cleared = [REGISTERS.index(name) for name in ("rcx", "rsi", "rdi", "r8", "r9", "r10", "r11")]
        if kind == "return":
            if "_saving" in name:
                return (), (), 8
            return (r10, r11, FLAGS), cleared if "_zeroing" in name else (), 8
        if kind == "call" or "_saving" in name:
            return (), (), 0
        if name.startswith("promote_") or self.targets[self.slot][1] == r11:
            return (FLAGS,), (), 0
        return (r11, FLAGS), (), 0

    def _write(self, _uc, _access, at, length, value, _data):
        self.undo.append((at, length))
        if self.over:
            return
        if not self.entered:
            self.now.writes.append((at, length, value))
            return
        self.below.append((at, self.memory[at:at + length]))
        top = self._physical(self.entered[RSP])
        # Where the stack is in neither mapping, it is not known where.
        if 0 <= top < len(self.memory) and not top - self._red() <= at <= top - length:
            thunk = self.variant.thunk(self.first) if self.first else "a thunk of the kernel"
            self.now.wrong.append((self.slot, thunk, f"writes to {at - top:+#x} from the stack pointer"))

    def _fronts(self, does):
        """The thunk that runs, as `stack_DOES_...`; none when it does something else."""
        return re.match(rf"stack_{does}_(\d*)", self.variant.thunk(self.first)) if self.first else None

    def _red(self):
        if self._fronts("clear"):
            return _STACK
        marks = self._fronts("mark")
        return max(RED, _SPACING * int(marks[1])) if marks else RED

    def _physical(self, at):
        """Where an address of the direct map or of the kernel's image lies."""
        return at - (LINKED if at >= LINKED else self.scratch.page_offset)

    def _read(self, _uc, _access, at, length, _value, _data):
        """Text that is read as data is not the same in a view; thunks may."""
        if not self.over and not self.entered:
            self._end("reads text", self.now.trace[-1], registers=self.state.registers)

    def _interrupt(self, _uc, vector, _data):
        if self.over:
            return
        if vector == DEBUG and not self.entered:
            # A random word was popped into the flags and has every instruction trapped, a thunk's first one too.
            self._end("single step", self.now.trace[-1], registers=self.state.registers)
            return
        at = self.uc.reg_read(x86_const.UC_X86_REG_RIP)
        address = self.uc.reg_read(x86_const.UC_X86_REG_CR2) if vector == PAGE_FAULT else 0
        if self.entered and self._kind(at) != THUNK:
            # Where the thunk goes nothing can be executed.
            self._leave()
            if self.gone_on:
                self._end("stopped", self.slot, at)
                return
        self._end("fault", vector, at, address)

