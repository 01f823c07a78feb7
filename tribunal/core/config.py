"""The experiment file: one YAML, validated as a whole before anything starts.

Every job declares its own section (a ``Section`` subclass named ``Config`` in its module), every dataset its
own keys (a ``DatasetConfig`` subclass named ``Dataset``); the experiment is put together from what is there.
Importing this module, and validating an experiment, needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tribunal.core import registry
from tribunal.core.errors import ConfigError

if TYPE_CHECKING:
    from tribunal.core.records import Problem

NO_EFFECT_ON_RESULTS: dict[str, Any] = {"no_effect_on_results": True}
"""``json_schema_extra`` of a field that cannot change a result (device, batch size, ...): a resume may change it."""

ADAPTERS: dict[str, Any] = {"adapters": True}
"""``json_schema_extra`` of a field that names adapters, each a folder or a name on the hub: ``tribunal prefetch`` fetches them."""

SectionT = TypeVar("SectionT", bound="Section")


class Section(BaseModel):
    """A block of the experiment file. Unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def fingerprint(self) -> dict[str, Any]:
        """The values that can change a result, as plain JSON."""
        data = self.model_dump(mode="json")
        for field, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, Mapping) and extra.get("no_effect_on_results"):
                data.pop(field)
            elif isinstance(value := getattr(self, field), Section):
                data[field] = value.fingerprint()
        return data


class ModelConfig(Section):
    """The model under study."""

    name: str = Field(description="Hugging Face name, a local folder, or builtin:addition (the shipped reasoner)")
    revision: str | None = Field(None, description="pinned commit of the model repository")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="weights and activations")
    adapter: str | None = Field(
        None,
        description="PEFT (LoRA) adapter, merged on loading: a folder or a hub name, name@commit where pinned",
        json_schema_extra=ADAPTERS,
    )
    device: str | None = Field(
        None, description="cuda, cuda:1, cpu; default: the first GPU if there is one", json_schema_extra=NO_EFFECT_ON_RESULTS
    )
    device_map: str | dict[str, str | int] | None = Field(
        None, description="only for a model that does not fit one GPU: 'auto' or a map of modules", json_schema_extra=NO_EFFECT_ON_RESULTS
    )
    prompt: Literal["auto", "chat", "plain"] = Field("auto", description="auto: the tokenizer's chat template where it has one")
    prompt_suffix: str = Field("", description="text added to each question, e.g. 'Put the final answer in \\boxed{}.'")
    think_open: str | None = Field(None, description="opening thinking tag; default: known by tokenizer")
    think_close: str | None = Field(None, description="closing thinking tag; default: known by tokenizer")


def hub_name(source: str) -> tuple[str, str | None]:
    """Name and commit of an adapter on the hub, given as ``name`` or ``name@commit``."""
    name, _, commit = source.partition("@")
    return name, commit or None


class DatasetConfig(Section):
    """Where problems come from. Subclassed by every module of ``tribunal.datasets``."""

    name: str
    path: Path | None = Field(None, description="local file or folder; without it the Hugging Face dataset is used")
    revision: str | None = Field(None, description="pinned commit of the Hugging Face dataset")
    split: str = "test"
    limit: int | None = Field(None, ge=1, description="first N problems only")

    def problems(self) -> list[Problem]:
        """All problems in a fixed order (at most ``limit``)."""
        raise NotImplementedError


class SlurmJob(Section):
    """Resources of a job; what is not given falls back to the experiment's ``slurm`` block, then to the job's own."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = Field(None, description="e.g. gpu:a100; the count comes from gpus")
    time: str | None = Field(None, pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$|^\d+$", description="limit, [D-]HH:MM:SS or minutes")
    nodes: int | None = Field(None, ge=1)
    gpus: int | None = Field(None, ge=0)
    cpus: int | None = Field(None, ge=1)
    mem_gb: int | None = Field(None, ge=1)
    exclude: str | None = None
    mail: str | None = None
    array: int | None = Field(None, ge=1, description="number of array tasks (shards)")
    array_throttle: int | None = Field(None, ge=1)
    extra: list[str] | None = None


class SlurmConfig(SlurmJob):
    """How jobs run; nothing here can change a result."""

    signal_lead_s: int = Field(300, ge=0, description="seconds before the limit at which SLURM sends SIGUSR1")
    save_every_s: float = Field(600, gt=0, description="unfinished state is saved at least this often")
    max_generations: int = Field(50, ge=1, description="starts of one job, over time limits and preemptions")
    no_progress_generations: int = Field(2, ge=1, description="generations that had the time and made no unit durable, before giving up")
    jobs: dict[str, SlurmJob] = {}


class Experiment:
    """A validated experiment file.

    Attributes:
        name: names the folders under results/ and checkpoints/.
        path: the file it came from.
        seed: the one seed; every random draw derives from it by counters.
        model, dataset, slurm: the shared blocks.
        sections: every job's section by job name, defaults where the file says nothing.
        given: names of the sections that the file or an override mentions.
    """

    def __init__(
        self,
        *,
        name: str,
        path: Path,
        seed: int,
        model: ModelConfig,
        dataset: DatasetConfig,
        slurm: SlurmConfig,
        sections: Mapping[str, Section],
        given: frozenset[str],
    ) -> None:
        self.name = name
        self.path = path
        self.seed = seed
        self.model = model
        self.dataset = dataset
        self.slurm = slurm
        self.sections = sections
        self.given = given

    def section(self, job: str, kind: type[SectionT]) -> SectionT:
        """A job's section, typed."""
        value = self.sections[job]
        assert isinstance(value, kind), f"{job}: {type(value).__name__} is not {kind.__name__}"
        return value


