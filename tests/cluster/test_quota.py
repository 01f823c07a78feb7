"""What the quota commands print is read as used and allowed, in bytes and files; what nobody knows is not made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tribunal.cluster import quota as module
from tribunal.cluster.quota import Mount, mount_of, quota, room

QUOTA = """Disk quotas for user jo (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
   nas:/home {used}  50000000 60000000       0   12345   {files}       0       0
"""
LFS = "         /lustre  {used}       0 1000000       -   55000       0   {files}       -\n"


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def says(program: str, text: str, mount: Mount, code: int = 0) -> None:
        script = tmp_path / program
        script.write_text(f"#!/bin/bash\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(module, "mount_of", lambda _: mount)

    return says


NFS, LUSTRE = Mount("nas:/home", "/home", "nfs4"), Mount("10.0.0.1@o2ib:/l", "/lustre", "lustre")


@pytest.mark.parametrize(
    ("program", "text", "mount", "code", "said", "full"),
    [
        ("quota", QUOTA.format(used=20_000_000, files=0), NFS, 0, "20.5 GB used of 51.2; 12,345 files, no limit (quota on /home)", False),
        ("quota", QUOTA.format(used="51000000*", files=0), NFS, 1, "52.2 GB used of 51.2; 12,345 files, no limit (quota on /home)", True),
        ("quota", QUOTA.format(used=1, files=12_400), NFS, 0, "0.0 GB used of 51.2; 12,345 files of 12,400 (quota on /home)", True),
        ("lfs", LFS.format(used=500_000, files=100_000), LUSTRE, 0, "0.5 GB used of 1.0; 55,000 files of 100,000 (lfs on /lustre)", False),
        ("lfs", LFS.format(used="[500000]", files=9), LUSTRE, 0, "/lustre [500000] 0 1000000 - 55000 0 9 - (lfs on /lustre)", None),
    ],
)
def test_used_and_allowed_are_read_and_another_form_is_passed_on(says, program, text, mount, code, said, full):
    says(program, text, mount, code)
    assert quota(Path("/")) == (said, full)


def test_no_quota_is_nothing_to_report(says):
    says("quota", "Disk quotas for user jo (uid 1000): none", NFS)
    assert quota(Path("/")) is None
    says("lfs", LFS, NFS)  # a Lustre command says nothing of an NFS
    assert quota(Path("/")) is None


def test_room_is_that_of_the_folders_own_file_system(tmp_path):
    facts = os.statvfs(tmp_path)
    free = room(tmp_path)
    assert free.gb == pytest.approx(facts.f_bavail * facts.f_frsize / 1e9, rel=0.05)
    assert free.files is None or free.files > 0
    place = Path(mount_of(tmp_path).place)
    assert place.is_mount() and place in (tmp_path.resolve(), *tmp_path.resolve().parents)
