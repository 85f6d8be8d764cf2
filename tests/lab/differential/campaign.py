# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which functions are run, from how many states, on which variants' texts; what came of it."""

import bisect
import random
import re
from collections import Counter, defaultdict

from .. import LabError, chain
from ..forward import forward_sets
from . import bundle, states
from .capture import capture
from .compare import differences
from .machine import AFTER, Machine
from .text import Text

SCHEMA = "penumbra.differential/v1"

# Instructions of the kernel's own text that a run may execute.
BUDGET = 300

# States that a run from a slot begins in.
_AT_SLOT = 2

# Most returns are good ones.
_HOMES = [states.CALLER] * 6 + [states.INDIRECT, states.OTHER, states.NOWHERE, states.DATA, states.WILD]

_STRICT = '[pass.return-cfi]\npolicy = ["function", "return-sites"]\n'
_TYPED = '[pass.forward-cfi]\npolicy = ["typed", "address-taken"]\n'

# By name: the preset, or the recipe's text, and the variants. What presets have in common (`fast`) is run once.
CONFIGURATIONS = {
    "hardened": (None, ["hardened", "fast"]),
    "zero-regs": (_STRICT + "[pass.zero-regs]\n", ["hardened"]),
    "paranoid": (None, ["hardened"]),
    "no recipe": ("", ["hardened"]),
    "zero-regs, any site": ("[pass.zero-regs]\n", ["hardened"]),
    "promote": ('[pass.promote]\nprofile = "branches"\n', ["fast"]),
    "log": ((_STRICT + _TYPED).replace("policy", 'on-violation = "log"\npolicy'), ["hardened"]),
}
SHORT = ["hardened", "zero-regs"]
PRESETS = {"hardened", "paranoid"}

# The profile: branches, and of each so many targets.
_PROMOTED, _TARGETS = 2000, 3


