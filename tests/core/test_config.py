"""A wrong experiment file is refused in one line that names file, field, value and cure."""

from __future__ import annotations

import textwrap

import pytest

from tribunal.core.config import NO_EFFECT_ON_RESULTS, ModelConfig, Section, load_experiment
from tribunal.core.errors import ConfigError

GOOD = """
name: mine
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition}
generate_traces: {temperature: 0.7}
"""


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_file_gives_its_values_and_overrides_win(tmp_path):
    experiment = load_experiment(
        write(tmp_path, GOOD), ["generate_traces.temperature=0.5", "slurm.jobs.train_probes.time=0:30:00", "seed=3"]
    )
    assert experiment.sections["generate_traces"].temperature == 0.5
    assert experiment.slurm.jobs["train_probes"].time == "0:30:00"
    assert experiment.seed == 3
    assert experiment.model.name == "builtin:addition"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generate_traces.temprature=1", "generate_traces: unknown key 'temprature'; did you mean 'temperature'?"),
        ("generate_trace.temperature=1", "unknown key 'generate_trace'; did you mean 'generate_traces'?"),
        ("generate_traces.temperature=-1", "generate_traces.temperature: input should be greater than"),
        ("generate_traces.temperature=warm", "generate_traces.temperature: input should be a valid number"),
        ("slurm.jobs.train_probs.gpus=0", "slurm.jobs: unknown job 'train_probs'; did you mean 'train_probes'?"),
        ("slurm.jobs.train_probes.gpu=0", "slurm.jobs.train_probes: unknown key 'gpu'; did you mean 'gpus'?"),
        ("slurm.time=4h", "slurm.time: string should match pattern"),
        ("dataset.name=gsm8", "dataset.name: unknown dataset 'gsm8'; did you mean 'gsm8k'?"),
        ("dataset.digit=[2]", "dataset: unknown key 'digit'; did you mean 'digits'?"),
        ("model=null", "model: missing; give at least"),
        ("name=a/b", "name: 'a/b' cannot name a folder"),
        ("seed=-1", "seed: -1 is not a whole number"),
        ("temperature", "expected section.key=value"),
        ("model.dtype=fp8", "model.dtype: input should be 'float32', 'bfloat16' or 'float16' (got 'fp8')"),
    ],
)
def test_a_wrong_value_is_named_with_its_cure(tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, GOOD), [change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: no such experiment file"):
        load_experiment(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"mine.yaml: not valid YAML"):
        load_experiment(write(tmp_path, "name: [1"))


def test_fields_without_effect_on_results_are_left_out_of_the_fingerprint():
    from pydantic import Field

    class Inner(Section):
        a: int = 1
        device: str = Field("cpu", json_schema_extra=NO_EFFECT_ON_RESULTS)

    class Outer(Section):
        inner: Inner = Inner()

    assert Outer().fingerprint() == {"inner": {"a": 1}}
    assert "device" not in ModelConfig(name="x").fingerprint()
