"""Imports point down only: the layers of docs/architecture.md, read from the source.

Every import counts, inside functions and under ``TYPE_CHECKING`` too: a module that names a type of an upper
layer knows that layer. ``tribunal.core.registry`` finds jobs and datasets by a name from the experiment file;
that is the one way up, and it is no import.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCIENCE = ["datasets", "models", "traces", "activations", "probes", "oracle"]
"""From the bottom up; each may import those before it (datasets and models know nothing of each other)."""

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "cluster": {"core"},
    "datasets": {"core"},
    "models": {"core"},
    **{SCIENCE[i]: {"core", *SCIENCE[:i]} for i in range(2, len(SCIENCE))},
    **{top: {"core", *SCIENCE} for top in ("coconut", "interventions", "legibility")},
    "report": {"core"},
}
"""For each package of ``tribunal``, the other packages that it may import."""

EVERYTHING = {*ALLOWED, "jobs"}
ALLOWED["jobs"] = EVERYTHING - {"jobs"}
ALLOWED["cli_cluster"] = {"core", "cluster"}
ALLOWED["cli_monitor"] = EVERYTHING
ALLOWED["cli_oracle"] = EVERYTHING
ALLOWED["cli"] = EVERYTHING | {"cli_oracle", "cli_cluster", "cli_monitor"}

MODEL_LIBRARIES = {"transformers", "transformer_lens", "peft", "trl"}
MODEL_PLACES = ("tribunal/models/", "tribunal/coconut/model.py")

WITHOUT_TORCH = [
    "jobs",
    "tribunal/core",
    "tribunal/cluster",
    "tribunal/datasets",
    "tribunal/cli.py",
    "tribunal/cli_cluster.py",
    "tribunal/cli_oracle.py",
    "tribunal/cli_monitor.py",
]
"""What reads and validates an experiment: imports of these must stay quick, so no torch at module level."""
HEAVY = ["torch", "transformers", "transformer_lens", "peft", "trl", "accelerate"]


def sources(root: Path, places: list[str]) -> list[Path]:
    """The Python files of these files and folders, those that exist."""
    return [
        file
        for place in places
        for file in ([root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py")))
        if file.exists()
    ]


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that the file imports, wherever the import stands."""
    module = module_name(file, root).split(".")
    package = module if file.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [str(node.module)]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(name := node.args[0], ast.Constant) and isinstance(name.value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, name.value


def package_of(name: str) -> str | None:
    """'core' for tribunal.core.work, 'jobs' for jobs.x, '' for tribunal itself, None for what is not ours."""
    first, *rest = name.split(".")
    if first == "tribunal":
        return rest[0] if rest and rest[0] != "__version__" else ""
    return first if first in ("jobs", "tests", "benchmarks") else None


def violations(root: Path) -> list[str]:
    """Every import below ``root`` that points up, as 'file:line: what is wrong'."""
    found = []
    for file in sources(root, ["tribunal", "jobs"]):
        where = file.relative_to(root).as_posix()
        own = package_of(module_name(file, root)) or ""
        if own and own not in ALLOWED:
            found.append(f"{where}:1: tribunal.{own} has no layer: add it to ALLOWED in tests/test_layers.py")
            continue
        allowed = ALLOWED.get(own, set())
        for line, name in imports(file, root):
            target = package_of(name)
            if target and target != own and target not in allowed:
                may = ", ".join(sorted(allowed)) or "nothing of ours"
                found.append(f"{where}:{line}: {own or 'tribunal'} may not import {name} (allowed: {may})")
            if name.split(".")[0] in MODEL_LIBRARIES and not where.startswith(MODEL_PLACES):
                found.append(f"{where}:{line}: {name} may be imported in {' and '.join(MODEL_PLACES)} only")
    return found


REFUSE_HEAVY = """
import importlib, importlib.machinery, json, sys, traceback
heavy, modules = json.loads(sys.argv[1])
class Heavy(BaseException): pass
class Refuse:
    # A finder, and not an exception from find_spec: libraries may ask whether torch is there.
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in heavy else None
    def create_module(self, spec): raise Heavy(spec.name)
    def exec_module(self, module): pass
sys.meta_path.insert(0, Refuse())
found = []
for module in modules:
    try:
        importlib.import_module(module)
    except Heavy as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename and f.filename != "<string>"]
        last = [f for f in ours if "site-packages" not in f.filename][-1]
        found.append(f"{module}: {last.filename}:{last.lineno} imports {error}")
print(json.dumps(found))
"""


def heavy_imports(root: Path) -> list[str]:
    """Modules of WITHOUT_TORCH below ``root`` that import torch (or the like) when they are imported, each with the line to blame."""
    modules = [module_name(file, root) for file in sources(root, WITHOUT_TORCH)]
    run = subprocess.run(
        [sys.executable, "-c", REFUSE_HEAVY, json.dumps([HEAVY, modules])],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_imports_point_down_only():
    assert sources(ROOT, ["tribunal/core"])
    assert not (found := violations(ROOT)), "\n".join(found)


def test_experiments_are_read_and_validated_without_torch():
    assert not (found := heavy_imports(ROOT)), "\n".join(found)


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("tribunal/core/a.py", "from tribunal.cluster import job", "tribunal/core/a.py:1: core may not import tribunal.cluster.job"),
        (
            "tribunal/core/a.py",
            "def f():\n    import tribunal.models.loading",
            "tribunal/core/a.py:2: core may not import tribunal.models.loading",
        ),
        (
            "tribunal/datasets/a.py",
            "from ..models import loading",
            "tribunal/datasets/a.py:1: datasets may not import tribunal.models.loading",
        ),
        ("tribunal/traces/a.py", "from tribunal import probes", "tribunal/traces/a.py:1: traces may not import tribunal.probes"),
        (
            "tribunal/probes/__init__.py",
            "from ..cluster.job import Job",
            "tribunal/probes/__init__.py:1: probes may not import tribunal.cluster.job.Job",
        ),
        ("tribunal/cluster/a.py", "import jobs.label_traces", "tribunal/cluster/a.py:1: cluster may not import jobs.label_traces"),
        ("tribunal/__init__.py", "from tribunal.core import work", "tribunal/__init__.py:1: tribunal may not import tribunal.core.work"),
        ("tribunal/report/a.py", "import tribunal.probes", "tribunal/report/a.py:1: report may not import tribunal.probes"),
        ("jobs/a.py", "from tribunal import cli", "jobs/a.py:1: jobs may not import tribunal.cli"),
        ("jobs/a.py", "import tests.helpers", "jobs/a.py:1: jobs may not import tests.helpers"),
        ("jobs/a.py", "if TYPE_CHECKING:\n    from peft import X", "jobs/a.py:2: peft.X may be imported in tribunal/models/"),
        (
            "tribunal/traces/a.py",
            "import importlib\nimportlib.import_module('transformers')",
            "tribunal/traces/a.py:2: transformers may be imported in",
        ),
        ("tribunal/newcomer/a.py", "", "tribunal/newcomer/a.py:1: tribunal.newcomer has no layer"),
    ],
)
def test_an_import_that_points_up_is_named_with_its_line(tmp_path: Path, place: str, source: str, complaint: str):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(complaint)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("tribunal/models/a.py", "import transformers, peft\nfrom tribunal.core import work"),
        ("tribunal/coconut/model.py", "from transformers import Cache"),
        ("tribunal/activations/a.py", "from . import store\nfrom tribunal.datasets import answers\nimport torch"),
        ("jobs/a.py", "from tribunal.cluster.job import Job\nfrom tribunal.legibility import pairs"),
        ("tribunal/cli.py", "import jobs\nfrom tribunal import __version__\nfrom tribunal.cluster import launch"),
    ],
)
def test_an_import_that_points_down_is_allowed(tmp_path: Path, place: str, source: str):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_a_module_level_torch_import_is_named_also_when_it_is_indirect(tmp_path: Path):
    for place in ("jobs", "tribunal", "tribunal/models", "tribunal/datasets"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "__init__.py").touch()
    (tmp_path / "tribunal/models/loading.py").write_text("import json\nimport torch\n")
    (tmp_path / "jobs/direct.py").write_text("import tribunal.models.loading\n")
    (tmp_path / "jobs/inside.py").write_text("import importlib.util\nimportlib.util.find_spec('torch')\ndef build():\n    import torch\n")
    (tmp_path / "tribunal/datasets/own.py").write_text("from transformers import AutoTokenizer\n")
    found = heavy_imports(tmp_path)
    assert len(found) == 2
    assert found[0].startswith("jobs.direct: ") and found[0].endswith("loading.py:2 imports torch")
    assert found[1].startswith("tribunal.datasets.own: ") and found[1].endswith("own.py:1 imports transformers")
