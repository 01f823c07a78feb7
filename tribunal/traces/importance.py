"""How much a trace hangs on each of its sentences: by attention suppression or by resampling; and what it says of its answer.

Shapes: D model width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.work import Checkpoint, Checkpoints, Json, Stop
from tribunal.datasets import answers
from tribunal.models.draws import stream
from tribunal.models.generation import Finished, Request, Sampler
from tribunal.models.loading import LoadedModel
from tribunal.models.residual import capture
from tribunal.models.suppression import Suppression, lens_logprobs
from tribunal.traces.sentence_labels import CHANCE, RolloutSettings
from tribunal.traces.sentences import TokenOffsets

NO_ANSWER = ""
SHUFFLES = 9999
FEW = 10
"""More shuffles than this that part the answers as far settle that a sentence of a long trace is within chance."""


class Effect(NamedTuple):
    """What a sentence does.

    Attributes:
        by_chance: rollouts: mean importance when those from before and from behind the sentence are shuffled among each other;
            suppression: importance when nothing is hidden.
        p: rollouts: share of the shuffles that part the answers at least as far.
    """

    importance: float
    by_chance: float | None = None
    p: float | None = None


def by_suppression(suppression: Suppression, trace: Trace, label: TraceLabel) -> list[Effect | None]:
    """For each sentence, the mean KL (nats) on the readable tokens behind it when it is hidden from them; None for the last ones.

    Beside it stands what rounding alone makes: nothing is hidden, behind the middle one of the sentences that have an importance.
    """
    prompt, ids = len(trace.prompt_ids), trace.prompt_ids + trace.completion_ids[: trace.readable]
    spans = [(prompt + span.start_token, prompt + span.end_token) for span in label.sentences]
    measured = [end for _, end in spans if end < len(ids) - 1]
    if not measured:
        return [None] * len(spans)
    middle = measured[len(measured) // 2]
    *values, rounding = suppression.importances(ids, [*spans, (middle, middle)])
    return [None if value is None else Effect(value, rounding) for value in values]


class Rollouts:
    """Resamples a trace from the start of each of its sentences and compares the answers.

    A sentence's importance is the total variation distance between the answers of rollouts that begin before it and of those
    that begin behind it, 0 to 1: what writing this sentence, rather than another in its place, did to the answer.

    Source: Bogdan et al. (2025), resampling importance, with a bounded distance in place of KL over a smoothed histogram.
    """

    def __init__(self, loaded: LoadedModel, settings: RolloutSettings, seed: int) -> None:
        self.loaded, self.settings, self.seed = loaded, settings, seed
        self.sampler = Sampler(
            loaded.model,
            eos_ids=loaded.eos_ids,
            slots=settings.slots,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_cache_gb=settings.max_cache_gb,
            slots_field="label_sentences.rollouts.slots",
        )

    def measure(
        self, trace: Trace, label: TraceLabel, problem: Problem, stop: Stop, checkpoints: Checkpoints | None = None
    ) -> list[Effect | None] | None:
        """The effect of each sentence of the thought (of the whole text where there is none), None for the others; None when stopped."""
        within = trace.readable if trace.thought_end is None else trace.thought_end
        count = sum(span.end_token <= within for span in label.sentences)
        if count == 0:
            return [None] * len(label.sentences)
        cuts = [span.start_token for span in label.sentences[:count]] + [label.sentences[count - 1].end_token]
        requests = [
            Request(
                f"{place}/{n}", trace.prompt_ids + trace.completion_ids[:cut], self.settings.max_new_tokens, self._stream(trace, place, n)
            )
            for place, cut in enumerate(cuts)
            for n in range(self.settings.samples)
        ]
        state = _Keeping(checkpoints, trace.key)
        for step in self.sampler.run(requests, stop, state):
            for finished in step:
                cut = cuts[int(finished.key.partition("/")[0])]
                state.answers[finished.key] = self._answer(trace, cut, finished, problem)
        if len(state.answers) < len(requests):
            return None
        found: list[Counter[str]] = [Counter() for _ in cuts]
        for key, answer in state.answers.items():
            found[int(key.partition("/")[0])][answer] += 1
        effects: list[Effect | None] = [
            effect(before, after, np.random.default_rng(stream(self.seed, f"shuffles of {trace.key} at {place}", 0)), count)
            for place, (before, after) in enumerate(pairwise(found))
        ]
        return effects + [None] * (len(label.sentences) - count)

    def _stream(self, trace: Trace, place: int, number: int) -> int:
        return stream(self.seed, f"rollout of {trace.key} from {place}", number)

    def _answer(self, trace: Trace, cut: int, finished: Finished, problem: Problem) -> str:
        if finished.finish_reason == "length":
            return NO_ANSWER
        reading = self.loaded.format.read(trace.completion_ids[:cut] + finished.tokens, trace.prompt_ids)
        if reading.thought and reading.thought_end is None:
            return NO_ANSWER
        return answers.grade(reading.response, problem.answer, problem.choices).answer or NO_ANSWER


class _Keeping:
    """Saves the answers of finished rollouts together with the sampler's state: it does not give them a second time.

    Attributes:
        answers: by request key; those that were saved with the state that the sampler goes on from.
    """

    def __init__(self, inner: Checkpoints | None, owner: str) -> None:
        self._inner, self._owner = inner, owner
        saved = self.newest()
        ours = saved is not None and saved.meta.get("rollouts_of") == owner
        self.answers: dict[str, str] = dict(saved.meta["answers"]) if saved is not None and ours else {}

    def save(self, write: Callable[[Path], None], meta: Json | None = None) -> Any:
        if self._inner is None:
            return None
        return self._inner.save(write, {**(meta or {}), "rollouts_of": self._owner, "answers": self.answers})

    def newest(self) -> Checkpoint | None:
        return None if self._inner is None else self._inner.newest()

    def clear(self) -> None:
        if self._inner is not None:
            self._inner.clear()


def total_variation(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Half the summed difference of two histograms' shares, 0 to 1."""
    n, m = sum(a.values()), sum(b.values())
    return 0.5 * sum(abs(a.get(name, 0) / n - b.get(name, 0) / m) for name in {*a, *b})


