"""Tail masses from the falls of their record, by a linear prediction in whole numbers: every machine predicts the same."""

import numpy as np
from numpy.typing import NDArray

FALLS = 16
"""Falls that a prediction looks at."""
UNIT_BITS = 16
"""Weights are whole numbers of 2^-16."""
FITTED_ITEMS = 16_384
"""Items that weights are fitted to, at most; from fewer than an eighth of them nothing is predicted."""
MIDDLE = 128

Codes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def features(falls: Codes, known: list[Codes]) -> Ints:
    """What a mass is predicted from, [items, features].

    Args:
        falls: Codes of the first falls, [items, up to `FALLS`], 0 where there is none.
        known: Codes of the masses at higher temperatures, each [items].
    """
    codes = falls[:, :FALLS].astype(np.int64)
    columns = [codes, codes * codes >> 8]
    for mass in known:
        column = mass.astype(np.int64)[:, None]
        columns += [column, column * column >> 8, column * codes[:, :4] >> 8]
    return np.concatenate([*columns, np.ones((len(codes), 1), np.int64)], axis=1)


def fit(inputs: Ints, codes: Codes) -> list[int]:
    """The weights that predict these codes best, by least squares; none for few items."""
    step = -(-len(codes) // FITTED_ITEMS)
    if len(codes) < FITTED_ITEMS // 8:
        return []
    weights, *_ = np.linalg.lstsq(inputs[::step].astype(np.float64), codes[::step].astype(np.float64), rcond=None)
    return [int(weight) for weight in np.clip(np.rint(weights * 2**UNIT_BITS), -(2**31), 2**31 - 1)]


def residuals(codes: Codes, inputs: Ints, weights: list[int]) -> Codes:
    """Codes less their prediction plus 128, modulo 256."""
    left: Codes = (codes.astype(np.int64) - _predicted(inputs, weights) + MIDDLE).astype(np.uint8)
    return left


def restored(left: Codes, inputs: Ints, weights: list[int]) -> Codes:
    """The codes that `residuals` was given."""
    codes: Codes = (left.astype(np.int64) + _predicted(inputs, weights) - MIDDLE).astype(np.uint8)
    return codes


def _predicted(inputs: Ints, weights: list[int]) -> Ints:
    total: Ints = inputs @ np.array(weights, np.int64)
    predicted: Ints = np.clip((total + 2 ** (UNIT_BITS - 1)) >> UNIT_BITS, 0, 255)
    return predicted
