# SPDX-License-Identifier: MIT OR Apache-2.0
"""The pass `stack-depth` in a running kernel: who has too little stack left is stopped before a large frame, others are not."""

from contextlib import contextmanager

from lab import TARGET, chain, filled, programs, victim

from . import expect, scenario

FOLDER = TARGET / "run" / "stack-depth"

# What is left when the path is looked up: what the pass asks for, with the frame, and not.
ENOUGH, LITTLE = 8192, 3584
# It begins near the stack's top: more is never left.
ALL = 16384


class World:
    """One boot."""

    def __init__(self, guest):
        self.guest = guest

    def emit(self, name, parameters=""):
        """A bundle whose thunks ask for stack."""
        recipe = FOLDER / f"{name}.toml"
        recipe.write_text(f"schema = 1\n[pass.stack-depth]\n{parameters}")
        return chain.emit(FOLDER / f"{name}.bundle", recipe=recipe)

    def deep(self, left):
        """What the program said, and what the kernel then said."""
        return self.guest.try_out(f"/usr/bin/deep {left}")

    def goes_on(self, left):
        """Nobody is stopped with so much left."""
        said, trouble = self.deep(left)
        expect(said == "done" and not trouble, left, said, trouble)


@contextmanager
def world():
    """A guest without Xen."""
    chain.build_tools()
    FOLDER.mkdir(parents=True, exist_ok=True)
    extra = [(f"usr/bin/{name}", programs.program(name), 0o755) for name in ("bench", "deep")]
    with filled.Guest("stack-depth", extra=extra) as guest:
        victim.prepare_attacks(guest)
        yield World(guest)


@scenario
def stock_text_does_not_ask(w):
    """Without the pass the path is looked up, however little is left."""
    for left in (ALL, ENOUGH, LITTLE):
        w.goes_on(left)


@scenario
def where_enough_is_left_it_goes_on(w):
    """All works of the benchmark, and the look-up with half of the stack left."""
    w.bundle = w.emit("kill")
    expect(w.guest.put(w.bundle, "hardened") > 1000)
    rc, out = w.guest.run("/usr/bin/bench 1", 600)
    expect(rc == 0, rc, out)
    w.goes_on(ALL)
    w.goes_on(ENOUGH)


@scenario
def with_too_little_left_it_is_stopped(w):
    """The process is ended, the kernel is not: what is left is enough for its oops."""
    said, trouble = w.deep(LITTLE)
    expect(said == "" and any("invalid opcode" in line for line in trouble), said, trouble)
    expect(not any("panic" in line or "double fault" in line for line in trouble), trouble)
    w.goes_on(ENOUGH)
    w.guest.explained()


@scenario
def logged_it_goes_on(w):
    """With `log` nothing is stopped."""
    bundle = w.emit("log", 'on-violation = "log"\n')
    w.guest.put(None, None)
    w.guest.put(bundle, "hardened")
    w.goes_on(LITTLE)
