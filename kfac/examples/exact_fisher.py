"""The exact Fisher block of a dense layer, and where K-FAC's error comes from.

A case has the layer inputs a `[d_in]` (a constant 1 last, for the bias) and the second
moments of the gradients at the pre-activations, `G = E[g g']` `[d_out, d_out]` over the
model's predictive distribution. The layer's Fisher block, its parameters a matrix
`[d_in, d_out]` flattened row-major, is `E[a a' (x) G]` over the cases; K-FAC says
`E[a a'] (x) E[G]`.

Section 3.1 of Martens & Grosse (2015) splits the difference into cumulants. With m the
mean of a, the gradients having mean zero for every input,

    E[a_i a_j g_k g_l] - E[a_i a_j] E[g_k g_l]
        =   k(a_i, a_j, g_k, g_l)                          "fourth order"
          + m_i k(a_j, g_k, g_l) + m_j k(a_i, g_k, g_l)    "third order"

All cumulants of a normal distribution beyond the second order vanish: the error is what
is not normal in the joint distribution of activities and gradients.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What the blocks of one layer are made of, case by case, float64.

    Attributes:
      inputs: a, `[cases, d_in]`.
      output_moments: G, `[cases, d_out, d_out]`.
    """

    inputs: np.ndarray
    output_moments: np.ndarray

    def exact(self) -> np.ndarray:
        """`E[a a' (x) G]`, `[d_in d_out, d_in d_out]`."""
        return _mean_product(_outer(self.inputs, self.inputs), self.output_moments)

    def kronecker(self) -> np.ndarray:
        """`E[a a'] (x) E[G]`."""
        return np.kron(
            _outer(self.inputs, self.inputs).mean(0), self.output_moments.mean(0)
        )

    def third_order(self) -> np.ndarray:
        """The terms with third-order cumulants."""
        mean = self.inputs.mean(0)
        centred = self.inputs - mean
        term = _mean_product(
            _outer(np.broadcast_to(mean, centred.shape), centred), self.output_moments
        )
        return term + term.T

    def fourth_order(self) -> np.ndarray:
        """The term with fourth-order cumulants."""
        centred = self.inputs - self.inputs.mean(0)
        squares = _outer(centred, centred)
        return _mean_product(squares - squares.mean(0), self.output_moments)


def logit_moments(logits: np.ndarray) -> np.ndarray:
    """Second moments of a softmax's gradient: `diag(p) - p p'`, `[cases, n, n]`."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.einsum("bi,ij->bij", p, np.eye(p.shape[1])) - _outer(p, p)


def actual_moments(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The same for the actual labels, `(p - e_y)(p - e_y)'`: the empirical Fisher's."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = p - np.eye(p.shape[1])[labels]
    return _outer(gradient, gradient)


def pulled_back(moments: np.ndarray, jacobians: np.ndarray) -> np.ndarray:
    """`J' M J` case by case.

    Args:
      moments: M at the logits, `[cases, n, n]`.
      jacobians: J of the logits by a layer's pre-activations, `[cases, n, d_out]`.
    """
    return np.einsum("bki,bkl,blj->bij", jacobians, moments, jacobians, optimize=True)


def relative_error(matrix: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return float(np.linalg.norm(matrix - exact) / np.linalg.norm(exact))


def damped_inverse(matrix: np.ndarray, damping: float) -> np.ndarray:
    """`(matrix + damping I)^-1`."""
    return np.linalg.inv(matrix + damping * np.eye(len(matrix)))


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a b'` case by case."""
    return np.einsum("bi,bj->bij", a, b)


def _mean_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Mean over cases of the Kronecker products of `[m, m]` and `[n, n]` matrices."""
    cases, m, n = len(left), left.shape[1], right.shape[1]
    product = left.reshape(cases, -1).T @ right.reshape(cases, -1) / cases
    product = product.reshape(m, m, n, n).transpose(0, 2, 1, 3)
    return product.reshape(m * n, m * n)
