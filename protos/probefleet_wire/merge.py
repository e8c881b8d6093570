"""Key-wise merges: rows with group numbers in, one row a group out. Pure NumPy, no loop over rows.

The agent merges map entries into the rows of an output with these (groupBy is applied before sending), the
operator merges the rows of nodes. Every merge is associative and commutative and has an identity, so neither
the order of samples nor how they were bundled changes a result; the property tests hold that.

Rows are ``uint64[n]`` or ``[n, width]`` (``int64`` works too), groups are integers below ``count``. Sums are
modulo 2⁶⁴, which makes "add the difference of new and old" exact whatever the difference's sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from probefleet_wire.v1 import plan_pb2

AnyArray: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

# No counter of the kernel has more bits: slots past 2⁶⁴ cannot be filled.
MAX_LOG2_SLOTS: Final = 65


def sum_by(groups: npt.ArrayLike, values: AnyArray, count: int) -> AnyArray:
    """The sum of each group's rows; 0 for a group without rows."""
    return _reduce_by(np.add, groups, values, np.zeros((count, *values.shape[1:]), values.dtype))


def max_by(groups: npt.ArrayLike, values: AnyArray, count: int) -> AnyArray:
    """The largest of each group's rows, slot by slot; the type's least value for a group without rows."""
    least = np.iinfo(values.dtype).min
    return _reduce_by(np.maximum, groups, values, np.full((count, *values.shape[1:]), least, values.dtype))


def min_by(groups: npt.ArrayLike, values: AnyArray, count: int) -> AnyArray:
    """The smallest of each group's rows, slot by slot; the type's largest value for a group without rows."""
    largest = np.iinfo(values.dtype).max
    return _reduce_by(np.minimum, groups, values, np.full((count, *values.shape[1:]), largest, values.dtype))


def latest_by(groups: npt.ArrayLike, values: AnyArray, times_ns: npt.ArrayLike, count: int) -> AnyArray:
    """The value of each group's newest row; of two of the same time the larger; 0 for a group without rows.

    One-dimensional: a histogram has no latest slot.
    """
    group = np.asarray(groups, np.int64)
    order = np.lexsort((values, np.asarray(times_ns), group))
    result = np.zeros(count, values.dtype)
    # Of several assignments to one place NumPy keeps the last.
    result[group[order]] = values[order]
    return result


def combine(groups: npt.ArrayLike, values: AnyArray, count: int, *, merge: int, times_ns: npt.ArrayLike) -> AnyArray:
    """The merge that a gauge names (``plan.Output.Merge``)."""
    if merge == plan_pb2.Output.MAX:
        return max_by(groups, values, count)
    if merge == plan_pb2.Output.MIN:
        return min_by(groups, values, count)
    if merge == plan_pb2.Output.LATEST:
        return latest_by(groups, values, times_ns, count)
    return sum_by(groups, values, count)


def unwrap32(total: AnyArray, reading: AnyArray) -> AnyArray:
    """A 32-bit counter of the kernel as a 64-bit one: ``total`` (what was counted so far) carried on to
    ``reading``.

    Exact while less than 2³² happen between two readings.
    """
    wide = np.asarray(total, np.uint64)
    step = np.asarray(reading).astype(np.uint32) - wide.astype(np.uint32)
    return wide + step


def slot_bounds(scale: int, step: int, width: int) -> tuple[Floats, Floats]:
    """Where each slot of a histogram begins and where the next begins: ``(low[width], high[width])``.

    The last slot is open to the right: its ``high`` is infinity. LOG2: [2^i, 2^(i+1)), slot 0 also 0.
    LOG2_BCC: [2^(i-1), 2^i), and slot 1 also 0, because ``bpf_log2l(0)`` is 1; its slot 0 stays empty.
    LINEAR: multiples of ``step`` (``plan.Histogram``).
    """
    slots = np.arange(width, dtype=np.float64)
    if scale == plan_pb2.Histogram.LINEAR:
        low, high = slots * step, (slots + 1) * step
    elif scale == plan_pb2.Histogram.LOG2_BCC:
        low, high = 2.0 ** (slots - 1), 2.0**slots
        low[:2] = 0
    else:
        low, high = 2.0**slots, 2.0 ** (slots + 1)
        low[:1] = 0
    high[-1:] = np.inf
    return low, high


def sums(counts: AnyArray, bounds: tuple[Floats, Floats]) -> Floats:
    """What the values of each row of ``counts[n, width]`` add up to, ``[n]`` in the histogram's unit: each is taken for
    the middle of the whole numbers in its slot, and in the open last slot for where that begins.
    """
    low, high = bounds
    found: Floats = counts @ np.where(np.isfinite(high), (low + high - 1) / 2, low)
    return found


@dataclass(frozen=True, slots=True)
class Percentile:
    """``value`` in the histogram's unit; ``at_least``: it fell into the open last slot, of which only this

    is known.
    """

    value: float
    at_least: bool = False


def percentiles(
    counts: AnyArray, bounds: tuple[Floats, Floats], quantile: float
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """One quantile (0…1) of each row of ``counts[n, width]``: ``(value[n], at_least[n])``; NaN where nothing
    was counted.

    The values of a slot are taken as spread evenly over it, as Prometheus's ``histogram_quantile`` does: the
    rank is ``quantile × total``, and the value lies as far into its slot as the rank lies into the slot's
    count. In the open last slot the answer is where that begins, and ``at_least`` is true.
    """
    low, high = bounds
    weights = counts.astype(np.float64)
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    rank = quantile * total
    # The first slot that is not empty and reaches the rank.
    reached = (cumulative >= rank[:, None]) & (weights > 0)
    slot = np.argmax(reached, axis=1)
    rows = np.arange(len(counts))
    count = weights[rows, slot]
    before = cumulative[rows, slot] - count
    with np.errstate(divide="ignore", invalid="ignore"):
        into = np.clip((rank - before) / count, 0, 1)
    at_least = np.isinf(high[slot])
    span = np.where(at_least, 0, high[slot] - low[slot])
    value = np.where(total > 0, low[slot] + np.nan_to_num(into) * span, np.nan)
    return value, at_least & (total > 0)


def percentile(counts: AnyArray, bounds: tuple[Floats, Floats], quantile: float) -> Percentile | None:
    """One quantile of one histogram ``counts[width]``; None where nothing was counted."""
    value, at_least = percentiles(np.asarray(counts)[None, :], bounds, quantile)
    return None if np.isnan(value[0]) else Percentile(float(value[0]), bool(at_least[0]))


def top(weights: AnyArray, limit: int) -> Indices:
    """The rows of the largest weights, largest first, at most ``limit``; of equal weights the lower row

    first.
    """
    if 0 < limit < len(weights):
        least = np.partition(weights, len(weights) - limit)[len(weights) - limit]
        candidates = np.flatnonzero(weights >= least)
    else:
        candidates = np.arange(len(weights))
    # Dense ranks sort like the weights and, unlike unsigned numbers, can be negated.
    ranks = np.unique(weights[candidates], return_inverse=True)[1].astype(np.int64)
    order = np.argsort(-ranks, kind="stable")
    return candidates[order][: max(limit, 0)].astype(np.int64)


def _reduce_by(ufunc: np.ufunc, groups: npt.ArrayLike, values: AnyArray, result: AnyArray) -> AnyArray:
    group = np.asarray(groups, np.int64)
    if not group.size:
        return result
    if values.ndim == 1:
        ufunc.at(result, group, values)
        return result
    # ufunc.at has a fast way for one dimension only.
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    result[ordered[starts]] = ufunc.reduceat(values[order], starts, axis=0)
    return result
