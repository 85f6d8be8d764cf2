# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernels of the lab: Debian's current ones, as their packages have them."""

import lzma
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import TARGET, packages

# dom0's drivers for the toolstack; everything else it needs is built in.
DOM0_MODULES = ["xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs"]


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel package."""

    release: str
    package: str
    version: str
    tree: Path

    @property
    def vmlinuz(self):
        return self.tree / "boot" / f"vmlinuz-{self.release}"

    @property
    def vmlinux(self):
        """The executable that an xz-packed `vmlinuz` unpacks (Linux Documentation/x86/boot.rst): whoever boots it without
        hardware virtualisation need not wait for that."""
        plain = TARGET / "guest" / self.release / "vmlinux"
        # Labs that boot at the same time want the same one.
        with packages.locked("vmlinux"):
            if not plain.exists():
                packed = self.vmlinuz.read_bytes()
                start, length = struct.unpack_from("<II", packed, 0x248)
                start += (packed[0x1f1] + 1) * 512
                plain.parent.mkdir(parents=True, exist_ok=True)
                part = plain.with_suffix(".part")
                # The length of what is unpacked stands behind it.
                part.write_bytes(lzma.LZMADecompressor().decompress(packed[start:start + length]))
                part.rename(plain)
        return plain

    @property
    def modules(self):
        """The folder of the package's modules."""
        return self.tree / "lib" / "modules" / self.release / "kernel"

    def module(self, name):
        """The file of one module of the package."""
        found = list((self.tree / "lib" / "modules" / self.release).rglob(f"{name}.ko*"))
        if len(found) != 1:
            raise packages.LabError(f"module {name} of {self.release}: {len(found)} files, expected one")
        return found[0]

    def plain_module(self, name):
        """The same file as the kernel takes it: packed ones are unpacked (xz, as Debian packs from 6.12 on)."""
        packed = self.module(name)
        if packed.suffix == ".ko":
            return packed
        plain = TARGET / "guest" / self.release / f"packaged-{name}.ko"
        plain.parent.mkdir(parents=True, exist_ok=True)
        part = plain.with_suffix(".part")
        with open(part, "wb") as out:
            subprocess.run(["xz", "-dc", packed], stdin=subprocess.DEVNULL, stdout=out, check=True)
        part.rename(plain)
        return plain


def _kernel(metapackage, pattern, modules, suite=None):
    package = packages.resolve(metapackage, pattern, suite)
    only = ["./boot/vmlinuz-*"] + [f"./lib/modules/*/{m}.ko*" for m in modules]
    tree = packages.unpacked(package, only)
    return Kernel(package.removeprefix("linux-image-"), package, packages.version(package), tree)


def cloud():
    """The guest's kernel: what Debian's cloud images run, with all its modules."""
    return _kernel("linux-image-cloud-amd64", r"linux-image-[0-9].*-cloud-amd64", ["*"])


def amd64():
    """dom0's kernel: the cloud kernel is built without XEN_DOM0."""
    return _kernel("linux-image-amd64", r"linux-image-[0-9].*-amd64", DOM0_MODULES)


def rt():
    """The same release with PREEMPT_RT."""
    return _kernel("linux-image-rt-amd64", r"linux-image-[0-9].*-rt-amd64", [])


def cloud_backports():
    """The cloud kernel of the next release (6.12), with all its modules: IBT, call padding, no `.parainstructions`."""
    suite = f"{packages.release()}-backports"
    return _kernel("linux-image-cloud-amd64", r"linux-image-[0-9].*-cloud-amd64", ["*"], suite)


def amd64_backports():
    """The kernel of the next release (6.12) for machines."""
    suite = f"{packages.release()}-backports"
    return _kernel("linux-image-amd64", r"linux-image-[0-9].*-amd64", [], suite)


def headers(kernel):
    """The folders of headers to build a module for `kernel`: (architecture's, common, kbuild)."""
    own = packages.unpacked(f"linux-headers-{kernel.release}")
    common = packages.resolve(f"linux-headers-{kernel.release}", r"linux-headers-.*-common")
    kbuild = packages.resolve(f"linux-headers-{kernel.release}", r"linux-kbuild-.*")
    return own, packages.unpacked(common), packages.unpacked(kbuild)
