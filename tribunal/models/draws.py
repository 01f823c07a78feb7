"""Random draws that depend on (seed, problem, sample, position, token id) and on nothing else.

A token is drawn as ``argmax(logits / T + Gumbel noise)``, which has exactly the softmax's distribution (Gumbel-max).
The noise comes from an integer hash of the counters, so there is no generator state to save: batch size, order,
device count and interruption cannot change which draw a token gets. Integer arithmetic wraps alike on CPU and GPU.
Plans are ordered by ``order_key`` when an experiment is checked, so torch is imported where noise is made.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


def stream(seed: int, key: str, sample: int) -> int:
    """The 64-bit name of one sample's sequence of draws."""
    text = json.dumps([seed, key, sample]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def order_key(seed: int, key: str) -> bytes:
    """Sorting by this shuffles keys in an order that only the seed and the keys themselves decide."""
    return hashlib.blake2b(json.dumps([seed, key, "order"]).encode(), digest_size=16).digest()


def position_keys(streams: Sequence[int], positions: Sequence[int]) -> list[tuple[int, int]]:
    """Two signed 32-bit words for each (stream, position), by the splitmix64 finaliser.

    Source: Steele, Lea & Flood (2014), "Fast splittable pseudorandom number generators".
    """
    return [_words(name, position) for name, position in zip(streams, positions, strict=True)]


def _words(name: int, position: int) -> tuple[int, int]:
    x = (name + (position + 1) * _GOLDEN64) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    x ^= x >> 31
    return _signed(x & 0xFFFFFFFF), _signed(x >> 32)


def _signed(x: int) -> int:
    """The int32 with the same bits as the unsigned 32-bit ``x``."""
    return x - (1 << 32) if x >= 1 << 31 else x


def _finalise(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser in place, on int32 (shifts are made logical by masking the sign's copies)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x85EBCA6B)
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


@functools.lru_cache(maxsize=4)
def _token_counters(vocab: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.arange(vocab, dtype=torch.int32, device=device) * _signed(0x9E3779B1)


def gumbel(keys: Sequence[tuple[int, int]], vocab: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise for every token id.

    The uniform has 31 bits and is used on its precise side (near 0, where a small value makes a large Gumbel), so
    tokens of probability down to about 1e-9 are drawn at their rate.

    Args:
        keys: ``position_keys`` of the B rows.
        vocab: V.
    Returns:
        float32 [B, V], finite.
    """
    import torch

    words = torch.tensor(keys, dtype=torch.int32, device=device)
    x_BV = _token_counters(vocab, words.device)[None, :] + words[:, :1]
    x_BV = _finalise(x_BV)
    x_BV ^= words[:, 1:]  # the second word, between two rounds, keeps two streams from being shifts of each other
    x_BV = _finalise(x_BV)
    u_BV = (x_BV & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    exponential_BV = u_BV.neg_().log1p_().neg_()
    return exponential_BV.log_().neg_()
