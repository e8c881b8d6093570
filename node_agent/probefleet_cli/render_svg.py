"""Folded stacks in, a flame graph as one SVG file out.

Written by hand and small: the flame graph packages on PyPI are abandoned or wrap Perl or JavaScript tools, and what is
wanted is a file without scripts or fonts from elsewhere that any browser opens. Each frame is a rectangle with a
``<title>``, which browsers show on hover. Names come from user programs and are escaped.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

from probefleet_core.format import weight

WIDTH: Final = 1200
ROW: Final = 17
FONT: Final = 12
CHARACTER: Final = 7.1  # pixels of the monospaced font, roughly
TOP: Final = 40
#: Narrower frames are left out, with all that is above them.
MIN_PIXELS: Final = 0.3
MAX_DEPTH: Final = 256
UNKNOWN: Final = "[unknown]"
#: What XML cannot hold, even escaped.
_FORBIDDEN: Final = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 65534, 65535, *range(55296, 57344)), "�")


@dataclass(slots=True)
class Frame:
    """A function below its callers; ``count`` is of itself and all that it called."""

    count: int = 0
    callees: dict[str, Frame] = field(default_factory=dict)


def render_svg(stacks: Mapping[str, int], *, title: str = "Flame graph", unit: str = "") -> str:
    """The flame graph of folded stacks (``caller;…;leaf`` → samples, or another unit), callers below.

    Same input, same output.
    """
    root = tree(stacks)
    body: list[str] = []
    whole = max(root.count, 1)
    deepest = _draw(root, "all", x=0.0, depth=0, whole=whole, body=body, height=_depth(root, whole), unit=unit)
    height = TOP + (deepest + 1) * ROW + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="monospace" font-size="{FONT}">\n'
        f'<rect width="100%" height="100%" fill="#fdfaf3"/>\n'
        f'<text x="{WIDTH / 2:.0f}" y="24" text-anchor="middle" font-size="16">{_clean(title)}</text>\n'
        f'<text x="{WIDTH - 4}" y="24" text-anchor="end" fill="#555">{weight(root.count, unit)}; the kernel is '
        f"blue; hover for a function's share</text>\n"
    )
    return head + "".join(body) + "</svg>\n"


def tree(stacks: Mapping[str, int]) -> Frame:
    """All stacks as one tree of frames."""
    root = Frame()
    for stack, count in sorted(stacks.items()):
        here = root
        here.count += count
        before = ""
        for name in stack.split(";")[:MAX_DEPTH]:
            # A hundred frames without a name say no more than one.
            if name == before == UNKNOWN:
                continue
            before = name
            here = here.callees.setdefault(name, Frame())
            here.count += count
    return root


def _depth(frame: Frame, whole: int) -> int:
    """Of the frames that are wide enough to be drawn."""
    shown = (each for each in frame.callees.values() if each.count / whole * WIDTH >= MIN_PIXELS)
    return max((1 + _depth(callee, whole) for callee in shown), default=0)


def _draw(frame: Frame, name: str, *, x: float, depth: int, whole: int, body: list[str], height: int, unit: str) -> int:
    width = frame.count / whole * WIDTH
    if width < MIN_PIXELS:
        return height
    y = TOP + (height - depth) * ROW
    share = frame.count / whole
    room = int((width - 4) / CHARACTER)
    label = ""
    if room >= 3:
        shown = name if len(name) <= room else name[: room - 1] + "…"
        label = f'<text x="{x + 3:.1f}" y="{y + FONT}">{_clean(shown)}</text>'
    body.append(
        f"<g><title>{_clean(name)}: {weight(frame.count, unit)}, {share:.2%}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.1):.1f}" height="{ROW - 1}" rx="2" '
        f'fill="{_colour(name)}"/>{label}</g>\n'
    )
    for callee_name, callee in sorted(frame.callees.items()):
        _draw(callee, callee_name, x=x, depth=depth + 1, whole=whole, body=body, height=height, unit=unit)
        x += callee.count / whole * WIDTH
    return height


def _colour(name: str) -> str:
    """Warm, the kernel's cool; always the same for the same function, so that two graphs can be compared."""
    mix = zlib.crc32(name.encode("utf-8", "replace"))
    if name.endswith("_[k]"):
        return f"rgb({130 + mix % 50},{175 + mix // 50 % 40},{215 + mix // 6500 % 35})"
    return f"rgb({205 + mix % 50},{80 + mix // 50 % 130},{mix // 6500 % 55})"


def _clean(name: str) -> str:
    return escape(name.translate(_FORBIDDEN))
