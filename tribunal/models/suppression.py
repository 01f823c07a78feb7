"""Attention suppression: what would the model have predicted, had it not been able to look at some tokens?

Keys are hidden from all later tokens by an additive mask of minus infinity that keeps causality: hiding nothing changes
nothing, and a later token never reaches an earlier one. (A float mask of ones and zeros does neither: transformers adds it to
the scores and then applies no causal mask of its own.) The hidden tokens still see themselves and what is before them, so
everything up to the end of a hidden span is as it was, and its keys and values are reused.

Shapes: L tokens, Q queries, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tribunal.core.errors import ModelError
from tribunal.models.residual import decoder, input_device

Span = tuple[int, int]
"""Tokens from the first to the second, exclusive."""

ATTENTIONS = ("sdpa", "eager")
"""Implementations of attention that take an additive mask as it is."""
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models whose logits are not simply their head's output."""
NO_OP_KL = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest mean KL (nats) that hiding nothing may cost: rounding of another attention kernel, and no more."""
LOGIT_ROWS = 256
"""Tokens whose logits are in memory together."""


def hiding_mask(queries: Span, n_keys: int, hidden: Sequence[Span], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The additive mask [1, 1, Q, n_keys]: 0 where a query may look, minus infinity where it may not.

    A query sees its own key and the earlier ones, less those of a hidden span that ended before it.
    """
    q_Q1 = torch.arange(*queries, device=device)[:, None]
    k_1L = torch.arange(n_keys, device=device)[None, :]
    blocked_QL = k_1L > q_Q1
    for start, end in hidden:
        blocked_QL = blocked_QL | ((k_1L >= start) & (k_1L < end) & (q_Q1 >= end))
    return torch.zeros(blocked_QL.shape, dtype=dtype, device=device).masked_fill_(blocked_QL, -math.inf)[None, None]


