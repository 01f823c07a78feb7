"""How the page names things and writes numbers: one rule for each, whatever job they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

HEADINGS = {
    "train_reasoner": "The built-in reasoner",
    "generate_traces": "Traces",
    "label_traces": "Labels",
    "extract_activations": "Activations",
    "train_probes": "Probes",
    "monitor_traces": "Monitor",
    "steer": "Steering",
    "select_answers": "Selection",
    "attribute_direction": "Attribution",
    "transfer_probes": "Transfer",
    "label_sentences": "Sentences",
    "train_oracle": "The oracle",
    "evaluate_oracle": "What the oracle reads",
    "train_coconut": "The latent reasoner",
    "extract_latents": "Latents",
    "train_latent_probes": "Latent probes",
    "train_self_oracle": "The self-oracle",
    "evaluate_self_oracle": "What the self-oracle reads",
    "run_interventions": "Interventions on thoughts",
    "build_preferences": "Preferences",
    "train_dpo": "Legibility training",
    "evaluate_legibility": "Legibility",
}
"""Headings of sections, in the page's order; a job that is not listed comes last, under its own name."""

METRICS = {
    "auroc": "AUROC",
    "brier": "Brier score",
    "ece": "Expected calibration error",
    "within_problem_pairs": "Within-problem pairs won",
    "f1": "F1",
    "r2": "R²",
}
"""Names of metrics that a rule would get wrong."""

CONTROLS = {
    "majority": "the same answer always: the more frequent class, or its share",
    "length": "the length of the text alone",
    "finish": "how the text ends: cut off by the limit, thought never closed",
    "bag_of_words": "the words of the text, without their order",
    "question_only": "the question alone: how hard it looks",
    "layer_0": "the same on the first block's output, little more than the text's surface",
    "logprob": "the model's own probability of the tokens that it sampled",
    "permuted_labels": "labels permuted within each problem, then fitted again: what is left is chance, or the problem's difficulty",
    "shuffled_labels": "a control task with random labels by type: what the fit could memorise",
    "random_directions": "random directions of equal norm: mean and 95 % range over them",
    "majority_vote": "the answer that most samples give",
    "text_only": "trained on and asked the same prompts, without any activation",
    "shuffled": "activations of other examples, in place of the right ones",
    "zeroed": "the same prompts, without any activation",
    "linear_probe": "a linear probe on the same activations",
    "separate_oracle": "another model, trained to read the same activations",
    "diff_of_means": "the difference of the class means as direction: no fit",
    "random_choice": "a sample picked at random",
    "best_possible": "a right sample wherever there is one: a ceiling, not a rival",
    "pause": "as many tokens without content",
    "no_cot": "the answer at once, without a chain of thought",
    "swapped_latents": "the latents of another problem",
    "zeroed_latents": "latents set to zero",
    "no_steering": "the same runs, nothing added",
    "text_reader": "a reader of the text itself: a ceiling, not a rival",
}
"""What each control of ``tribunal.core.reports.CONTROLS`` is, for the page's last section."""

MINUS = "\N{MINUS SIGN}"


def heading(job: str) -> str:
    return HEADINGS.get(job) or plain(job)


def plain(name: str) -> str:
    """A name of the files as words: underscores become spaces, the first letter a capital."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def metric(name: str) -> str:
    return METRICS.get(name) or plain(name)


def decimals(values: Sequence[float]) -> int:
    """Digits after the point that numbers standing together share: three for what lies below 10, none from 1000 on."""
    largest = max((abs(value) for value in values), default=0.0)
    return 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0


def number(value: float, digits: int | None = None, *, signed: bool = False) -> str:
    """A number as text: a real minus sign, thousands apart; below 0.001 (and not 0) in powers of ten."""
    if not math.isfinite(value):
        return "not finite"
    if digits is None and 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    else:
        digits = decimals([value]) if digits is None else digits
        text = f"{round(value, digits) + 0.0:,.{digits}f}"
    if signed and value > 0 and not text.startswith("-"):
        text = "+" + text
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def interval(value: float, low: float, high: float, *, signed: bool = False) -> tuple[str, str]:
    """('0.920', '[0.901, 0.937]'), with as many decimals each; numbers that are all tiny go in powers of ten."""
    together = [value, low, high]
    tiny = max(abs(one) for one in together) < 0.001
    shown = [number(one, None if tiny else decimals(together), signed=signed) for one in together]
    return shown[0], f"[{shown[1]}, {shown[2]}]"


def share(part: float) -> str:
    """0.585 as '58.5 %'."""
    return f"{number(100 * part, 1)} %"


def count(value: float) -> str:
    return f"{value:,.0f}"


def several(value: int, unit: str) -> str:
    """'1 trace', '1,440 traces'."""
    return f"{count(value)} {unit}" + ("" if value == 1 else "s")


def duration(seconds: float) -> str:
    """'0.2 s', '18 s', '4.5 min', '2.1 h'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
