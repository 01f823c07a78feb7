"""TransformerLens as a second backend for reading the residual stream, and a witness for the first.

The bridge of transformer-lens >= 4 rebuilds the model it wraps (eager attention, bridge modules in place of
blocks), so it works on a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tribunal.core.errors import ModelError
from tribunal.models.residual import hook_point, is_split


class BridgeReader:
    """Reads the residual stream with ``TransformerBridge.run_with_cache``; same signature as ``read_residual`` less the model.

    Args:
        model: a Hugging Face causal language model; copied, so memory for a second one is needed.
        stop_early: end after the deepest wanted block (``stop_at_layer``); False for comparisons.
    Raises:
        ModelError: the bridge cannot wrap this model.
    """

    def __init__(self, model: nn.Module, *, stop_early: bool = True) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            raise ModelError("transformer_lens cannot wrap a PEFT model; merge the adapter first (loading does) or take backend: hooks")
        if is_split(model):
            raise ModelError("transformer_lens needs the model on one device; leave out model.device_map or take backend: hooks")
        own: Any = copy.deepcopy(model)
        try:
            self.bridge = TransformerBridge.boot_transformers(
                getattr(own.config, "_name_or_path", "") or type(own).__name__, hf_model=own, tokenizer=_no_tokenizer(), dtype=own.dtype
            )
        except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
            raise ModelError(
                f"transformer_lens cannot wrap {type(model).__name__}: {' '.join(str(error).split())}; take backend: hooks"
            ) from error
        self.stop_early = stop_early

    @torch.no_grad()
    def __call__(self, ids_BL: Tensor, readers: Mapping[int, Callable[[Tensor], None]]) -> None:
        names = {layer: hook_point(layer) for layer in readers}
        # stop_at_layer = number of layers does not stop anything; the bridge then runs to its end
        stop: dict[str, Any] = {"stop_at_layer": max(readers) + 1} if self.stop_early else {}
        _, cache = self.bridge.run_with_cache(ids_BL, names_filter=list(names.values()), **stop)
        for layer, see in readers.items():
            see(cache[names[layer]])


def _no_tokenizer() -> Any:
    """The bridge insists on a tokenizer and reloads a real one by its name; ids are all we give it, so one of a single word will do."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")), eos_token="", pad_token="", unk_token="")
