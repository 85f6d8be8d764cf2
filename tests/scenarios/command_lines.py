# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tools at a shell, on Debian's kernels, without Xen."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lab import chain, kernel

from . import expect, scenario

HARDENER, SIGNER, INSTALLER = map(chain.tool, ("hardener", "signer", "installer"))


class World:
    """A signed bundle for the cloud kernel, and room for damaged copies."""

    def __init__(self, folder):
        self.folder = folder
        self.vmlinuz = kernel.cloud().vmlinuz
        self.bundle = chain.emit(folder / "bundle")
        self.secret, self.public = chain.new_key(folder / "key")
        chain.sign(self.bundle, self.secret)
        self.policy = chain.policy_copy("payroll.toml", folder)
        chain.sign(self.policy, self.secret)

    def copy(self, name):
        """A fresh copy of the signed bundle, to be damaged."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.bundle, target))


@contextmanager
def world():
    """Builds the tools, emits and signs once."""
    chain.build_tools()
    with tempfile.TemporaryDirectory() as folder:
        yield World(Path(folder))


def refused(argv, codes, *words):
    """The command ends with one of `codes` and one message that has all `words`."""
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, errors="replace")
    told = f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    expect(done.returncode in codes, f"expected exit in {codes}:", told)
    expect("panicked" not in done.stderr, told)
    expect((done.stderr + done.stdout).strip(), "no message:", told)
    for word in words:
        expect(str(word) in done.stderr + done.stdout, f"no {word!r} in:", told)


@scenario
def other_verifiers_agree(w):
    """securesystemslib and in-toto's library judge every envelope of the testkit as signer does."""
    done = subprocess.run([chain.ROOT / "signer" / "tests" / "interop" / "run", SIGNER], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, errors="replace")
    expect(done.returncode == 0 and " 0 failed" in done.stdout, done.stdout[-2000:], done.stderr[-2000:])


@scenario
def emit_is_reproducible(w):
    """The same image gives the same bundle, byte for byte."""
    again = chain.emit(w.folder / "again")
    made = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    expect(made, "an empty bundle")
    for file in made:
        expect((again / file).read_bytes() == (w.bundle / file).read_bytes(), f"{file} differs")


