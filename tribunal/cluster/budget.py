"""Whether a job may go on after a generation has ended, by the cause: each has its own budget.

A time limit or a preemption is no fault: up to ``max_generations``. The same exception twice is a fault in the code or
the input: no third try, unless both met the same unit, which is then set aside. Generations that make no unit durable,
though they had the time, are a plan that cannot work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tribunal.cluster.ledger import Row
from tribunal.core.config import SlurmConfig

DEATHS = {"crashed", "failed"}
"""Causes that count against the units being worked on: the process died, or an exception ended it."""
FINAL = {"cancelled", "terminated", "interrupted", "superseded"}
FROM_OUTSIDE = {"preempted", "asked", "requeued"}
"""Ends that may come at any moment of a generation, however short."""
BY_THE_CLOCK = {"time limit", "deadline"}
LATE_S = 60.0
"""Stages that took less of an allocation took nothing of the next one's chance."""
DEATHS_OF_A_UNIT = 2
MAX_SET_ASIDE = 10
"""More items than this are no bad items but a bad run."""


class Decision(NamedTuple):
    go_on: bool
    why: str


def decide(rows: Sequence[Row], slurm: SlurmConfig) -> Decision:
    """Whether a shard may go on, from its generations so far, the last of which has just ended."""
    last = rows[-1]
    counted = since_resume(rows)
    cause, error = last["cause"], last["error"]
    if cause in FINAL:
        return Decision(False, cause)
    if last["mendable"]:
        return Decision(False, f"failed: {error}")
    dead = items_set_aside(rows)
    if len(dead) > MAX_SET_ASIDE:
        return Decision(False, f"failed: {len(dead)} units each ended {DEATHS_OF_A_UNIT} generations, the last with: {error}")
    if cause in DEATHS and frozenset(last["in_flight"]) in dead:
        return Decision(True, f"{_units(last['in_flight'])} ended {DEATHS_OF_A_UNIT} generations and is set aside ({error})")
    if cause == "failed":
        alike = [n for n, row in enumerate(counted, 1) if _same(row["error"], error) and frozenset(row["in_flight"]) not in dead]
        same_unit = all(frozenset(counted[n - 1]["in_flight"]) == frozenset(last["in_flight"]) for n in alike)
        if len(alike) > 1 and not (same_unit and last["in_flight"]):
            return Decision(False, f"failed: the same exception in generations {alike[-2]} and {alike[-1]}: {error}")
    idle = generations_without_progress(counted, slurm.save_every_s)
    if idle >= slurm.no_progress_generations:
        working = f" on {_units(last['in_flight'])}" if last["in_flight"] else ""
        return Decision(
            False,
            f"no progress: {idle} generations in a row made no {last['unit'] or 'unit'} durable; the last worked{working} until it ended "
            f"({cause}); give the job more time, or smaller units",
        )
    if len(counted) >= slurm.max_generations:
        return Decision(False, f"exhausted: {len(counted)} generations of at most {slurm.max_generations} (slurm.max_generations)")
    return Decision(True, f"{cause}, generation {len(counted)} of at most {slurm.max_generations}")


def since_resume(rows: Sequence[Row]) -> list[Row]:
    """The starts that count: those since the user last submitted the job (units set aside stay so)."""
    return [row for row in rows if not row.get("before_resume")]


def generations_without_progress(rows: Sequence[Row], save_every_s: float) -> int:
    """How many of the last generations made nothing durable, of those that had a fair chance to."""
    idle = 0
    for row in reversed(rows):
        if row["units"] or row["progressed"]:
            break
        idle += _had_a_chance(row, save_every_s)
    return idle


def _had_a_chance(row: Row, save_every_s: float) -> bool:
    """Whether a generation ran long enough for its lack of progress to say something about the job.

    Stopped from outside (a person's SIGUSR1, a preemption), it had if it had worked for ``save_every_s``, within which every
    work makes something durable. Stopped by the clock it had, since the next one gets no more; unless it was a late stage
    of an allocation, most of which had gone to the stages before it. One that died had.
    """
    if row["cause"] in FROM_OUTSIDE:
        return None not in (row["working"], row["ended"]) and bool(row["ended"] - row["working"] >= save_every_s)
    if row["cause"] in BY_THE_CLOCK and None not in (row["launched"], row["ended"]):
        return bool(row["started"] - row["launched"] <= max(row["ended"] - row["started"], LATE_S))
    return True


def items_set_aside(rows: Sequence[Row]) -> set[frozenset[str]]:
    """The sets of units that were being worked on when a generation died, as often as is allowed."""
    deaths = Counter(frozenset(row["in_flight"]) for row in rows if row["cause"] in DEATHS and row["in_flight"] and not row["mendable"])
    return {units for units, times in deaths.items() if times >= DEATHS_OF_A_UNIT}


def units_set_aside(rows: Sequence[Row]) -> frozenset[str]:
    """Every unit that is not tried again (rows of all shards)."""
    return frozenset(unit for units in items_set_aside(rows) for unit in units)


def _same(one: str | None, other: str | None) -> bool:
    """Whether two errors are one: numbers and addresses in them may differ."""
    return None not in (one, other) and re.sub(r"0x[0-9a-f]+|\d+", "#", one or "") == re.sub(r"0x[0-9a-f]+|\d+", "#", other or "")


def _units(keys: Sequence[str]) -> str:
    return f"unit '{keys[0]}'" if len(keys) == 1 else f"units '{keys[0]}' and {len(keys) - 1} more"
