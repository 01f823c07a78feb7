"""Score a running generation: one dot product per token, on the residual stream that sampling computes anyway.

    monitor = Monitor(load("results/demo/train_probes"))
    for step in monitor.stream(load_model(experiment.model), "347 + 285 ="):
        print(step.text, step.score)                       # P(correct) by what has been written so far

A direction reads a pooled state, and a mean's projection is the mean of projections, so no state is kept: ``mean`` becomes the
running mean over the completion, ``last_10`` a window of ten, everything else the token itself. A token's state is known
once it has been fed back, in the pass that draws the next one; a step is told then.

Shapes: B rows, L tokens, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from tribunal.activations.poolings import LAST_N, POOLINGS
from tribunal.core.errors import DataError, ModelError, UserError
from tribunal.core.records import Problem, Span
from tribunal.models import draws
from tribunal.models.generation import Request, Sampler, Token
from tribunal.models.loading import LoadedModel
from tribunal.models.residual import residual_hooks
from tribunal.probes.direction import Direction, Directions
from tribunal.traces.live import LiveText

Floats = NDArray[np.float64]

FOLLOWED = tuple(pooling for pooling in POOLINGS if pooling != "prompt_end")
"""Poolings that can be followed while a completion grows."""
CHECKED = ("model", "dtype", "template")
"""What must be the model's own, unless the caller allows otherwise."""
DEFAULT_TOKENS = 4096


class Running:
    """The logit of "correct" so far, from the projections of the tokens so far.

    Args:
        pooling: of the direction, one of ``FOLLOWED``.
    """

    def __init__(self, pooling: str, bias: float) -> None:
        assert pooling in FOLLOWED, pooling
        self._bias = bias
        self._window: deque[float] | None = {"mean": None, "last_10": deque(maxlen=LAST_N)}.get(pooling, deque(maxlen=1))
        self._sum, self._count = 0.0, 0

    def add(self, projection: float) -> float:
        """Take the next token's projection on the direction's vector; returns the logit."""
        if self._window is not None:
            self._window.append(projection)
            return sum(self._window) / len(self._window) + self._bias
        self._sum += projection
        self._count += 1
        return self._sum / self._count + self._bias


def running_logits(projections_L: Floats, pooling: str, bias: float) -> Floats:
    """The logits that ``Running`` gives after each token of a whole completion, [L]."""
    assert pooling in FOLLOWED, pooling
    if pooling not in ("mean", "last_10"):
        return projections_L + bias
    sums, counts = np.cumsum(projections_L, dtype=np.float64), np.arange(1, len(projections_L) + 1)
    if pooling == "mean":
        return sums / counts + bias
    before = np.concatenate([np.zeros(min(LAST_N, len(sums))), sums[:-LAST_N]])
    return (sums - before) / np.minimum(counts, LAST_N) + bias


class Watched(NamedTuple):
    """One token of a running generation, its state read.

    Attributes:
        token: the token.
        drawn: the token that was drawn from its state; None after the last one.
        projection: state @ vector.
        logit: of "correct", by all tokens of this completion so far.
    """

    token: Token
    drawn: Token | None
    projection: float
    logit: float


@dataclass(frozen=True)
class Sentence:
    """A sentence that has ended. ``score`` is P(correct) at its last token, ``logprob`` the mean of its tokens' (nats)."""

    number: int
    text: str
    start_token: int
    end_token: int
    score: float
    logprob: float


@dataclass(frozen=True)
class Step:
    """One readable token of a running generation.

    Attributes:
        index: in the completion.
        text: what it adds to the text; empty while it completes no character.
        logprob: nats, under the model's own distribution (T = 1).
        projection: its state @ the direction's vector.
        score: P(correct) by all tokens so far.
        sentences: those that are known to have ended by now; they are told a few tokens late.
        finish_reason: "stop" or "length" at the last step, else None.
    """

    index: int
    token: int
    text: str
    logprob: float
    projection: float
    score: float
    sentences: tuple[Sentence, ...]
    finish_reason: str | None


