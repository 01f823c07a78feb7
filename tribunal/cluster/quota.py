"""How much room a folder has: what its file system says, and what the site's quota command says of this user.

A disk with terabytes free still refuses a write once a quota is used up, in bytes or in files, and `df` does not show it.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

KIB = 1024
NEARLY_FULL = 0.95
ASKED_S = 20.0


class Room(NamedTuple):
    """What anybody may still write: GB, and files (None where the file system has no such limit)."""

    gb: float
    files: int | None

    def __str__(self) -> str:
        return f"{self.gb:.0f} GB and {'any number of' if self.files is None else f'{self.files:,}'} files free"


class Quota(NamedTuple):
    """What this user may have on a file system.

    Attributes:
        said: in words, with the command that said it.
        full: a limit is used up or nearly so; None where that could not be told from what the command said.
    """

    said: str
    full: bool | None


class Mount(NamedTuple):
    source: str
    place: str
    kind: str


def room(folder: Path) -> Room:
    """Room on the file system of an existing folder."""
    facts = os.statvfs(folder)
    return Room(facts.f_bavail * facts.f_frsize / 1e9, facts.f_favail if facts.f_files else None)


def quota(folder: Path) -> Quota | None:
    """This user's quota on the file system of an existing folder; None where no command here knows of one."""
    mount = mount_of(folder)
    for kinds, command in (
        ({"lustre"}, ["lfs", "quota", "-q", "-u", getpass.getuser(), mount.place]),
        ({"beegfs"}, ["beegfs-ctl", "--getquota", "--uid", str(os.getuid()), f"--mount={mount.place}"]),
        ({"gpfs"}, ["mmlsquota", "-u", getpass.getuser(), Path(mount.source).name]),
        (None, ["quota", "-w", "-p", "-f", mount.place]),
    ):
        if (kinds is None or mount.kind in kinds) and shutil.which(command[0]) is not None:
            try:  # its exit code is not looked at: that of quota is 1 for who has used it up
                said = subprocess.run(command, capture_output=True, text=True, timeout=ASKED_S, stdin=subprocess.DEVNULL, check=False)
            except subprocess.TimeoutExpired:
                return Quota(f"{command[0]} gave no answer in {ASKED_S:.0f} s", None)
            lines = [line for line in said.stdout.splitlines() if line.strip() and not line.rstrip().endswith(": none")]
            return read_quota(lines, command[0], mount) if lines else None
    return None


def read_quota(lines: list[str], program: str, mount: Mount) -> Quota:
    """Read what ``quota`` or ``lfs quota`` printed: used, soft and hard limit in KiB, the same in files; 0 is no limit.

    What has another form is passed on as it is.
    """
    by = f"({program} on {mount.place})"
    text = " ".join(lines)
    after = text.rpartition(mount.source if mount.source in text else mount.place)[2]
    fields = re.findall(r"(?:^|(?<=\s))(\d+)\*?(?=\s|$)", after)
    if program in ("quota", "lfs") and len(fields) in (6, 8):  # 8: quota -p tells each grace time as a number
        numbers = [int(field) for field in (fields if len(fields) == 6 else [*fields[:3], *fields[4:7]])]
        used, files = numbers[0], numbers[3]
        limits = _lowest(numbers[1:3]), _lowest(numbers[4:6])
        parts = [f"{used * KIB / 1e9:.1f} GB used" + (f" of {limits[0] * KIB / 1e9:.1f}" if limits[0] else ", no limit")]
        parts += [f"{files:,} files" + (f" of {limits[1]:,}" if limits[1] else ", no limit")]
        full = any(limit and have >= NEARLY_FULL * limit for have, limit in zip((used, files), limits))
        return Quota(f"{'; '.join(parts)} {by}", full)
    return Quota(f"{' '.join(lines[-1].split())} {by}", None)


def _lowest(limits: list[int]) -> int:
    """The limit that is met first; 0 where there is none."""
    return min((limit for limit in limits if limit), default=0)


def mount_of(folder: Path) -> Mount:
    """What is mounted where the folder lies."""
    path = str(folder.resolve())
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    here = [Mount(source, re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place), kind) for source, place, kind in mounts]
    inside = [mount for mount in here if path == mount.place or path.startswith(mount.place.rstrip("/") + "/")]
    return max(reversed(inside), key=lambda mount: len(mount.place))  # of two on one place the later one is seen
