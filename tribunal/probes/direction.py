"""Read, check and apply ``implicit_value_directions.json``: the file that stands alone.

    directions = load("results/gsm8k/train_probes")
    p_correct_N = directions.score(acts_ND)                     # the best one
    p_correct_N = directions.select(layer=12, pooling="mean").score(acts_ND)

Vectors are in raw residual units with the scaler folded in: ``sigmoid(acts @ vector + bias)`` is P(correct).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit

from tribunal.core.errors import CorruptError, DataError
from tribunal.core.storage import read_json, sha256_json

FILE_NAME = "implicit_value_directions.json"
SCHEMA_VERSION = 1
NORM_TOLERANCE = 1e-6
OLDER_KEY = re.compile(r"layer_(\d+)")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Direction(_Strict):
    """One probe as a direction in the residual stream."""

    layer: int = Field(ge=0)
    pooling: str
    kind: str = "logistic"
    hook_point: str
    vector: list[float]
    bias: float
    norm: float = Field(description="Euclidean length of the vector")
    threshold: float = Field(0.5, ge=0, le=1, description="P(correct) from which on the probe says correct")
    c: float | None = Field(None, description="inverse penalty, chosen by cross-validation")
    metrics: dict[str, Any] = Field(description="out-of-fold, with 95 % intervals; gain over the best control")
    training_set_sha256: str | None

    def logits(self, acts_ND: ArrayLike) -> NDArray[np.float64]:
        """Logit of "correct" for every row of [n, d_model] activations (numpy or torch, any dtype)."""
        acts = _array(acts_ND)
        vector = np.asarray(self.vector)
        if acts.ndim != 2 or acts.shape[1] != len(vector):
            raise DataError(
                f"activations of shape {list(acts.shape)}: the direction of layer {self.layer}, {self.pooling} wants [n, {len(vector)}]"
            )
        return acts @ vector + self.bias

    def score(self, acts_ND: ArrayLike) -> NDArray[np.float64]:
        """P(correct) for every row, [n]."""
        return expit(self.logits(acts_ND))


class Model(_Strict):
    """The model that the directions belong to; None where the older form doesn't say."""

    name: str | None
    revision: str | None
    d_model: int
    n_layers: int | None


class Place(_Strict):
    layer: int
    pooling: str
    kind: str = "logistic"


class Directions(_Strict):
    """The whole file."""

    schema_version: Literal[1] = 1
    model: Model
    dataset: dict[str, Any]
    label: str = "P(correct)"
    directions: list[Direction] = Field(min_length=1)
    best: Place
    experiment: str | None = None
    template_sha256: str | None = Field(None, description="of the prompt format; a monitor refuses another one")
    dtype: str | None = Field(None, description="of the model's weights while the activations were read")
    counts: dict[str, int] = Field(default_factory=dict, description="traces by verdict")
    poolings: dict[str, str] = Field(default_factory=dict, description="what each pooling averages")
    folds: dict[str, Any] = Field(default_factory=dict)
    planted: bool = False
    tribunal_version: str | None = None
    form: Literal["current", "older"] = Field("current", exclude=True)

    def select(self, layer: int | None = None, pooling: str | None = None, kind: str | None = None) -> Direction:
        """The direction at a place; what isn't given is the best one's.

        Raises:
            DataError: there is none; names those there are.
        """
        wanted = self.best.layer if layer is None else layer, self.best.pooling if pooling is None else pooling, kind or self.best.kind
        for direction in self.directions:
            if (direction.layer, direction.pooling, direction.kind) == wanted:
                return direction
        there = ", ".join(f"{d.layer}/{d.pooling}/{d.kind}" for d in self.directions)
        raise DataError(f"no {wanted[2]} direction for layer {wanted[0]}, pooling '{wanted[1]}'; there are {there}")

    def score(self, acts_ND: ArrayLike) -> NDArray[np.float64]:
        """P(correct) by the best direction."""
        return self.select().score(acts_ND)

    @property
    def content_sha256(self) -> str:
        """Of the numbers alone: equal for copies of one set of directions, whatever is written around them."""
        return sha256_json([[d.layer, d.pooling, d.kind, d.vector, d.bias] for d in self.directions])