class Monitor:
    """Follows running generations along one direction.

    Args:
        directions: what ``tribunal.probes.direction.load`` read: says which model, dtype and prompt template they belong to.
        direction: the one to follow, by default the best; e.g. ``HeldOut.direction_of(problem)`` for a problem that the
            best one was trained on.
        pooling: how to follow it, where the file does not say what it was trained on (the older form).
        allow: of ``CHECKED``, what may differ from the model's, or be missing from the file.
    Raises:
        DataError: the direction cannot be followed.
        UserError: ``allow`` names something else.
    """

    def __init__(
        self, directions: Directions, direction: Direction | None = None, *, pooling: str | None = None, allow: Collection[str] = ()
    ) -> None:
        self.directions = directions
        self.direction = direction or directions.select()
        self.allow = frozenset(allow)
        if unknown := sorted(self.allow - set(CHECKED)):
            raise UserError(f"cannot allow '{unknown[0]}'; {', '.join(CHECKED)} may differ, d_model and layer never")
        place = f"the direction of layer {self.direction.layer}"
        stated = self.direction.pooling if self.direction.pooling in POOLINGS else None
        if pooling is not None and stated is not None and pooling != stated:
            raise DataError(
                f"{place} was trained on '{stated}' and cannot be followed as '{pooling}'; select the direction of that pooling"
            )
        if (pooling or stated) is None:
            raise DataError(
                f"{place} comes from a file that does not say which tokens it was trained on ('{self.direction.pooling}'); "
                f"give pooling, one of {', '.join(FOLLOWED)}"
            )
        self.pooling = str(pooling or stated)
        if self.pooling not in FOLLOWED:
            known = "reads the prompt alone, so there is nothing to follow" if self.pooling in POOLINGS else "is unknown"
            raise DataError(f"{place}: pooling '{self.pooling}' {known}; take one of {', '.join(FOLLOWED)}")
        self._vector_D = torch.tensor(self.direction.vector, dtype=torch.float64)

    def require(self, loaded: LoadedModel) -> None:
        """Refuse a model that the direction does not belong to.

        Raises:
            ModelError: another width, layer, model, dtype or prompt template; names all that differ, with the values.
        """
        theirs, width, layer = self.directions.model, len(self.direction.vector), self.direction.layer
        here = f"{loaded.name}@{loaded.revision}"
        wrong = []
        if width != loaded.d_model:
            wrong.append(f"d_model {width} (the model's is {loaded.d_model})")
        if layer >= loaded.n_layers or theirs.n_layers not in (None, loaded.n_layers):
            wrong.append(f"layer {layer} of {theirs.n_layers or 'an unknown number'} (the model has {loaded.n_layers})")
        if wrong:
            raise ModelError(f"the direction does not fit {here}: {'; '.join(wrong)}; load the model that it was trained on")
        same_folder = theirs.revision == loaded.revision and loaded.revision.startswith("folder:")  # a hash of its content
        stated = {
            "model": (None if theirs.name is None else f"{theirs.name}@{theirs.revision}", here),
            "dtype": (self.directions.dtype, str(loaded.model.dtype).removeprefix("torch.")),
            "template": (self.directions.template_sha256, loaded.format.template_sha256),
        }
        for name, (expected, found) in stated.items():
            if expected != found and name not in self.allow and not (name == "model" and same_folder):
                said = "is not in the file" if expected is None else f"is {_short(expected)}"
                wrong.append(f"its {name} {said}, the model's {_short(found)}")
        if wrong:
            names = [name for name in CHECKED if any(line.startswith(f"its {name} ") for line in wrong)]
            what = "belongs to another model" if all("not in the file" not in line for line in wrong) else "cannot be told to belong here"
            raise ModelError(
                f"the direction {what}: {'; '.join(wrong)}; load what it was trained on, or allow {', '.join(names)} if you know better"
            )

    def watch(self, sampler: Sampler, requests: Sequence[Request]) -> Iterator[list[Watched]]:
        """Sample requests with the one engine; after each pass, the tokens whose states it has shown.

        A request's last token is fed once more, for its state; what is drawn from it is dropped. So completions are the
        same as without a monitor, and a completion that ends by itself ends with the token before the end-of-sequence
        token. The model is not checked here: see ``require``.
        """
        most = {request.key: request.max_new_tokens for request in requests}
        running = {request.key: Running(self.pooling, self.direction.bias) for request in requests}
        waiting: dict[str, Token] = {}
        seen: list[Tensor] = []

        def read(hidden_BLD: Tensor) -> None:
            if self._vector_D.device != hidden_BLD.device:
                self._vector_D = self._vector_D.to(hidden_BLD.device)
            seen[:] = [hidden_BLD[:, -1].double() @ self._vector_D]

        passes = sampler.stream([request._replace(max_new_tokens=request.max_new_tokens + 1) for request in requests])
        while True:
            with residual_hooks(sampler.model, {self.direction.layer: read}):  # not while the caller runs the model itself
                tokens = next(passes, None)
            if tokens is None:
                return
            told = []
            if tokens[0].index > 0:  # a step, which fed every row's last token; else a prefill
                for drawn, projection in zip(tokens, seen[0].tolist(), strict=True):
                    logit = running[drawn.key].add(projection)
                    last = drawn.index >= most[drawn.key]
                    told.append(Watched(waiting.pop(drawn.key), None if last else drawn, projection, logit))
            waiting.update({token.key: token for token in tokens})
            if told:
                yield told

    def stream(
        self,
        loaded: LoadedModel,
        prompt: str | Problem | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sample: int = 0,
        every: Literal["token", "sentence"] = "token",
    ) -> Iterator[Step]:
        """Generate one completion and follow it.

        Only readable tokens are told: the stream ends before the end-of-sequence token, and before the built-in
        reasoner's report on itself, which would be a leak.

        Args:
            prompt: a question, put to the model in its own format; a problem; or token ids.
            max_new_tokens: default: 4096, or what the model's positions leave.
            seed, sample: name the draws; a problem's are those of ``generate_traces``.
            every: with "sentence", only the steps at which a sentence is known to have ended.
        Raises:
            ModelError: the direction does not belong to this model, or the tokens do not fit its positions. At once.
        """
        self.require(loaded)
        problem = Problem(id=prompt, question=prompt, answer="", dataset="prompt", revision="none") if isinstance(prompt, str) else prompt
        ids = loaded.format.prompt_ids(problem) if isinstance(problem, Problem) else list(problem)
        room = DEFAULT_TOKENS if loaded.shape.max_positions is None else loaded.shape.max_positions - len(ids)
        most = min(DEFAULT_TOKENS, room) if max_new_tokens is None else max_new_tokens
        if not ids or not 1 <= most <= room:
            raise ModelError(
                f"a prompt of {len(ids)} and {most} new tokens do not fit the model's {loaded.shape.max_positions} positions; "
                "ask something shorter, or give fewer max_new_tokens (at least 1)"
            )
        name = problem.id if isinstance(problem, Problem) else ",".join(map(str, ids))
        request = Request(name, ids, most, draws.stream(seed, name, sample))
        sampler = Sampler(loaded.model, eos_ids=loaded.eos_ids, slots=1, temperature=temperature, top_p=top_p, top_k=top_k)
        steps = self._steps(loaded, sampler, request)
        return steps if every == "token" else (step for step in steps if step.sentences)

    def _steps(self, loaded: LoadedModel, sampler: Sampler, request: Request) -> Iterator[Step]:
        live = LiveText(loaded.format.decode, loaded.format.tags or ())
        text, told = "", 0
        scores: list[float] = []
        logprobs: list[float] = []

        def sentence(span: Span) -> Sentence:
            nonlocal told
            told += 1
            where = slice(span.start_token, span.end_token)
            return Sentence(
                number=told - 1,
                text=text[span.start_char : span.end_char],
                start_token=span.start_token,
                end_token=span.end_token,
                score=scores[span.end_token - 1],
                logprob=float(np.mean(logprobs[where])),
            )

        for (watched,) in self.watch(sampler, [request]):
            token, drawn = watched.token, watched.drawn
            if token.token in loaded.format.end_ids:
                return
            scores.append(float(expit(watched.logit)))
            logprobs.append(token.logprob)
            piece, ended = live.add(token.token)
            finish = "length" if drawn is None else "stop" if drawn.token in loaded.format.end_ids or drawn.finish_reason else None
            if finish:
                rest, open_ones = live.finish()
                piece, ended = piece + rest, ended + open_ones
            text += piece
            yield Step(
                index=token.index,
                token=token.token,
                text=piece,
                logprob=token.logprob,
                projection=watched.projection,
                score=scores[-1],
                sentences=tuple(map(sentence, ended)),
                finish_reason=finish,
            )
            if finish:
                return


def _short(value: Any) -> str:
    """A hash by its first digits; anything else as it is."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