def effect(before: Mapping[str, int], after: Mapping[str, int], rng: np.random.Generator, sentences: int = 1) -> Effect:
    """The distance of two sets of as many answers, beside that of the same answers dealt out at random (permutation test).

    A p-value is at least one over the number of deals, and ``beyond_chance`` asks for ``CHANCE`` over that of sentences: where at
    most ``FEW`` of the first ``SHUFFLES`` deals part the answers as far, there are twice as many as that takes, if that is more.
    """
    distance, n = total_variation(before, after), sum(before.values())
    both = np.array([before.get(name, 0) + after.get(name, 0) for name in sorted({*before, *after})])

    def deal(count: int) -> np.ndarray:
        return np.abs(2 * rng.multivariate_hypergeometric(both, n, size=count) - both).sum(axis=1) / (2 * n)

    dealt, more = deal(SHUFFLES), round(2 * sentences / CHANCE) - SHUFFLES
    if more > 0 and (dealt > distance - 1e-9).sum() <= FEW:
        dealt = np.concatenate([dealt, deal(more)])
    return Effect(distance, float(dealt.mean()), (1 + int((dealt > distance - 1e-9).sum())) / (1 + len(dealt)))


class AnswerTracker:
    """Reads off, at the end of each sentence, how likely the trace's own answer is to come next, by the logit lens.

    Args:
        layer: 0-based; default three quarters of the way.
    """

    def __init__(self, loaded: LoadedModel, layer: int | None = None) -> None:
        self.loaded = loaded
        self.layer = loaded.n_layers * 3 // 4 if layer is None else layer
        self._offsets = TokenOffsets(loaded.format.decode)

    def logprobs(self, trace: Trace, label: TraceLabel, problem: Problem) -> list[float | None]:
        """Log-probability (nats) of the answer's first token at the last token of each sentence that ends before the answer is
        first stated; None for the others, and for all where the answer is not in the text word for word."""
        token = self._answer_token(trace, label, problem)
        if token is None:
            return [None] * len(label.sentences)
        before = [span.end_token for span in label.sentences if span.end_token <= token]
        if not before:
            return [None] * len(label.sentences)
        ids_1L = torch.tensor([trace.prompt_ids + trace.completion_ids[: before[-1]]])
        states_LD = capture(self.loaded.model, ids_1L, [self.layer])[self.layer][0]
        places = [len(trace.prompt_ids) + end - 1 for end in before]
        values = lens_logprobs(self.loaded.model, states_LD[places], trace.completion_ids[token]).tolist()
        return [*(float(value) for value in values), *[None] * (len(label.sentences) - len(before))]

    def _answer_token(self, trace: Trace, label: TraceLabel, problem: Problem) -> int | None:
        """Where the trace first writes its answer: the token with the answer's first character.

        What is written can be copied, so that a sentence behind it would be high for another reason. A choice's letter counts
        in a sentence that chooses it: 'A' is also a word.
        """
        if not label.answer:
            return None
        text, offsets = self._offsets(trace.completion_ids[: trace.readable])
        written = re.compile(rf"(?<![\w.]){re.escape(label.answer)}(?!\w|\.\d)")
        for span in label.sentences:
            found = [match.start() for match in written.finditer(text, span.start_char, span.end_char)]
            if found and problem.choices:
                sentence = text[span.start_char : span.end_char]
                chosen = answers.grade(sentence, problem.answer, problem.choices).answer == label.answer
                found = found[-1:] if chosen else []
            if found:
                return next(n for n, (_, end) in enumerate(offsets) if end > found[0])
        return None


def quantile_names(values: Sequence[float | None], names: Sequence[str]) -> list[str | None]:
    """Names by rank, equally many of each as far as ties allow: the lowest values get the first name.

    Equal values share their mean rank and so their name. Fewer distinct values than names cannot be ranked: all get None.
    """
    known = [value for value in values if value is not None]
    if len(set(known)) < len(names):
        return [None] * len(values)
    counts = Counter(known)
    below, name_of = 0, {}
    for value in sorted(counts):
        middle = below + counts[value] / 2
        name_of[value] = names[min(len(names) - 1, int(len(names) * middle / len(known)))]
        below += counts[value]
    return [None if value is None else name_of[value] for value in values]


def within_groups(
    values: Mapping[str, Sequence[float | None]], group_of: Callable[[str], Any], names: Sequence[str]
) -> dict[str, list[str | None]]:
    """``quantile_names`` over all values of a group of traces together (the samples of one problem)."""
    groups: dict[Any, list[str]] = {}
    for key in values:
        groups.setdefault(group_of(key), []).append(key)
    named: dict[str, list[str | None]] = {}
    for keys in groups.values():
        flat = quantile_names([value for key in keys for value in values[key]], names)
        for key in keys:
            named[key], flat = flat[: len(values[key])], flat[len(values[key]) :]
    return named
