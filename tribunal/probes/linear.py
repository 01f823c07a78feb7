"""Linear probes: logistic regression, ridge (LDA) and difference of means, fitted fast and to a stated tolerance.

One ``TrainingSet`` standardises its rows and factorises their Gram matrix once, in the smaller of the two spaces (rows or
features); every fit on these rows shares it: all values of C, all kinds, and 200 permuted labels. Arithmetic is float64.

Logistic regression is solved by Newton's method, each C starting from the one before. With fewer rows than features a
step is exact (Cholesky in the space of rows); else it is found by conjugate gradients with the ridge matrix, which is the
Hessian at zero, as preconditioner.

N rows, D model width, K smaller space, C values of the inverse penalty, M label columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

LOGIT_TOLERANCE = 1e-6
"""Converged: the last Newton step moved no training logit by more than this."""
MAX_NEWTON_STEPS = 100
MAX_CG_STEPS = 500


@dataclass(frozen=True)
class Fit:
    """Fitted columns in raw activation units: ``acts @ vectors + biases`` are the logits (scores).

    Attributes:
        vectors: [d_model, columns].
        biases: [columns].
        newton_steps: 0 for closed forms.
        last_move: largest change of a training logit in the last Newton step.
    """

    vectors: torch.Tensor
    biases: torch.Tensor
    newton_steps: int = 0
    last_move: float = 0.0

    def scores(self, acts_ND: torch.Tensor) -> torch.Tensor:
        """Logits of every row and column, shape [n, columns]."""
        return acts_ND @ self.vectors + self.biases


class TrainingSet:
    """Rows to fit on: standardised (weighted), with the Gram matrix that all fits share.

    Args:
        acts_ND: one layer's residual stream, [n_rows, d_model], float64, on the device to compute on.
        weights_N: weight of each row in the loss, the mean and the scale, [n_rows], > 0; None for ones.
        standardise: False only centres (for features that carry their own scale, such as TF-IDF).

    The loss is scikit-learn's: ``C * sum_i weight_i * logloss_i + |w|^2 / 2`` on standardised features, intercept free.
    """

    def __init__(self, acts_ND: torch.Tensor, weights_N: torch.Tensor | None = None, *, standardise: bool = True) -> None:
        n, d = acts_ND.shape
        weights = torch.ones(n, dtype=torch.float64, device=acts_ND.device) if weights_N is None else weights_N.to(acts_ND)
        total = weights.sum()
        self.root = weights.sqrt()
        self.mean = (weights @ acts_ND) / total
        centred = acts_ND - self.mean
        if standardise:
            variance = (weights @ centred.square()) / total
            eps = torch.finfo(torch.float64).eps
            constant = variance <= n * eps * variance + (n * eps * self.mean) ** 2  # scikit-learn's rule for a constant feature
            self.scale = torch.where(constant, torch.ones_like(variance), variance.sqrt())
        else:
            self.scale = torch.ones_like(self.mean)
        self.features = centred.div_(self.scale).mul_(self.root[:, None])  # Z = sqrt(weight) * standardised row
        self.dual = n < d
        self.gram = self.features @ self.features.T if self.dual else self.features.T @ self.features
        self._factors: dict[float, torch.Tensor] = {}

    # The two spaces: coefficients are feature weights w, or row coefficients a with w = Z^T a ---------------------------

    def _forward(self, coefs: torch.Tensor) -> torch.Tensor:
        return self.gram @ coefs if self.dual else self.features @ coefs

    def _back(self, residual: torch.Tensor) -> torch.Tensor:
        return residual if self.dual else self.features.T @ residual

    @cached_property
    def _gram32(self) -> torch.Tensor:
        return self.gram.float()

    def _inner(self, left: torch.Tensor, right: torch.Tensor, forward_right: torch.Tensor) -> torch.Tensor:
        return (left * (forward_right if self.dual else right)).sum(0)

    def _factor(self, c: float) -> torch.Tensor:
        """Cholesky factor of ``I + C/4 Gram``, the Hessian at zero."""
        if c not in self._factors:
            matrix = self.gram * (c / 4)
            matrix.diagonal().add_(1.0)
            self._factors[c] = torch.linalg.cholesky(matrix)
        return self._factors[c]

    def _raw(self, coefs: torch.Tensor, biases: torch.Tensor, newton_steps: int = 0, last_move: float = 0.0) -> Fit:
        """Fold the scaler in."""
        weights = self.features.T @ coefs if self.dual else coefs
        vectors = weights / self.scale[:, None]
        return Fit(vectors, biases - self.mean @ vectors, newton_steps, last_move)

    # The fits ---------------------------------------------------------------------------------------------------------

    def diff_of_means(self, labels_N: torch.Tensor) -> Fit:
        """Unit vector (in standardised units) from the incorrect to the correct mean; the midpoint scores 0."""
        labels = labels_N.to(self.root)
        weighted = self.root * labels, self.root * (1 - labels)
        means = [(part @ self.features) / (self.root * part).sum() for part in weighted]
        direction = (means[1] - means[0]).neg()
        direction = direction / direction.norm().clamp_min(torch.finfo(torch.float64).tiny)
        vector = direction / self.scale
        bias = -(self.mean @ vector) - (means[0] + means[1]) @ direction / 2
        return Fit(vector[:, None], bias[None])

    def ridge(self, labels_NM: torch.Tensor, c: float) -> Fit:
        """Ridge on targets +-2, the working response of logistic regression at zero, one column per label column.

        With two classes its direction is LDA's with a shrunk covariance. ``c`` means what it means for ``logistic``.
        """
        targets = 4 * labels_NM.to(self.root) - 2
        means = (self.root.square() @ targets) / self.root.square().sum()
        response = self.root[:, None] * (targets - means)
        right = response if self.dual else self.features.T @ response
        coefs = torch.cholesky_solve(right, self._factor(c)) * (c / 4)
        return self._raw(coefs, means)

    def logistic(self, labels_N: torch.Tensor, cs: Sequence[float], *, tolerance: float = LOGIT_TOLERANCE) -> Fit:
        """L2-regularised logistic regression for every value of ``cs`` (columns), equal to scikit-learn's converged fit.

        Args:
            labels_N: 1 where the trace's answer is correct, else 0.
            cs: the inverse penalties; each fit starts from the one before.
            tolerance: the largest move of a training logit in a last Newton step.
        Raises:
            ArithmeticError: not converged within ``MAX_NEWTON_STEPS`` (cannot happen for finite input).
        """
        labels = labels_N.to(self.root)
        coefs = torch.zeros(len(self.gram), dtype=torch.float64, device=self.root.device)
        bias, forward = torch.zeros_like(coefs[0]), torch.zeros_like(self.root)
        columns, biases, most_steps, worst = [], [], 0, 0.0
        for c in cs:
            coefs, forward, bias, steps, move = self._newton(c, labels, coefs, forward, bias, tolerance)
            columns.append(coefs)
            biases.append(bias)
            most_steps, worst = max(most_steps, steps), max(worst, move)
        return self._raw(torch.stack(columns, 1), torch.stack(biases), most_steps, worst)

    def _newton(
        self, c: float, labels: torch.Tensor, coefs: torch.Tensor, forward: torch.Tensor, bias: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float]:
        move = float("inf")
        for steps in range(1, MAX_NEWTON_STEPS + 1):
            chance = torch.sigmoid(forward / self.root + bias)
            residual = self.root * (chance - labels)
            gradient, gradient_b = c * self._back(residual) + coefs, c * (self.root @ residual)
            curvature = (chance * (1 - chance)).clamp_min(1e-12)
            step, step_forward, step_b = self._newton_step(c, gradient, gradient_b, curvature)
            slope = self._inner(gradient, step, step_forward) + gradient_b * step_b
            size = self._line_search(c, labels, (coefs, forward, bias), (step, step_forward, step_b), slope)
            coefs, forward, bias = coefs + size * step, forward + size * step_forward, bias + size * step_b
            move = size * float((step_forward / self.root + step_b).abs().max())
            if move <= tolerance:
                return coefs, forward, bias, steps, move
        raise ArithmeticError(f"logits still move by {move:.1e} after {MAX_NEWTON_STEPS} Newton steps; are the inputs finite?")

    def _newton_step(
        self, c: float, gradient: torch.Tensor, gradient_b: torch.Tensor, curvature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solve ``Hessian @ step = -gradient``; returns the step, its image under ``_forward`` and the intercept's step."""
        if self.dual:
            return self._step_by_cholesky(c, gradient, gradient_b, curvature)
        return self._step_by_conjugate_gradients(c, gradient, gradient_b, curvature)

    def _step_by_cholesky(
        self, c: float, gradient: torch.Tensor, gradient_b: torch.Tensor, curvature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Few rows: one factorisation a step. Rows nearly interpolated have almost no curvature, where an iteration would crawl.

        The factor is float32 where that holds (half the time); gradients are float64, so Newton's iteration corrects its error.
        """
        e = (c * curvature).sqrt()  # with q the step in logits: (I + E K E) (E q) = E (K(-gradient) + root * step_b)
        matrix = e.float()[:, None] * self._gram32 * e.float()
        matrix.diagonal().add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):  # too ill-conditioned for float32
            matrix = e[:, None] * self.gram * e
            matrix.diagonal().add_(1.0)
            factor = torch.linalg.cholesky(matrix)
        right = torch.stack([-e * (self.gram @ gradient), e * self.root], 1)
        solved = torch.cholesky_solve(right.to(factor.dtype), factor).double()
        along = e * self.root
        step_b = (-gradient_b - along @ solved[:, 0]) / (along @ solved[:, 1])
        step = -gradient - e * (solved[:, 0] + step_b * solved[:, 1])
        return step, self._forward(step), step_b

    def _step_by_conjugate_gradients(
        self, c: float, gradient: torch.Tensor, gradient_b: torch.Tensor, curvature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Many rows: the ridge matrix as preconditioner; two passes over the rows an iteration, a few iterations a step."""
        factor, scale_b = self._factor(c), 4 / (c * self.root.square().sum())
        r, r_b = -gradient, -gradient_b
        z, z_b = torch.cholesky_solve(r[:, None], factor)[:, 0], r_b * scale_b
        p, p_b = z, z_b
        rz = r @ z + r_b * z_b
        goal = rz * rz.clamp(1e-12, 1e-2)  # solved more sharply as the gradient shrinks: superlinear convergence
        step, forward, step_b = torch.zeros_like(r), torch.zeros_like(self.root), torch.zeros_like(r_b)
        for _ in range(MAX_CG_STEPS):
            if not bool(rz > goal):
                break
            f = self._forward(p)
            bent = c * curvature * (f + self.root * p_b)
            alpha = rz / (bent @ (f + self.root * p_b) + p @ p)
            step, forward, step_b = step + alpha * p, forward + alpha * f, step_b + alpha * p_b
            r, r_b = r - alpha * (self._back(bent) + p), r_b - alpha * (self.root @ bent)
            z, z_b = torch.cholesky_solve(r[:, None], factor)[:, 0], r_b * scale_b
            new = r @ z + r_b * z_b
            p, p_b, rz = z + new / rz * p, z_b + new / rz * p_b, new
        return step, forward, step_b

    def _line_search(
        self,
        c: float,
        labels: torch.Tensor,
        at: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        step: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slope: torch.Tensor,
    ) -> float:
        """Halve the step until the objective falls (Armijo); 1e-12 of slack for its rounding."""

        def objective(size: float) -> float:
            coefs, forward, bias = (start + size * change for start, change in zip(at, step))
            logits = forward / self.root + bias
            losses = torch.nn.functional.softplus(logits) - labels * logits
            return float(c * (self.root.square() @ losses) + self._inner(coefs, coefs, forward) / 2)

        now, size = objective(0.0), 1.0
        while size > 1e-12 and not objective(size) <= now + 1e-4 * size * float(slope) + 1e-12 * abs(now):
            size /= 2
        return size


def fit_platt(scores_N: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> tuple[float, float]:
    """Slope and offset that turn scores into logits of "correct" (Platt 1999), fitted on held-out scores."""
    fit = TrainingSet(scores_N[:, None], weights_N).logistic(labels_N, [1e4])
    return float(fit.vectors[0, 0]), float(fit.biases[0])


def to_device(acts: np.ndarray | torch.Tensor, device: str | None = None) -> torch.Tensor:
    """float64 on ``device`` (default: the first GPU if there is one)."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.as_tensor(acts).to(device=name, dtype=torch.float64)
