# SPDX-License-Identifier: MIT OR Apache-2.0
"""The readers of hostile files, fuzzed for some seconds each, from seeds cut from Debian's kernels."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

from lab import fuzz

from . import expect, scenario


@contextmanager
def world():
    """Builds the targets and the seeds; a temporary folder for what is learnt."""
    fuzz.build()
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@scenario
def the_harness_sees_what_breaks(folder):
    """A panic behind four bytes is found from nothing; so are an overflow and memory that is never touched."""
    found = fuzz.search("canary", 2_000_000, folder / "canary")
    expect(found.rc == 77 and "panicked" in found.told, found.rc, found.told[-2000:])
    for name, content, told in [("panic", b"FUZZp", "as it should"), ("overflow", b"FUZZ\x01", "add with overflow"),
                                ("memory", b"FUZZm", "memory allocation of 4294967296 bytes failed")]:
        file = folder / name
        file.write_bytes(content)
        ran = fuzz.run("canary", file)
        expect(ran.rc != 0 and told in ran.told, name, ran.rc, ran.told[-2000:])
    (folder / "sound").write_bytes(b"FUZ")
    ran = fuzz.run("canary", folder / "sound")
    expect(ran.rc == 0, ran.rc, ran.told[-2000:])


@scenario
def every_seed_is_taken(_):
    """The seeds of each target are read to the end by every reader, emitter's and checker's: mutations start deep."""
    for target in fuzz.RUNS:
        ran = fuzz.run(target, *fuzz.seeds(target), env={"PENUMBRA_FUZZ_SEEDS": "1"})
        expect(ran.rc == 0, target, ran.rc, ran.told[-2000:])


@scenario
def no_reader_breaks(folder):
    """No target panics, overflows, hangs or asks for too much memory; what is taken reads back the same; each
    search reaches code that the seeds do not."""
    told = []
    for target, runs in fuzz.RUNS.items():
        ran = fuzz.search(target, runs, folder / target)
        expect(ran.rc == 0, f"{target} broke; the input is in {fuzz.WORK / 'found'}:", ran.told[-4000:])
        before, after = ran.coverage("INITED"), ran.coverage("DONE")
        expect(after > before > 0, target, "covers", before, after, ran.told[-2000:])
        told.append(f"{target} {before} to {after}")
    print("        edges covered, seeds to end: " + ", ".join(told))
