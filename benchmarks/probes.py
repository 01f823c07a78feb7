"""Probe fitting against scikit-learn, in one run: a grid of C over folds, and 200 label permutations.

    OMP_NUM_THREADS=2 python -m benchmarks.probes [--quick] [--device cuda]

2000 made-up examples (500 problems of 4) of 4096 dimensions, folds by problem. scikit-learn goes layer by layer through
StandardScaler and LogisticRegression, at its default tolerance (not converged: shown, not compared) and at the one that
reaches our solution. Held-out logits are checked equal. Ends with the bars and a non-zero exit when one is missed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from benchmarks._common import clock, matmul_peak_flops
from tribunal.probes.crossfit import make_folds
from tribunal.probes.linear import TrainingSet, to_device

CS = (0.001, 0.01, 0.1, 1.0)
FOLDS, LAYERS, PERMUTATIONS, REFITS = 5, 36, 200, 5
DEFAULT_TOLERANCE, CONVERGED_TOLERANCE = 1e-4, 1e-7
GRID_BAR, PERMUTATION_BAR, LOGITS_EQUAL = 2.0, 50.0, 1e-2


def make_layer(n_problems: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [n, width] (float32, a spectrum that falls and a few large features), labels and folds, 4 traces a problem."""
    rng = np.random.default_rng(seed)
    n = 4 * n_problems
    spectrum = np.arange(1, 257) ** -0.5
    hidden = rng.standard_normal((n, 256)) + 0.7 * np.repeat(rng.standard_normal((n_problems, 256)), 4, axis=0)
    acts = (hidden * spectrum * 6) @ rng.standard_normal((256, width)) / 3 + rng.standard_normal((n, width))
    acts = acts * rng.lognormal(0, 0.5, width) + rng.standard_normal(width)
    acts[:, :4] *= 100
    labels = (hidden[:, 5:25].sum(1) / 5 + 0.6 * rng.standard_normal(n) > 0).astype(np.int64)
    return acts.astype(np.float32), labels, make_folds(labels, [str(i // 4) for i in range(n)], FOLDS, 0)


def ours_grid(acts: np.ndarray, labels: np.ndarray, folds: np.ndarray, device: str) -> np.ndarray:
    """Held-out logits for every C, [n, len(CS)]."""
    held_out = np.empty((len(labels), len(CS)))
    on_device, truth = to_device(acts, device), torch.as_tensor(labels, device=device)
    for k in range(FOLDS):
        training = torch.as_tensor(np.flatnonzero(folds != k), device=device)
        fit = TrainingSet(on_device[training]).logistic(truth[training], CS)
        held_out[folds == k] = fit.scores(on_device[torch.as_tensor(np.flatnonzero(folds == k), device=device)]).cpu().numpy()
    return held_out


def sklearn_grid(acts: np.ndarray, labels: np.ndarray, folds: np.ndarray, tolerance: float, cs: Sequence[float] = CS) -> np.ndarray:
    """The same by scikit-learn, one fit after the other."""
    held_out = np.empty((len(labels), len(cs)))
    acts = acts.astype(np.float64) if tolerance < DEFAULT_TOLERANCE else acts
    for k in range(FOLDS):
        scaler = StandardScaler().fit(acts[folds != k])
        training, test = scaler.transform(acts[folds != k]), scaler.transform(acts[folds == k])
        for i, c in enumerate(cs):
            fit = LogisticRegression(C=c, tol=tolerance, max_iter=50_000).fit(training, labels[folds != k])
            held_out[folds == k, i] = fit.decision_function(test)
    return held_out


def ours_permutations(acts: np.ndarray, permuted: np.ndarray, folds: np.ndarray, device: str) -> np.ndarray:
    """Held-out scores of ridge refitted on every column of labels, [n, permutations]."""
    held_out = np.empty(permuted.shape)
    on_device, truth = to_device(acts, device), torch.as_tensor(permuted, device=device)
    for k in range(FOLDS):
        training = torch.as_tensor(np.flatnonzero(folds != k), device=device)
        fit = TrainingSet(on_device[training]).ridge(truth[training], 0.01)
        held_out[folds == k] = fit.scores(on_device[torch.as_tensor(np.flatnonzero(folds == k), device=device)]).cpu().numpy()
    return held_out


def sklearn_ridge(acts: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    held_out = np.empty(len(labels))
    for k in range(FOLDS):
        scaler = StandardScaler().fit(acts[folds != k])
        fit = Ridge(alpha=4 / 0.01).fit(scaler.transform(acts[folds != k]), 4.0 * labels[folds != k] - 2)
        held_out[folds == k] = fit.predict(scaler.transform(acts[folds == k]))
    return held_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer of 512 dimensions and 400 examples: a check that it runs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    n_problems, width, timed = (100, 512, 1) if arguments.quick else (500, 4096, 3)
    device = arguments.device
    ours_grid(*make_layer(50, 256, 99), device)  # start threads and libraries
    # process seconds on a CPU (all threads), so that a busy neighbour counts less; scikit-learn runs on the CPU always
    peak = matmul_peak_flops(device, torch.float64)
    n_train = 4 * n_problems * (FOLDS - 1) // FOLDS
    seconds: dict[str, float] = {"ours": 0.0, "sklearn": 0.0, "sklearn, default tolerance": 0.0}
    apart, signs, signs_default = 0.0, 0, 0
    accuracy: dict[str, list[float]] = {"ours": [], "sklearn": []}
    for layer in range(timed):
        acts, labels, folds = make_layer(n_problems, width, layer)
        start = clock(device)
        mine = ours_grid(acts, labels, folds, device)
        seconds["ours"] += clock(device) - start
        for name, tolerance in (("sklearn", CONVERGED_TOLERANCE), ("sklearn, default tolerance", DEFAULT_TOLERANCE)):
            start = clock()
            theirs = sklearn_grid(acts, labels, folds, tolerance)
            seconds[name] += clock() - start
            if name == "sklearn":
                apart = max(apart, float(np.abs(mine - theirs).max()))
                signs += int(((mine > 0) != (theirs > 0)).sum())
                for who, logits in (("ours", mine), ("sklearn", theirs)):
                    accuracy[who].append(float(((logits > 0) == labels[:, None]).mean()))
            else:
                signs_default += int(((mine > 0) != (theirs > 0)).sum())
        print(f"layer {layer}: AUROC {[round(float(roc_auc_score(labels, column)), 3) for column in mine.T]} at C = {list(CS)}", flush=True)

    unit = "CPU s" if device == "cpu" else "s"
    print(
        f"\ngrid of {FOLDS} folds x {len(CS)} C, {4 * n_problems} examples x {width} dimensions; {timed} layers timed, {LAYERS} by scaling"
    )
    for name, value in seconds.items():
        print(f"  {name:<28}{value / timed:9.2f} {unit} a layer{value / timed * LAYERS:11.0f} {unit} for {LAYERS} layers (scaled)")
    gram_s = FOLDS * 2 * n_train * n_train * width / peak if n_train < width else float("nan")
    share = gram_s * timed / seconds["ours"]
    print(f"  Gram products at the float64 matmul peak ({peak / 1e9:.0f} GFLOP/s): {gram_s:.2f} s a layer, {share:.2f} of ours")
    print(
        f"  converged fits: logits at most {apart:.1e} apart, {signs} signs differ; accuracy {accuracy['ours']} and {accuracy['sklearn']}"
    )
    print(f"  default tolerance: {signs_default} signs differ from the converged fit")

    acts, labels, folds = make_layer(n_problems, width, 0)
    rng = np.random.default_rng(0)
    permuted = np.stack([rng.permutation(labels.reshape(-1, 4), axis=1).ravel() for _ in range(PERMUTATIONS)], 1)
    start = clock(device)
    scores = ours_permutations(acts, permuted, folds, device)
    ours_s = clock(device) - start
    start = clock()
    for i in range(REFITS):
        sklearn_grid(acts, permuted[:, i], folds, DEFAULT_TOLERANCE, cs=(0.01,))
    refit_s = (clock() - start) / REFITS
    start = clock()
    peers = np.stack([sklearn_ridge(acts.astype(np.float64), permuted[:, i], folds) for i in range(REFITS)], 1)
    ridge_s = (clock() - start) / REFITS
    print(f"\n{PERMUTATIONS} permutations of one layer; {REFITS} refits timed, {PERMUTATIONS} by scaling")
    print(f"  ours, ridge                 {ours_s:9.2f} {unit}")
    print(f"  sklearn LogisticRegression  {refit_s * PERMUTATIONS:9.0f} CPU s (scaled; another estimator, default tolerance)")
    ridge_apart = np.abs(scores[:, :REFITS] - peers).max()
    print(f"  sklearn Ridge               {ridge_s * PERMUTATIONS:9.0f} CPU s (scaled; scores {ridge_apart:.1e} apart)")

    bars = [
        ("grid, x scikit-learn converged", seconds["sklearn"] / seconds["ours"], GRID_BAR),
        ("permutations, x refitting", refit_s * PERMUTATIONS / ours_s, PERMUTATION_BAR),
    ]
    equal = apart < LOGITS_EQUAL and abs(np.mean(accuracy["ours"]) - np.mean(accuracy["sklearn"])) < 1e-4
    print()
    for name, value, bar in bars:
        print(f"{'PASS' if value >= bar else 'FAIL'}  {name}: {value:.1f} (bar {bar:g})")
    print(f"{'PASS' if equal else 'FAIL'}  converged fits equal: {apart:.1e} (bar {LOGITS_EQUAL:g})")
    if arguments.quick:
        print("quick run: the bars are for the full size")
        return 0 if equal else 1
    return 0 if equal and all(value >= bar for _, value, bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
