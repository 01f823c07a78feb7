"""Vectors on the disk: each state once, handed out as the source would."""

from __future__ import annotations

import pytest
import torch

from tests.oracle.helpers import BUILTIN, additions, example
from tribunal.core.errors import CorruptError
from tribunal.core.storage import write_jsonl
from tribunal.models.loading import load_model
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.vectors import VectorLayout, Vectors
from tribunal.traces.files import TraceFile


@pytest.fixture
def source(tmp_path):
    write_jsonl(tmp_path / "traces.jsonl", [trace for trace, _, _ in additions(5)])
    return ActivationSource(load_model(BUILTIN), TraceFile(tmp_path / "traces.jsonl"), None)


def asked():
    """Three questions about each trace, at overlapping tokens, in one layer and in two."""
    found = []
    for trace, _, _ in additions(5):
        for n, (tokens, layers) in enumerate([([3, 4, 5], [1]), ([5, -1], [2, 1]), ([4], [0])]):
            values = {"problem_id": trace.problem_id, "sample": trace.sample, "tokens": tokens, "layers": layers}
            found.append(example(key=f"carry/{trace.key}/{n}", **values))
    return found


def write(layout, source, folder):
    files = [folder / f"{number}.safetensors" for number in range(len(layout.files))]
    for number, path in enumerate(files):
        layout.write(number, source, path, torch.float32)
    return files


def test_every_example_gets_the_vectors_that_the_source_gives_it(source, tmp_path):
    layout = VectorLayout(asked(), traces_per_file=2)
    vectors = Vectors(layout, write(layout, source, tmp_path))
    assert [len(traces) for traces in layout.files] == [2, 2, 1]
    assert source.passes == 5, "one pass per trace for all its questions"
    expected = dict(source.vectors(asked()))
    for item in asked():
        torch.testing.assert_close(vectors.of(item), expected[item.key], rtol=1e-5, atol=1e-5)
        assert vectors.of(item).shape == (item.n_vectors, 128)


def test_a_state_that_several_questions_are_about_is_stored_once(source, tmp_path):
    from safetensors import safe_open

    layout = VectorLayout(asked(), traces_per_file=5)
    [file] = write(layout, source, tmp_path)
    with safe_open(file, framework="pt") as stored:
        rows = stored.get_slice("rows").get_shape()[0]
    assert rows == 5 * len({(1, 3), (1, 4), (1, 5), (1, -1), (2, 5), (2, -1), (0, 4)})


def test_a_damaged_file_is_named(source, tmp_path):
    layout = VectorLayout(asked(), traces_per_file=5)
    [file] = write(layout, source, tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptError, match="was damaged: remove it"):
        Vectors(layout, [file]).of(asked()[0])
