"""Multi-digit addition for the built-in reasoner: '347 + 285 ='. Problems are made, so no file and no network.

dataset: {name: addition, digits: [2, 3, 4], per_digits: 40}
"""

from __future__ import annotations

import hashlib
from itertools import zip_longest

from pydantic import Field, field_validator, model_validator

from tribunal.core.config import DatasetConfig
from tribunal.core.records import Problem


class Dataset(DatasetConfig):
    """Both summands have the same number of digits, which is the stratum; a + b and b + a never both appear."""

    digits: list[int] = Field([2, 3, 4], min_length=1, description="digit counts of the summands, each from 1 to 9")
    per_digits: int = Field(40, ge=1, description="problems for each digit count")
    seed: int = Field(0, ge=0, description="of the problems alone; the experiment's seed draws the samples")

    @field_validator("path", "revision", "split")
    @classmethod
    def _nothing_is_read(cls, value: object) -> object:
        if value not in (None, "test"):
            raise ValueError("addition problems are made, not read; remove this key")
        return value

    @field_validator("digits")
    @classmethod
    def _possible_digits(cls, value: list[int]) -> list[int]:
        if any(not 1 <= digits <= 9 for digits in value) or len(set(value)) < len(value):
            raise ValueError("give each digit count once, from 1 to 9")
        return value

    @model_validator(mode="after")
    def _enough_problems(self) -> Dataset:
        for digits in self.digits:
            if self.per_digits > (available := _pairs(digits)) // 2:
                raise ValueError(
                    f"per_digits: {self.per_digits} is too many for {digits}-digit summands, which make {available} different problems; "
                    f"use at most {available // 2} (half of them) or more digits"
                )
        return self

    def problems(self) -> list[Problem]:
        """Digit counts take turns, so that any first N problems are balanced over them."""
        columns = [self._of(digits) for digits in self.digits]
        return [problem for turn in zip_longest(*columns) for problem in turn if problem is not None][: self.limit]

    def _of(self, digits: int) -> list[Problem]:
        low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
        seen: set[tuple[int, int]] = set()
        problems: list[Problem] = []
        draw = 0
        while len(problems) < self.per_digits:
            a, b = (low + _draw(f"{self.seed}/{digits}/{draw}/{which}", span) for which in "ab")
            draw += 1
            pair = (min(a, b), max(a, b))
            if pair in seen:
                continue
            seen.add(pair)
            problems.append(
                Problem(
                    id=f"{a}+{b}",
                    question=f"{a} + {b} =",
                    answer=str(a + b),
                    stratum=f"{digits} digit{'s' if digits > 1 else ''}",
                    dataset="addition",
                    revision="generator 1",
                )
            )
        return problems


def _pairs(digits: int) -> int:
    span = 9 * 10 ** (digits - 1)
    return span * (span + 1) // 2


def _draw(key: str, span: int) -> int:
    """A draw from 0 to span - 1 that is a function of the key alone (bias below span / 2^64)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % span
