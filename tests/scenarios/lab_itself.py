# SPDX-License-Identifier: MIT OR Apache-2.0
"""The lab's own parts, without booting anything."""

import json
import subprocess
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from lab import ROOT, LabError, chain, packages, programs, qemu, slots
from lab.agent import Agent, LineLost
from lab.cpio import Archive

from . import expect, scenario


@contextmanager
def world():
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@scenario
def archive_is_what_cpio_reads(folder):
    """An initramfs that the lab writes is listed by busybox's cpio, with modes and links."""
    archive = Archive()
    archive.file("usr/bin/tool", b"x" * 7, 0o755)
    archive.link("bin", "usr/bin")
    archive.write(folder / "a")
    raw = (folder / "a").read_bytes()
    out = folder / "out"
    out.mkdir()
    subprocess.run([programs.busybox(), "cpio", "-id"], input=raw, cwd=out, check=True,
                   capture_output=True)
    expect((out / "usr/bin/tool").read_bytes() == b"x" * 7, "content")
    expect((out / "usr/bin/tool").stat().st_mode & 0o777 == 0o755, "mode")
    expect((out / "bin").is_symlink(), "link")


@scenario
def archive_is_reproducible(folder):
    """The same files give the same archive, in whatever order they were added."""
    one, two = Archive(), Archive()
    one.file("a", b"1")
    one.file("b/c", b"2")
    two.file("b/c", b"2")
    two.file("a", b"1")
    one.write(folder / "1")
    two.write(folder / "2")
    expect((folder / "1").read_bytes() == (folder / "2").read_bytes(), "archives differ")


@scenario
def sources_are_derived(_):
    """Source packages and backports are added to the release's own archives, and to no other's."""
    text = ("Types: deb\n# a comment\nURIs: mirror:/a\nSuites: bookworm bookworm-updates\nComponents: main\n"
            "Signed-By: /k.gpg\n\nTypes: deb\nURIs: mirror:/sec\nSuites: bookworm-security\nComponents: main\n\n"
            "Types: deb\nURIs: other:/x\nSuites: nodistro\nComponents: main\n")
    out = packages.derived_sources([("debian.sources", text),
                                    ("more.list", "deb [signed-by=/l.gpg] mirror:/b bookworm main contrib # x\n"
                                     "deb other:/y stable main\n")], "bookworm")
    expect(out.count("Types: deb deb-src") == 3, out)
    expect("Suites: bookworm bookworm-updates bookworm-backports\n" in out, out)
    expect("Suites: bookworm-security\n" in out, out)
    expect("Signed-By: /l.gpg" in out and "other:" not in out, out)
    try:
        packages.derived_sources([("x.list", "deb mirror:/c trixie main\n")], "bookworm")
    except LabError as error:
        expect("bookworm" in str(error), error)
    else:
        expect(False, "sources of another release were accepted")


@scenario
def pae_is_the_specification(_):
    """The signed bytes that the openssl check builds are those of DSSE's published example."""
    # From the DSSE protocol, "Test Vectors".
    expect(chain.pae("http://example.com/HelloWorld", b"hello world")
           == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world", "wrong PAE")


class _ScriptedLine:
    """A line whose far side answers from a list."""

    def __init__(self, answers):
        self.answers = answers
        self.written = []

    def write(self, data):
        self.written.append(data)

    def read(self, _seconds, _marker=None):
        return self.answers.pop(0) if self.answers else b""


def _part(number, text):
    return b"~P 1 %d %08x %s\n" % (number, zlib.crc32(text) ^ number, text)


def _end(parts, rc):
    text = b"1 %d %d" % (parts, rc)
    return b"~E %s %08x\n" % (text, zlib.crc32(text))


@scenario
def agent_survives_a_noisy_console(_):
    """A kernel message in the middle of an answer makes the lab ask again, not fail or garble."""
    broken = _part(1, b"d29ybGQ=").replace(b"d29", b"[ 1.0] int3: 0000\nd29")
    line = _ScriptedLine([b"noise\n" + _part(0, b"aGVsbG8g") + broken + _end(2, 3),
                          b"", _part(0, b"aGVsbG8g") + _part(1, b"d29ybGQ=") + _end(2, 3)])
    expect(Agent("far side", line).run("x") == (3, "hello world"), "wrong answer")
    expect(b"GET 1\n" in line.written, "it was not asked again", line.written)


@scenario
def agent_reports_a_dead_guest(_):
    """A command in a guest that has panicked ends with that reason, not by running out of time."""
    line = _ScriptedLine([])
    line.lost = lambda: "kernel panic"
    try:
        Agent("guest", line).run("x", timeout=600)
    except LineLost as error:
        expect("kernel panic" in str(error), error)
    else:
        expect(False, "no error")


def _bundle(folder, hardened, fast):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"text": {"start": "0xffffffff81000000"}}))
    (folder / "text.bin").write_bytes(bytes(range(256)) * 2)
    (folder / "hardened.edits").write_bytes(hardened)
    (folder / "fast.edits").write_bytes(fast)
    return folder