def load(path: Path | str) -> Directions:
    """Read a direction file (or the one in a results folder), the older form too.

    Raises:
        DataError: it is not one, or a field is wrong; one line that names file and field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise DataError(f"{path}: no such direction file; train_probes writes {FILE_NAME} under results/<experiment>/train_probes/")
    try:
        data = read_json(path)
    except CorruptError as error:
        raise DataError(str(error)) from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}, not directions")
    if "schema_version" not in data and data and all(OLDER_KEY.fullmatch(key) for key in data):
        return _older(path, data)
    if data.get("schema_version") != SCHEMA_VERSION:
        version = data.get("schema_version")
        raise DataError(f"{path}: schema_version: {version!r}; this tribunal reads {SCHEMA_VERSION} and the older layer_<L> form")
    try:
        directions = Directions.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {field}: {first['msg'].lower()}") from None
    return _checked(path, directions)


def is_direction_file(data: Any) -> bool:
    """Whether a JSON value claims to hold directions, in either form."""
    if not isinstance(data, dict) or not data:
        return False
    return "directions" in data or all(OLDER_KEY.fullmatch(str(key)) for key in data)


def vector_norm(vector: ArrayLike) -> float:
    return float(np.linalg.norm(np.asarray(vector, dtype=np.float64)))


def short(value: float) -> float:
    """Nine significant digits: enough to give a float32 back exactly, a third of the text of a float64."""
    return float(f"{value:.9g}") + 0.0


def _checked(path: Path, directions: Directions) -> Directions:
    seen = set()
    for i, direction in enumerate(directions.directions):
        where = f"{path}: directions.{i}"
        if len(direction.vector) != directions.model.d_model:
            raise DataError(f"{where}.vector: {len(direction.vector)} numbers, but model.d_model is {directions.model.d_model}")
        if not np.isfinite(direction.vector).all() or not math.isfinite(direction.bias):
            raise DataError(f"{where}.{'bias' if not math.isfinite(direction.bias) else 'vector'}: holds a number that is not finite")
        norm = vector_norm(direction.vector)
        if norm == 0 or abs(norm - direction.norm) > NORM_TOLERANCE * norm:
            raise DataError(f"{where}.norm: {direction.norm}, but the vector's length is {norm:.9g}")
        if directions.model.n_layers is not None and direction.layer >= directions.model.n_layers:
            raise DataError(f"{where}.layer: {direction.layer}, but model.n_layers is {directions.model.n_layers}")
        if direction.hook_point != hook_point(direction.layer):
            raise DataError(f"{where}.hook_point: '{direction.hook_point}' is not layer {direction.layer}'s {hook_point(direction.layer)}")
        key = direction.layer, direction.pooling, direction.kind
        if key in seen:
            raise DataError(f"{where}: a second direction for layer {key[0]}, {key[1]}, {key[2]}")
        seen.add(key)
    best = directions.best.layer, directions.best.pooling, directions.best.kind
    if best not in seen:
        raise DataError(f"{path}: best: no {best[2]} direction for layer {best[0]}, pooling '{best[1]}'")
    return directions


def hook_point(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _older(path: Path, data: dict[str, Any]) -> Directions:
    """``{"layer_12": {"direction", "intercept", "scaler_mean", "scaler_std", "accuracy"}}``: the scaler is folded in here."""
    directions = []
    for key, entry in data.items():
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {key}: holds a {type(entry).__name__}, not a direction")
        arrays = {}
        for name in ("direction", "scaler_mean", "scaler_std"):
            try:
                arrays[name] = np.asarray(entry[name], dtype=np.float64).ravel()
            except KeyError:
                raise DataError(f"{path}: {key}.{name}: missing") from None
            except (TypeError, ValueError):
                raise DataError(f"{path}: {key}.{name}: not a list of numbers") from None
            if not len(arrays[name]) or not np.isfinite(arrays[name]).all():
                raise DataError(f"{path}: {key}.{name}: empty, or holds a number that is not finite")
        weights, mean, scale = arrays["direction"], arrays["scaler_mean"], arrays["scaler_std"]
        if not len(weights) == len(mean) == len(scale):
            lengths = f"{len(weights)}, {len(mean)} and {len(scale)}"
            raise DataError(f"{path}: {key}: direction, scaler_mean and scaler_std have {lengths} numbers")
        if (scale <= 0).any():
            raise DataError(f"{path}: {key}.scaler_std: holds a number that is not positive")
        try:
            intercept = float(np.asarray(entry["intercept"], dtype=np.float64).ravel().item())  # a number, or scikit-learn's [number]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: {key}.intercept: missing, or not one number") from None
        vector = weights / scale
        accuracy = entry.get("accuracy")
        layer = int(key.removeprefix("layer_"))
        directions.append(
            Direction(
                layer=layer,
                pooling=str(entry.get("pooling", "unknown")),
                hook_point=hook_point(layer),
                vector=vector.tolist(),
                bias=intercept - float(mean @ vector),
                norm=vector_norm(vector),
                metrics={} if accuracy is None else {"accuracy": {"value": float(accuracy)}},
                training_set_sha256=None,
            )
        )
    widths = {len(direction.vector) for direction in directions}
    if len(widths) > 1:
        raise DataError(f"{path}: vectors of different lengths: {sorted(widths)}")
    best = max(directions, key=lambda d: d.metrics.get("accuracy", {}).get("value", 0.0))
    whole = Directions(
        model=Model(name=None, revision=None, d_model=widths.pop(), n_layers=None),
        dataset={},
        directions=directions,
        best=Place(layer=best.layer, pooling=best.pooling),
        form="older",
    )
    return _checked(path, whole)


def _array(acts: Any) -> NDArray[np.float64]:
    if hasattr(acts, "detach"):  # a torch tensor, bfloat16 too, without importing torch
        acts = acts.detach().double().cpu().numpy()
    return np.asarray(acts, dtype=np.float64)
