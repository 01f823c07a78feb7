"""``tribunal collect``: what is taken, what is refused by name, and what it writes."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile

import pytest

from tests.probes.helpers import train
from tribunal.core import receipts
from tribunal.core.errors import UserError
from tribunal.core.storage import write_json
from tribunal.probes.collect import collect, conclude

OLDER = {"layer_3": {"direction": [1.0, 2.0], "intercept": 0.5, "scaler_mean": [0.0, 1.0], "scaler_std": [1.0, 2.0], "accuracy": 0.75}}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "made" / "train_probes"
    folder.parent.mkdir()
    train(world, folder, kinds=["logistic", "diff_of_means"], permutations=0, random_directions=0, bootstrap=100)
    outputs = receipts.hash_outputs(folder)
    write_json(folder / receipts.RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": receipts.digest(outputs)})
    return folder


@pytest.fixture
def results(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "results" / "made" / "train_probes")
    return tmp_path / "results"


def test_one_line_per_file_with_auroc_interval_and_gain(results):
    collection = collect([results])
    assert len(collection.rows) == 12 and not collection.refused
    line = next(line for line in collection.text.splitlines() if line.startswith("made"))
    best = next(row for row in collection.rows if row["best"])
    assert best["kind"] == "logistic" and f"{best['auroc']:.3f} [" in line
    assert "tiny" in line and "mean" in line and "[" in line and "(" in line


def test_the_older_form_is_taken_and_marked(results):
    write_json(results / "layer_directions.json", OLDER)
    collection = collect([results])
    assert [row["form"] for row in collection.rows].count("older") == 1
    assert "older form" in collection.text


def test_a_partial_run_is_refused_by_name(results):
    (results / "made" / "train_probes" / receipts.RECEIPT).unlink()
    collection = collect([results])
    assert not collection.rows
    (reason,) = collection.refused
    assert "made/train_probes/implicit_value_directions.json: partial run" in reason


def test_a_file_changed_after_the_run_is_refused_by_name(results):
    path = results / "made" / "train_probes" / "implicit_value_directions.json"
    path.write_text(path.read_text().replace('"made"', '"fake"'))
    (reason,) = collect([results]).refused
    assert str(path) in reason and "hash" in reason


def test_a_copy_is_refused_and_named_with_its_original(results):
    shutil.copytree(results / "made", results / "zcopy")
    collection = collect([results])
    (reason,) = collection.refused
    assert "zcopy" in reason and "same directions as" in reason and len(collection.found) == 1


def test_the_same_file_given_twice_is_no_duplicate(results):
    collection = collect([results, results / "made"])
    assert not collection.refused and len(collection.found) == 1


def test_a_damaged_file_of_the_older_form_is_refused_with_its_field(results):
    write_json(results / "old.json", {"layer_3": {**OLDER["layer_3"], "scaler_std": [1.0]}})
    (reason,) = collect([results]).refused
    assert "old.json: layer_3" in reason


def test_other_json_files_are_no_concern(results):
    write_json(results / "notes.json", {"a": 1})
    (results / "broken.json").write_text("{")
    assert not collect([results]).refused


def test_csv_json_and_pack_hold_the_rows_the_jsons_and_the_figures(results, tmp_path):
    out = tmp_path / "out"
    collection = collect([results], csv=out / "t.csv", json=out / "t.json", pack=out / "t.zip")
    with (out / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12 and float(lines[0]["auroc"]) == collection.rows[0]["auroc"]
    assert json.loads((out / "t.json").read_text())["rows"] == collection.rows
    names = set(zipfile.ZipFile(out / "t.zip").namelist())
    inside = "made/train_probes/"
    assert {inside + name for name in ("implicit_value_directions.json", "report.json", "receipt.json", "probe_results.png")} <= names
    assert {"directions.json", "directions_cosine.png"} <= names
    first = (out / "t.zip").read_bytes()
    collect([results], pack=out / "t.zip")
    assert (out / "t.zip").read_bytes() == first


def test_nothing_found_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(UserError, match="train_probes writes them"):
        collect([tmp_path])
    with pytest.raises(UserError, match="no such file or folder"):
        collect([tmp_path / "absent"])


def test_the_conclusion_names_verdict_limits_and_files(results):
    text = conclude(results / "made")
    assert "AUROC" in text and "Not shown by this" in text and "probe_results.png" in text and "length" in text
