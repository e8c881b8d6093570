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

WIDTH: Final = 1200
ROW: Final = 17
FONT: Final = 12
CHARACTER: Final = 7.1  # pixels of the monospaced font, roughly
TOP: Final = 40
#: Narrower frames are left out, with all that is above them.
MIN_PIXELS: Final = 0.3
MAX_DEPTH: Final = 256
#: What XML cannot hold, even escaped.
_FORBIDDEN: Final = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 65534, 65535, *range(55296, 57344)), "�")


@dataclass(slots=True)
class Frame:
    """A function below its callers; ``count`` is of itself and all that it called."""

    count: int = 0
    callees: dict[str, Frame] = field(default_factory=dict)


def render_svg(stacks: Mapping[str, int], *, title: str = "Flame graph") -> str:
    """The flame graph of folded stacks (``caller;…;leaf`` → samples), callers below. Same input, same output."""
    root = tree(stacks)
    body: list[str] = []
    deepest = _draw(root, "all", x=0.0, depth=0, whole=max(root.count, 1), body=body, height=_depth(root))
    height = TOP + (deepest + 1) * ROW + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="monospace" font-size="{FONT}">\n'
        f'<rect width="100%" height="100%" fill="#fdfaf3"/>\n'
        f'<text x="{WIDTH / 2:.0f}" y="24" text-anchor="middle" font-size="16">{_clean(title)}</text>\n'
    )
    return head + "".join(body) + "</svg>\n"


def tree(stacks: Mapping[str, int]) -> Frame:
    """All stacks as one tree of frames."""
    root = Frame()
    for stack, count in sorted(stacks.items()):
        here = root
        here.count += count
        for name in stack.split(";")[:MAX_DEPTH]:
            here = here.callees.setdefault(name, Frame())
            here.count += count
    return root


def _depth(frame: Frame) -> int:
    return max((1 + _depth(callee) for callee in frame.callees.values()), default=0)


def _draw(frame: Frame, name: str, *, x: float, depth: int, whole: int, body: list[str], height: int) -> int:
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
        f"<g><title>{_clean(name)}: {frame.count:,} samples, {share:.2%}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.1):.1f}" height="{ROW - 1}" rx="2" '
        f'fill="{_colour(name)}"/>{label}</g>\n'
    )
    for callee_name, callee in sorted(frame.callees.items()):
        _draw(callee, callee_name, x=x, depth=depth + 1, whole=whole, body=body, height=height)
        x += callee.count / whole * WIDTH
    return height


def _colour(name: str) -> str:
    """Warm, and always the same for the same function, so that two graphs can be compared."""
    mix = zlib.crc32(name.encode("utf-8", "replace"))
    return f"rgb({205 + mix % 50},{80 + mix // 50 % 130},{mix // 6500 % 55})"


def _clean(name: str) -> str:
    return escape(name.translate(_FORBIDDEN))
