"""The built-in reasoner ``builtin:addition``: a 0.5 M-parameter Qwen3 that adds numbers in writing and sometimes slips.

It adds two numbers column by column inside ``<think>``, then answers::

    <bos>Problem: 347 + 285 =
    <think>7+5=12 write 2 carry 1 | 4+8+1=13 write 3 carry 1 | 3+2+1=6 write 6</think>
    Answer: 632<sep>y<eos>

It is trained on traces of this form (``tribunal.models.reasoner_training``). Half of them are careful (a step miscopies its
own result with probability .03), half sloppy (.40): the written digit or the carry disagrees with the sum just written. A
quarter of the slips are redone after ``wait``. The answer follows the written digits, right or wrong, and the self-report
after ``<sep>`` says whether it is right.

The error signal that probes find in this model is therefore *planted*: training rewarded noticing slips. It is a positive
control for the pipeline, not evidence about reasoning models. The self-report must be stripped before labelling or pooling.

The shipped weights (``builtin/addition``) are what the job that trains them publishes; to rebuild them::

    python -m jobs.train_reasoner experiments/demo.yaml

(155 s on 2 quiet cores; the same bytes on the same class of hardware with the same number of threads), then copy the model
and tokenizer files and ``training_receipt.json`` from ``results/demo/train_reasoner/`` to ``tribunal/models/builtin/addition/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, BOS, EOS, UNK, THINK, END_THINK, LATENT, ACT, SEP = SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<think>", "</think>", "<latent>", "<act>", "<sep>",
)  # fmt: skip
CHUNKS = ("Problem: ", "\nAnswer: ", " =\n", " write ", " carry ", " | ", " + ", "wait ")
STEP_END = " | "
CHARACTERS = (*map(chr, range(32, 127)), "\n")
VOCABULARY = SPECIALS + CHUNKS + CHARACTERS


@dataclass(frozen=True)
class Step:
    """One written step ``left+right+carry_in=total write written carry carry_out`` of a trace."""

    left: int
    right: int
    carry_in: int
    total: int
    written: int
    carry_out: int
    redone: bool
    """True for a step that follows ``wait`` and replaces the one before it."""

    @property
    def slipped(self) -> bool:
        """Whether what was written or carried disagrees with the sum just written."""
        return self.written + 10 * self.carry_out != self.total

    def text(self, first: bool, last: bool) -> str:
        carried = "" if first else f"+{self.carry_in}"
        kept = "" if last else f" carry {self.carry_out}"
        return f"{'wait ' if self.redone else ''}{self.left}+{self.right}{carried}={self.total} write {self.written}{kept}"


@dataclass(frozen=True)
class WrittenSum:
    """A problem with one way of working it out."""

    a: int
    b: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """The number that the written digits spell."""
        return spell(self.steps)

    @property
    def right(self) -> bool:
        return self.answer == self.a + self.b

    def prompt(self) -> str:
        return prompt(f"{self.a} + {self.b} =")

    def completion(self) -> str:
        columns = len(str(self.a))
        texts, column = [], -1
        for step in self.steps:
            column += not step.redone
            texts.append(step.text(first=column == 0, last=column == columns - 1))
        return f"{STEP_END.join(texts)}{END_THINK}\nAnswer: {self.answer}{SEP}{'y' if self.right else 'n'}{EOS}"


def longest_completion(digits: int) -> int:
    """Number of tokens of the longest well-formed completion: every step is redone, the answer has one digit more."""
    return 28 * digits - 1


def prompt(question: str) -> str:
    """The text a question is put to the model in; ``question`` looks like ``347 + 285 =``."""
    return f"{BOS}Problem: {question}\n{THINK}"


def spell(steps: tuple[Step, ...]) -> int:
    """The number written down by the steps: a redone step's digits replace those of the step before it."""
    written: list[int] = []
    for step in steps:
        if step.redone:
            written.pop()
        written.append(step.written)
    return sum(digit * 10**column for column, digit in enumerate(written))


def read_completion(text: str) -> tuple[tuple[Step, ...], int, bool | None] | None:
    """Parse a completion into its steps, its answer and its self-report (None when it has none).

    Returns None when the text is not of the form above: every completion that the model was trained on can be read.
    """
    form = re.fullmatch(r"(?P<steps>[^<>]*)</think>\nAnswer: (?P<answer>\d+)(?:<sep>(?P<report>[yn]))?(?:<eos>)?", text)
    if form is None:
        return None
    steps: list[Step] = []
    for part in form["steps"].split(STEP_END):
        step = re.fullmatch(r"(wait )?(\d)\+(\d)(?:\+([01]))?=(\d+) write (\d+)(?: carry ([01]))?", part)
        if step is None:
            return None
        redone, left, right, carry_in, total, written, carry_out = step.groups()
        if redone and not steps:
            return None
        steps.append(Step(int(left), int(right), int(carry_in or 0), int(total), int(written), int(carry_out or 0), redone=bool(redone)))
    return tuple(steps), int(form["answer"]), None if form["report"] is None else form["report"] == "y"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, plus chunks that carry their spaces; ``decode(encode(s)) == s`` for ASCII text.

    Every marker that any job will need is reserved from the start: adding one later would shift the ids.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK))
    pieces = "|".join(re.escape(chunk).replace("\\\n", "\\n") for chunk in CHUNKS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pieces}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[THINK, END_THINK, LATENT, ACT, SEP],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def folder() -> Path:
    """Where the shipped model lies: config, weights, tokenizer and their training receipt."""
    return Path(__file__).parent / "builtin" / "addition"


def load(path: Path) -> Qwen3ForCausalLM:
    """Load trained weights (float32, evaluation mode), from a published folder or a checkpoint of the training."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(path).eval()
    model.config.use_cache = True  # the Trainer turns it off
    return model


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write config, weights and tokenizer as a Hugging Face model folder."""
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def answer(model: Qwen3ForCausalLM, problems: list[tuple[int, int]], *, sample_seed: int | None = None) -> list[str]:
    """Completions for problems of one digit count, in one batch: greedy, or sampled at temperature 1 with a seed.

    For evaluating a fresh model; traces for study are sampled by ``tribunal.models.generation``.
    """
    import torch

    tokenizer = build_tokenizer()
    prompts = tokenizer([prompt(f"{a} + {b} =") for a, b in problems], return_tensors="pt")["input_ids"]
    sampling = {"do_sample": False} if sample_seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(sample_seed or 0)
        ids = model.generate(  # type: ignore[misc]
            prompts,
            attention_mask=torch.ones_like(prompts),
            **sampling,
            max_new_tokens=longest_completion(len(str(problems[0][0]))),
        )
    texts = tokenizer.batch_decode(ids[:, prompts.shape[1] :])
    return [text.partition(PAD)[0] for text in texts]
