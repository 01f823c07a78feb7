"""What label_sentences says of a trace's sentences, and its file read on demand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from tribunal.core.config import Section
from tribunal.core.errors import DataError
from tribunal.core.records import Record
from tribunal.core.storage import storage_errors

CLASSES = (
    "problem_setup", "plan_generation", "fact_retrieval", "active_computation", "result_consolidation",
    "uncertainty_management", "self_checking", "final_answer_emission",
)  # fmt: skip
"""The sentence classes of Bogdan et al. (2025), "Thought Anchors"."""
TIERS = ("low", "medium", "high", "critical")
"""Importance within a problem, a quarter of its sentences each, from the least to the most important."""
THIRDS = ("low", "middle", "high")
"""How well the trace's own answer can be read off at a sentence's end, within the trace, a third of its sentences each."""

CHANCE = 0.05
"""Share of traces without any effect whose importances may still pass for one."""


class RolloutSettings(Section):
    """How traces are continued from the start of each sentence."""

    samples: int = Field(10, ge=2, description="rollouts from each sentence's start")
    max_new_tokens: int = Field(2048, ge=1, description="a rollout that is not done by then has no answer")
    temperature: float = Field(1.0, gt=0, description="softmax temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 filters nothing")
    slots: int = Field(32, ge=1, description="rollouts sampled together (it can change low bits)")
    max_cache_gb: float = Field(20.0, gt=0, description="larger caches are not saved on a stop")


class SentenceLabel(Record):
    """One sentence; None where the job was not asked, or where there is nothing to say."""

    sentence_class: str | None = Field(None, description="one of CLASSES")
    importance: float | None = Field(None, description="suppression: mean KL (nats) on later tokens; rollouts: total variation, 0 to 1")
    importance_by_chance: float | None = Field(
        None, description="rollouts: mean importance when the answers are dealt out at random; suppression: when nothing is hidden"
    )
    importance_p: float | None = Field(None, description="rollouts: share of random deals with at least this importance")
    tier: str | None = Field(None, description="one of TIERS: rank of the importance within the problem")
    answer_logprob: float | None = Field(None, description="log-probability (nats) of the answer's first token at the sentence's end")
    answer_third: str | None = Field(None, description="one of THIRDS: rank of answer_logprob within the trace")


class TraceSentences(Record):
    """One line of ``sentences.jsonl``: labels for the sentences of one trace, in their order in ``labels.jsonl``."""

    problem_id: str
    sample: int
    sentences: list[SentenceLabel]

    @property
    def key(self) -> str:
        return f"{self.problem_id}/{self.sample}"

    @property
    def beyond_chance(self) -> bool:
        return beyond_chance([sentence.importance_p for sentence in self.sentences])


def beyond_chance(p_values: Sequence[float | None]) -> bool:
    """Whether a trace's importances can be ranked: at least one is too large for chance (Bonferroni over its sentences).

    True where nothing was left to chance (suppression), and there is no p-value.
    """
    known = [p for p in p_values if p is not None]
    return not known or min(known) * len(known) <= CHANCE


class SentenceFile(Mapping[str, TraceSentences]):
    """``sentences.jsonl`` by trace key; only the places of its lines are held.

    Raises:
        DataError: a line cannot be read, or a trace is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        offset = 0
        with storage_errors(path, "read"), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    fields = json.loads(line)
                    key = f"{fields['problem_id']}/{fields['sample']}"
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"{path}, line {number}: no sentence labels; run label_sentences again") from None
                if key in self._places:
                    raise DataError(f"{path}, line {number}: trace {key} is there twice; run label_sentences again")
                self._places[key] = offset
                offset += len(line)

    def __getitem__(self, key: str) -> TraceSentences:
        with storage_errors(self.path, "read"), self.path.open("rb") as file:
            file.seek(self._places[key])
            return TraceSentences.model_validate_json(file.readline())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
