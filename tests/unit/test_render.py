"""Reports on a terminal: golden, in colour only where someone looks, and the same object for machines."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from probefleet_cli import render, render_svg
from probefleet_core import report, summary

from tests.unit import test_report

SVG = "{http://www.w3.org/2000/svg}"


def status(name: str) -> dict[str, object]:
    return report.status(test_report.RESULTS[name]())


@pytest.mark.parametrize("name", test_report.RESULTS)
def test_a_table_reads_as_its_golden_one(name: str) -> None:
    test_report.golden(f"report-{name}.txt", render.render(status(name), name=name))


def test_json_and_yaml_are_the_object_that_the_cluster_would_write() -> None:
    body = status("calls")
    whole = {
        "apiVersion": "probefleet.io/v1alpha1",
        "kind": "ProbeReport",
        "metadata": {"name": "calls", "namespace": "shop"},
        "status": body,
    }
    assert json.loads(render.render(body, name="calls", namespace="shop", output="json")) == whole
    assert yaml.safe_load(render.render(body, name="calls", namespace="shop", output="yaml")) == whole


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, coloured, machine = io.StringIO(), Terminal(), Terminal()
    body = status("slow-connects")
    render.write(body, name="x", stream=plain)
    render.write(body, name="x", stream=coloured)
    render.write(body, name="x", stream=machine, output="json")
    assert plain.getvalue() == render.render(body, name="x")
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in machine.getvalue()
    assert render.text(body, name="x").plain == plain.getvalue()


def test_a_histogram_is_drawn_as_bcc_draws_it() -> None:
    buckets = [
        {"from": 512, "to": 1024, "count": 1},
        {"from": 1024, "to": 2048, "count": 997},
        {"from": 2048, "count": 23},
    ]
    assert summary.histogram(buckets, "ns") == [
        "time         : count distribution",
        f"512ns -> 1µs : 1     |{'*':40}|",
        f"  1µs -> 2µs : 997   |{'*' * 40}|",
        f"  2µs -> ∞   : 23    |{'*':40}|",
    ]
    assert summary.unit_title("") == "value"
    assert summary.unit_title("bytes") == "bytes"


def test_the_distribution_of_an_only_row_is_not_drawn_twice() -> None:
    shown = status("slow-connects")
    output = next(each for each in shown["outputs"] if each["name"] == "latency")
    (row, *others) = output["total"]["rows"]
    assert others
    several = "\n".join(render.report_lines(shown, name="slow", whole=True))
    output["total"] |= {"rows": [row], "value": row["value"]}
    one = "\n".join(render.report_lines(shown, name="slow", whole=True))
    assert (several.count(" distribution"), one.count(" distribution")) == (len(others) + 2, 1)


def test_an_event_in_one_line_leaves_out_what_is_empty() -> None:
    assert render.event_line({"time": "t", "comm": "ls", "args": "", "pid": 0}) == "time=t  comm=ls  pid=0"


def test_stacks_without_names_say_how_many_they_are() -> None:
    output = status("profile")["outputs"][0]  # type: ignore[index]
    whole = render.stacks_lines(output)
    output = {**output, "frames": {"named": 75, "unknown": 25}}
    line = "  25% of the frames have no name: [unknown], or [FILE] where only that is known"
    assert render.stacks_lines(output) == [*whole, "", line]


def test_folded_stacks_are_what_flame_graph_tools_read() -> None:
    counts = render.stacks(status("profile")["outputs"][0])  # type: ignore[index]
    assert render.folded(counts) == (
        "cart-0;main;wait 17\nweb-1;main;serve;compute<int, char> 22\nweb-1;main;serve;read;ksys_read_[k] 61\n"
    )


def test_a_flame_graph_is_a_picture_of_the_shares() -> None:
    counts = render.stacks(status("profile")["outputs"][0])  # type: ignore[index]
    text = render_svg.render_svg(counts, title="profile & more")
    test_report.golden("report-profile.svg", text)
    frames = {group[0].text: float(group[1].attrib["width"]) for group in ET.fromstring(text).iter(f"{SVG}g")}
    assert frames["all: 100 samples, 100.00%"] == pytest.approx(1199.5)
    assert frames["serve: 83 samples, 83.00%"] == pytest.approx(0.83 * 1200 - 0.5)
    assert "compute<int, char>: 22 samples, 22.00%" in frames


def test_stacks_weigh_what_their_output_says() -> None:
    text = render_svg.render_svg({"main;sleep": 2_500_000_000}, unit="ns")
    assert "sleep: 2.5s, 100.00%" in text and "sample" not in text
    output = {
        "name": "waits",
        "unit": "ns",
        "groupBy": [],
        "total": {"value": 2_500_000, "rows": [{"key": ["main;sleep"], "value": 2_500_000}]},
    }
    assert render.stacks_lines(output)[:3] == [
        "waits (stacks), since the beginning, 2.5ms",
        "",
        "  2.5ms (100.0%)",
    ]
    output["unit"] = ""
    assert render.stacks_lines(output)[0].endswith("2,500,000 samples")


def test_frames_too_narrow_to_see_are_left_out() -> None:
    text = render_svg.render_svg({"wide": 1_000_000, "narrow;child": 1})
    assert "wide" in text
    assert "narrow" not in text


@given(st.dictionaries(st.text(max_size=30), st.integers(1, 2**62), max_size=10))
def test_whatever_the_names_the_svg_is_xml(stacks: dict[str, int]) -> None:
    root = ET.fromstring(render_svg.render_svg(stacks, title="".join(stacks)))
    assert root.tag == f"{SVG}svg"


def test_a_deep_stack_is_cut() -> None:
    text = render_svg.render_svg({";".join(f"f{i}" for i in range(1000)): 5})
    assert text.count("<g>") == render_svg.MAX_DEPTH + 1


def test_a_chart_of_nothing_is_a_chart() -> None:
    assert ET.fromstring(render_svg.render_svg({})).tag == f"{SVG}svg"


def test_frames_without_a_name_are_one_frame_and_the_kernels_are_blue() -> None:
    text = render_svg.render_svg({"python;[unknown];[unknown];[unknown];read;vfs_read_[k]": 3})
    assert text.count("<title>[unknown]:") == 1
    (kernel,) = re.findall(r"<title>vfs_read_\[k\]: 3 samples, .*?rgb\((\d+),(\d+),(\d+)\)", text)
    assert int(kernel[2]) > int(kernel[0])
