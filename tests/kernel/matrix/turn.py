"""Whose turn it is: `make test` boots one kernel, each day another. Results and a day in, a suite out; no state.

A kernel takes part once it was seen as a whole: nothing of its column is "not tried" that another one has tried, and
nothing fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.kernel.matrix import results

FIRST = "bookworm"  # while none was seen as a whole


def suite(found: Sequence[results.Result], day: int, *, suites: Mapping[str, str]) -> str:
    """The suite for a day, counted from anywhere; `suites` are `vm_kernels.SUITES`, oldest kernel first."""
    tried = {cell for each in found for cell, word in each.cells.items() if word != results.NOT_TRIED}
    whole = {each.series for each in found if each.emulated and _is_whole(each, tried)}
    *numbered, newest = suites
    ready = [name for name in numbered if suites[name] in whole]
    if whole - set(suites.values()):
        ready.append(newest)
    return ready[day % len(ready)] if ready else FIRST


def _is_whole(result: results.Result, tried: set[str]) -> bool:
    words = {cell: result.cells.get(cell, results.NOT_TRIED) for cell in tried}
    return not any(word == results.NOT_TRIED or word.startswith("fails") for word in words.values())
