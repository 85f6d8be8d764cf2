# SPDX-License-Identifier: MIT OR Apache-2.0
"""GRUB for PVH guests, with kernel and initramfs inside.

Xen loads a PVH guest's kernel itself and enters it behind the decompressor, which is the
part that chooses the KASLR slide: booted so, Debian's kernel always runs where it was
linked.  GRUB's PVH build starts the same file as firmware would, decompressor first.
"""

import subprocess
import tarfile

from . import LabError, packages

PLATFORM = "i386-xen_pvh"
_MODULES = ["memdisk", "tar", "linux", "normal"]


def image(path, vmlinuz, initrd, command_line):
    """Writes a GRUB image that boots `vmlinuz` with `initrd`; returns its path."""
    modules = packages.unpacked("grub-xen-bin") / "usr/lib/grub" / PLATFORM
    config = path.with_suffix(".cfg")
    disk = path.with_suffix(".tar")
    config.write_text(f"linux (memdisk)/vmlinuz {command_line}\ninitrd (memdisk)/initrd\nboot\n")
    with tarfile.open(disk, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(vmlinuz, "vmlinuz")
        tar.add(initrd, "initrd")
    argv = ["grub-mkimage", "-O", PLATFORM, "-d", modules, "-m", disk, "-c", config,
            "-p", "(memdisk)/", "-o", path, *_MODULES]
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"grub-mkimage: {done.stderr}")
    disk.unlink()
    return path