@scenario
def emit_stays_in_its_memory(w):
    """hardener emit on Debian's full amd64 kernel takes less than 500 MB."""
    out = w.folder / "amd64"
    child = subprocess.Popen([HARDENER, "emit", kernel.amd64().vmlinuz, "-o", out],
                             stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    expect(child.returncode == 0, errors)
    expect(usage.ru_maxrss < 500_000, f"{usage.ru_maxrss} kB")


@scenario
def check_accepts_what_emit_made(w):
    """The checker, written apart from the emitter, finds no violation."""
    chain.check(w.bundle)


@scenario
def check_refuses_another_kernel(w):
    """A bundle is not accepted for another kernel than its own."""
    refused([HARDENER, "check", w.bundle, "--image", kernel.amd64().vmlinuz], (2,), "build")


@scenario
def check_finds_damage_in_every_file(w):
    """One flipped bit in the middle of any file of a bundle is found: by the reader (exit 2) or the checker (1)."""
    files = sorted(p.relative_to(w.bundle) for p in w.bundle.rglob("*")
                   if p.is_file() and p.name != "statement.dsse.json")
    for file in files:
        damaged = w.copy("damaged")
        content = bytearray((damaged / file).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / file).write_bytes(content)
        refused([HARDENER, "check", damaged, "--image", w.vmlinuz], (1, 2))


@scenario
def bad_images_are_refused(w):
    """Garbage, an empty file, a truncated and a damaged vmlinuz: exit 2, the file is named, no bundle."""
    whole = w.vmlinuz.read_bytes()
    cases = {"empty": b"", "garbage": b"\x7fELF" + b"\x5a" * 5000, "text": b"not a kernel\n" * 50,
             "header": whole[:600], "half": whole[:len(whole) // 2],
             # The very end of a signed image is its certificate, which no loader of the kernel reads.
             "short": whole[:len(whole) * 9 // 10],
             "holed": whole[:2 << 20] + bytes(4096) + whole[(2 << 20) + 4096:]}
    for name, content in cases.items():
        image, out = w.folder / f"vmlinuz-{name}", w.folder / f"out-{name}"
        image.write_bytes(content)
        refused([HARDENER, "emit", image, "-o", out], (2,), image.name)
        expect(not out.exists() or not any(out.iterdir()), f"{name}: half a bundle in {out}")
    refused([HARDENER, "emit", w.folder / "nowhere", "-o", w.folder / "out"], (2,), "nowhere")


@scenario
def emit_does_not_overwrite(w):
    """An existing bundle is not overwritten without --force."""
    target = w.copy("keep")
    refused([HARDENER, "emit", w.vmlinuz, "-o", target], (2,), "--force")
    expect((target / "statement.dsse.json").exists(), "the old bundle is damaged")


@scenario
def inspect_speaks_json(w):
    """hardener inspect --json is JSON with a schema and the three variants."""
    seen = json.loads(chain.run([HARDENER, "inspect", w.bundle, "--json"]))
    expect(seen["schema"].startswith("penumbra."), seen.get("schema"))
    text = json.dumps(seen)
    for variant in ("stock", "fast", "hardened"):
        expect(f'"{variant}"' in text, f"no {variant}")


@scenario
def openssl_agrees(w):
    """Plain openssl accepts signer's key and signature, and refuses a changed statement."""
    for path in (w.bundle, w.policy):
        envelope = chain.envelope_of(path)
        expect(chain.openssl_verifies(envelope, w.public, w.folder / "o"), f"{envelope}: not accepted")
        expect(not chain.openssl_verifies(envelope, w.public, w.folder / "o", damage=True),
               f"{envelope}: accepted although changed")
    text = chain.run(["openssl", "pkey", "-in", w.secret, "-noout", "-text"])
    expect("ED25519" in text.upper(), text)


@scenario
def edited_bundles_are_not_verified(w):
    """signer verify: a changed, missing or added file and a foreign key are refused."""
    chain.run([SIGNER, "verify", w.bundle, "--trust", w.public])
    for file in sorted(p.name for p in w.bundle.iterdir() if p.is_file()):
        damaged = w.copy("edited")
        content = bytearray((damaged / file).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / file).write_bytes(content)
        refused([SIGNER, "verify", damaged, "--trust", w.public], (2,), "edited")
    damaged = w.copy("edited")
    (damaged / "manifest.json").unlink()
    refused([SIGNER, "verify", damaged, "--trust", w.public], (2,), "manifest.json")
    damaged = w.copy("edited")
    (damaged / "extra").write_text("x")
    refused([SIGNER, "verify", damaged, "--trust", w.public], (2,), "extra")
    _, other = chain.new_key(w.folder / "other")
    refused([SIGNER, "verify", w.bundle, "--trust", other], (2,))
    refused([SIGNER, "verify", w.bundle, "--trust", w.public, "--threshold", 2], (2,))


@scenario
def a_policy_that_fails_its_own_tests_is_not_applied(w):
    """A signed policy whose own test expects another view is refused before Xen is asked for anything."""
    policy = w.folder / "failing.toml"
    policy.write_text(w.policy.read_text().replace('view = "fast", rule', 'view = "hardened", rule'))
    expect(policy.read_text() != w.policy.read_text(), "the test was not changed")
    chain.sign(policy, w.secret)
    refused([INSTALLER, "apply", "guest", "--bundle", w.bundle, "--policy", policy, "--trust", w.public],
            (2,), "payroll is fast", "failing.toml")


@scenario
def two_keys_meet_a_threshold(w):
    """A second signature is added to the first, and a threshold of two distinct keys is met."""
    bundle = w.copy("two")
    secret, public = chain.new_key(w.folder / "second")
    chain.sign(bundle, secret)
    chain.run([SIGNER, "verify", bundle, "--trust", w.public, "--trust", public, "--threshold", 2])
    refused([SIGNER, "verify", bundle, "--trust", public, "--trust", public, "--threshold", 2], (2,))


@scenario
def tools_teach(_):
    """Each tool has --help with examples or commands, a version, and completions; wrong usage is exit 2."""
    for binary in (HARDENER, SIGNER, INSTALLER):
        expect("Usage" in chain.run([binary, "--help"]), f"{binary.name} --help")
        expect(binary.name in chain.run([binary, "--version"]), f"{binary.name} --version")
        expect(binary.name in chain.run([binary, "completions", "bash"]), f"{binary.name} completions")
        refused([binary, "no-such-command"], (2,))
