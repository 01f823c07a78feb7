"""Best of N: which of a problem's samples to hand in, by the probe and by what needs no activation.

Everything is an expectation over the subsets of N of a problem's M samples, so nothing hangs on which sample came first.
Best-of-N is exact at any size; votes go over all subsets where there are few enough, else over as many drawn ones. A sample
without an answer (unparsable, truncated) is wrong, has no vote and is chosen by no score; ``random_choice`` may take it.

M samples of a problem, N of them to choose among, S subsets, K different answers
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from tribunal.core.errors import DataError
from tribunal.core.records import Trace, TraceLabel
from tribunal.core.storage import iter_jsonl
from tribunal.core.work import Stop
from tribunal.datasets import answers
from tribunal.probes.held_out import HeldOut
from tribunal.traces.files import TraceFile

Json = dict[str, Any]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PROBE, WEIGHTED = "probe", "probe_vote"
ANSWERED = ("correct", "incorrect")
EVERY_N_UP_TO = 16
RIGHT, NO_ANSWER = 0, -1
"""Numbers of answers: the right one, and none."""


class Sample(NamedTuple):
    """One sample of a problem as the selectors see it."""

    answer: int
    probe: float
    """Logit by a probe that saw neither the problem nor chose its layer on it; NaN where there is no answer."""
    logprob: float | None
    """Mean log-probability (nats) of the readable tokens."""
    length: int
    """Readable tokens."""


class Candidates:
    """The problems to choose for.

    Args:
        traces, labels: result folders of generate_traces and label_traces.
        n: samples to choose among, at most; None for as many as most problems have.
        subsets: most subsets that a vote is averaged over.
    Attributes:
        problems: ids, in the order of the labels.
        left_out: why other problems are not among them, with their number.
    Raises:
        DataError: the probes were trained on other labels, or no problem is left; one line.
    """

    def __init__(self, *, traces: Path, labels: Path, held_out: HeldOut, n: int | None, subsets: int, seed: int) -> None:
        self.held_out, self.subsets, self.seed = held_out, subsets, seed
        self.file = TraceFile(traces / "traces.jsonl")
        self._number = {key: number for number, key in enumerate(self.file.keys)}
        self.labels: dict[str, list[TraceLabel]] = {}
        for label in iter_jsonl(labels / "labels.jsonl", TraceLabel):
            if label.key not in self._number:
                raise DataError(f"{labels / 'labels.jsonl'}: trace {label.key} is not in {self.file.path}; run label_traces again")
            known = held_out.labels.get((label.problem_id, label.sample))
            if known is not None and known != (label.verdict == "correct"):
                raise DataError(
                    f"{held_out.folder}: trace {label.key} was {'in' * (not known)}correct for the probes and is {label.verdict} in "
                    f"{labels / 'labels.jsonl'}; run train_probes again"
                )
            self.labels.setdefault(label.problem_id, []).append(label.model_copy(update={"sentences": []}))
        most_common = Counter(len(samples) for samples in self.labels.values()).most_common()
        self.n = n or max(size for size, count in most_common if count == most_common[0][1])
        fewer = {problem for problem, samples in self.labels.items() if len(samples) < self.n}
        unscored = {problem for problem, samples in self.labels.items() if not all(map(self._scored, samples))} - fewer
        self.problems = [problem for problem in self.labels if problem not in fewer | unscored]
        self.left_out = {
            f"{len(fewer)} problems have fewer than {self.n} samples": len(fewer),
            f"{len(unscored)} problems have an answered trace that no held-out probe scored": len(unscored),
        }
        self.left_out = {reason: count for reason, count in self.left_out.items() if count}
        if self.n < 2 or not self.problems:
            raise DataError(
                f"{labels / 'labels.jsonl'}: of {len(self.labels)} problems {len(self.problems)} have {self.n} samples with held-out "
                "scores; best-of-N needs at least 2 samples per problem: raise generate_traces.samples_per_problem"
                + ("" if n is None else f" or lower select_answers.n ({n})")
            )

    def _scored(self, label: TraceLabel) -> bool:
        return label.verdict not in ANSWERED or (label.problem_id, label.sample) in self.held_out.nested_logit

    @property
    def sizes(self) -> list[int]:
        """The values of N that are measured."""
        powers = {2**power for power in range(self.n.bit_length())}
        return sorted({*range(1, min(self.n, EVERY_N_UP_TO) + 1), *powers, self.n})

    def measure(self, problems: Sequence[str], stop: Stop) -> Iterator[Mapping[str, Json]]:
        """One record per problem, with the chance of a right answer by selector and N; all of them durable together."""
        done: dict[str, Json] = {}
        for problem in problems:
            if done and stop.is_set():
                break
            done[problem] = self.record(problem)
        yield done

    def record(self, problem: str) -> Json:
        labels = self.labels[problem]
        samples = [
            self._sample(trace, label, number)
            for label, number, trace in zip(
                labels, number_answers(labels), self.file.read(self._number[label.key] for label in labels), strict=True
            )
        ]
        return {
            "stratum": labels[0].stratum,
            "samples": len(samples),
            "right": sum(sample.answer == RIGHT for sample in samples),
            "answered": sum(sample.answer != NO_ANSWER for sample in samples),
            "curves": curves(samples, self.sizes, self.subsets, self.seed),
            "picks": picks(samples[: self.n]),
        }

    def _sample(self, trace: Trace, label: TraceLabel, number: int) -> Sample:
        read = trace.logprobs[: trace.readable] if len(trace.logprobs) >= trace.readable else None
        return Sample(
            answer=number,
            probe=self.held_out.nested_logit[label.problem_id, label.sample] if number != NO_ANSWER else float("nan"),
            logprob=None if read is None else float(np.mean(read or [0.0])),
            length=trace.readable,
        )


def number_answers(labels: Sequence[TraceLabel]) -> list[int]:
    """The number of every sample's answer: equal answers share one, the right one is ``RIGHT``, none is ``NO_ANSWER``.

    Answers graded correct equal the gold answer, so they equal each other; wrong ones are compared among themselves.
    """
    wrong: list[str] = []
    numbers = []
    for label in labels:
        if label.verdict == "correct":
            numbers.append(RIGHT)
        elif label.verdict not in ANSWERED or label.answer is None:
            numbers.append(NO_ANSWER)
        else:
            known = next((i for i, other in enumerate(wrong) if answers.same(label.answer, other)), len(wrong))
            wrong += [label.answer] if known == len(wrong) else []
            numbers.append(1 + known)
    return numbers


def scores_of(samples: Sequence[Sample]) -> dict[str, Floats]:
    """What each best-of-N selector maximises, [M]; -inf where there is no answer. Without log-probabilities that one is missing."""
    found = {PROBE: [sample.probe for sample in samples], "length": [-float(sample.length) for sample in samples]}
    if all(sample.logprob is not None for sample in samples):
        found["logprob"] = [float(sample.logprob or 0.0) for sample in samples]
    answered = np.array([sample.answer != NO_ANSWER for sample in samples])
    return {name: np.where(answered, values, -np.inf) for name, values in found.items()}


def curves(samples: Sequence[Sample], sizes: Sequence[int], subsets: int, seed: int) -> dict[str, list[float]]:
    """Chance of a right answer, by selector, for every N of ``sizes``."""
    answer_M = np.array([sample.answer for sample in samples])
    right_M, m = answer_M == RIGHT, len(samples)
    share = float(right_M.mean())
    found: dict[str, list[float]] = {
        "random_choice": [share for _ in sizes],
        "best_possible": [1 - math.comb(m - int(right_M.sum()), n) / math.comb(m, n) for n in sizes],
    }
    for name, score_M in scores_of(samples).items():
        found[name] = [expected_best(score_M, right_M, n) for n in sizes]
    probe_M = np.array([sample.probe for sample in samples])
    for name, weight_M in (("majority_vote", np.ones(m)), (WEIGHTED, expit(probe_M))):
        found[name] = [expected_vote(answer_M, weight_M, subsets_of(m, n, subsets, seed)) for n in sizes]
    return found


def expected_best(score_M: Floats, right_M: Bools, n: int) -> float:
    """Chance that the best-scored of n samples drawn without replacement is right; ties are shared evenly. Exact."""
    m, above, chance = len(score_M), 0, 0.0
    for score in np.unique(score_M)[::-1]:
        tied = score_M == score
        size = int(tied.sum())
        best_is_here = (math.comb(m - above, n) - math.comb(m - above - size, n)) / math.comb(m, n)
        chance += best_is_here * float(right_M[tied].mean())
        above += size
    return chance


def expected_vote(answer_M: NDArray[np.int64], weight_M: Floats, subsets_SM: Bools) -> float:
    """Share of the subsets whose heaviest answer is the right one; ties are shared evenly, no vote at all is wrong."""
    kinds = np.unique(answer_M[answer_M != NO_ANSWER])
    if RIGHT not in kinds:
        return 0.0
    of_kind_MK = answer_M[:, None] == kinds
    there_SK = (subsets_SM.astype(float) @ of_kind_MK) > 0
    sums_SK = subsets_SM.astype(float) @ (np.where(of_kind_MK, np.nan_to_num(weight_M)[:, None], 0.0))
    sums_SK = np.where(there_SK, sums_SK, -np.inf)
    most_S = sums_SK.max(1)
    wins_SK = there_SK & (sums_SK >= (most_S - 1e-12 * np.abs(most_S))[:, None])
    return float(np.mean(wins_SK[:, kinds == RIGHT][:, 0] / np.maximum(wins_SK.sum(1), 1)))


@lru_cache(maxsize=256)
def subsets_of(m: int, n: int, most: int, seed: int) -> Bools:
    """All subsets of n of m samples as masks [S, m], or ``most`` drawn ones (a function of seed, m and n) where there are more."""
    if math.comb(m, n) <= most:
        chosen = np.array(list(combinations(range(m), n)))
    else:
        draws = np.random.default_rng([seed, m, n]).random((most, m))
        chosen = np.argpartition(draws, n - 1, axis=1)[:, :n]
    masks = np.zeros((len(chosen), m), dtype=bool)
    np.put_along_axis(masks, chosen, True, axis=1)
    return masks


def picks(samples: Sequence[Sample]) -> dict[str, int]:
    """Whether each selector is right on these very samples, ties to the earlier one: whole problems, for exact tests."""
    answer = np.array([sample.answer for sample in samples])
    found = {name: int(answer[np.argmax(score_M)] == RIGHT) for name, score_M in scores_of(samples).items()}
    kinds = list(dict.fromkeys(answer[answer != NO_ANSWER].tolist()))  # in order of their first sample
    weights = {"majority_vote": np.ones(len(samples)), WEIGHTED: expit(np.array([sample.probe for sample in samples]))}
    for name, weight_M in weights.items():
        sums = [float(weight_M[answer == kind].sum()) for kind in kinds]
        found[name] = int(bool(kinds) and kinds[int(np.argmax(sums))] == RIGHT)
    return found
