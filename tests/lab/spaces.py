# SPDX-License-Identifier: MIT OR Apache-2.0
"""tests/guest/spaces.c from here: processes that see from inside which view they are on."""

import json

from . import LabError, chain, programs, slots

# The programs are one file under two paths.
TRUSTED, UNTRUSTED = "/usr/bin/trusted", "/usr/bin/untrusted"

POLICY = """\
schema = 1
name = "spaces"
version = 1

[default]
view = "hardened"

[[rule]]
id = "trusted-root"
reason = "a test: root's copy of the program"
view = "fast"
match = { exe = "/usr/bin/trusted", uid = [0] }

[[rule]]
id = "payroll-fast"
reason = "a test: a second one that is trusted"
view = "fast"
match = { exe = "/usr/bin/payroll" }
"""


def policy(folder, secret):
    """The policy, signed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spaces.toml"
    path.write_text(POLICY)
    chain.sign(path, secret)
    return path


def files():
    """What the guest needs."""
    return [(path.lstrip("/"), programs.program("spaces"), 0o755) for path in (TRUSTED, UNTRUSTED)]


class Slot:
    """A place of the running kernel's text that tells the views apart."""

    def __init__(self, bundle, installer):
        bundle = slots.Bundle(bundle)
        offset, views = bundle.telling()
        self.address = bundle.start + offset + int(installer.status()["slide"], 16)
        self.words = [f"{int.from_bytes(views[v][:4], 'little'):08x}" for v in ("stock", "fast", "hardened")]
        if len(set(self.words)) != 3:
            raise LabError(f"the slot at {self.address:#x} does not tell the views apart: {self.words}")


def drive(guest, slot, how, rounds, timeout=900):
    """One run of the driver; returns its JSON."""
    command = f"{UNTRUSTED} drive {how} {rounds} {slot.address:#x} {' '.join(slot.words)}"
    rc, out = guest.run(command, timeout)
    try:
        if rc == 0:
            return json.loads(out.strip().splitlines()[-1])
    except ValueError:
        pass
    raise LabError(f"`{command}` ended with {rc}: {out[-2000:]}")
