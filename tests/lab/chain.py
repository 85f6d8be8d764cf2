# SPDX-License-Identifier: MIT OR Apache-2.0
"""The chain of tools as a user runs it: build, emit, sign, apply.

Only command lines and files are used here, never the tools' insides: what the demo
and the scenarios show is what a person at a shell gets.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from . import ROOT, TARGET, LabError, kernel, until

WORK = TARGET / "chain"
GUEST = "guest"


class ToolFailed(LabError):
    """A tool ended with another exit code than expected."""


def run(argv, expect=0, **kw):
    """Runs a command on this machine; returns its standard output."""
    argv = [str(a) for a in argv]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace", **kw)
    if done.returncode != expect:
        raise ToolFailed(f"`{' '.join(argv)}` ended with {done.returncode}, expected {expect}\n"
                         + done.stdout[-2000:] + done.stderr[-4000:])
    return done.stdout


def target_dir():
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()


def tool(name):
    """A release executable of the workspace."""
    return target_dir() / "release" / name


def cargo_build(*wanted):
    """Builds some targets of the workspace in release mode.

    The example has them built with the same features of the same dependencies as the tests: otherwise cargo keeps two
    builds of most crates.
    """
    run(["cargo", "build", "--release", "--locked", "--workspace", "--example", "fuzz-seeds", *wanted], cwd=ROOT)


def build_tools():
    """Builds the three tools."""
    cargo_build("--bin", "hardener", "--bin", "signer", "--bin", "installer")


def build_lab_installer():
    """Builds the installer with what tests need besides (faults, `contract`); returns its path."""
    cargo_build("--bin", "installer-lab", "--features", "installer/lab")
    return tool("installer-lab")


def build_xen():
    """Builds the patched Xen; returns the image."""
    run([ROOT / "xen-patches" / "build"])
    return TARGET / "xen" / "xen"


def emit(out, vmlinuz=None, modules=(), recipe=None, preset=None):
    """Emits a bundle for the guest's kernel, with these modules, by this recipe (a file) or preset."""
    vmlinuz = vmlinuz or kernel.cloud().vmlinuz
    out.parent.mkdir(parents=True, exist_ok=True)
    with_modules = [word for module in modules for word in ("--module", module)]
    run([tool("hardener"), "emit", vmlinuz, "-o", out, "--force", *with_modules,
         *(["--recipe", recipe] if recipe else []), *(["--preset", preset] if preset else [])])
    return out


def emit_said(out, vmlinuz, preset):
    """Emits a bundle by a preset; returns what that said to the person who asked (standard error)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    argv = [tool("hardener"), "emit", vmlinuz, "-o", out, "--force", "--preset", preset]
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ToolFailed(f"`emit` of {vmlinuz.name} by {preset} ended with {done.returncode}:\n{done.stderr}")
    return done.stderr


def check(bundle):
    """The checker's verdict on a bundle, against the image afresh."""
    return run([tool("hardener"), "check", bundle, "--image", kernel.cloud().vmlinuz])


def new_key(name):
    """Makes a key pair; returns (secret, public) files."""
    secret, public = Path(f"{name}.pem"), Path(f"{name}.pub.pem")
    for old in (secret, public):
        old.unlink(missing_ok=True)
    secret.parent.mkdir(parents=True, exist_ok=True)
    run([tool("signer"), "key", "new", "-o", name])
    return secret, public


