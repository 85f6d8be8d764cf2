# SPDX-License-Identifier: MIT OR Apache-2.0
"""Commands and their results over a line: the near side of tests/guest/agent.c.

A `Line` is anything with `write(bytes)` and `read(seconds, marker) -> bytes`; the
marker, a text that ends the answer, may be used to wait better.  The far
side's answers carry checksums because a kernel may print on the same line; what
does not arrive whole is asked for again.
"""

import base64
import itertools
import re
import time
import zlib
from typing import NamedTuple

from . import PATIENCE, LabError, until

_PART = re.compile(rb"~P (\w+) (\d+) ([0-9a-f]{8}) ([A-Za-z0-9+/=]*)")
_END = re.compile(rb"~E ((\w+) (\d+) (\d+)) ([0-9a-f]{8})")


class Result(NamedTuple):
    """What a command left: exit code (124: out of time), and both its outputs as they came."""

    rc: int
    out: str


class LineLost(LabError):
    """The far side stopped answering: it crashed, or was never there."""


class Agent:
    """Runs shell commands at the other end of a line."""

    def __init__(self, name, line):
        self.name = name
        self.line = line
        self._ids = (f"{n:x}" for n in itertools.count(1))

    def wait_ready(self, timeout):
        """Waits until the agent answers."""
        deadline = until(timeout)
        seen = b""
        while time.monotonic() < deadline:
            number = next(self._ids)
            self.line.write(f"\nPING {number}\n".encode())
            pause = time.monotonic() + 2
            while time.monotonic() < min(pause, deadline):
                seen = (seen + self.line.read(0.5, f"~PONG {number}"))[-65536:]
                if f"~PONG {number}".encode() in seen:
                    return
        raise LineLost(f"{self.name} did not come up in {timeout} s")

    def run(self, command, timeout=120):
        """Runs `command` with /bin/sh; both outputs come back as one text."""
        number = next(self._ids)
        request = f"RUN {number} {int(timeout * PATIENCE)} {base64.b64encode(command.encode()).decode()}\n"
        self.line.write(request.encode())
        deadline = until(timeout + 30)
        again = time.monotonic() + 20
        parts, end, rest = {}, None, b""
        while True:
            data = self.line.read(2.0, f"~E {number} ")
            rest += data
            *lines, rest = re.split(rb"[\r\n]+", rest)
            for text in lines:
                part, last = _PART.search(text), _END.search(text)
                if part and part[1].decode() == number:
                    if zlib.crc32(part[4]) ^ int(part[2]) == int(part[3], 16):
                        parts[int(part[2])] = part[4]
                elif last and last[2].decode() == number and zlib.crc32(last[1]) == int(last[5], 16):
                    end = (int(last[3]), int(last[4]))
            if end and all(n in parts for n in range(end[0])):
                out = b"".join(base64.b64decode(parts[n]) for n in range(end[0]))
                return Result(end[1], out.decode(errors="replace"))
            now = time.monotonic()
            if reason := getattr(self.line, "lost", lambda: None)():
                raise LineLost(f"{self.name} is lost ({reason}) while it runs: {command}")
            if now > deadline:
                raise LineLost(f"{self.name} gave no answer within {timeout + 30} s to: {command}")
            if now > again or (end and not data):
                # Parts are missing, or the last line was broken: the far side keeps its answer.
                self.line.write(f"GET {number}\n".encode())
                again = now + 20
                end = None
