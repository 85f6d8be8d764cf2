# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every kernel of the lab on every preset's text, for all its processes and itself, without Xen.

A scenario is one kernel: one boot, two processors, all presets one after the other.
"""

import time
from contextlib import contextmanager

from lab import TARGET, chain, filled, kernel, packages, programs, stress
from lab.victim import Worker

from . import expect, scenario

PRESETS = ["fast", "balanced", "hardened", "paranoid"]  # `hardener recipe list` has them

# Seconds for which threads look whether the kernel gives their vector registers back.
REGISTERS = 3

# What `emit` says of a policy that a kernel has no room for.
LESS = "this kernel cannot have all that the recipe lists first; "

LESS_OF_CLOUD_6_12 = {"paranoid": ["return-cfi"]}
LESS_OF_6_12 = {"hardened": ["return-cfi"], "paranoid": ["return-cfi"]}


@contextmanager
def world():
    """The tools; each scenario boots its own kernel."""
    chain.build_tools()
    expect(all(preset in chain.run([chain.tool("hardener"), "recipe", "list"]) for preset in PRESETS))
    yield TARGET / "run" / "every-kernel"


def emitted(which, folder, presets, less):
    """The bundles of the presets by name; presets that make the same text are one.  `less` is what each
    gives up, by its name: the passes."""
    bundles, known = {}, {}
    for preset in presets:
        bundle = folder / f"{which.release}.{preset}"
        said = chain.emit_said(bundle, which.vmlinuz, preset)
        gave_up = sorted(line.split(LESS)[1].split(":")[0] for line in said.splitlines() if LESS in line)
        expect(gave_up == less.get(preset, []), which.release, preset, said)
        same = (bundle / "cave.elf").read_bytes(), (bundle / "hardened.edits").read_bytes()
        if same not in known:
            known[same] = preset
            bundles[preset] = bundle
        packages.say(f"{which.release} {preset}: " + ("the text of " + known[same] if known[same] != preset else
                                                      "gives up " + (", ".join(gave_up) or "nothing")))
    return bundles


def works(guest, bundle, variant, groups):
    """Puts it in while a worker runs, does everything, and looks at what is left."""
    begin = time.monotonic()
    worker = Worker(guest, "payroll", 0, f".{bundle.name}.{variant}")
    pages = guest.put(bundle, variant)
    expect(pages > 1000, pages)
    worker.lives()
    # What clears the stack borrows a vector register.
    rc, out = guest.run(f"registers {REGISTERS}")
    expect(rc == 0 and "kept" in out, out)
    did = sum(stress.run(guest, group) for group in groups)
    worker.lives()
    guest.run(f"kill {worker.pid}")
    expect(not guest.trouble(), guest.trouble())
    guest.explained()
    packages.say(f"{bundle.name} {variant}: {pages} pages, {did} operations, {time.monotonic() - begin:.0f} s")


def every_preset(which, folder, less=None, presets=PRESETS, groups=tuple(stress.GROUPS)):
    """One boot of `which`: all presets, both variants of each."""
    bundles = emitted(which, folder, presets, less or {})
    extra = [("usr/bin/registers", programs.program("registers"), 0o755), *stress.files()]
    with filled.Guest(f"every-{which.release}", which, extra=extra, libraries=packages.STRESS,
                      memory=1024) as guest:
        for bundle in bundles.values():
            for variant in ("hardened", "fast"):
                works(guest, bundle, variant, groups)
            # Another bundle's text goes in when nothing runs: its cave is another.
            guest.put(None, None)


@scenario
def cloud(folder):
    """Debian 12's cloud kernel does all work on both variants of every preset, and nothing is stopped."""
    every_preset(kernel.cloud(), folder)


@scenario
def amd64(folder):
    """So does the kernel for machines."""
    every_preset(kernel.amd64(), folder)


@scenario
def rt(folder):
    """So does the one with PREEMPT_RT."""
    every_preset(kernel.rt(), folder)


@scenario
def cloud_backports(folder):
    """So does the backports' cloud kernel (6.12)."""
    every_preset(kernel.cloud_backports(), folder, LESS_OF_CLOUD_6_12)


@scenario
def amd64_backports(folder):
    """So does the backports' kernel for machines."""
    every_preset(kernel.amd64_backports(), folder, LESS_OF_6_12)