def policy_copy(name, folder):
    """A policy of the repository, where its envelope may be put beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(ROOT / "policies" / name, folder / name))


def sign(path, secret):
    """Signs a bundle or a policy."""
    run([tool("signer"), "sign", path, "--key", secret])


def signed_chain(work, policy="payroll.toml", modules=(), preset=None, which=None, recipe=None):
    """Bundle (for the kernel `which`, else the guest's usual one) and policy in `work`, signed with a new key;
    returns (bundle, policy, secret, public)."""
    bundle = emit(work / "bundle", which and which.vmlinuz, modules=modules, preset=preset, recipe=recipe)
    secret, public = new_key(work / "key")
    policy = policy_copy(policy, work)
    for path in (bundle, policy):
        sign(path, secret)
    return bundle, policy, secret, public


def envelope_of(path):
    """Where the signature of a bundle or a policy lies."""
    path = Path(path)
    return path / "statement.dsse.json" if path.is_dir() else Path(f"{path}.dsse.json")


def pae(payload_type, payload):
    """DSSE's pre-authentication encoding: the bytes that are signed (DSSE protocol, v1)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def openssl_verifies(envelope, public, folder, damage=False):
    """Whether plain openssl accepts the envelope's first signature.

    Nothing of signer is used: the signed bytes are made here from the envelope.
    With `damage` one bit of the payload is flipped first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(Path(envelope).read_text())
    payload = bytearray(base64.b64decode(content["payload"]))
    if damage:
        payload[len(payload) // 2] ^= 1
    message, signature = folder / "pae", folder / "signature"
    message.write_bytes(pae(content["payloadType"], bytes(payload)))
    signature.write_bytes(base64.b64decode(content["signatures"][0]["sig"]))
    done = subprocess.run(["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin",
                           "-in", message, "-sigfile", signature],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0 and "Verified Successfully" in done.stdout


def dom0_files(bundle=None, policies=(), publics=()):
    """What dom0 gets, as (path, content, mode): the installer, and below /p bundle, policies
    with their envelopes, public keys."""
    files = [("usr/bin/installer", tool("installer"), 0o755)]
    if bundle:
        files += [(f"p/bundle/{f.relative_to(bundle)}", f, 0o644)
                  for f in sorted(bundle.rglob("*")) if f.is_file()]
    for policy in policies:
        files += [(f"p/{policy.name}", policy, 0o644),
                  (f"p/{envelope_of(policy).name}", envelope_of(policy), 0o644)]
    files += [(f"p/{public.name}", public, 0o644) for public in publics]
    return files


# The tables by which a kernel may change its text for good at any time, as when its clock turns out to be unstable under load.
SWITCHES = {"jump-label", "static-call", "static-call-trampoline"}


def tables_changed(before, now):
    """The tables by which a guest has changed its own text between two answers of `Installer.host_text`."""
    (_, before, _), (_, now, _) = before, now
    return {table for table in before | now if before.get(table) != now.get(table)}


def switched(before, now):
    """Has the guest done nothing to its own text between two answers of `Installer.host_text` but switched something
    for good?"""
    tables = tables_changed(before, now)
    return bool(tables) and tables <= SWITCHES


class Installer:
    """`installer` in a lab's dom0."""

    def __init__(self, lab, policy="payroll.toml", trust="key.pub.pem", bundle="/p/bundle"):
        self.lab = lab
        self.apply_args = f"{GUEST} --bundle {bundle} --policy /p/{policy} --trust /p/{trust}"
        self.bundle = bundle
        self.log = "/run/apply.log"

    def run(self, arguments, expect=0, timeout=300):
        """One command; returns its output (both streams)."""
        rc, out = self.lab.dom0.run(f"installer {arguments}", timeout)
        if rc != expect:
            raise ToolFailed(f"`installer {arguments}` in dom0 ended with {rc}, expected {expect}:\n{out}")
        return out

    def json(self, arguments, expect=0, timeout=300):
        """One command with --json; returns what it printed.  `expect` may be a tuple of exit codes."""
        rc, out = self.lab.dom0.run(f"installer {arguments} --json 2>/run/json.err", timeout)
        if rc not in (expect if isinstance(expect, tuple) else (expect,)):
            err = self.lab.dom0.run("cat /run/json.err").out
            raise ToolFailed(f"`installer {arguments} --json` in dom0 ended with {rc}, "
                             f"expected {expect}:\n{out}{err}")
        try:
            return json.loads(out)
        except ValueError as error:
            raise ToolFailed(f"`installer {arguments} --json` printed no JSON: {out[:500]}") from error

    def apply(self, timeout=300, command="installer"):
        """Applies, and leaves the watcher running; returns the line `applied: ...`."""
        self.lab.dom0.run(f"{command} apply {self.apply_args} > {self.log} 2> {self.log}.err & "
                          "echo $! > /run/apply.pid")
        deadline = until(timeout)
        while True:
            rc, out = self.lab.dom0.run(
                f"for i in $(seq 50); do grep -m1 ^applied: {self.log} && exit 0; "
                "kill -0 $(cat /run/apply.pid) 2>/dev/null || exit 1; usleep 100000; done; exit 2")
            if rc == 0:
                return out.strip()
            if rc == 1 or time.monotonic() > deadline:
                err = self.lab.dom0.run(f"cat {self.log} {self.log}.err").out
                raise ToolFailed(f"`installer apply` {'ended' if rc == 1 else 'is still at it'}:\n{err}")

    def stop_watching(self, timeout=60):
        """Asks the watcher to stop: it drops its bindings, so that all run on the default view."""
        rc, out = self.lab.dom0.run("kill -TERM $(cat /run/apply.pid); for i in $(seq 300); do "
                                    "kill -0 $(cat /run/apply.pid) 2>/dev/null || exit 0; usleep 100000; "
                                    "done; exit 1", timeout)
        if rc:
            raise ToolFailed(f"the watcher does not stop on SIGTERM: {out}")

    def host_text(self):
        """The guest's own text: its digest, the bytes that differ from the file by the table that explains them,
        and whether hook code is in the cave; an error if there is anything else."""
        seen = self.json(f"digest {GUEST} --bundle {self.bundle} --explain")
        return seen["sha256"], seen["changed_bytes"], seen["cave_in_use"]

    def cave(self):
        """Where the cave is in the guest."""
        slide = int(self.json(f"digest {GUEST} --bundle {self.bundle}")["slide"], 0)
        rc, text = self.lab.dom0.run(f"cat {self.bundle}/manifest.json")
        if rc:
            raise ToolFailed(text)
        place = json.loads(text)["cave"]["range"]
        return range(*((int(place[end], 0) + slide) % 2 ** 64 for end in ("start", "end")))

    def own_text(self, before, when):
        """`host_text` once more: all that is not as `before` must be what the guest has switched itself."""
        now = self.host_text()
        if now != before and (now[-1] or not switched(before, now)):
            raise ToolFailed(f"{when}: the guest's text is not its own again: {now}, before {before}")
        return now

    def processes(self):
        """The guest's processes by pid, with view and rule."""
        return {p["pid"]: p for p in self.json(f"ps {GUEST}")["processes"]}

    def status(self):
        """What `status` says of the guest."""
        [domain] = [d for d in self.json(f"status {GUEST}")["domains"] if d["name"] == GUEST]
        return domain

    def events(self, kind):
        """Records of one kind in the guest's audit log, oldest first."""
        rc, out = self.lab.dom0.run(f"installer events {GUEST} --only {kind} --json")
        if rc:
            raise ToolFailed(f"`installer events` ended with {rc}:\n{out}")
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    def wait_view(self, pid, view, timeout=60):
        """Waits until the process has the view; returns its entry."""
        deadline = until(timeout)
        while True:
            entry = self.processes().get(pid)
            if entry and entry["view"] == view:
                return entry
            if time.monotonic() > deadline:
                raise ToolFailed(f"process {pid} should be in view {view}, `installer ps` has {entry}")
            time.sleep(0.3)
