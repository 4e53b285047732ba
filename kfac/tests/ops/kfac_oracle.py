"""K-FAC in NumPy, for one small network: what a step must do, written out.

The network is `softmax(tanh(x w1 + b1) w2 + b2)` with the mean cross-entropy.  Its two
layers are Kronecker-factored blocks; statistics are deterministic ("exact": sum over
the columns of the Fisher's square root; "empirical": real targets).  Arguments have
the names, defaults and meanings of `PeriodicInvCovUpdateKfacOpt`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

NAMES = ("w1", "b1", "w2", "b2")


def problem(seed=0, cases=6, inputs=3, hidden=4, classes=3):
    """`(params, (x, y))` with one-hot y, all float64."""
    rng = np.random.default_rng(seed)
    params = [
        0.7 * rng.normal(size=(inputs, hidden)),
        0.3 * rng.normal(size=hidden),
        0.7 * rng.normal(size=(hidden, classes)),
        0.3 * rng.normal(size=classes),
    ]
    x = rng.normal(size=(cases, inputs))
    y = np.eye(classes)[rng.integers(classes, size=cases)]
    return params, (x, y)


def with_ones(a):
    return np.concatenate([a, np.ones((len(a), 1))], axis=1)


def forward(params, x):
    w1, b1, w2, b2 = params
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, p / p.sum(axis=1, keepdims=True)


def loss(params, batch, l2_reg=0.0):
    x, y = batch
    _, p = forward(params, x)
    penalty = 0.5 * l2_reg * sum(np.sum(w**2) for w in params)
    return -np.mean(np.log(np.sum(p * y, axis=1))) + penalty


def gradients(params, batch, l2_reg=0.0):
    x, y = batch
    hidden, p = forward(params, x)
    delta2 = (p - y) / len(x)
    delta1 = (delta2 @ params[2].T) * (1 - hidden**2)
    plain = [x.T @ delta1, delta1.sum(0), hidden.T @ delta2, delta2.sum(0)]
    return [g + l2_reg * w for g, w in zip(plain, params, strict=True)]


def covariances(params, batch, mode):
    """`[(A1, G1), (A2, G2)]`, means over the batch."""
    x, y = batch
    n = len(x)
    hidden, p = forward(params, x)
    if mode == "exact":
        signals = [  # Columns of the square root of diag(p) - p p'.
            np.sqrt(p[:, [i]]) * (np.eye(p.shape[1])[i] - p) for i in range(p.shape[1])
        ]
    else:
        signals = [p - y]
    inputs = [with_ones(x), with_ones(hidden)]
    result = []
    for layer in (0, 1):
        total = 0
        for signal in signals:
            if layer == 0:
                signal = (signal @ params[2].T) * (1 - hidden**2)
            total = total + signal.T @ signal / n
        result.append((inputs[layer].T @ inputs[layer] / n, total))
    return result


def curvature_product(params, batch, u, v):
    """`<u, F v>` with the exact Fisher of the mini-batch."""
    x, _ = batch
    hidden, p = forward(params, x)

    def outputs(direction):
        d_hidden = (x @ direction[0] + direction[1]) * (1 - hidden**2)
        return d_hidden @ params[2] + hidden @ direction[2] + direction[3]

    du, dv = outputs(u), outputs(v)
    fisher_dv = p * dv - p * np.sum(p * dv, axis=1, keepdims=True)
    return np.sum(du * fisher_dv) / len(x)


def ip(xs, ys):
    return sum(np.sum(x * y) for x, y in zip(xs, ys, strict=True))


def damped(a, g, damping):
    pi = np.sqrt(np.trace(a) * len(g) / (np.trace(g) * len(a)))
    root = np.sqrt(damping)
    return a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g))


def blockwise(vectors, matrices):
    """`left V right` for each layer's weights V, biases as their last row."""
    result = []
    for layer, (left, right) in enumerate(matrices):
        stacked = np.vstack([vectors[2 * layer], vectors[2 * layer + 1]])
        product = left @ stacked @ right
        result += [product[:-1], product[-1]]
    return result


