"""The shard writer and the set that reads it."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tribunal.activations.store import INDEX, META, ActivationSet, Meta, Piece, ShardFile, ShardWriter, tensor_name
from tribunal.core.errors import CorruptError, StorageError, UserError
from tribunal.core.storage import write_file, write_json, write_jsonl

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pieces(tensors, cuts):
    """Every tensor cut into pieces, last piece first."""
    return [Piece(layer, pooling, start, rows[start:end]) for (layer, pooling), rows in tensors.items() for start, end in cuts[pooling]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_written_piecewise_and_out_of_order_equal_a_file_saved_by_safetensors(tmp_path, dtype):
    tensors = {
        (layer, name): torch.randn(n, 6).to(DTYPES[dtype]) for layer in (0, 11) for name, n in {"mean": 5, "none": 0, "token": 9}.items()
    }
    with ShardWriter(tmp_path / "ours", layers=[0, 11], rows={"mean": 5, "none": 0, "token": 9}, d_model=6, dtype=dtype) as writer:
        writer.put(pieces(tensors, {"mean": [(3, 5), (0, 1)], "none": [], "token": [(4, 9)]}))
        writer.put(pieces(tensors, {"mean": [(1, 3)], "none": [], "token": [(0, 4)]}))
    save_file({tensor_name(*name): rows for name, rows in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_failed_write_in_the_thread_reaches_the_caller_with_the_path_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path):
        with ShardWriter(path, layers=[0], rows={"mean": 100}, d_model=4, dtype="float32", depth=1) as writer:
            monkeypatch.setattr(os, "pwrite", full)
            for row in range(100):  # many more than the queue holds: a dead writer must not block
                writer.put([Piece(0, "mean", row, torch.zeros(1, 4))])

    with pytest.raises(StorageError, match=r"acts.*No space left on device"):
        write_file(tmp_path / "acts.safetensors", write)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_caller_is_not_hidden_by_the_writer(tmp_path):
    with pytest.raises(KeyError, match="mine"), ShardWriter(tmp_path / "x", layers=[0], rows={"mean": 2}, d_model=4, dtype="float32"):
        raise KeyError("mine")


def test_a_file_with_rows_missing_is_never_finished(tmp_path):
    with (
        pytest.raises(AssertionError, match="rows never written"),
        ShardWriter(tmp_path / "x", layers=[0], rows={"mean": 2}, d_model=4, dtype="float32") as writer,
    ):
        writer.put([Piece(0, "mean", 0, torch.zeros(1, 4))])


def make_set(folder, counts=(3, 2), poolings=("mean",)):
    folder.mkdir()
    rows, shards, everything = [], [], []
    for number, count in enumerate(counts):
        data = torch.randn(count, 4, generator=torch.Generator().manual_seed(number)).bfloat16()
        everything.append(data)
        save_file({"layer_0.mean": data, "layer_2.mean": -data}, folder / f"acts-{number:05d}.safetensors")
        shards.append(ShardFile(file=f"acts-{number:05d}.safetensors", sha256="", rows={"mean": count}))
        for row in range(count):
            rows.append(
                dict(shard=number, pooling="mean", row=row, problem_id=f"p{number}", sample=row, position=0, start_token=0, end_token=5)
            )
    write_jsonl(folder / INDEX, rows)
    meta = Meta(
        model={}, layers=[0, 2], hook_points=[], poolings=list(poolings), d_model=4, dtype="bfloat16", backend="hooks",
        verdicts=["correct"], template_sha256=[], traces=sum(counts), absent={}, shards=shards,
    )  # fmt: skip
    write_json(folder / META, meta.model_dump())
    return torch.cat(everything)


@pytest.mark.parametrize("counts", [(3, 2), (4,)])
def test_reading_a_layer_gives_all_shards_rows_in_the_order_of_the_index(tmp_path, counts):
    expected = make_set(tmp_path / "set", counts)
    found = ActivationSet.open(tmp_path / "set")
    assert torch.equal(found.read(0, "mean"), expected)
    assert torch.equal(found.read(2, "mean", torch.float32), -expected.float())
    some = torch.arange(len(expected)).flip(0)[::2]
    assert torch.equal(found.read(0, "mean", chosen=some), expected[some])
    assert [row.key for row in found.rows("mean")] == [f"p{number}/{row}" for number, count in enumerate(counts) for row in range(count)]


def test_what_is_not_stored_is_refused_with_what_is(tmp_path):
    make_set(tmp_path / "set")
    found = ActivationSet.open(tmp_path / "set")
    with pytest.raises(UserError, match=r"no activations of layer '1'; stored are 0, 2"):
        found.read(1, "mean")
    with pytest.raises(UserError, match=r"pooling 'meen'; did you mean 'mean'"):
        found.rows("meen")


def test_a_truncated_index_and_a_foreign_header_are_named(tmp_path):
    make_set(tmp_path / "set")
    index = tmp_path / "set" / INDEX
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CorruptError, match=r"index.jsonl: 4 rows of 'mean'"):
        ActivationSet.open(tmp_path / "set").rows("mean")
    (tmp_path / "set" / META).write_text('{"schema_version": 2}')
    with pytest.raises(CorruptError, match=META):
        ActivationSet.open(tmp_path / "set")


def test_a_truncated_shard_is_named(tmp_path):
    make_set(tmp_path / "set")
    shard = tmp_path / "set" / "acts-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CorruptError, match=r"acts-00001.safetensors"):
        ActivationSet.open(tmp_path / "set").read(0, "mean")
