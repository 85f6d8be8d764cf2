# SPDX-License-Identifier: MIT OR Apache-2.0
"""The fuzz targets (hardener/fuzz): built by cargo-fuzz, seeded from real kernels, run.

cargo-fuzz's flags for coverage are rustc's own, so stable Rust builds the targets; only its
sanitizers need a nightly.  What an address sanitizer would find, safe Rust has not; what it
has, panics, overflow and too much memory, is found without one.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, TARGET, LabError, chain, kernel

VERSION = "0.13.2"
FOLDER = ROOT / "hardener" / "fuzz"
WORK = TARGET / "fuzz"
SEEDS = WORK / "seeds"

# Runs of each target: some seconds.
RUNS = {"vmlinuz": 2500, "kernel": 6000, "kallsyms": 12000, "system_map": 12000, "btf": 60000, "module": 30000,
        "bundle": 2500, "recipe": 60000, "profile": 200000, "policy": 6000}


@dataclass(frozen=True)
class Ran:
    """How a target ended."""

    rc: int
    told: str

    def coverage(self, when):
        """The edges that were covered when libFuzzer said `when` (INITED, DONE)."""
        found = re.search(rf"{when}\s+cov: (\d+)", self.told)
        return int(found[1]) if found else 0


def build():
    """Builds the targets and makes the seeds."""
    tools = chain.target_dir() / "cargo-fuzz"
    known = tools / ".crates.toml"
    if not known.exists() or f"cargo-fuzz {VERSION} " not in known.read_text():
        chain.run(["cargo", "install", "--locked", "cargo-fuzz", "--version", VERSION, "--root", tools], cwd=ROOT)
    # cargo-fuzz would bring Cargo.lock up to date in silence.
    chain.run(["cargo", "fetch", "--locked", "--manifest-path", FOLDER / "Cargo.toml"], cwd=ROOT)
    env = os.environ | {"PATH": f"{tools / 'bin'}:{os.environ['PATH']}", "CARGO_TARGET_DIR": str(_built())}
    # By itself it has each crate compiled by one thread.
    chain.run(["cargo", "fuzz", "build", "--fuzz-dir", FOLDER, "--sanitizer", "none", "--codegen-units", "16"],
              cwd=ROOT, env=env)
    chain.cargo_build()
    shutil.rmtree(SEEDS, ignore_errors=True)
    SEEDS.mkdir(parents=True)
    kernels = [kernel.cloud().vmlinuz, kernel.cloud_backports().vmlinuz]
    chain.run([chain.target_dir() / "release" / "examples" / "fuzz-seeds", SEEDS, kernel.cloud().modules, *kernels])
    policies = [*(ROOT / "policies").glob("*.toml"),
                *(ROOT / "installer" / "policy" / "tests" / "testkit").glob("sound-*.toml")]
    (SEEDS / "policy").mkdir()
    for policy in policies:
        shutil.copy(policy, SEEDS / "policy")


def _built():
    return chain.target_dir() / "fuzz"


def seeds(target):
    """The files of a target's seeds."""
    found = sorted((SEEDS / target).iterdir())
    if not found:
        raise LabError(f"no seeds in {SEEDS / target}")
    return found


def run(target, *arguments, env=None):
    """Runs a target on files, or on folders as corpora (the first is written to)."""
    program = _built() / "x86_64-unknown-linux-gnu" / "release" / target
    crashes = WORK / "found"
    crashes.mkdir(parents=True, exist_ok=True)
    argv = [program, *arguments, "-timeout=120", "-rss_limit_mb=2048", "-max_len=131072",
            f"-artifact_prefix={crashes}/{target}-"]
    dictionary = FOLDER / "dictionaries" / f"{target}.dict"
    if dictionary.exists():
        argv.append(f"-dict={dictionary}")
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", env=os.environ | (env or {}))
    return Ran(done.returncode, done.stdout)


def search(target, runs, corpus):
    """A bounded search from the target's seeds, the same each time; what it learns goes to `corpus`."""
    Path(corpus).mkdir(parents=True, exist_ok=True)
    start = [SEEDS / target] if (SEEDS / target).exists() else []
    return run(target, corpus, *start, f"-runs={runs}", "-seed=1")