@dataclasses.dataclass
class Oracle:
    """State of a run; `step()` does one run of the train op."""

    params: list
    batch: Any
    learning_rate: float | None
    damping: float
    cov_ema_decay: float = 0.95
    momentum: float | None = 0.9
    momentum_type: str = "adam"
    use_weight_decay: bool = False
    weight_decay_coeff: float = 0.1
    qmodel_update_rescale: float | None = None
    norm_constraint: float | None = None
    estimation_mode: str = "exact"
    adapt_damping: bool = False
    update_damping_immediately: bool = True
    prev_train_batch: Any = None
    train_batch: Any = None
    min_damping: float = 1e-8
    l2_reg: float = 0.0
    damping_adaptation_decay: float = 0.95
    damping_adaptation_interval: int = 5
    precon_damping_mult: float = 1.0
    invert_every: int = 1
    cov_update_every: int = 1
    num_burnin_steps: int = 0
    include_damping: bool = False

    def __post_init__(self):
        self.velocity = [np.zeros_like(w) for w in self.params]
        self.sums = [(0.0, 0.0), (0.0, 0.0)]
        self.weight = 0.0
        self.counter = self.burnin = 0
        self.rho = self.prev_loss = self.qmodel_change = np.nan
        self.model_rate = self.model_momentum = np.nan
        self.eta = self.learning_rate
        if self.momentum_type.startswith("qmodel"):
            self.eta = self.qmodel_update_rescale or 1.0

    def step(self):
        if self.burnin < self.num_burnin_steps:
            self.burnin += 1
            self.collect(1.0)
            return
        k, interval = self.counter, self.damping_adaptation_interval
        last_of_interval = self.adapt_damping and (k + 1) % interval == 0
        delayed = self.adapt_damping and not self.update_damping_immediately
        if k % self.cov_update_every == 0:
            self.collect(self.cov_ema_decay**self.cov_update_every)
        if delayed and k and k % interval == 0:
            self.adapt(self.prev_train_batch)
        if k % self.invert_every == 0:
            self.inverses = [
                tuple(np.linalg.inv(m) for m in pair) for pair in self.damped_factors()
            ]
        if last_of_interval:
            self.prev_loss = loss(self.params, self.batch, self.l2_reg)
        r, change = self.direction()
        if last_of_interval or self.momentum_type.startswith("qmodel"):
            self.qmodel_change = change
        decay = self.weight_decay_coeff if self.use_weight_decay else 0.0
        self.params = [
            w - self.eta * (x + decay * w) for w, x in zip(self.params, r, strict=True)
        ]
        if last_of_interval and self.update_damping_immediately:
            self.adapt(self.train_batch)
        self.counter += 1

    def collect(self, decay):
        new = covariances(self.params, self.batch, self.estimation_mode)
        self.sums = [
            tuple(decay * old + x for old, x in zip(olds, xs, strict=True))
            for olds, xs in zip(self.sums, new, strict=True)
        ]
        self.weight = decay * self.weight + 1

    def damped_factors(self):
        damping = self.damping * self.precon_damping_mult
        return [damped(a / self.weight, g / self.weight, damping) for a, g in self.sums]

    def direction(self):
        """`(r, predicted change)`; moves the velocity."""
        g = gradients(self.params, self.batch, self.l2_reg)
        if self.momentum_type == "adam":
            self.accumulate(g, self.momentum)
            r = blockwise(self.velocity, self.inverses)
            kappa = self.clip(self.velocity, r)
            r = [kappa * x for x in r]
            change = 0.5 * self.eta**2 * kappa * ip(r, self.velocity)
            return r, change - self.eta * ip(r, g)
        d = blockwise(g, self.inverses)
        if self.momentum_type == "regular":
            kappa = self.clip(g, d)
            self.accumulate([kappa * x for x in d], self.momentum)
            u = [-self.eta * v for v in self.velocity]
            product = blockwise(u, self.damped_factors())
            # What stays in the model beyond F: all of the damping, or the l2 part.
            kept = self.damping if self.include_damping else self.l2_reg
            surplus = self.damping * self.precon_damping_mult - kept
            change = 0.5 * (ip(u, product) - surplus * ip(u, u)) + ip(u, g)
            return self.velocity, change
        return self.quadratic_direction(g, d)

    def quadratic_direction(self, g, d):
        p = [-v for v in self.velocity]
        basis = (d, p)
        fisher = np.array(
            [
                [curvature_product(self.params, self.batch, u, v) for v in basis]
                for u in basis
            ]
        )
        gram = np.array([[ip(u, v) for v in basis] for u in basis])
        m = fisher + self.damping * gram
        c = np.array([ip(g, d), ip(g, p)])
        if self.momentum_type == "qmodel_fixedmu":
            mu = self.momentum
            alpha = -(mu * m[0, 1] + c[0]) / m[0, 0]
        elif gram[1, 1] == 0:
            alpha, mu = -c[0] / m[0, 0], 0.0
        else:
            alpha, mu = -np.linalg.solve(m, c)
        x = self.eta * np.array([alpha, mu])
        kept = self.damping if self.include_damping else self.l2_reg
        change = 0.5 * x @ (fisher + kept * gram) @ x + c @ x
        self.model_rate, self.model_momentum = -alpha, mu
        self.accumulate(d, mu, -alpha)
        return self.velocity, change

    def accumulate(self, vectors, decay, coefficient=1.0):
        self.velocity = [
            decay * v + coefficient * x
            for v, x in zip(self.velocity, vectors, strict=True)
        ]

    def clip(self, g, d):
        if self.norm_constraint is None:
            return 1.0
        return min(1.0, np.sqrt(self.norm_constraint / (self.eta**2 * ip(g, d))))

    def adapt(self, batch):
        after = loss(self.params, batch, self.l2_reg)
        self.rho = (after - self.prev_loss) / self.qmodel_change
        omega = self.damping_adaptation_decay**self.damping_adaptation_interval
        if after > self.prev_loss:
            self.damping /= omega
        elif self.qmodel_change > 0 or self.rho > 0.75:
            self.damping *= omega
        elif self.rho < 0.25:
            self.damping /= omega
        self.damping = max(self.damping, self.min_damping + self.l2_reg)
