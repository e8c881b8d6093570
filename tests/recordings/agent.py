"""The real agent, and a file of what it reads: `python -m tests.recordings.agent READINGS [agent's options]`.

Four of the agent's functions are wrapped, and do what they do; before (or after) that a line of JSON is written:

    {"did": "learn", "paths": {cgroup id: path}}              cgroups became known
    {"did": "select", "selections": {…}, "known": [pod uid]}  a push was applied
    {"did": "restart", "rows": n}                             a new stream: this reader's keys are due again
    {"did": "rows", "rows": n, "plan", "output", "layout", "keys", "values", "answers"}      a map was read
    {"did": "chunk", "reader": n, …, "records", "positions", "end", "now_ns", "cursor", "dropped"}      a ring was read

`answers` is what the machine was asked for while decoding (users, commands), so that it can be answered again.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from probefleet_agent import collect, names, pods, samples
from probefleet_agent import main as agent

Json = dict[str, Any]


class Tap:
    """Writes the lines; every line at once, for the process may be killed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # what has a number stays, so that no other object gets its id()
        self.answers: Json = {}

    def number(self, thing: object) -> int:
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self._numbers)
            self._kept.append(thing)
        return self._numbers[id(thing)]

    def write(self, did: str, **more: Any) -> None:
        self._file.write(json.dumps({"did": did, "time_ns": time.time_ns(), **more}).encode() + b"\n")


def packed(array: Any) -> Json:
    """An array as JSON."""
    return {"dtype": array.dtype.str, "shape": array.shape, "hex": np.ascontiguousarray(array).tobytes().hex()}


def reader_facts(reader: collect.TableReader | collect.EventReader) -> Json:
    """What a reader was made from."""
    return {
        "plan": base64.b64encode(reader.plan.SerializeToString()).decode(),
        "output": reader.output.name,
        "layout": reader.layout.to_json(),
        "wall_minus_ktime_ns": reader.lookups.wall_minus_ktime_ns,
    }


def install(tap: Tap) -> None:
    """Put the wrappers in place."""
    read, chunk = collect.TableReader.read, collect.EventReader.chunk
    learn, select = pods.Book.learn, pods.Book.select
    restart = samples.Rows.restart_stream

    def tapped_read(self: collect.TableReader, keys: Any, values: Any) -> None:
        tap.answers = {}
        number, facts = tap.number(self.rows), reader_facts(self)
        read(self, keys, values)
        tap.write("rows", rows=number, **facts, keys=packed(keys), values=packed(values), answers=tap.answers)

    def tapped_chunk(self: collect.EventReader, records: Any, positions: Any, end_position: int, now_ns: int) -> Any:
        tap.answers = {}
        number, facts, cursor, dropped = tap.number(self), reader_facts(self), self.cursor, self.dropped
        counts, pending, _ = collect.judge(self.book, pods.PolicyUid(self.plan.policy_uid), records, self._cgroup)
        # Records of the rest of the machine are nobody's business: they are refused here, and left out there.
        ours = counts | pending
        made = chunk(self, records, positions, end_position, now_ns)
        if made is not None:
            raw = {"records": packed(records[ours]), "positions": packed(positions[ours])}
            tap.write(
                "chunk", reader=number, **facts, **raw, end=end_position, now_ns=now_ns, cursor=cursor,
                dropped=dropped, answers=tap.answers,
            )  # fmt: skip
        return made

    def tapped_learn(self: pods.Book, paths: Any) -> int:
        # Only this node's: the others' paths are this machine's own business, and are refused like any outsider's.
        fresh = {
            number: path if path.startswith(self.root) else "/"
            for number, path in paths.items()
            if number not in self.identities
        }
        if fresh:
            tap.write("learn", paths=fresh, root=self.root)
        return learn(self, paths)

    def tapped_select(self: pods.Book, selections: Any, known_pods: Any) -> None:
        known = sorted(known_pods)
        chosen = {policy: [each.everything, sorted(each.pods)] for policy, each in selections.items()}
        tap.write("select", selections=chosen, known=known)
        select(self, selections, known)

    def tapped_restart(self: samples.Rows) -> None:
        tap.write("restart", rows=tap.number(self))
        restart(self)

    patches: list[tuple[type, str, Any]] = [
        (collect.TableReader, "read", tapped_read),
        (collect.EventReader, "chunk", tapped_chunk),
        (pods.Book, "learn", tapped_learn),
        (pods.Book, "select", tapped_select),
        (samples.Rows, "restart_stream", tapped_restart),
    ]
    patches += [(names.MachineLookups, each, asking(tap, each)) for each in ("command", "user", "device")]
    for owner, name, function in patches:
        setattr(owner, name, function)


def asking(tap: Tap, question: str) -> Any:
    """A lookup that notes its answer."""
    answer = getattr(names.MachineLookups, question)

    def asked(self: names.MachineLookups, number: int) -> str:
        said: str = answer(self, number)
        tap.answers[f"{question} {number}"] = said
        return said

    return asked


if __name__ == "__main__":
    install(Tap(Path(sys.argv.pop(1))))
    agent.main()
