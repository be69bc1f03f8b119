"""Fits the blend of the heads and the calibration of its result on held-out rows, with NumPy only.

Shapes: N rows, M heads, P parameters.
"""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def log_loss(logits: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the mean cross-entropy of logits for labels or probabilities y."""
    logits, y = np.asarray(logits, np.float64), np.asarray(y, np.float64)
    return float(np.average(np.logaddexp(0.0, logits) - y * logits, weights=weight))


def fit_logistic(
    logits_NM: np.ndarray,
    y_N: np.ndarray,
    prior_M: np.ndarray,
    strength: float,
    weight_N: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Return the weights and the bias of a logistic regression of y on logits, in float64.

    A Gaussian prior pulls the weights toward `prior_M` with precision `strength`; the bias has no
    prior. The targets are slightly inside 0 and 1 (Platt 1999, "Probabilistic Outputs for Support
    Vector Machines", section 2.2), so the weights stay finite even for separable rows. The problem
    is convex and is solved by Newton's method with step halving. A row of weight 2 counts as two
    rows.
    """
    x_NM = np.asarray(logits_NM, np.float64)
    y_N = np.asarray(y_N, np.float64).reshape(-1)
    weight_N = np.ones(len(y_N)) if weight_N is None else np.asarray(weight_N, np.float64)
    total, positives = weight_N.sum(), weight_N @ y_N
    target_N = np.where(y_N > 0.5, (positives + 1) / (positives + 2), 1 / (total - positives + 2))
    design_NP = np.concatenate([x_NM, np.ones((len(x_NM), 1))], axis=1)
    prior_P = np.append(np.asarray(prior_M, np.float64), 0.0)
    penalty_P = np.append(np.full(x_NM.shape[1], float(strength)), 0.0)

    def objective(beta_P: np.ndarray) -> float:
        loss = total * log_loss(design_NP @ beta_P, target_N, weight_N)
        return loss + 0.5 * float(penalty_P @ (beta_P - prior_P) ** 2)

    beta_P = prior_P.copy()
    for _ in range(100):
        p_N = sigmoid(design_NP @ beta_P)
        gradient_P = design_NP.T @ (weight_N * (p_N - target_N)) + penalty_P * (beta_P - prior_P)
        curvature_N = weight_N * np.maximum(p_N * (1 - p_N), 1e-12)
        hessian_PP = (design_NP * curvature_N[:, None]).T @ design_NP + np.diag(penalty_P)
        step_P = np.linalg.lstsq(hessian_PP, gradient_P, rcond=None)[0]
        size, before = 1.0, objective(beta_P)
        while objective(beta_P - size * step_P) > before and size > 1e-8:
            size /= 2
        beta_P = beta_P - size * step_P
        if np.abs(step_P).max() < 1e-10:
            break
    return beta_P[:-1], float(beta_P[-1])


def fit_blend(
    logits_NM: np.ndarray,
    y_N: np.ndarray,
    strength: float = 10.0,
    weight_N: np.ndarray | None = None,
) -> np.ndarray:
    """Return the non-negative weights, summing to one, that blend the heads' logits best.

    Applies stacking (Wolpert 1992) with a prior of equal weights. A head that has memorized its
    training rows is confident but wrong on held-out rows, and therefore gets a low weight.

    Args:
        logits_NM: Logits of held-out rows.
        y_N: Their labels.
        strength: Precision of the prior.
        weight_N: Weights of the rows; by default, 1.
    """
    num_heads = logits_NM.shape[1]
    weights_M = np.zeros(num_heads)
    chosen = list(range(num_heads))
    while len(chosen) > 1:
        even = np.full(len(chosen), 1.0 / len(chosen))
        fitted, _ = fit_logistic(logits_NM[:, chosen], y_N, even, strength, weight_N)
        if (fitted > 0).all():
            weights_M[chosen] = fitted / fitted.sum()
            return weights_M
        # Remove one head at a time, because the weights of the others change.
        chosen.pop(int(np.argmin(fitted)))
    weights_M[chosen] = 1.0
    return weights_M


def fit_calibration(
    logit_N: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return a positive scale and a bias that make the sigmoid of a logit a calibrated probability.

    Applies Platt scaling with a prior of scale 1 and precision 1. If the logit contradicts the
    labels, its scale becomes almost 0 instead of negative.
    """
    scale_1, bias = fit_logistic(logit_N.reshape(-1, 1), y_N, np.ones(1), 1.0, weight_N)
    if scale_1[0] > 1e-3:
        return float(scale_1[0]), bias
    weight_N = np.ones(len(y_N)) if weight_N is None else weight_N
    positives = float(weight_N @ y_N)
    odds = (positives + 1) / (weight_N.sum() - positives + 1)
    return 1e-3, float(np.log(odds))
