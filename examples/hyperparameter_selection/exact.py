"""h and its gradient in float64, by Newton's method: what a stochastic run is measured against.

    h(x) = F(z*(x)),    z*(x) = argmin_z  data(z) + ½ Σ_k e^{x_k} ‖z_k‖²
    ∂h/∂x_k = e^{x_k} ⟨z_k, v_k⟩,    v = -H⁻¹ ∇F(z*)

NumPy and SciPy only: it shares no code with the library whose results it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize, special

# The box in which the published optimum of ijcnn1 was found: h is flat far out in either direction.
BOUNDS = (-25.0, 12.0)
# Without a penalty a linear classifier separates breast_cancer's examples, and has no minimiser.
SEPARABLE_BOUNDS = (-8.0, 12.0)
STARTS = (-12.0, -8.0, -5.0)  # constant x, where the search for the lowest h begins
_BLOCK_ROWS = 16_384
_MAX_NEWTON_STEPS = 200
_MAX_POLISHING_STEPS = 5


class Data(NamedTuple):
    """Examples: inputs float [n, features], labels int [n] (-1 and 1, or 0 .. classes - 1)."""

    inputs: np.ndarray
    labels: np.ndarray


class Optimum(NamedTuple):
    """The lowest h that was found.

    Attributes:
        x: float64 [penalties].
        value: h(x).
        from_each_start: h at the end of the search from every start.
        stationarity: the largest |∂h/∂x_k| that points into the box, 0 at a solution.
    """

    x: np.ndarray
    value: float
    from_each_start: tuple[float, ...]
    stationarity: float


def logistic(z: np.ndarray, data: Data, curvature: bool = True):
    """Mean logistic loss -> (value, gradient, Hessian or None); z is [features]."""
    signed = data.inputs * data.labels[:, None]
    margins = signed @ z
    value = np.logaddexp(0, -margins).mean()
    wrong = special.expit(-margins)
    gradient = -signed.T @ wrong / len(margins)
    if not curvature:
        return value, gradient, None
    return value, gradient, (signed * (wrong * (1 - wrong))[:, None]).T @ signed / len(margins)


def softmax(z: np.ndarray, data: Data, curvature: bool = True):
    """Mean cross-entropy, as `logistic`; z is a flat [features, classes]."""
    n, features = data.inputs.shape
    classes = len(z) // features
    value, gradient = 0.0, np.zeros((features, classes))
    hessian = np.zeros((features, classes, features, classes)) if curvature else None
    # In blocks, for covtype's 372,000 rows would need several copies in float64 at once.
    for start in range(0, n, _BLOCK_ROWS):
        inputs = np.asarray(data.inputs[start : start + _BLOCK_ROWS], np.float64)
        chosen = (np.arange(len(inputs)), data.labels[start : start + _BLOCK_ROWS])
        logits = inputs @ z.reshape(features, classes)
        value += np.sum(np.asarray(special.logsumexp(logits, axis=1)) - logits[chosen])
        chance = special.softmax(logits, axis=1)
        residual = chance.copy()
        residual[chosen] -= 1
        gradient += inputs.T @ residual
        if hessian is None:
            continue
        for c in range(classes):
            for d in range(c, classes):
                weights = chance[:, c] * ((c == d) - chance[:, d])
                block = (inputs * weights[:, None]).T @ inputs
                hessian[:, c, :, d] += block
                if d > c:
                    hessian[:, d, :, c] += block
    if hessian is not None:
        hessian = hessian.reshape(len(z), len(z)) / n
    return value / n, gradient.ravel() / n, hessian


def _solve(hessian: np.ndarray, penalty: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(H + diag(penalty))⁻¹ right; H may be singular, and the penalty as small as e^-25."""
    matrix = hessian + np.diag(penalty)
    try:
        return linalg.cho_solve(linalg.cho_factor(matrix), right)
    except linalg.LinAlgError:
        # Rounding made it indefinite. What this adds is far below what h resolves.
        jitter = 1e-14 * np.trace(hessian)
        matrix[np.diag_indices_from(matrix)] += jitter
        return linalg.cho_solve(linalg.cho_factor(matrix), right)


