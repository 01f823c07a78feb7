"""Small Hugging Face model folders made on the spot: random weights, real architectures, real tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = ("qwen3", "qwen2", "llama", "gpt2")
SENTENCES = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
    "Wait, let me check: 12 times 7 is 84, so the answer is 84.",
    "First I add the numbers, then I divide by two. Therefore, the total is 36 dollars.",
    "The train leaves at nine. How far does it go in three hours at 60 miles per hour?",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("[assistant] ", "[assistant] <think>\n")


def tiny_tokenizer(kind: str = "bpe", *, chat: bool = False, thinking: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE or a word-level tokenizer; with a chat template, and with one that opens ``<think>``, as asked."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        from tokenizers import processors

        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    if chat or thinking:
        fast.chat_template = THINKING_TEMPLATE if thinking else CHAT_TEMPLATE
    return fast


def tiny_config(
    family: str, vocab_size: int, *, layers: int = 3, width: int = 32, heads: int = 4, positions: int = 512
) -> PreTrainedConfig:
    """A config of one of ``FAMILIES``; Qwen3 and Llama share key-value heads between query heads."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions, bos_token_id=1, eos_token_id=2
        )
    kinds = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
    return kinds[family](
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if family == "qwen2" else heads // 2,
        head_dim=width // heads,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def tiny_model(family: str, vocab_size: int = 97, *, seed: int = 0, spread: float = 0.3, **shape: int) -> torch.nn.Module:
    """Random weights large enough (``spread``: their standard deviation) that the output depends on the input."""
    config = tiny_config(family, vocab_size, **shape)
    config.initializer_range = spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_folder(
    folder: Path, family: str = "qwen3", *, tokenizer: str = "bpe", chat: bool = False, thinking: bool = False, seed: int = 0, **shape: int
) -> Path:
    """A complete model folder ``folder/family``, as ``save_pretrained`` writes it."""
    made = tiny_tokenizer(tokenizer, chat=chat, thinking=thinking)
    path = folder / family
    tiny_model(family, len(made), seed=seed, **shape).save_pretrained(path)
    made.save_pretrained(path)
    return path
