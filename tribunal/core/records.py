"""The records that jobs exchange: one pydantic model per line of a results file (schemas in docs/files.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """An immutable record; unknown keys are an error, so a file of another version is refused and not misread."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Record):
    """One problem of a dataset, with its gold answer."""

    id: str = Field(description="stable within the dataset and its revision; the group of every split and bootstrap")
    question: str
    answer: str = Field(description="the gold answer, already extracted (no reasoning, no '####')")
    choices: list[str] | None = Field(None, description="the options in order A, B, C, ... for multiple choice")
    kind: Literal["question", "continuation"] = Field(
        "question", description="'continuation': the model continues `question` as plain text towards `answer`"
    )
    stratum: str | None = Field(None, description="difficulty class for stratified results, e.g. '3 digits'")
    dataset: str
    revision: str = Field(description="pinned revision, or sha256 of the local file")


class Trace(Record):
    """One sampled completion. Token ids are the artefact; the texts are derived from them."""

    problem_id: str
    sample: int = Field(ge=0)
    prompt_ids: list[int]
    completion_ids: list[int] = Field(description="every sampled token, the end-of-sequence token included")
    logprobs: list[float] = Field(description="log-probability (nats) of each completion token under the model at T=1")
    finish_reason: Literal["stop", "length"]
    seed: int
    readable: int = Field(
        ge=0,
        description="number of leading completion tokens that may be graded, pooled or probed: stops before a "
        "self-report (the built-in reasoner's) and before the end-of-sequence token",
    )
    thought: str = Field(description="text inside the thinking tags; empty when the model has none")
    thought_end: int | None = Field(
        description="index in completion_ids of the last token of the closing thinking tag; None when it never closed "
        "(or the model has no thinking tags)"
    )
    response: str = Field(description="text after the thought (the whole text when the model has no thinking tags)")
    model: str = Field(description="name@revision")
    template_sha256: str = Field(description="of the chat template or prompt format that made the prompt")
    continued: bool = Field(False, description="continued from tokens alone after a stop (its cache was too large to save)")

    @property
    def key(self) -> str:
        return f"{self.problem_id}/{self.sample}"


Verdict = Literal["correct", "incorrect", "unparsable", "truncated"]
VERDICTS: tuple[Verdict, ...] = ("correct", "incorrect", "unparsable", "truncated")


class Span(Record):
    """One sentence of the readable completion; ends are exclusive."""

    start_char: int
    end_char: int
    start_token: int = Field(description="index in completion_ids of the first token that touches the sentence")
    end_token: int = Field(description="exclusive; the sentence's last token is end_token - 1")
    sentence_class: str | None = None
    importance: float | None = None


class TraceLabel(Record):
    """What label_traces says of one trace."""

    problem_id: str
    sample: int
    verdict: Verdict
    answer: str | None = Field(description="the extracted answer, None where there is none")
    gold: str
    stratum: str | None
    sentences: list[Span] = Field(description="sentences of decode(completion_ids[:readable])")

    @property
    def key(self) -> str:
        return f"{self.problem_id}/{self.sample}"


class Interval(Record):
    """A number with its 95 % interval (clustered by problem)."""

    name: str
    value: float
    low: float
    high: float


class Gain(Record):
    over: str = Field(description="the control's name")
    value: float
    low: float
    high: float


class ReportRow(Record):
    """One measured number with its interval, sample size and controls."""

    name: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    stratum: str | None = None
    controls: list[Interval] = []
    gain: Gain | None = None


class Report(Record):
    """``report.json``: the same for every job that measures."""

    schema_version: Literal[1] = 1
    job: str
    experiment: str
    verdict: str
    not_supported: list[str]
    figures: list[str]
    rows: list[ReportRow]
    details: dict[str, Any] = Field(default_factory=dict, description="job-specific extras (tables, counts)")
