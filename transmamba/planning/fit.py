"""`python -m transmamba.planning.fit`: find the constants of the time model from the published rows marked `fit`.

Robust least squares of the logarithms of predicted over measured seconds, by Gauss-Newton steps on the logarithms of
the constants, for shares on that of share / (1 - share). Rows of a source with n of them weigh n^-1/2, so that long
tables do not decide alone. Every constant has a prior guess from data sheets or charts, which counts as one row that
is sure to within a factor of 1.35: what the rows do not determine stays physical, and nothing needs a bound. Rows
marked `check` are only looked at to report.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transmamba.planning.published import Prediction, Row, predict, read_rows, summary, with_half
from transmamba.planning.timing import FOLDER, Constants

CONSTANTS = FOLDER / "constants.json"
PRIOR = Constants(
    matmul={"h100": 700e12, "a100": 260e12},
    small=600.0,
    attention={
        "cudnn h100": 520e12,
        "flash2 h100": 300e12,
        "triton h100": 250e12,
        "cudnn a100": 200e12,
        "flash2 a100": 190e12,
        "triton a100": 150e12,
    },
    fused=0.75,
    eager=0.4,
    contention=0.2,
    exposed=0.4,
    jitter=0.005,
)
_SURENESS = 0.3  # of a prior, in logarithms
_HUBER = 0.08
_ROUNDS = 30


def fit(rows: Sequence[Row]) -> Constants:
    """The constants that explain the rows best."""
    prior = _pack(PRIOR)
    counts = Counter(row.source for row in rows)
    weights = np.array([counts[row.source] ** -0.5 for row in rows])
    weights *= len(rows) / weights.sum()
    theta, damping = prior.copy(), 1e-3
    cost, residuals = _cost(theta, prior, rows, weights)
    for _ in range(_ROUNDS):
        slopes = np.stack([(_residuals(_nudged(theta, i), rows) - residuals) / 1e-4 for i in range(len(theta))], 1)
        w = weights * np.minimum(1.0, _HUBER / np.maximum(np.abs(residuals), 1e-12))
        scale = (_noise(residuals) / _SURENESS) ** 2
        normal = slopes.T @ (w[:, None] * slopes) + scale * np.eye(len(theta))
        step = np.linalg.solve(
            normal + damping * np.diag(np.diag(normal)), slopes.T @ (w * residuals) + scale * (theta - prior)
        )
        new_cost, new_residuals = _cost(theta - step, prior, rows, weights)
        if new_cost < cost:
            done = cost - new_cost < 1e-9 * cost
            theta, cost, residuals, damping = theta - step, new_cost, new_residuals, damping / 3
            if done:
                break
        else:
            damping *= 5
    return _unpack(theta)


def leave_one_source_out(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Fit on the rows of all other sources, report on all rows of this one."""
    found = {}
    for source in dict.fromkeys(row.source for row in rows):
        k = fit([row for row in with_half(rows, "fit") if row.source != source])
        found[source] = summary(predict([row for row in rows if row.source == source], k))
    return found


def _pack(k: Constants) -> np.ndarray:
    shares = np.array([k.fused, k.eager, k.contention, k.exposed])
    return np.concatenate([np.log([*k.matmul.values(), k.small, *k.attention.values(), k.jitter]),
                           np.log(shares / (1 - shares))])  # fmt: skip


def _unpack(theta: np.ndarray) -> Constants:
    rates, shares = np.exp(theta[:-4]).tolist(), (1 / (1 + np.exp(-theta[-4:]))).tolist()
    n = len(PRIOR.matmul)
    matmul = dict(zip(PRIOR.matmul, rates[:n], strict=True))
    attention = dict(zip(PRIOR.attention, rates[n + 1 : -1], strict=True))
    return Constants(matmul, rates[n], attention, *shares, jitter=rates[-1])


def _nudged(theta: np.ndarray, i: int) -> np.ndarray:
    nudged = theta.copy()
    nudged[i] += 1e-4
    return nudged


def _residuals(theta: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    return np.array([np.log1p(prediction.error) for prediction in predict(rows, _unpack(theta))])


def _noise(residuals: np.ndarray) -> float:
    return max(0.02, float(np.median(np.abs(residuals))) * 1.48)


def _cost(theta: np.ndarray, prior: np.ndarray, rows: Sequence[Row], weights: np.ndarray) -> tuple[float, np.ndarray]:
    residuals = _residuals(theta, rows)
    size = np.abs(residuals)
    loss = np.where(size <= _HUBER, size**2 / 2, _HUBER * (size - _HUBER / 2))
    pull = (_noise(residuals) / _SURENESS) ** 2 * float(((theta - prior) ** 2).sum()) / 2
    return float((weights * loss).sum()) + pull, residuals


def _line(name: str, predictions: Sequence[Prediction]) -> str:
    found = summary(predictions)
    return (
        f"{name:<24} {found['rows']:>4} rows  median |error| {found['median_error']:.1%}  "
        f"within 10 %: {found['within_10_percent']:.0%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, report both halves and each source, and write the constants."""
    parser = argparse.ArgumentParser(prog="python -m transmamba.planning.fit", description=__doc__)
    parser.add_argument("--out", type=Path, default=CONSTANTS, help="file for the constants")
    parser.add_argument("--leave-out", action="store_true", help="also fit without each source in turn")
    options = parser.parse_args(argv)
    rows = read_rows()
    k = fit(with_half(rows, "fit"))
    held_out = predict(with_half(rows, "check"), k)
    values = {name: getattr(k, name) for name in Constants.__annotations__}
    print("\n".join(f"{name:<12} {value}" for name, value in values.items()))
    print(_line("fitted half", predict(with_half(rows, "fit"), k)))
    print(_line("held-out half", held_out))
    for source in dict.fromkeys(row.source for row in rows):
        print(
            _line(
                f"  {source}",
                [prediction for prediction in held_out if prediction.row.source == source]
                or predict([row for row in rows if row.source == source], k),
            )
        )
    if options.leave_out:
        for source, found in leave_one_source_out(rows).items():
            print(
                f"without {source:<18} median |error| {found['median_error']:.1%}  "
                f"within 10 %: {found['within_10_percent']:.0%}"
            )
    record = {"constants": values, "held_out": summary(held_out)}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