class Suppression:
    """Runs a model with spans of its context hidden.

    Args:
        model: a causal language model with full attention (sdpa or eager) in every layer.
    Raises:
        ModelError: attention or head are of another kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config: Any = model.config.get_text_config()
        attention = getattr(model.config, "_attn_implementation", None)
        if attention not in ATTENTIONS:
            raise ModelError(
                f"attention suppression needs sdpa or eager attention, the model has {attention}; load it with one, or take rollouts"
            )
        if others := set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}:
            raise ModelError(f"attention suppression needs full attention in every layer, the model has {', '.join(sorted(others))} too")
        if scaled := [name for name in SCALED_HEADS if getattr(config, name, None) not in (None, 1, 1.0)]:
            raise ModelError(f"attention suppression cannot read this model's logits (its config sets {scaled[0]}); take rollouts")
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.device = input_device(model)
        self._checked = False

    @torch.no_grad()
    def logits(self, ids: Sequence[int], hidden: Sequence[Span]) -> Tensor:
        """Next-token logits [L, V], the plain way: the whole sequence with the mask, nothing reused."""
        ids_1L = torch.tensor([list(ids)], device=self.device)
        mask = hiding_mask((0, len(ids)), len(ids), hidden, self.dtype, self.device)
        return self._head(decoder(self.model)(input_ids=ids_1L, attention_mask=mask, use_cache=False).last_hidden_state[0])

    @torch.no_grad()
    def importances(self, ids: Sequence[int], spans: Sequence[Span], *, until: int | None = None) -> list[float | None]:
        """For each span, how much hiding it changes what the model predicts from its end on.

        Args:
            ids: the whole context.
            spans: in tokens of ``ids``. An empty one hides nothing: its importance is what rounding alone makes.
            until: predictions of tokens from here on do not count (default: all of ``ids`` do).
        Returns:
            Mean KL(as it is || span hidden) in nats over the next-token distributions (T = 1) at the tokens behind the span; None
            where no predicted token is left behind it.
        Raises:
            ModelError: hiding nothing changes the predictions: this model does not take the mask as it should.
        Source: Bogdan et al. (2025), "Thought Anchors", with a mask that keeps causality.
        """
        stop = len(ids) if until is None else until
        ids_1L = torch.tensor([list(ids)[:stop]], device=self.device)
        cache = DynamicCache(config=self.model.config)
        base_LD = decoder(self.model)(input_ids=ids_1L, past_key_values=cache, use_cache=True).last_hidden_state[0]
        if not self._checked:
            self._check(ids_1L, base_LD)
        found: list[float | None] = []
        for start, end in spans:
            if end >= stop - 1:  # the token behind the span must have another one to predict
                found.append(None)
                continue
            hidden_QD = self._behind(ids_1L, cache, start, end)
            kl = self._mean_kl(base_LD[end : stop - 1], hidden_QD[:-1])
            if not math.isfinite(kl):
                raise ModelError(f"attention suppression: the model gives NaN or infinity (in {self.dtype}); load it with another dtype")
            found.append(kl)
        return found

    def _behind(self, ids_1L: Tensor, cache: DynamicCache, start: int, end: int) -> Tensor:
        """Final states of the tokens from ``end`` on with the span hidden, [Q, D]; those before are in the cache as they were."""
        length = ids_1L.shape[1]
        prefix = DynamicCache(config=self.model.config)
        for layer, kept in enumerate(cache.layers):
            prefix.update(kept.keys[:, :, :end], kept.values[:, :, :end], layer)  # type: ignore[union-attr, index]
        mask = hiding_mask((end, length), length, [(start, end)], self.dtype, self.device)
        positions_1Q = torch.arange(end, length, device=self.device)[None]
        out = decoder(self.model)(
            input_ids=ids_1L[:, end:], attention_mask=mask, position_ids=positions_1Q, past_key_values=prefix, use_cache=True
        )
        return out.last_hidden_state[0]

    def _check(self, ids_1L: Tensor, base_LD: Tensor) -> None:
        """Hiding nothing must change nothing."""
        mask = hiding_mask((0, ids_1L.shape[1]), ids_1L.shape[1], [], self.dtype, self.device)
        masked_LD = decoder(self.model)(input_ids=ids_1L, attention_mask=mask, use_cache=False).last_hidden_state[0]
        kl, most = self._mean_kl(base_LD, masked_LD), NO_OP_KL[self.dtype]
        if not kl <= most:
            raise ModelError(
                f"attention suppression: hiding nothing changes the predictions of {type(self.model).__name__} by {kl:.2g} nats (at most "
                f"{most:g} expected): it does not take an additive 4-D mask as it is; take importance: rollouts"
            )
        self._checked = True

    def _mean_kl(self, base_QD: Tensor, other_QD: Tensor) -> float:
        """Mean over tokens of KL(base || other) in nats; logits are made for a few tokens at a time."""
        total = 0.0
        for first in range(0, len(base_QD), LOGIT_ROWS):
            base_QV = self._head(base_QD[first : first + LOGIT_ROWS]).float().log_softmax(-1)
            other_QV = self._head(other_QD[first : first + LOGIT_ROWS]).float().log_softmax(-1)
            total += float((base_QV.exp() * (base_QV - other_QV)).sum(dtype=torch.float64))
        mean = total / len(base_QD)
        return 0.0 if mean < 0 else mean  # rounding; NaN stays NaN

    def _head(self, hidden_QD: Tensor) -> Tensor:
        head: nn.Module = self.model.get_output_embeddings()
        return head(hidden_QD)


@torch.no_grad()
def lens_logprobs(model: PreTrainedModel, states_PD: Tensor, token: int) -> Tensor:
    """Log-probability (nats) of one token at each state by the logit lens: the final norm and the head put on any layer, [P].

    Source: nostalgebraist (2020), "interpreting GPT: the logit lens".
    """
    inner: Any = decoder(model)
    norm = next((found for name in ("norm", "ln_f") if (found := getattr(inner, name, None)) is not None), None)
    if norm is None:
        raise ModelError(f"{type(model).__name__}: no final norm found (looked for norm, ln_f); set track_answers: false")
    head: Any = model.get_output_embeddings()
    weight = next(head.parameters())
    out = []
    for first in range(0, len(states_PD), LOGIT_ROWS):
        rows_PD = states_PD[first : first + LOGIT_ROWS].to(weight.device, weight.dtype)
        out.append(head(norm(rows_PD)).float().log_softmax(-1)[:, token].cpu())
    return torch.cat(out)
