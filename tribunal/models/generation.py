"""The sampling engine: continuous batching of a Hugging Face causal language model, exactly resumable.

A wave is a fixed queue of requests. At every step each live row gets one token; a finished row leaves, and waiting
requests join in its slot after a prefill of their own. Who joins which step, in which shapes, is a pure function of
the queue, the number of slots and the sampled tokens, and a draw depends on its own counters only
(``tribunal.models.draws``). A wave that was cut off is therefore continued from its saved keys and values, or
replayed from its start, with the same bytes. Rows may be steered while they are generated, each its own way.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicCache

from tribunal.core.errors import ModelError, UserError
from tribunal.core.storage import sha256_json
from tribunal.core.work import Checkpoints, Never, Stop
from tribunal.models import draws
from tribunal.models.cache import SlotCache
from tribunal.models.residual import Steering, columns_to_keep, residual_hooks

PREFILL_TOKENS = 8192
"""Padded prompt tokens in one prefill pass. Fixed, since it decides shapes."""
REFILL_SHARE = 8
"""Waiting requests join once 1/8 of the slots are free: a prefill pass costs about as much as a step for all rows."""


class Request(NamedTuple):
    """One completion to sample."""

    key: str
    prompt_ids: list[int]
    max_new_tokens: int
    stream: int  # draws.stream(seed, problem, sample)
    intervention: str = ""  # one of the sampler's steering, from the prompt's last token on


class Finished(NamedTuple):
    """A completed request. ``logprobs`` are nats under the model's own distribution (T = 1, nothing filtered)."""

    key: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    continued: bool


class Token(NamedTuple):
    """One sampled token of one request. ``logprob`` as in ``Finished``."""

    key: str
    index: int  # type: ignore[assignment]  # of the token in the completion; hides tuple.index
    token: int
    logprob: float
    finish_reason: str | None  # None: the request goes on


@dataclass
class Row:
    """A live request: what it has sampled so far."""

    index: int  # in the wave's queue
    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    continued: bool = False
    finish_reason: str | None = None


@dataclass
class Wave:
    """The engine's whole state between two steps."""

    requests: Sequence[Request]
    cache: SlotCache
    rows: list[Row] = field(default_factory=list)  # in the cache's row order
    next: int = 0  # first waiting request

    @property
    def waiting(self) -> int:
        return len(self.requests) - self.next