def load_experiment(path: Path | str, overrides: Sequence[str] = (), *, jobs_package: str = "jobs") -> Experiment:
    """Read and validate an experiment file.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` (value in YAML), applied on top of the file.
    Raises:
        ConfigError: names the file, the field, the value and the cure, in one line.
    """
    path = Path(path)
    data = _read_yaml(path)
    for override in overrides:
        _override(data, override)
    where = str(path)

    job_names = registry.names(jobs_package)
    known = {"name", "seed", "model", "dataset", "slurm", *job_names}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; {registry.nearest(key, known)}")
    name = data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{where}: name: {name!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
    seed = data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise ConfigError(f"{where}: seed: {seed!r} is not a whole number from 0 to 2^31 - 1")
    for block in ("model", "dataset"):
        if not isinstance(data.get(block), dict) or "name" not in data[block]:
            raise ConfigError(f"{where}: {block}: missing; give at least `{block}: {{name: ...}}`")

    try:
        dataset_module = registry.load("tribunal.datasets", str(data["dataset"]["name"]), "dataset")
    except ConfigError as error:
        raise ConfigError(f"{where}: dataset.name: {error}") from None
    sections = {}
    for job in job_names:
        kind: type[Section] = registry.load(jobs_package, job, "job").Config
        sections[job] = _validate(kind, data.get(job), where, job)
    slurm = _validate(SlurmConfig, data.get("slurm"), where, "slurm")
    for job in slurm.jobs:
        if job not in job_names:
            raise ConfigError(f"{where}: slurm.jobs: unknown job '{job}'; {registry.nearest(job, job_names)}")
    return Experiment(
        name=name,
        path=path,
        seed=seed,
        model=_validate(ModelConfig, data["model"], where, "model"),
        dataset=_validate(dataset_module.Dataset, data["dataset"], where, "dataset"),
        slurm=slurm,
        sections=sections,
        given=frozenset(data),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file; see experiments/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no experiment; the top level must be `key: value` lines (name, model, dataset, ...)")
    return data


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected section.key=value, e.g. generate_traces.temperature=0.7")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': value is not valid YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    block = data
    for parent in parents:
        if block.get(parent) is None:
            block[parent] = {}
        block = block[parent]
        if not isinstance(block, dict):
            raise ConfigError(f"override '{override}': '{parent}' is not a section")
    block[last] = value


def _validate(kind: type[SectionT], data: Any, where: str, block: str) -> SectionT:
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{where}: {block}: expected a section of `key: value` lines, got {data!r}")
    try:
        return kind.model_validate(data or {})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, e, where, block) for e in error.errors()[:3])) from None


def _explain(kind: type[BaseModel], error: Any, where: str, block: str) -> str:
    *parents, last = (str(part) for part in error["loc"]) if error["loc"] else ("",)
    field = ".".join(part for part in (block, *parents, last) if part)
    if error["type"] == "extra_forbidden":
        keys = _fields_at(kind, parents)
        return f"{where}: {'.'.join((block, *parents))}: unknown key '{last}'; {registry.nearest(last, keys)}"
    if error["type"] == "missing":
        return f"{where}: {field}: missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {field}: {message[0].lower() + message[1:]} (got {error['input']!r})"


def _fields_at(kind: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Field names of the (possibly nested) section that a validation error speaks of."""
    for parent in parents:
        info = kind.model_fields.get(parent)
        nested = _section_in(info.annotation) if info else None
        if nested is None:
            continue  # a dict's key or a list's index: the next level down is still this annotation's section
        kind = nested
    return list(kind.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _section_in(argument)) is not None:
            return found
    return None
