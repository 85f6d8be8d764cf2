# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a bundle says of its indirect branches: which entries of the text each may reach, and by what."""

from typing import NamedTuple

from .postcard import Reader

# What decides a class by prototype; these let the entries of which nothing is known through as well.
_BY_PROTOTYPE = {"prototype", "prototypes"}


class Class(NamedTuple):
    """What some branches may reach, as offsets in the text, ascending, and what decides it."""

    entries: tuple
    by: str


class Forward(NamedTuple):
    """The class of each indirect branch, by the branch's offset in the text, the entries of which BTF may have
    another function's prototype, and the class of each branch that the kernel makes a direct one."""

    classes: dict
    doubted: frozenset
    patched: dict


def forward_sets(folder):
    """Reads all."""
    reader = Reader(folder / "forward.postcard")
    classes = reader.sequence(lambda: (reader.bytes().decode(), reader.sequence(reader.number)))
    sites = reader.sequence(lambda: (reader.number(), reader.number()))
    doubts = reader.sequence(lambda: (reader.number(), reader.bytes().decode(), reader.number()))
    patched = reader.sequence(lambda: (reader.number(), reader.number()))
    reader.end()
    untold = {at for at, _, told in doubts if not told}
    whole = [Class(tuple(sorted({*entries, *untold} if by in _BY_PROTOTYPE else entries)), by)
             for by, entries in classes]
    return Forward({at: whole[number] for at, number in sites}, frozenset(at for at, _, _ in doubts),
                   {at: whole[number] for at, number in patched})
