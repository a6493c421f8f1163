"""CBP in plain Python and numpy, written from the design alone, for the tests to compare with."""

import math

import numpy as np


def nearest_index(levels, scale, w):
    """Index of the nearest level by looking at all of them; of two equally near ones the upper."""
    distance = np.abs(
        np.asarray(w)[..., None] - np.multiply.outer(np.broadcast_to(scale, np.shape(w)), levels)
    )
    return len(levels) - 1 - np.argmin(distance[..., ::-1], axis=-1)


def quantize(levels, scale, w):
    return np.asarray(levels)[nearest_index(levels, scale, w)] * scale


def gap_and_threshold(levels, scale, w, window):
    """The gap between the levels around each weight, and the largest violation that counts."""
    levels = np.asarray(levels)
    targets = np.multiply.outer(np.broadcast_to(scale, np.shape(w)), levels)
    below = np.clip(np.sum(np.asarray(w)[..., None] >= targets, axis=-1) - 1, 0, len(levels) - 2)
    gap = (levels[below + 1] - levels[below]) * scale
    outside = (w < targets[..., 0]) | (w > targets[..., -1])
    return gap, np.where(outside, np.inf, gap * (1 - 1 / window))


def violation(levels, scale, w, window=math.inf):
    distance = 2 * np.abs(w - quantize(levels, scale, w))
    return np.where(distance > gap_and_threshold(levels, scale, w, window)[1], 0, distance)


def violation_grad(levels, scale, w, window=math.inf):
    counts = violation(levels, scale, w, window) > 0  # on a level the gradient is 0 anyway
    return np.where(counts, 2 * np.sign(w - quantize(levels, scale, w)), 0)


class Adam:
    """Kingma and Ba's algorithm 1, descending, on a dictionary of arrays."""

    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.t, self.m, self.v = 0, {}, {}

    def step(self, x, grads):
        self.t += 1
        for key, grad in grads.items():
            self.m[key] = self.b1 * self.m.get(key, 0) + (1 - self.b1) * grad
            self.v[key] = self.b2 * self.v.get(key, 0) + (1 - self.b2) * grad**2
            m, v = self.m[key] / (1 - self.b1**self.t), self.v[key] / (1 - self.b2**self.t)
            x[key] = x[key] - self.rate * m / (np.sqrt(v) + self.eps)


class Descent:
    """Plain gradient descent, for a multiplier optimizer that is not the default one."""

    def __init__(self, rate):
        self.rate = rate

    def step(self, x, grads):
        for key, grad in grads.items():
            x[key] = x[key] - self.rate * grad


class Schedule:
    """The design's state machine over steps.

    `levels` and `scales` have an entry for each constrained weight in the dictionary of parameters.
    The sums are None where an epoch cannot be compared.
    """

    def __init__(
        self,
        levels,
        scales,
        params,
        steps_per_epoch,
        patience,
        ascent,
        initial_window=1.0,
        growth=None,
    ):
        self.levels, self.scales, self.ascent = levels, scales, ascent
        self.steps_per_epoch, self.patience = steps_per_epoch, patience
        self.growth = growth or (lambda g: g + 1 if g < 10 else g + 10)
        self.multipliers = {key: np.zeros_like(params[key]) for key in levels}
        self.window, self.lagrangian_sum, self.previous_sum = initial_window, 0.0, math.inf
        self.step_in_epoch, self.patience_used, self.count, self.skipped = 0, 0, 0, 0
        self.updates_of_multipliers = 0

    def quantize(self, params):
        on_levels = {
            key: quantize(levels, self.scales[key], params[key])
            for key, levels in self.levels.items()
        }
        return {**params, **on_levels}

    def __call__(self, params, grads, value):
        """Gradients with those of the constraint added."""
        if self.step_in_epoch == 0:
            self._start_epoch(params)
        of_constraint = self._each(violation_grad, params)
        self._add_to_sum(value, params)
        self.step_in_epoch = (self.step_in_epoch + 1) % self.steps_per_epoch
        self.count += 1
        return {
            key: g + self.multipliers[key] * of_constraint[key] if key in self.levels else g
            for key, g in grads.items()
        }

    def _start_epoch(self, params):
        if self.count == 0:
            self._update_multipliers(params)
            return
        self.patience_used += 1
        comparable = self.lagrangian_sum is not None and self.previous_sum is not None
        stalled = comparable and self.lagrangian_sum >= self.previous_sum
        if stalled or self.patience_used == self.patience:
            self.window = self.growth(self.window)
            self._update_multipliers(params)
            self.previous_sum, self.patience_used = math.inf, 0
        else:
            self.previous_sum = self.lagrangian_sum
        self.lagrangian_sum = 0.0

    def _update_multipliers(self, params):
        descent = {key: -v for key, v in self._each(violation, params).items()}
        self.ascent.step(self.multipliers, descent)
        self.updates_of_multipliers += 1

    def _add_to_sum(self, value, params):
        if value is None or not math.isfinite(value):
            self.skipped += 1
            self.lagrangian_sum = None
        elif self.lagrangian_sum is not None:
            violations = self._each(violation, params).items()
            self.lagrangian_sum += value + sum(
                np.sum(self.multipliers[k] * v) for k, v in violations
            )

    def _each(self, function, params):
        return {
            key: function(levels, self.scales[key], params[key], self.window)
            for key, levels in self.levels.items()
        }
