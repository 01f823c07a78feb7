"""What later phases may say of a problem: nothing that was learnt from it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.probes.helpers import train
from tribunal.activations.store import ActivationSet
from tribunal.core.errors import DataError
from tribunal.probes.held_out import read_held_out


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """(folder, evaluation)"""
    out = tmp_path_factory.mktemp("held") / "train_probes"
    return out, train(world, out, kinds=["ridge", "diff_of_means", "logistic"], permutations=0, random_directions=0)


def rows_of(world, held_out):
    """Stored activations of the scored traces, [n, d_model], and their keys."""
    acts = ActivationSet.open(world.activations)
    keys = [(row.problem_id, row.sample) for row in acts.rows(held_out.place.pooling)]
    kept = [i for i, key in enumerate(keys) if key in held_out.labels]
    return acts.read(held_out.place.layer, held_out.place.pooling).double().numpy()[kept], [keys[i] for i in kept]


def test_a_problems_own_direction_gives_its_held_out_logits_exactly(run, world):
    folder, evaluation = run
    held_out = read_held_out(folder)
    acts, keys = rows_of(world, held_out)
    assert set(keys) == set(held_out.logit) == set(held_out.nested_logit)
    ours = [held_out.direction_of(problem).logits(row[None])[0] for row, (problem, _) in zip(acts, keys)]
    np.testing.assert_allclose(ours, [held_out.logit[key] for key in keys], rtol=0, atol=1e-11)
    np.testing.assert_array_equal([held_out.logit[key] for key in keys], evaluation.scores(evaluation.best).logits)
    contrast = evaluation.scores(evaluation.best, "diff_of_means").logits
    theirs = [held_out.diff_of_means_of(problem).logits(row[None])[0] for row, (problem, _) in zip(acts, keys)]
    np.testing.assert_allclose(theirs, contrast, rtol=0, atol=1e-11)


def test_a_problem_is_never_scored_by_a_direction_that_saw_it(world, tmp_path):
    train(world, tmp_path / "out", kinds=["logistic", "diff_of_means"], permutations=0, random_directions=0)
    held_out = read_held_out(tmp_path / "out")
    acts, keys = rows_of(world, held_out)
    labels = np.array([held_out.labels[key] for key in keys])
    for fold in sorted(set(held_out.folds.values())):
        theirs = np.array([held_out.fold_of(problem) == fold for problem, _ in keys])
        problem = keys[int(np.flatnonzero(theirs)[0])][0]
        direction, contrast = held_out.direction_of(problem), held_out.diff_of_means_of(problem)
        known, y = acts[~theirs], labels[~theirs]
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=direction.c, tol=1e-10, solver="newton-cg")).fit(known, y)
        np.testing.assert_allclose(direction.logits(acts), pipeline.decision_function(acts), atol=1e-5)
        between = (known[y == 1].mean(0) - known[y == 0].mean(0)) / known.var(0)
        assert np.dot(between, contrast.vector) / np.linalg.norm(between) == pytest.approx(contrast.norm)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "fold_directions.json").unlink(), "fold_directions.json: not there"),
        (lambda folder: edit(folder, lambda data: data["folds"].pop()), "held_out.jsonl, line .*: fold 3, but fold_directions.json holds"),
        (lambda folder: edit(folder, lambda data: data["folds"][0]["direction"]["vector"].pop()), "fold 0, direction: 11 numbers where"),
        (lambda folder: edit(folder, lambda data: data.update(schema_version=2)), "fold_directions.json: schema_version"),
        (lambda folder: (folder / "held_out.jsonl").write_text('{"problem_id": "p0"}\n'), "held_out.jsonl, line 1: "),
    ],
)
def test_a_file_that_is_missing_or_wrong_is_named_in_one_line(run, tmp_path, damage, message):
    folder = tmp_path / "train_probes"
    shutil.copytree(run[0], folder)
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        read_held_out(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_problem_without_a_fold_is_refused(run):
    with pytest.raises(DataError, match="no problem 'p999' among the 60 with a correct or incorrect trace"):
        read_held_out(run[0]).direction_of("p999")


def edit(folder, change):
    path = folder / "fold_directions.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
