"""A report's status as lines of text: ASCII histograms, tables, losses. Pure.

``report`` puts a short form into ``status.summary``, so that ``kubectl describe`` reads well; the command line prints
the long one. Both are made from the status alone, so what is printed is what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from probefleet_core import format as humane

Json: TypeAlias = dict[str, Any]

MAX_LINES: Final = 60
MAX_LINE: Final = 160
BAR: Final = 40
GAP: Final = 2  # between columns
LEAST: Final = 8  # no part of a key becomes narrower
#: A map with this share of its entries taken is announced.
NEARLY_FULL: Final = 0.8
IDENTITIES: Final = frozenset({"node", "namespace", "workload", "pod", "container"})


def lines(status: Json, *, rows: int = 5, histograms: int = 1) -> list[str]:
    """The short form: at most ``MAX_LINES`` lines; ``rows`` of each output, and its whole distribution."""
    found = head(status)
    for output in status["outputs"]:
        found += [
            "",
            *output_lines(output, rows=rows, histograms=histograms, window_seconds=status["windowSeconds"]),
        ]
    found = [line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in found]
    if len(found) > MAX_LINES:
        found = [*found[: MAX_LINES - 1], f"… {len(found) - MAX_LINES + 1} more lines: see status.outputs"]
    return found


def head(status: Json) -> list[str]:
    """What holds for the whole report: how far it reaches, what is lost, what it costs."""
    shown, coverage, cost = status["columns"], status["coverage"], status["cost"]
    since, rest = shown["since"], f"{_rate(status)}, lost {shown['lost']}"
    found = [f"{shown['coverage']} nodes" + (f" for {since}, {rest}" if since else f", {rest}: no sample has come yet")]
    if coverage["missingCount"]:
        found.append(f"no sample from {_names(coverage['missing'], coverage['missingCount'])}")
    if coverage["staleCount"]:
        found.append(f"only old samples from {_names(coverage['stale'], coverage['staleCount'])}")
    found += [f"not counted: {text}" for text in status["uncounted"]]
    found += _filling(status["outputs"])
    found += [f"gap on {gap['node']}: {gap['start']} to {gap['end']}: {gap['why']}" for gap in status["gaps"][-3:]]
    if cost["nodesKnown"]:
        shared = f", shared by {cost['sharedBy']} policies" if cost["sharedBy"] > 1 else ""
        several = coverage["selected"] > 1
        mean = f" (the busiest), {humane.percent(cost['meanMillicores'] / 1000)} on average" if several else ""
        found.append(
            f"cost: {cost['overhead']} of one CPU on {cost['maxNode']}{mean}, "
            f"{humane.size(cost['mapBytesMax'])}B of maps{' a node' if several else ''}{shared}"
        )
    elif cost["overhead"] == "measuring":
        found.append("cost: measuring (programs are timed one second in ten)")
    elif cost["nodesUnknown"]:
        found.append("cost: unknown (agents may not read the kernel's run-time statistics, or cannot measure a hook)")
    return found


def _rate(status: Json) -> str:
    """With what is counted, where that is the runs of the programs: they are more, or fewer, than the events."""
    text: str = status["columns"]["rate"]
    runs = status["cost"]["runsPerSecond"]
    return f"{text.removesuffix('/s')} runs/s" if runs and runs == status["ratePerSecond"] else text


def _filling(outputs: Sequence[Json]) -> list[str]:
    """Maps that are nearly full, before anything is lost for want of room."""
    fills = {fill["map"]: fill for output in outputs if (fill := output.get("mapFill"))}
    return [
        f"map {name} is {humane.percent(fill['entries'] / fill['maxEntries'])} full on {fill['node']} "
        f"({humane.count(fill['entries'])} of {humane.count(fill['maxEntries'])} entries): what finds no room is lost; "
        "raise spec.maps[].maxEntries"
        for name, fill in fills.items()
        if fill["entries"] >= NEARLY_FULL * fill["maxEntries"]
    ]


def part_shown(output: Json, *, whole: bool) -> str:
    """Which part people see: the window, or the total where nothing moved in it or the ``whole`` run was asked for."""
    moved = output["window"]["value"] or output["kind"] == "gauge"
    return "window" if moved and not (whole and output["kind"] != "gauge") else "total"


def output_lines(
    output: Json, *, rows: int, histograms: int, window_seconds: float, whole: bool = False, width: int = 0
) -> list[str]:
    """One output: title, distribution, largest rows of the part that ``part_shown`` says. ``width`` as in ``table``."""
    grouped = f" by {', '.join(name.removeprefix('key.') for name in output['groupBy'])}" if output["groupBy"] else ""
    kind = output["kind"]
    if kind == "events":
        return event_lines(output, rows)
    which = part_shown(output, whole=whole)
    part = output[which]
    span = f"last {humane.duration(window_seconds * 1e9)}" if which == "window" else "since the beginning"
    amount = ""
    if kind == "gauge":
        span = "as read last"
    else:
        amount = f", {_value(part['value'], output)}" + (
            f" of {_value(output['total']['value'], output)}" if which == "window" else ""
        )
    found = [f"{output['name']} ({kind}{grouped}), {span}{amount}"]
    if kind == "histogram":
        if part.get("percentiles"):
            found.append("  " + percentiles_text(part, output["unit"]))
        if histograms and part.get("buckets"):
            found += [f"  {line}" for line in histogram(part["buckets"], output["unit"])]
    if output["groupBy"] or kind == "gauge":
        found += [f"  {line}" for line in table(part, output, rows, width=max(width - 2, 0))]
    elif kind != "histogram" and not part["rows"]:
        found.append("  nothing yet")
    found += [f"  {line}" for line in nameless(output)]
    if output.get("truncated"):
        found.append(f"  ({output['truncated']})")
    return found


def nameless(output: Json) -> list[str]:
    """How much of the stacks is without names, where anything is."""
    frames = output.get("frames", {"named": 0, "unknown": 0})
    if not frames["unknown"]:
        return []
    share = humane.percent(frames["unknown"] / (frames["unknown"] + frames["named"]))
    return [f"{share} of the frames have no name: [unknown], or [FILE] where only that is known"]


def histogram(buckets: Sequence[Json], unit: str) -> list[str]:
    """As BCC prints it: one line a slot, with a bar."""
    low = [humane.quantity(bucket["from"], unit) for bucket in buckets]
    high = [humane.quantity(bucket["to"], unit) if "to" in bucket else "∞" for bucket in buckets]
    counts = [humane.count(bucket["count"]) for bucket in buckets]
    widths = (max(map(len, low)), max(map(len, high)), max(5, *map(len, counts)))
    largest = max(bucket["count"] for bucket in buckets) or 1
    title = unit_title(unit)
    found = [f"{title:<{widths[0] + widths[1] + 4}} : {'count':<{widths[2]}} distribution"]
    for index, bucket in enumerate(buckets):
        length = round(bucket["count"] * BAR / largest)
        # A slot that has anything shows something.
        bar = "*" * max(length, 1 if bucket["count"] else 0)
        found.append(
            f"{low[index]:>{widths[0]}} -> {high[index]:<{widths[1]}} : {counts[index]:<{widths[2]}} |{bar:<{BAR}}|"
        )
    return found


def unit_title(unit: str) -> str:
    """What a histogram's first column is called."""
    if unit in ("ns", "us", "µs", "ms", "s"):
        return "time"
    return unit or "value"


