"""The direction file stands alone, and a wrong one is refused in one line that names file and field."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tribunal.core.errors import DataError
from tribunal.probes.direction import load, short


def current(**changes) -> dict:
    one = {"layer": 1, "pooling": "mean", "hook_point": "blocks.1.hook_resid_post", "vector": [3.0, 4.0], "bias": -1.0, "norm": 5.0}
    one |= {"threshold": 0.5, "metrics": {}, "training_set_sha256": "0" * 64}
    whole = {"schema_version": 1, "model": {"name": "m", "revision": None, "d_model": 2, "n_layers": 3}, "dataset": {"name": "d"}}
    return whole | {"label": "P(correct)", "directions": [one], "best": {"layer": 1, "pooling": "mean"}} | changes


def direction(**changes) -> dict:
    return current(directions=[current()["directions"][0] | changes])


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_score_is_the_sigmoid_of_acts_times_vector_plus_bias(tmp_path):
    found = load(write(tmp_path / "d.json", current()))
    acts = np.array([[1.0, 0.0], [-1.0, 1.0]])
    expected = 1 / (1 + np.exp(-np.array([2.0, 0.0])))
    np.testing.assert_allclose(found.score(acts), expected)
    np.testing.assert_allclose(found.score(torch.tensor(acts, dtype=torch.bfloat16)), expected)
    np.testing.assert_allclose(found.select(layer=1, pooling="mean").score(acts), expected)


def test_the_older_form_gives_the_same_logits_as_the_scaled_sklearn_pipeline(tmp_path):
    rng = np.random.default_rng(0)
    acts = rng.standard_normal((100, 7)) * 4 + 3
    labels = (acts[:, 0] + rng.standard_normal(100) > 3).astype(int)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(acts, labels)
    scaler, regression = pipeline
    entry = {"direction": regression.coef_[0].tolist(), "scaler_mean": scaler.mean_.tolist(), "scaler_std": scaler.scale_.tolist()}
    older = {
        "layer_12": {**entry, "intercept": regression.intercept_.tolist(), "accuracy": 0.8},
        "layer_3": {**entry, "intercept": 0.0, "accuracy": 0.7},
    }
    found = load(write(tmp_path / "older.json", older))
    assert found.form == "older" and found.best.layer == 12 and len(found.directions) == 2
    np.testing.assert_allclose(found.select(layer=12).logits(acts), pipeline.decision_function(acts))


WRONG = {
    "schema_version": current(schema_version=2),
    "model.d_model": {**current(), "model": {"name": "m", "revision": None, "n_layers": 3}},
    "directions.0.vector": direction(vector=[3.0, 4.0, 0.0]),
    "directions.0.norm": direction(norm=4.0),
    "directions.0.layer": direction(layer=7, hook_point="blocks.7.hook_resid_post"),
    "directions.0.hook_point": direction(hook_point="blocks.2.hook_resid_post"),
    "directions.0.bias": {**current(), "directions": [{k: v for k, v in current()["directions"][0].items() if k != "bias"}]},
    "directions.0.vecctor": direction(vecctor=[1.0]),
    "directions.1": current(directions=current()["directions"] * 2),
    "best": current(best={"layer": 0, "pooling": "mean"}),
    "best: no ridge": current(best={"layer": 1, "pooling": "mean", "kind": "ridge"}),
    "layer_1.scaler_std": {"layer_1": {"direction": [1.0], "scaler_mean": [0.0], "scaler_std": [0.0], "intercept": 0.0}},
    "layer_1.scaler_mean": {"layer_1": {"direction": [1.0], "scaler_std": [1.0], "intercept": 0.0}},
    "layer_1.intercept": {"layer_1": {"direction": [1.0], "scaler_mean": [0.0], "scaler_std": [1.0]}},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_file_is_refused_in_one_line_that_names_file_and_field(tmp_path, field):
    path = write(tmp_path / "d.json", WRONG[field])
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {field}") and "\n" not in str(error.value)


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(direction(vector=[float("nan"), 1.0])))
    with pytest.raises(DataError, match=r"directions\.0\.vector: .*finite"):
        load(tmp_path / "d.json")


def test_a_missing_or_foreign_or_damaged_file_is_refused(tmp_path):
    for text in ("[1]", "{", "{}"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(DataError, match=r"d\.json"):
            load(tmp_path / "d.json")
    with pytest.raises(DataError, match="no such direction file"):
        load(tmp_path)


def test_activations_of_another_width_are_refused(tmp_path):
    found = load(write(tmp_path / "d.json", current()))
    with pytest.raises(DataError, match=r"wants \[n, 2\]"):
        found.score(np.zeros((4, 3)))
    with pytest.raises(DataError, match="there are 1/mean/logistic"):
        found.select(layer=2)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_nine_digits_give_a_float32_back_exactly(value):
    assert np.float32(short(value)) == np.float32(value)