@scenario
def edits_are_read_as_the_bundle_has_them(folder):
    """The lab's reading of a bundle's edits: offsets over 127, the slot that tells the views apart, an
    error for what is left over."""
    # Two edits: a return site at 300 (varint ac 02), an indirect call at 16.
    fast = b"\x02" + b"\x10\x02\x05\x2e\x2e\x2e\xff\xd0" + b"\xac\x02\x01\x05\xc3\xcc\xcc\xcc\xcc"
    hardened = b"\x02" + b"\x10\x02\x05\xe8\x01\x02\x03\x04" + b"\xac\x02\x01\x05\xe9\x05\x06\x07\x08"
    bundle = slots.Bundle(_bundle(folder / "good", hardened, fast))
    offset, views = bundle.telling()
    expect(offset == 16 and views["stock"] == bytes(range(16, 20)) and views["fast"] == b"\x2e\x2e\x2e\xff"
           and views["hardened"] == b"\xe8\x01\x02\x03", offset, views)
    expect([e.at for e in bundle.slots_in(256, 400, "return")] == [300], bundle.hardened)
    try:
        slots.Bundle(_bundle(folder / "bad", hardened + b"\0", fast))
    except LabError as error:
        expect("behind the last entry" in str(error), error)
    else:
        expect(False, "no error")


_TRIPLE_FAULT = """\
(XEN) CR0 = 0x0000000080050033 CR2 = 0xfffffe0000000080
(XEN) IDTR: 0000 0000 00000fff fffffe0000000000
(XEN) CR2: level 3: gfn 2ce8 host 9b0e8/0 view ffffffffffffffff/1 entry[508] 000000000ff69067
(XEN) CR2: level 0: gfn ff67 host 43d67/0 view ffffffffffffffff/1 entry[0] 80000000070b4161
(XEN) d1v0 Triple fault - invoking HVM shutdown action 1
"""


@scenario
def faults_of_the_emulator_are_told_from_others(folder):
    """A fault at an IDT that is mapped is the emulator's; one that is not mapped, or none at all, is not."""
    def fault(text):
        log = folder / "console.log"
        log.write_text(text)
        return qemu.emulator_fault(log)

    expect("IDT" in (fault(_TRIPLE_FAULT) or ""), "not recognised")
    for old, new in [("80000000070b4161", "80000000070b4160"), ("Triple fault", "shutdown"),
                     ("CR2 = 0xfffffe0000000080", "CR2 = 0x0000000000000080"), ("level 0", "level 1")]:
        expect(fault(_TRIPLE_FAULT.replace(old, new)) is None, f"{new} is taken for the emulator's")
    dump = "RIP:    e008:[<ffff82d0402043fb>]\n(XEN) RFLAGS: 0 CONTEXT: hvm guest (d1v0)\n"
    expect(fault("Triple fault\n" + dump), "Xen's state is not recognised")
    expect(fault("Triple fault\n" + dump.replace("e008", "0010")) is None, "the guest's own state")


@scenario
def scripts_name_what_there_is(folder):
    """pylint finds no error in any Python file here, and finds one in a script that calls what is not there."""
    place = packages.python_environment("pylint", ["pylint==4.1.4"])
    # These come from environments of their own (lab/differential, signer/tests/interop).
    argv = [place / "bin" / "python", "-m", "pylint", "--errors-only", "--ignored-modules=" + ",".join(["capstone", "unicorn", "cryptography", "google", "in_toto_attestation",
                                         "securesystemslib"]),
            f"--init-hook=import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})"]

    def errors(files):
        done = subprocess.run([*argv, *files], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        expect(done.returncode < 32 and not done.stderr, done.stderr)
        return [line for line in done.stdout.splitlines() if ": E" in line or ": F" in line]

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    scripts = [name for name in listed if name.endswith(".py")]
    for name in listed:
        with open(ROOT / name, "rb") as file:
            if file.readline().startswith(b"#!/usr/bin/env python3") and name not in scripts:
                scripts.append(name)
    expect("tests/run" in scripts and "tests/lab/chain.py" in scripts, scripts)
    expect(not (found := errors(scripts)), *found)
    (folder / "bad.py").write_text("from lab import chain\nchain.Installer(None).not_there()\n")
    expect("no-member" in "".join(errors([folder / "bad.py"])), "an unknown method")