class Sampler:
    """Samples completions; one instance serves any number of waves.

    Args:
        model: a causal LM in eval mode whose layers use full or sliding attention.
        eos_ids: a sampled one of these ends a completion (it is kept in ``tokens``).
        slots: rows that run together; decides batch shapes, hence belongs to a run's configuration.
        temperature: 0 is greedy.
        top_p, top_k: 1.0 and 0 filter nothing; applied after the temperature, as ``generate`` does.
        max_cache_gb: keys and values beyond this are not saved on a stop; the tokens are, and the cache is
            computed again on resume (``continued``: equal up to rounding, not to the byte).
        slots_field: how the user calls ``slots``, for the error when memory runs out.
        steering: the interventions that requests may name.
        around_prefill: called with the request keys of each prefill batch, by row, and entered around its forward pass;
            a position in ``prompt_ids`` is the position in the row. What it does must be a function of the keys, or a
            resumed wave is another one. Requests with equal prompts do not share a row then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        slots: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_cache_gb: float = math.inf,
        slots_field: str = "slots",
        steering: Steering | None = None,
        around_prefill: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
    ) -> None:
        layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if unknown := layer_types - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"{model.config.model_type}: cannot sample from layers of type {', '.join(sorted(unknown))}; "
                "models with full or sliding attention are supported"
            )
        self.model = model
        self.eos_ids = frozenset(eos_ids)
        self.slots = slots
        self.temperature = temperature
        self.max_cache_gb = max_cache_gb
        self.slots_field = slots_field
        self.steering = steering
        self.around_prefill = around_prefill
        self.settings = {"slots": slots, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.warp = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warp.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            self.warp.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warp.append(TopPLogitsWarper(top_p))
        device = model.device  # of the embedding; a split model moves what it needs from there
        self.device = torch.device("cpu") if device.type == "meta" else device

    def run(
        self, requests: Sequence[Request], stop: Stop | None = None, checkpoints: Checkpoints | None = None
    ) -> Iterator[list[Finished]]:
        """Sample a wave, yielding completions in the steps that finish them.

        When ``stop`` is set the state is saved to ``checkpoints`` and the iterator ends early; a later call with the
        same requests goes on from there. A saved state skips what was yielded before it, so what is yielded must be
        recorded before the next item is asked for, where ``checkpoints`` makes it durable before a state counts (a job's
        do, see ``Job.checkpoints``). After a kill a call goes on from the newest state, or starts over without one, and
        yields again what came later, equal to the first time.

        Raises:
            UserError: the memory does not hold the wave's batch; names the setting to lower.
            ModelError: the model's output is not a number.
        """
        for drawn in self._loop(requests, stop or Never(), checkpoints or _Nowhere()):
            done = [Finished(r.request.key, r.tokens, r.logprobs, r.finish_reason, r.continued) for r in drawn if r.finish_reason]
            if done:
                yield done

    def stream(self, requests: Sequence[Request]) -> Iterator[list[Token]]:
        """Sample a wave as ``run`` does, yielding each token when it is drawn; not resumable.

        Raises: as ``run``.
        """
        for drawn in self._loop(requests, Never(), _Nowhere()):
            yield [Token(r.request.key, len(r.tokens) - 1, r.tokens[-1], r.logprobs[-1], r.finish_reason) for r in drawn]

    def _loop(self, requests: Sequence[Request], stop: Stop, checkpoints: Checkpoints) -> Iterator[list[Row]]:
        """The engine: after each forward pass, the rows that got a token from it."""
        try:
            wave = self._restore(requests, checkpoints) or Wave(requests, SlotCache(min(self.slots, len(requests))))
            while wave.rows or wave.waiting:
                if stop.is_set():
                    self._save(wave, checkpoints)
                    return
                if stop.save_due():
                    self._save(wave, checkpoints)
                if self._may_join(wave):
                    yield self._join(wave)
                if wave.rows:
                    yield self._step(wave)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                raise UserError(
                    f"out of memory with {self.slots_field}={self.slots}: lower it and start under another experiment name"
                ) from error
            raise
        checkpoints.clear()

    def _may_join(self, wave: Wave) -> bool:
        free = wave.cache.slots - len(wave.rows)
        return wave.waiting > 0 and (not wave.rows or free * REFILL_SHARE >= wave.cache.slots or free >= wave.waiting)

    @torch.no_grad()
    def _join(self, wave: Wave) -> list[Row]:
        """Fill the free slots: prefill, and draw the new rows' first tokens."""
        free = wave.cache.slots - len(wave.rows)
        new = [Row(i, wave.requests[i]) for i in range(wave.next, min(wave.next + free, len(wave.requests)))]
        wave.next += len(new)
        logits_BV = self._prefill(wave, new)
        wave.rows += new
        return self._draw(wave, len(wave.rows) - len(new), logits_BV)

    @torch.no_grad()
    def _step(self, wave: Wave) -> list[Row]:
        """One more token for every live row."""
        cache = wave.cache
        positions, mask = cache.begin_step(self.device)
        last = torch.tensor([[row.tokens[-1]] for row in wave.rows], device=self.device)
        with self._steered([row.request.intervention for row in wave.rows]):
            logits = self.model(input_ids=last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        cache.end_step()
        return self._draw(wave, 0, logits[:, -1])

    def _prefill(self, wave: Wave, rows: Sequence[Row]) -> torch.Tensor:
        """Put the keys and values of rows (their last token's excepted) into free slots; return the logits after each, [B, V].

        Equal sequences under equal interventions (samples of one problem) are run once. Right padding needs no mask: a
        causal model's real tokens never see it, and only real columns are copied.
        """
        sequences = [(*row.request.prompt_ids, *row.tokens[:-1]) for row in rows]
        logits = []
        for chunk in _chunks(sequences):
            runs = [self._run_of(rows[i], sequences[i]) for i in chunk]
            unique = list(dict.fromkeys(runs))
            longest = max(len(run.ids) for run in unique)
            ids = torch.tensor([[*run.ids, *[run.ids[-1]] * (longest - len(run.ids))] for run in unique], device=self.device)
            ends = sorted({len(run.ids) - 1 for run in unique})
            prefilled = DynamicCache()
            positions = torch.arange(longest, device=self.device).expand(len(unique), -1)
            around = self.around_prefill([run.key for run in unique]) if self.around_prefill else nullcontext()
            with around, self._steered([run.intervention for run in unique], [run.start for run in unique]):
                out = self.model(
                    input_ids=ids,
                    position_ids=positions,
                    past_key_values=prefilled,
                    use_cache=True,
                    logits_to_keep=columns_to_keep(self.model, torch.tensor(ends, device=self.device)),
                )
            place = {run: n for n, run in enumerate(unique)}
            source = [place[run] for run in runs]
            wave.cache.join(prefilled, source, [len(run.ids) for run in runs])
            logits.append(out.logits[source, [ends.index(len(run.ids) - 1) for run in runs]])
        return torch.cat(logits)

    def _run_of(self, row: Row, ids: tuple[int, ...]) -> _PrefillRun:
        request = row.request
        start = len(request.prompt_ids) - 1 if request.intervention else 0
        return _PrefillRun(ids, request.intervention, start, request.key if self.around_prefill else "")

    @contextmanager
    def _steered(self, interventions: Sequence[str], starts: Sequence[int] | None = None) -> Iterator[None]:
        """Around a forward pass whose rows are under these interventions (``Steering.aim``)."""
        if not any(interventions):
            yield
            return
        assert self.steering is not None, "a request names an intervention: the sampler needs its steering"
        self.steering.aim(interventions, starts)
        with residual_hooks(self.model, self.steering.edits()):
            yield

    def _draw(self, wave: Wave, first: int, logits_BV: torch.Tensor) -> list[Row]:
        """Draw a token for each row from ``first`` on and return those rows; the ones that it completes leave the wave."""
        rows = wave.rows[first:]
        logits_BV = logits_BV.float()
        scores_BV = logits_BV
        if self.temperature > 0:
            keys = draws.position_keys([row.request.stream for row in rows], [len(row.tokens) for row in rows])
            # the warpers never look at the ids; they get none
            scores_BV = self.warp(None, logits_BV) + draws.gumbel(keys, logits_BV.shape[-1], logits_BV.device)  # type: ignore[arg-type]
        chosen_B = scores_BV.argmax(-1)
        logprob_B = logits_BV.gather(-1, chosen_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
        gone = []
        for i, (row, token, logprob) in enumerate(zip(rows, chosen_B.tolist(), logprob_B.tolist(), strict=True), first):
            if not math.isfinite(logprob):
                raise ModelError(
                    f"{row.request.key}: the model's output at token {len(row.tokens)} is not finite; try model.dtype float32 or bfloat16"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if (ended := token in self.eos_ids) or len(row.tokens) >= row.request.max_new_tokens:
                row.finish_reason = "stop" if ended else "length"
                gone.append(i)
        for i in reversed(gone):
            wave.cache.leave(i)
            wave.rows[i] = wave.rows[-1]
            wave.rows.pop()
        return rows

    def _fingerprint(self, requests: Sequence[Request]) -> str:
        parts: list[Any] = [self.settings, sorted(self.eos_ids), str(self.model.dtype)]
        plain = [request._asdict() for request in requests]
        for fields in plain:
            if not fields["intervention"]:
                del fields["intervention"]
        if any(request.intervention for request in requests) and self.steering is not None:
            parts.append(self.steering.digest)
        return sha256_json([*parts, plain])

    def _save(self, wave: Wave, checkpoints: Checkpoints) -> None:
        whole = wave.cache.bytes_used <= self.max_cache_gb * 1e9
        state: dict[str, Any] = {
            "next": wave.next,
            "rows": [{"index": r.index, "tokens": r.tokens, "logprobs": r.logprobs, "continued": r.continued} for r in wave.rows],
            "layout": wave.cache.layout() if whole and wave.rows else None,
        }

        def write(folder: Path) -> None:
            (folder / "state.json").write_text(json.dumps(state))
            if state["layout"]:
                wave.cache.save(folder / "cache.safetensors")

        checkpoints.save(write, {"wave": self._fingerprint(wave.requests)})

    @torch.no_grad()
    def _restore(self, requests: Sequence[Request], checkpoints: Checkpoints) -> Wave | None:
        """The saved state of this very wave, if there is one (a state of other requests or settings is not used)."""
        saved = checkpoints.newest()
        if saved is None or saved.meta.get("wave") != self._fingerprint(requests):
            return None
        state = json.loads((saved.path / "state.json").read_text())
        rows = [Row(r["index"], requests[r["index"]], r["tokens"], r["logprobs"], r["continued"]) for r in state["rows"]]
        wave = Wave(requests, SlotCache(min(self.slots, len(requests))), [], state["next"])
        if layout := state["layout"]:
            split = getattr(self.model, "hf_device_map", None)
            devices = layout["devices"] if split else [self.device] * len(layout["devices"])
            wave.cache = SlotCache.load(saved.path / "cache.safetensors", layout, [torch.device(d) for d in devices])
        elif rows:
            for row in rows:
                row.continued = True
            # the last token of each row is not in the cache yet: the next step feeds it
            self._prefill(wave, rows)
        wave.rows = rows
        return wave


class _PrefillRun(NamedTuple):
    """One row of a prefill batch; requests for which all of this is equal share it."""

    ids: tuple[int, ...]
    intervention: str
    start: int
    key: str  # "" where requests may share


def _chunks(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts in order, cut so that rows x longest stays within PREFILL_TOKENS (one row always fits)."""
    chunk: list[int] = []
    longest = 0
    for i, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if chunk and longest * (len(chunk) + 1) > PREFILL_TOKENS:
            yield chunk
            chunk, longest = [], len(prompt)
        chunk.append(i)
    if chunk:
        yield chunk


@torch.no_grad()
def score(model: PreTrainedModel, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """Log-probability (nats, T = 1) of each token of a completion that exists already."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
    logits_LV = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(completion_ids)).logits[0].float()
    chosen_L = ids[0, -len(completion_ids) :, None].to(logits_LV.device)
    return (logits_LV.gather(-1, chosen_L)[:, 0] - logits_LV.logsumexp(-1)).tolist()


class _Nowhere:
    """Checkpoints of a caller who does not want to resume."""

    def save(self, write: Any, meta: Any = None) -> Any:
        return None

    def newest(self) -> None:
        return None

    def clear(self) -> None:
        return None