def percentiles_text(part: Json, unit: str) -> str:
    """``p50 870µs  p90 3.1ms  p99 ≥14ms``."""
    open_ones = part.get("atLeast", ())
    return "  ".join(
        f"{name} {'≥' if name in open_ones else ''}{humane.quantity(value, unit)}"
        for name, value in part["percentiles"].items()
    )


def table(part: Json, output: Json, limit: int, *, width: int = 0) -> list[str]:
    """The largest rows in columns: key, value, share or rate, percentiles.

    No wider than ``width``, where one is given: the widest parts of keys give way, down to ``LEAST``.
    """
    header, body = cells(part, output, limit)
    if not body:
        return ["nothing yet"]
    widths = [max(len(row[at]) for row in (header, *body)) for at in range(len(header))]
    left = len(output["groupBy"])
    most = max(widths[:left], default=0)
    room = width - GAP * (len(widths) - 1) - sum(widths[left:])
    while width and most > LEAST and sum(min(each, most) for each in widths[:left]) > room:
        most -= 1
    widths[:left] = [min(each, most) for each in widths[:left]]
    header[:left] = [title if len(title) <= most else title[: most - 1] + "…" for title in header[:left]]
    for row in body:
        row[:left] = [_short(text, most) for text in row[:left]]
    return [
        "  ".join(
            text.ljust(width) if at < left else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *body)
    ]