class Campaign:
    """The machines, and what they have shown so far in `report`."""

    def __init__(self, folder, names=SHORT, seed=0, say=lambda text: None):
        self.seed = seed
        folder.mkdir(parents=True, exist_ok=True)
        base = _emitted(folder, "hardened", None)
        guest = capture(say)
        slots = bundle.Slots(base)
        running = guest.text(len(slots.text))
        dump = folder / "text.dump"
        dump.write_bytes(running)
        # Of lists and objects that random words make up, checks would say what is wrong: nobody calls them.
        self.left_out = slots.left_out()
        self.text = Text(slots.start, self._unchecked(running), slots.text, bundle.symbols(base))
        sets, doubted, _ = forward_sets(base)
        # Of whatever has its address taken, and of what may have another's prototype, nobody says that it gets the
        # arguments which it reads.
        fitting = {id(one): frozenset(() if one.by == "address-taken" else one.entries) - doubted
                   for one in sets.values()}
        self.targets = {}
        for offset, edit in slots.hardened.items():
            if edit.kind == "indirect":
                at, one = slots.start + offset, sets.get(offset)
                entries, fit = (one.entries, fitting[id(one)]) if one else ((), frozenset())
                self.targets[at] = entries, self.text.indirect_register(at), fit
        calls = [at for at in sorted(self.targets) if b"\xe8" in self.text.bytes(at, 2)]
        behind = [at + len(slots.hardened[at - slots.start].content) for at in calls]
        self.scratch = states.Scratch(guest, self.text, behind, seed)
        self._profile(folder, sets, slots.start)
        self.guest = guest
        self.stock = self._machine()
        self.variants = {}
        for name in names:
            recipe, variants = CONFIGURATIONS[name]
            say(f"{name}: emitting, filling the text")
            made = base if name == "hardened" else _emitted(folder, name, recipe)
            for which in variants:
                variant = bundle.Variant(made, which, dump)
                variant = variant.with_text(self._unchecked(variant.content))
                self.variants[f"{name}/{which}"] = variant, self._machine(variant)
        self.slots = sorted({at for variant, _ in self.variants.values() for at in variant.edits})
        self.reset()

    def _unchecked(self, content):
        """A text without the calls that `fast` leaves out."""
        content = bytearray(content)
        for at, instead in self.left_out.items():
            content[at:at + len(instead)] = instead
        return bytes(content)

    def _machine(self, variant=None):
        return Machine(self.guest, self.scratch, self.text, self.targets, variant)

    def reset(self):
        """Forgets what was seen."""
        self.covered = {label: [set(), set()] for label in self.variants}
        self.report = {"schema": SCHEMA, "seed": self.seed, "functions": 0, "runs": 0, "stock_ends": Counter(),
                       "returned": Counter(), "let_through": Counter(), "reports": Counter(), "differences": []}

    def replace(self, label, content):
        """Has `content` stand in the place of a variant's text from now on."""
        if label not in self.variants:
            raise LabError(f"no variant {label}; there are {', '.join(self.variants)}")
        variant = self.variants[label][0].with_text(self._unchecked(content))
        self.variants[label] = variant, self._machine(variant)

    def _profile(self, folder, sets, start):
        chance = random.Random(f"{self.seed}/profile")
        known = sorted(at for at, (entries, _) in sets.items() if 0 < len(entries) < 64)
        lines = [f"{start + at:#x} {start + target:#x} {100 - number}" for at in chance.sample(known, _PROMOTED)
                 for number, target in enumerate(chance.sample(sets[at].entries, min(_TARGETS, len(sets[at].entries))))]
        (folder / "branches").write_text("\n".join(lines) + "\n")

    def functions(self, count):
        """So many functions, in turn one of each stratum: kinds of thunks at its slots, whether it calls,
        whether it can be traced (has a `__fentry__` site)."""
        strata = defaultdict(set)
        for label, (variant, _) in self.variants.items():
            for slot in variant.edits:
                function = self.text.around(slot)
                calls = b"\xe8" in self.text.bytes(function.start, function.end - function.start)
                kind = bundle.kind_of(variant.thunk_of(slot) or "none")
                strata[label, kind, calls, self.text.is_traced(function.start)].add(function.start)
        chance = random.Random(f"{self.seed}/functions")
        queues = []
        for key in sorted(strata):
            queue = sorted(strata[key])
            chance.shuffle(queue)
            queues.append(queue)
        chosen = {}
        while len(chosen) < count and any(queues):
            for queue in queues:
                if queue and len(chosen) < count:
                    chosen.setdefault(queue.pop(), None)
        return [self.text.functions[at] for at in chosen]

    def named(self, name):
        """The functions of that name, or the one around that address."""
        if re.fullmatch(r"0x[0-9a-f]+", name):
            found = [self.text.around(int(name, 16))] if self.text.start <= int(name, 16) < self.text.end else []
        else:
            found = [self.text.functions[at] for at in self.text.named.get(name, [])]
        if not found:
            raise LabError(f"the kernel's text has no function {name}")
        return found

    def run(self, function, count):
        """`count` states from the function's entry, and two from each of its slots."""
        self.report["functions"] += 1
        for number in range(count):
            self._pair(function, function.start, f"{self.seed}/{number}", BUDGET)
        first, end = (bisect.bisect_left(self.slots, at) for at in (function.start, function.end))
        for at in self.slots[first:end]:
            for number in range(_AT_SLOT):
                self._pair(function, at, f"{self.seed}/{number}", AFTER + 1)

    def _pair(self, function, start, seed, budget):
        state = self.scratch.state(seed, function, start, _HOMES)
        stock = self.stock.run(state, budget)
        report = self.report
        report["stock_ends"][stock.end[0]] += 1
        if stock.returned:
            report["returned"][state.home_kind] += 1
        for label, (variant, machine) in self.variants.items():
            other = machine.run(state, budget)
            report["runs"] += 1
            slots, thunks = self.covered[label]
            slots |= variant.edits.keys() & set(other.trace)
            thunks |= other.thunks
            if other.returned:
                report["let_through"][f"{label}: {state.home_kind}"] += 1
            for slot, *_ in other.stopped:
                report["reports"][f"{label}: {variant.edits[slot].kind}"] += 1
            if found := differences(state, stock, other, variant, self.text):
                report["differences"].append({
                    "variant": label, "function": function.name, "entry": f"{function.start:#x}",
                    "start": f"{start:#x}", "place": self.text.place(start), "seed": self.seed, "state": seed, "what": found})

    def coverage(self):
        """Of each variant: slots and thunks executed, of how many, by kind."""
        told = {}
        for label, (variant, _) in self.variants.items():
            slots, thunks = self.covered[label]
            names = {variant.thunk(at) for at in thunks}
            # The cave has the other variants' thunks too.
            own = {name.split("_")[0] for at in variant.edits if (name := variant.thunk_of(at))}
            every = [name for name in variant.thunks.values() if name.split("_")[0] in own]
            told[label] = {
                "slots": _parts((edit.kind for edit in variant.edits.values()),
                                (variant.edits[at].kind for at in slots)),
                "thunks": _parts(map(bundle.kind_of, every), map(bundle.kind_of, names))}
        return told


def _parts(every, some):
    every, some = Counter(every), Counter(some)
    return {kind: [some[kind], every[kind]] for kind in sorted(every)}


def _emitted(folder, name, recipe):
    out = folder / re.sub(r"\W+", "-", name)
    if name in PRESETS:
        return chain.emit(out, preset=name)
    file = out.with_suffix(".toml")
    file.write_text("schema = 1\n\n" + recipe)
    return chain.emit(out, recipe=file)
