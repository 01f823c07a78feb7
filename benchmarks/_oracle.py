"""What an oracle is trained on in benchmarks: questions about random traces, as token ids, and the flops that they need."""

from __future__ import annotations

import argparse
import random

from benchmarks._random import PROMPT_TOKENS, SHAPES, VOCABULARY, forward_flops, random_trace
from tribunal.models.oracle_batches import Lesson, StepPlan
from tribunal.oracle.examples import Example, default_layers

RANKS = {"small": 8, "qwen3-8b": 64}
"""Of LoRA: the same 2.5 % of a block's weights in both shapes."""
PLACEHOLDER, PAD, HEAD = 1, 0, 4  # HEAD: tokens before the placeholders ("Layer: 18\n")
MOST_VECTORS = 16


class Workload:
    """Traces, questions about them as token ids, and which are in which step.

    Args:
        steps: optimizer steps of ``args.batch_size`` examples; each example comes once.
    """

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        self.args, self.steps, self.shape = args, steps, SHAPES[args.shape]
        count, vocabulary = steps * args.batch_size, VOCABULARY[args.shape]
        layers, draw = default_layers(self.shape["num_hidden_layers"]), random.Random(0)
        self.traces = [random_trace(n, draw.randint(300, 600), draw, vocabulary) for n in range(-(-count // args.questions_per_trace))]
        self.examples: list[Example] = []
        self.lessons: list[Lesson] = []
        for number in range(count):
            trace = self.traces[number // args.questions_per_trace]
            vectors = draw.randint(1, MOST_VECTORS)
            end = draw.randint(vectors, trace.readable)
            values = {"problem_id": trace.problem_id, "group": trace.problem_id, "sample": trace.sample, "layers": [draw.choice(layers)]}
            texts = {"task": "made", "question": "", "target": "", "stratum": None, "split": "train"}
            self.examples.append(Example(key=f"made/{trace.key}/{number}", tokens=list(range(end - vectors, end)), **values, **texts))
            prompt_ids = [draw.randrange(2, vocabulary) for _ in range(draw.randint(30, 60))]
            prompt_ids[HEAD : HEAD + vectors] = [PLACEHOLDER] * vectors
            answer_ids = [draw.randrange(2, vocabulary) for _ in range(draw.randint(1, 10))]
            self.lessons.append(Lesson(prompt_ids, list(range(HEAD, HEAD + vectors)), answer_ids))

    def step(self, step: int) -> list[int]:
        """The numbers of a step's examples, as the Trainer draws them; in an order that says nothing about length."""
        lengths, answers = [x.length for x in self.lessons], [len(x.answer_ids) for x in self.lessons]
        plan = StepPlan(lengths, answers, batch_size=self.args.batch_size, batch_tokens=10**9, seed=0)
        return sorted(number for numbers in plan.step(step)[0].passes for number in numbers)

    def flops(self) -> tuple[float, float]:
        """That are needed to read the contexts, and to train."""
        shape = self.shape
        d, mlp, n_blocks = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
        q, kv = (shape["head_dim"] * shape[heads] for heads in ("num_attention_heads", "num_key_value_heads"))
        last = {trace.key: max(e.tokens[-1] for e in self.examples if e.trace_key == trace.key) for trace in self.traces}
        deepest = max(layer for example in self.examples for layer in example.layers)
        contexts = forward_flops([PROMPT_TOKENS + token + 1 for token in last.values()], shape, deepest + 1)
        lengths = [lesson.length - 1 for lesson in self.lessons]
        attention = n_blocks * sum(2 * q * length**2 for length in lengths)
        blocks = 2 * forward_flops(lengths, shape, n_blocks) + attention - 2 * d * (q + 2 * kv) * sum(lengths)
        lora = n_blocks * RANKS[self.args.shape] * (2 * (d + q) + 2 * (d + kv) + 3 * (d + mlp))
        head = 4 * d * VOCABULARY[self.args.shape] * sum(len(lesson.answer_ids) for lesson in self.lessons)
        return contexts, blocks + 6 * lora * sum(lengths) + head
