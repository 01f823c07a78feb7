"""What an oracle is trained with, and what its results say of it. No torch: experiments are validated with this."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from tribunal.core.config import ADAPTERS, NO_EFFECT_ON_RESULTS, Experiment, Section
from tribunal.core.errors import CorruptError
from tribunal.core.records import Record
from tribunal.core.registry import nearest
from tribunal.core.storage import read_json, sha256_file, sha256_json
from tribunal.models.lora import LoraSettings
from tribunal.oracle.audit import AuditSettings
from tribunal.oracle.tasks.task import ExampleSettings, Need, known_tasks, task_class

FACTS = "oracle.json"
ADAPTER, TEXT_ONLY, CHECKPOINTS = "adapter", "text_only", "checkpoints"
"""Folders of the results: the best adapter, the one that was trained without activations, and those kept along the way."""
SENTENCE_NEEDS: frozenset[Need] = frozenset({"classes", "importance", "answers"})
"""What only label_sentences can give."""


class InjectionSettings(Section):
    """How vectors enter the oracle's own residual stream, at one placeholder token each."""

    layer: int = Field(1, ge=0, description="after this block (0-based)")
    scale: float = Field(1.0, gt=0, description="s in h' = h + s |h| v/|v|")
    mode: Literal["add", "replace"] = Field("add", description="replace: h' = s |h| v/|v|")
    norm_matched: bool = Field(True, description="false: the vector is put in as it is, times the scale")


class OracleSettings(Section):
    """How an activation oracle is trained. Optimiser and LoRA defaults are those of the published oracles of 8 B models."""

    tasks: list[str] = Field(["context_prediction", "correctness"], min_length=1, description="what is asked; see tribunal/oracle/tasks")
    examples: ExampleSettings = ExampleSettings()
    audit: AuditSettings = AuditSettings()
    lora: LoraSettings = LoraSettings()
    injection: InjectionSettings = InjectionSettings()
    start_from: str | None = Field(
        None, description="PEFT folder or hub name (name@commit) to start from; lora is then not used", json_schema_extra=ADAPTERS
    )
    placeholder: str | None = Field(None, description="placeholder token with its blank; default: ' ?' or the next that is a single token")
    from_store: bool = Field(False, description="read the activations that extract_activations stored, and run the model for the rest only")
    epochs: float = Field(1.0, gt=0, description="passes over the examples, where steps is not given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="examples in an optimizer step, over all GPUs")
    batch_tokens: int = Field(16_384, ge=1, description="most tokens in one forward pass, padding included (it can change low bits)")
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: bool | None = Field(None, description="autocast to bfloat16; default: where the model's weights are bfloat16")
    gradient_checkpointing: bool = Field(
        False,
        description="compute blocks again in the backward pass: less memory, a third slower",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )
    shard: bool = Field(
        False,
        description="several GPUs: each holds a share of the frozen weights (FSDP) instead of all; the adapter stays whole",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )
    validate_every: int | None = Field(None, ge=1, description="optimizer steps between two validations; default: a tenth of them")
    validate_items: int = Field(64, ge=1, description="validation examples of each task that are answered each time")
    keep: int = Field(4, ge=1, description="adapters kept, evenly spaced, the last step's among them; the best comes on top")
    text_only_steps: int | None = Field(
        None, ge=0, description="steps of the control: a second adapter trained without activations; default: as many; 0: no such control"
    )
    slots: int = Field(64, ge=1, description="questions answered together")
    max_new_tokens: int = Field(64, ge=1, description="longest answer")
    traces_per_file: int = Field(256, ge=1, description="traces whose activations are read together, the unit that a stop can cost")
    tracker: Literal["tensorboard", "wandb"] | None = Field(
        None, description="also report there, all generations to one run", json_schema_extra=NO_EFFECT_ON_RESULTS
    )

    @field_validator("tracker")
    @classmethod
    def _installed(cls, tracker: str | None) -> str | None:
        if tracker and not any(importlib.util.find_spec(name) for name in (tracker, f"{tracker}X")):
            raise ValueError(f"{tracker} is not installed here: pip install {tracker}, or leave tracker out")
        return tracker

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in known_tasks():
                raise ValueError(f"unknown task '{task}'; {nearest(task, known_tasks())}")
        return list(dict.fromkeys(tasks))

    @property
    def reads(self) -> tuple[str, ...]:
        """The jobs whose results are read, besides traces and labels."""
        sentences = any(task_class(task).needs & SENTENCE_NEEDS for task in self.tasks)
        return (*(["label_sentences"] if sentences else []), *(["extract_activations"] if self.from_store else []))


class OracleFacts(Record):
    """``oracle.json``: everything that is needed to ask a trained oracle as it was trained."""

    schema_version: Literal[1] = 1
    model: dict[str, Any]
    dtype: str
    seed: int
    tasks: list[str]
    examples: dict[str, Any] = Field(description="the examples section it was trained with")
    examples_sha256: str = Field(description="of every example, whatever its split")
    injection: dict[str, Any]
    placeholder: str
    max_new_tokens: int
    slots: int
    steps: int
    best_step: int
    kept: list[int] = Field(description="steps whose adapters lie under checkpoints/")
    text_only_steps: int
    start_from: str | None = Field(description="digest or hub name of the adapter that both runs started from; null: fresh ones")
    counts: dict[str, dict[str, int]] = Field(description="examples by task and split")
    validation: dict[str, Any] | None = Field(description="score, loss and tasks of the best step")
    planted: bool

    def adapter(self, folder: Path, step: int) -> Path:
        """The folder of the adapter kept at a step."""
        return folder / CHECKPOINTS / f"step-{step:06d}"


def read_facts(folder: Path) -> OracleFacts:
    """Raises CorruptError that names the file."""
    try:
        return OracleFacts.model_validate(read_json(folder / FACTS))
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(f"{folder / FACTS}: {'.'.join(map(str, first['loc']))}: {first['msg']}; is it of another version?") from None


def available(experiment: Experiment, settings: ExampleSettings) -> set[Need]:
    """What an experiment brings for its tasks besides traces and their labels."""
    labels: Any = experiment.sections.get("label_sentences")
    there: dict[Need, bool] = {
        "addition": experiment.model.name.startswith("builtin:"),
        "pairs": settings.pairs is not None,
        "file": settings.yes_no is not None,
        "classes": labels is not None and labels.classes != "none",
        "importance": labels is not None and labels.importance != "none",
        "answers": labels is not None and labels.track_answers,
    }
    return {need for need, given in there.items() if given}


def question_files(settings: ExampleSettings) -> dict[str, str | None]:
    """sha256 of each file that examples are made of besides traces and labels, by its field; None for one that is not there."""
    return {field: sha256_file(path) if path.is_file() else None for field, path in settings.files.items()}


def adapter_digest(source: str) -> str:
    """Names an adapter by what is in its folder; one on the hub by its name, and its commit where one is given. Needs no torch."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    return sha256_json({path.name: sha256_file(path) for path in sorted(folder.glob("adapter_*"))})
