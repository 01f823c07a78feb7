"""The receipt of a finished job: what went in, what came out with which hashes, and the digest of the data.

The digest covers the data files only (figures, pages, hosts, times and generations are left out), so two runs of the
same plan on the same class of hardware have the same digest however often they were interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.core.errors import CorruptError, InputMissing
from tribunal.core.storage import read_json, sha256_file, sha256_json

RECEIPT = "receipt.json"
NOT_DATA = {".png", ".svg", ".html", ".pdf"}
HASH_AT_START_BYTES = 64 * 2**20


def hash_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {sha256, bytes}} of every file of a results folder except the receipt itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT)
    return {path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in paths}


def digest(outputs: dict[str, dict[str, Any]], set_aside: Sequence[str] = ()) -> str:
    """sha256 over the data files' names and hashes, and over the units that were given up, where there are any."""
    hashes: dict[str, Any] = {name: facts["sha256"] for name, facts in outputs.items() if Path(name).suffix not in NOT_DATA}
    return sha256_json({**hashes, "set aside": sorted(set_aside)} if set_aside else hashes)


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a finished job's folder; None when the job has not finished."""
    path = folder / RECEIPT
    if not path.exists():
        return None
    receipt = read_json(path)
    if not isinstance(receipt, dict) or receipt.get("schema_version") != 1:
        raise CorruptError(f"{path}: schema_version {receipt.get('schema_version') if isinstance(receipt, dict) else None}, expected 1")
    return receipt


def require(folder: Path, wanted_by: str) -> dict[str, Any]:
    """The receipt of a finished job whose files are all there with the right sizes (and hashes, for files up to 64 MiB).

    Raises:
        InputMissing: the job has not finished, or what it read itself was made anew since.
        CorruptError: a file is missing or differs; names it.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        experiment, job = folder.parent.name, folder.name
        raise InputMissing(f"{wanted_by} reads the results of {job}, which has not finished for experiment '{experiment}'; run {job} first")
    faults = verify(folder, receipt, hash_up_to=HASH_AT_START_BYTES)
    if faults:
        raise CorruptError(f"{faults[0]}; remove the folder {folder} and run {folder.name} again")
    if why := stale(folder.name, lambda job: read_receipt(folder.parent / job)):
        raise InputMissing(
            f"{wanted_by} reads the results of {folder.name}, which are stale ({why}); remove the folder {folder} and run it again"
        )
    return receipt


def stale(job: str, receipt_of: Callable[[str], Mapping[str, Any] | None], above: tuple[str, ...] = ()) -> str:
    """Why a finished job's results do not belong to what it reads now, itself or further up; empty where they do.

    Args:
        receipt_of: the receipt of a job of the same experiment; None where there is none, which nothing is said of.
    """
    receipt_of = functools.cache(receipt_of)  # one of 10,000 files takes a while to read, and many jobs read the same
    receipt = receipt_of(job) or {}
    there = {need: (digest, found) for need, digest in receipt.get("config", {}).get("inputs", {}).items() if (found := receipt_of(need))}
    if changed := [need for need, (digest, found) in there.items() if found["digest"] != digest]:
        return f"{', '.join(changed)} changed since"
    further = [need for need in there if need not in above and stale(need, receipt_of, (*above, job))]
    return f"{', '.join(further)} {'is' if len(further) == 1 else 'are'} stale" if further else ""


def verify(folder: Path, receipt: dict[str, Any], *, hash_up_to: float = float("inf")) -> list[str]:
    """Every difference between a results folder and its receipt, one sentence each."""
    faults = []
    for name, facts in receipt["outputs"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size != facts["bytes"]:
            faults.append(f"{path} has {path.stat().st_size} bytes, the receipt says {facts['bytes']}")
        elif facts["bytes"] <= hash_up_to and sha256_file(path) != facts["sha256"]:
            faults.append(f"{path} does not match the hash in its receipt")
    return faults
