# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest's programs, and the module with the planted bug.

Programs are linked statically: the guest has no libraries.  The module is built
out of tree against Debian's headers packages, which are unpacked, not installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

from . import ROOT, TARGET, LabError, kernel, packages

SOURCES = ROOT / "tests" / "guest"
BUILT = TARGET / "guest"

# Executable: its sources.
PROGRAMS = {
    "agent": ["agent.c"],
    "worker": ["worker.c", "attack.c"],
    "spaces": ["spaces.c"],
    "bpf": ["bpf.c"],
    "bench": ["bench.c"],
    "deep": ["deep.c"],
    "hold": ["hold.c"],
    "kexec": ["kexec.c"],
    "leave": ["leave.c"],
    "registers": ["registers.c"],
    "load": [f"load/{name}.c" for name in ("load", "files", "sockets", "processes", "memory", "threads",
                                           "modules")],
}


def _newer(target, sources):
    return target.exists() and all(target.stat().st_mtime >= s.stat().st_mtime for s in sources)


def _make(argv, **kw):
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(map(str, argv))}` failed:\n{done.stdout}")


def program(name):
    """A static executable, built if it is older than its sources."""
    sources, target = [SOURCES / file for file in PROGRAMS[name]], BUILT / name
    with packages.locked("programs"):
        if not _newer(target, [*sources, *SOURCES.rglob("*.h")]):
            BUILT.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            _make(["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread",
                   "-o", part, *sources])
            part.rename(target)
    return target


def plugin(name):
    """A plugin of QEMU's translator, built if it is older than its source, which is beside this file."""
    source, target = Path(__file__).with_name(f"{name}.c"), BUILT / f"{name}.so"
    with packages.locked("programs"):
        if not _newer(target, [source]):
            BUILT.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            _make(["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
                   "-fvisibility=hidden", "-o", part, source])
            part.rename(target)
    return target


def busybox():
    """The static busybox of this machine."""
    return Path("/bin/busybox") if Path("/bin/busybox").exists() else Path("/usr/bin/busybox")


def _headers(guest):
    """One folder of headers out of three packages, with the paths that the packages expect
    below / rewritten to where they are."""
    tree = TARGET / "trees" / f"headers-{guest.release}"
    stamp = tree / ".complete"
    if not stamp.exists():
        shutil.rmtree(tree, ignore_errors=True)
        for part in kernel.headers(guest):
            shutil.copytree(part, tree, symlinks=True, dirs_exist_ok=True)
        makefile = tree / "usr" / "src" / f"linux-headers-{guest.release}" / "Makefile"
        makefile.write_text(makefile.read_text().replace("/usr/src/", f"{tree}/usr/src/"))
        stamp.write_text("")
    return tree / "usr" / "src" / f"linux-headers-{guest.release}"


# Modules for the guest's kernel: the folder of their sources.
MODULES = {"penumbra_bug": "module", "penumbra_patch": "livepatch"}


def module(name="penumbra_bug", which=None):
    """A module, built for the guest's kernel: `which`, else the cloud kernel."""
    guest = which or kernel.cloud()
    source = SOURCES / MODULES[name]
    target = BUILT / guest.release / f"{name}.ko"
    sources = [p for p in source.iterdir() if p.is_file()]
    with packages.locked("programs"):
        if not _newer(target, sources):
            headers = _headers(guest)
            work = BUILT / guest.release / name
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(source, work)
            env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "CFLAGS", "ARCH")}
            # Without types, which only the kernel's debuggers read: making them takes pahole.
            _make(["make", "-C", headers, f"M={work}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"], env=env)
            shutil.copy(work / f"{name}.ko", target)
    return target