def cells(part: Json, output: Json, limit: int) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of ``table``, still as cells."""
    groups = [name.removeprefix("key.").upper() for name in output["groupBy"]]
    quantiles = list(next((row["percentiles"] for row in part["rows"] if "percentiles" in row), {}))
    gauge = output["kind"] == "gauge"
    # Of what rows are put in order by: of a histogram what its values add up to. Gauges are not parts of a whole.
    # A report that an earlier operator wrote has no sums.
    size = "sum" if output["kind"] == "histogram" and "sum" in part else "value"
    titles = ["COUNT" if output["kind"] == "histogram" else "VALUE", *(["SUM"] if size == "sum" else [])]
    header = [*groups, *titles, *([] if gauge else ["SHARE"]), *(name.upper() for name in quantiles)]
    whole = part.get(size, 0)
    body = []
    for row in part["rows"][:limit]:
        texts = [*(_short(part) for part in row["key"]), *_sizes(row, output, size)]
        if not gauge:
            texts.append(humane.percent(row.get(size, 0) / whole) if whole else "")
        for name in quantiles:
            found = row.get("percentiles", {}).get(name)
            mark = "≥" if name in row.get("atLeast", ()) else ""
            texts.append("" if found is None else mark + humane.quantity(found, output["unit"]))
        body.append(texts)
    rest = part["rows"][limit:]
    other = part.get("other", {"rows": 0, "value": 0})
    hidden = len(rest) + other["rows"]
    if hidden and not gauge and groups:
        together = {name: sum(row.get(name, 0) for row in (*rest, other)) for name in ("value", "sum")}
        share = humane.percent(together[size] / whole) if whole else ""
        texts = [f"({humane.count(hidden)} more)", *[""] * (len(groups) - 1), *_sizes(together, output, size), share]
        body.append(texts + [""] * len(quantiles))
    return header, body


def _sizes(row: Json, output: Json, size: str) -> list[str]:
    """Its value; of a histogram how many and, as far as slots tell, how much together."""
    sums = ["≈" + humane.quantity(row.get("sum", 0), output["unit"])] if size == "sum" else []
    return [_value(row["value"], output), *sums]


def label_text(label: Sequence[object], group_by: Sequence[str]) -> str:
    """A row's key in one word: names as they are, numbers with the name of their field: ``web``, ``uid=0``."""
    parts = []
    for part, group in zip(label, group_by, strict=True):
        if isinstance(part, str) or group in IDENTITIES:
            parts.append(str(part))
        else:
            parts.append(f"{group.removeprefix('key.')}={part}")
    return "/".join(_short(part, 40) for part in parts)


def event_cells(records: Sequence[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Records as a table: one column a field, in the order of appearance; empty columns are left out."""
    names = list(dict.fromkeys(name for record in records for name in record if record[name]))
    return [name.upper() for name in names], [[record.get(name, "") for name in names] for record in records]


def _short(text: str, limit: int = 60) -> str:
    """The end of what is too long: a path's file, a stack's leaf."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


def event_lines(output: Json, rows: int) -> list[str]:
    """Records of events: what became of them, and the newest ``rows``, a line each."""
    newest = output["events"]["records"][-rows:] if rows else []
    return [
        event_title(output, len(newest)),
        *("  " + " ".join(f"{name}={text}" for name, text in record.items() if text) for record in newest),
    ]


def event_title(output: Json, shown: int) -> str:
    """How many records there were, and that fewer are ``shown``."""
    events = output["events"]
    lost = f", lost {humane.count(events['lost'])}" + (
        f", dropped {humane.count(events['dropped'])}" if events["dropped"] else ""
    )
    newest = f"; the newest {shown}" if 0 < shown < events["received"] else ""
    return f"{output['name']} (events), {humane.count(events['received'])} received{lost}{newest}"


def _value(value: int, output: Json) -> str:
    # A histogram's rows count values; the unit is that of the values.
    return humane.count(value) if output["kind"] in ("histogram", "events") else humane.quantity(value, output["unit"])


def _names(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"{humane.count(count)} node{'s' if count > 1 else ''}: {', '.join(names)}{more}"
