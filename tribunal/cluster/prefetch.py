"""Fetch an experiment's models, adapters and dataset on the login node, and prove that they can be read without network.

Jobs run with hub access off: compute nodes often have none, and a thousand array tasks must not ask the hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tribunal.cluster.site import site_environment
from tribunal.core.config import Experiment, ModelConfig, Section, hub_name
from tribunal.core.errors import UserError

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", *WEIGHTS]
CHECK = """
import sys
from pathlib import Path
from tribunal.cluster.launch import guarded
from tribunal.cluster.prefetch import read_offline
sys.exit(guarded(lambda: read_offline(Path(sys.argv[1]), sys.argv[2:])))
"""


def prefetch(experiment: Experiment) -> list[str]:
    """Fetch what the experiment reads from the hub; returns one line per thing, with its place and size.

    Raises:
        UserError: it cannot be had; says why in one line.
    """
    for key, value in site_environment().items():
        os.environ.setdefault(key, value)
    for key in OFFLINE:
        os.environ.pop(key, None)  # read by the hub's library when it is imported, which has not happened yet
    return fetch_all(experiment)


def fetch_all(experiment: Experiment) -> list[str]:
    """Every model, every adapter and the dataset; a line for each."""
    wanted = dict.fromkeys(found for section in (experiment.model, *experiment.sections.values()) for found in on_the_hub(section))
    return [*(fetch_snapshot(name, revision, what) for what, name, revision in wanted), fetch_dataset(experiment)]


def on_the_hub(section: Section) -> Iterator[tuple[str, str, str | None]]:
    """What a section names that is a folder or lies on the hub: kind, name, revision."""
    if isinstance(section, ModelConfig):
        yield "model", section.name, section.revision
    for field, info in type(section).model_fields.items():
        value = getattr(section, field)
        if isinstance(value, Section):
            yield from on_the_hub(value)
        elif value and isinstance(info.json_schema_extra, Mapping) and info.json_schema_extra.get("adapters"):
            for source in [value] if isinstance(value, str) else value:
                folder = Path(source).expanduser().is_dir()
                yield ("adapter", source, None) if folder else ("adapter", *hub_name(source))


def fetch_snapshot(name: str, revision: str | None, what: str) -> str:
    """A repository of the hub at a commit; a local folder is left alone.

    Raises:
        UserError: neither a folder nor to be had from the hub.
    """
    if name.startswith("builtin:"):
        return f"{what} {name}: comes with tribunal"
    if Path(name).expanduser().is_dir():
        return f"{what} {name}: a local folder"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise UserError(f"{what} {name}{at} cannot be fetched: {_first_line(error)}; {_cure()}") from None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{what} {name}: {size / 1e9:.2f} GB in {folder}"


def fetch_dataset(experiment: Experiment) -> str:
    """The dataset's problems, read once.

    Raises:
        UserError: it cannot be had.
    """
    dataset = experiment.dataset
    try:
        problems = dataset.problems()
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {dataset.name} cannot be fetched: {_first_line(error)}; {_cure()}") from None
    return f"dataset {dataset.name}: {len(problems)} problems" + (f" from {dataset.path}" if dataset.path else "")


def check_offline(path: Path, overrides: list[str]) -> str:
    """Read everything again in a process that may not use the hub.

    Raises:
        UserError: something is missing from the cache.
    """
    command = [sys.executable, "-c", CHECK, str(path), *overrides]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(filter(None, [_here(), os.environ.get("PYTHONPATH")]))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = (result.stderr.strip() or "no reason given").splitlines()[-1].removeprefix("error: ")
        raise UserError(f"fetched, but it cannot be read offline: {said}")
    return "read again with hub access off: all there"


def read_offline(path: Path, overrides: list[str]) -> int:
    """What a compute node does first: find the files of models and adapters, and the dataset, without network."""
    from tribunal.core.config import load_experiment

    fetch_all(load_experiment(path, overrides))
    return 0


def _cure() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "run tribunal prefetch on a node with network first, with the same HF_HOME"
    return "check the name, the network and, for a gated repository, HF_TOKEN"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _here() -> str:
    return str(Path(__file__).resolve().parents[2])
