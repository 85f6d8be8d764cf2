# SPDX-License-Identifier: MIT OR Apache-2.0
"""A bundle's tables: postcard, in which all numbers are varints and a sequence begins with its length."""

from pathlib import Path

from . import LabError


class Reader:
    """Reads one file from its start to its end."""

    def __init__(self, path):
        self.path = Path(path)
        self.data = self.path.read_bytes()
        self.at = 0

    def number(self):
        """The next unsigned number."""
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                return value

    def bytes(self):
        """The next sequence of bytes."""
        length = self.number()
        self.at += length
        return self.data[self.at - length:self.at]

    def sequence(self, read):
        """The next sequence, each member by `read`."""
        return [read() for _ in range(self.number())]

    def end(self):
        """Nothing may follow."""
        if self.at != len(self.data):
            raise LabError(f"{self.path}: {len(self.data) - self.at} bytes behind the last entry")