class Exact:
    """h of one selection problem.

    Args:
        loss: `logistic` (one penalty for each feature) or `softmax` (one for each class).
        train: what the inner loss sees.
        validation: what the outer loss sees.
        num_penalties: the length of x.
    """

    def __init__(self, loss: Callable, train: Data, validation: Data, num_penalties: int):
        self._loss, self._train, self._validation = loss, train, validation
        features = train.inputs.shape[1]
        size = features if loss is logistic else features * num_penalties
        self._group = np.arange(size) % num_penalties  # the penalty of each entry of a flat z
        self._last = np.zeros(size)

    def solve(self, x: np.ndarray) -> np.ndarray:
        """z*(x), flat, by Newton's method with backtracking, from the last solution.

        Raises:
            ArithmeticError: no minimiser is found, as for an x that is not finite.
        """
        penalty = np.exp(np.asarray(x, np.float64))[self._group]
        if not np.isfinite(penalty).all():
            raise ArithmeticError(f"x has no finite penalties: {x}")
        z = self._last if np.isfinite(self._last).all() else np.zeros_like(self._last)

        def objective(point):
            return self._loss(point, self._train, False)[0] + 0.5 * penalty @ point**2

        now, decrease = objective(z), np.inf
        for _ in range(_MAX_NEWTON_STEPS):
            _, gradient, hessian = self._loss(z, self._train)
            gradient = gradient + penalty * z
            step = -_solve(hessian, penalty, gradient)
            before, decrease = decrease, -gradient @ step
            # Softmax does not see a shift of all scores: with a penalty of e^-25 alone to fix it,
            # rounding ends the progress earlier.
            if decrease < 1e-24 or (decrease < 1e-16 and decrease > before / 4):
                self._last = z
                return z
            size = 1.0
            # Near the minimum the objective no longer resolves a decrease, and a full step is best.
            while decrease > 1e-12 and size > 1e-10:
                if objective(z + size * step) <= now - 1e-4 * size * decrease:
                    break
                size /= 2
            z = z + size * step
            now = objective(z)
        raise ArithmeticError(f"Newton's method did not converge in {_MAX_NEWTON_STEPS} steps")

    def value(self, x: np.ndarray) -> float:
        """h(x)."""
        return float(self._loss(self.solve(x), self._validation, False)[0])

    def value_and_grad(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """h(x) and ∇h(x), float64 [penalties]."""
        x = np.asarray(x, np.float64)
        z = self.solve(x)
        penalty = np.exp(x)[self._group]
        value, gradient, _ = self._loss(z, self._validation, False)
        v = -_solve(self._loss(z, self._train)[2], penalty, gradient)
        return float(value), np.bincount(self._group, penalty * z * v, minlength=len(x))

    def optimum(
        self,
        num_penalties: int,
        starts: Sequence[float | np.ndarray] = STARTS,
        bounds: tuple[float, float] = BOUNDS,
    ) -> Optimum:
        """The lowest h in the box: L-BFGS from several x, then Newton's method on h.

        h is not convex, hence the starts. L-BFGS alone leaves gradients of 1e-10.

        Args:
            num_penalties: the length of x.
            starts: points [num_penalties], or constants; what lies outside starts at the edge.
            bounds: the box, for every coordinate of x.
        """
        ends = [
            optimize.minimize(
                self.value_and_grad,
                np.broadcast_to(np.clip(start, *bounds), num_penalties),
                jac=True,
                method="L-BFGS-B",
                bounds=[bounds] * num_penalties,
                options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10},
            )
            for start in starts
        ]
        best = min(ends, key=lambda result: result.fun)
        x, value, stationarity = self._polished(best.x, bounds)
        return Optimum(x, value, tuple(float(result.fun) for result in ends), stationarity)

    def _polished(
        self, x: np.ndarray, bounds: tuple[float, float]
    ) -> tuple[np.ndarray, float, float]:
        """(x, h, stationarity) after Newton's method on the coordinates inside the box."""
        value, gradient = self.value_and_grad(x)
        for _ in range(_MAX_POLISHING_STEPS):
            inside = np.flatnonzero((x > bounds[0]) & (x < bounds[1]))
            if not len(inside) or np.abs(gradient[inside]).max() < 1e-15:
                break
            step = np.zeros_like(x)
            # Pseudo-inverse: h is flat in penalties that do not matter.
            hessian = self._hessian(x, inside)
            step[inside] = -np.linalg.pinv(hessian, 1e-9, hermitian=True) @ gradient[inside]
            moved = np.clip(x + step, *bounds)
            new_value, new_gradient = self.value_and_grad(moved)
            smaller = _pointing_inside(moved, new_gradient, bounds) < _pointing_inside(
                x, gradient, bounds
            )
            # A saddle has no gradient either.
            if not smaller or new_value > value + 1e-15:
                break
            x, value, gradient = moved, new_value, new_gradient
        return x, value, _pointing_inside(x, gradient, bounds)

    def _hessian(self, x: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
        """∇²h on some coordinates, by central differences of ∇h."""
        columns = []
        for k in coordinates:
            shift = np.zeros_like(x)
            shift[k] = 1e-4
            _, above = self.value_and_grad(x + shift)
            _, below = self.value_and_grad(x - shift)
            columns.append((above - below)[coordinates] / 2e-4)
        hessian = np.array(columns)
        return 0.5 * (hessian + hessian.T)


def _pointing_inside(x: np.ndarray, gradient: np.ndarray, bounds: tuple[float, float]) -> float:
    """The largest |∂h/∂x_k| whose descent direction does not leave the box."""
    leaves = ((x <= bounds[0]) & (gradient > 0)) | ((x >= bounds[1]) & (gradient < 0))
    return float(np.abs(np.where(leaves, 0.0, gradient)).max())
