# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writes initramfs archives: cpio's "newc" format, not compressed: an emulated processor would unpack it.

Format: Linux Documentation/driver-api/early-userspace/buffer-format.rst.  Written
here because device nodes in an archive need no root this way, and because times
and inode numbers are fixed: the same files give the same bytes.
"""

import os
import stat
from pathlib import Path


class Archive:
    """Files by their path in the archive."""

    def __init__(self):
        self.entries = {}

    def folder(self, path, mode=0o755):
        """A folder and its parents; the root is always there."""
        path = path.strip("/")
        if not path:
            return
        self.folder(os.path.dirname(path))
        self.entries.setdefault(path, (stat.S_IFDIR | mode, b"", 0))

    def file(self, path, content, mode=0o644):
        """A regular file; `content` is bytes, text, or a Path to read."""
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, str):
            content = content.encode()
        path = path.strip("/")
        self.folder(os.path.dirname(path))
        self.entries[path] = (stat.S_IFREG | mode, content, 0)

    def link(self, path, to):
        """A symbolic link."""
        path = path.strip("/")
        self.folder(os.path.dirname(path))
        self.entries[path] = (stat.S_IFLNK | 0o777, to.encode(), 0)

    def device(self, path, major, minor):
        """A character device."""
        path = path.strip("/")
        self.folder(os.path.dirname(path))
        self.entries[path] = (stat.S_IFCHR | 0o600, b"", (major, minor))

    def write(self, target):
        """Writes the archive; the file appears only when it is complete."""
        part = target.with_suffix(".part")
        with open(part, "wb") as out:
            # A parent sorts before what it holds.
            for number, path in enumerate(sorted(self.entries), 1):
                mode, content, device = self.entries[path]
                _entry(out, number, path, mode, content, device or (0, 0))
            _entry(out, 0, "TRAILER!!!", 0, b"", (0, 0))
        part.rename(target)


def _entry(out, number, path, mode, content, device):
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % f for f in fields)
    out.write(header + name + b"\0" * (-(len(header) + len(name)) % 4))
    out.write(content + b"\0" * (-len(content) % 4))
