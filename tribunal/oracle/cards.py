"""The model cards of the adapters that train_oracle publishes, each true of its own."""

from __future__ import annotations

from tribunal.core.work import Json
from tribunal.oracle.settings import OracleFacts, OracleSettings, adapter_digest


def oracle_card(settings: OracleSettings, facts: OracleFacts, step: int, scores: Json) -> str:
    """The model card of the oracle's adapter at a step; ``scores`` are its own on the validation examples, by task."""
    injection = facts.injection
    shown = {task: f"{scores[task]['score']:.3f} (n = {scores[task]['n']})" if task in scores else "" for task in facts.tasks}
    lines = [f"| {task} | {facts.counts[task]['train']} | {shown[task]} |" for task in facts.tasks]
    term = "h + " if injection["mode"] == "add" else ""
    vector = "|h| v/|v|" if injection["norm_matched"] else "v"
    best = ", the best by validation" if step == facts.best_step else ""
    return f"""{_head(facts)}# Activation oracle

A LoRA adapter with which {_base(facts)} answers questions about its own activations.
This is step {step} of {facts.steps}{best}.
{_planted(facts)}
Vectors go in at the output of block {injection["layer"]} (0-based), one at each placeholder token {facts.placeholder!r}:
h' = {term}{injection["scale"]:g} {vector}, in the prompt's pass only. They are read with the adapter off.

| task | training examples | score on validation problems |
|---|---|---|
{chr(10).join(lines)}

{_schedule(settings, facts, step, facts.steps)}
The score is the share of right answers (fuzzy), for free answers the mean F1 over words; evaluate_oracle gives numbers with
intervals and controls.

Load it with `PeftModel.from_pretrained(model, folder)`; the injection is not part of the file.
"""


def control_card(settings: OracleSettings, facts: OracleFacts) -> str:
    """The model card of ``text_only``."""
    lines = [f"| {task} | {facts.counts[task]['train']} |" for task in facts.tasks]
    return f"""{_head(facts)}# The control of an activation oracle

A LoRA adapter with which {_base(facts)} answers the prompts of an activation oracle without any
activation: nothing is put in at the placeholder tokens {facts.placeholder!r}, in training or when it is asked. What it gets right, the
prompts give away.
{_planted(facts)}
| task | training examples |
|---|---|
{chr(10).join(lines)}

{_schedule(settings, facts, facts.text_only_steps, facts.text_only_steps)}

Load it with `PeftModel.from_pretrained(model, folder)`.
"""


def _head(facts: OracleFacts) -> str:
    return f"---\nbase_model: {facts.model['name']}\nlibrary_name: peft\ntags: [activation-oracle, lora]\n---\n"


def _base(facts: OracleFacts) -> str:
    return f"{facts.model['name']} (revision {facts.model['revision']})"


def _planted(facts: OracleFacts) -> str:
    said = "\nThe model's signals are planted by its own training: a positive control, not evidence about reasoning models.\n"
    return said if facts.planted else ""


def _schedule(settings: OracleSettings, facts: OracleFacts, step: int, steps: int) -> str:
    began = "" if settings.start_from is None else f", from the adapter {adapter_digest(settings.start_from)}"
    return f"""Trained for {step} steps, of a schedule of {steps}, of {settings.batch_size} examples{began}; learning rate
{settings.learning_rate:g} ({settings.schedule}), {settings.warmup:.0%} warm-up, seed {facts.seed}."""
