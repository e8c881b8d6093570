"""What one of bpfcc-tools' scripts gives to BCC, taken down instead of run: its C text, and where it attaches what.

Started by ``extract`` as a process for each tool: `python record_bcc.py FACTS TOOL [ARGUMENT…]`. The script runs as
it is, with ``bcc.BPF`` replaced by a recorder; questions to the kernel (which functions, tracepoints, members are
there?) are answered from FACTS, taken from the kernel that the program is meant for. When the script begins to wait,
it is over: JSON on the last line of stdout.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import bcc
from probefleet_wire.btf import Btf
from probefleet_wire.btf_types import Kind

MARK = "\x1e"
#: So many a policy names one by one; more, by the pattern that the script itself gives.
MOST_ATTACHMENTS = 64


class Facts:
    """The other kernel: functions and tracepoints by name, members by BTF."""

    def __init__(self, folder: Path) -> None:
        self.functions = (folder / "functions").read_text().split()
        self.known = set(self.functions)
        self.symbols = set((folder / "symbols").read_text().split())
        self.tracepoints = {tuple(each.split(":")) for each in (folder / "tracepoints").read_text().split()}
        self._btf = Btf.parse((folder / "vmlinux").read_bytes())

    def has_member(self, struct: str, member: str) -> bool:
        """Whether a struct of that kernel has a member of that name."""
        found = self._btf.find(struct, Kind.STRUCT)
        return found is not None and any(field.name.split(".")[0] == member for field in self._btf.layout_of(found))


class Done(SystemExit):
    """The script waits for events: all that it had to say it has said."""


FACTS: Facts
MODULES: list[dict[str, Any]] = []


def text_of(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def finish(*_: object, **__: object) -> NoReturn:
    raise Done(0)


class Anything:
    """A table, a function, a callback: whatever the script does with it before it waits."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return finish if name in ("event",) else Anything()

    def __call__(self, *_: object, **__: object) -> Anything:
        return Anything()

    def __getitem__(self, _: object) -> Anything:
        return Anything()

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __int__(self) -> int:
        return 0


REAL = bcc.BPF


class Statics(type):
    """What scripts ask of the class and no kernel has to answer, BCC itself does."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(REAL, name)


class Recorder(metaclass=Statics):
    """bcc.BPF as far as scripts see it."""

    SOCKET_FILTER, KPROBE, SCHED_CLS, TRACEPOINT, XDP, PERF_EVENT, RAW_TRACEPOINT = 1, 2, 3, 5, 6, 7, 17
    CGROUP_SKB, TRACING, LSM = 8, 26, 29

    def __init__(
        self,
        src_file: Any = b"",
        hdr_file: Any = b"",
        text: Any = None,
        debug: int = 0,
        cflags: Any = (),
        usdt_contexts: Any = (),
        **_: Any,
    ) -> None:
        if text is None:
            text = Path(text_of(src_file)).read_text()
        defines = [flag[2:].replace("=", " ", 1) for flag in map(text_of, cflags) if flag.startswith("-D")]
        before = "".join(f"#define {define}\n" for define in defines)
        self.made: dict[str, Any] = {
            "text": before + text_of(text),
            "attach": [],
            "usdt": [each.path_or_pid for each in usdt_contexts],
        }
        MODULES.append(self.made)

    def _attach(self, kind: str, program: Any, **target: Any) -> None:
        self.made["attach"].append({"program": text_of(program), "kind": kind, **target})

    def _each(self, event: Any, event_re: Any) -> list[str]:
        return self.get_kprobe_functions(event_re) if event_re else [text_of(event)]

    def attach_kprobe(self, event: Any = b"", event_off: int = 0, fn_name: Any = b"", event_re: Any = b"") -> None:
        found = self._each(event, event_re)
        simple = re.fullmatch(r"\^?(\w+)\.\*\$?", text_of(event_re))
        if len(found) > MOST_ATTACHMENTS and simple:
            self._attach("kprobe", fn_name, functions=f"{simple[1]}*")
            return
        for each in found:
            self._attach("kprobe", fn_name, function=each)

    def attach_kretprobe(self, event: Any = b"", fn_name: Any = b"", event_re: Any = b"", maxactive: int = 0) -> None:
        for each in self._each(event, event_re):
            self._attach("kretprobe", fn_name, function=each)

    def attach_tracepoint(self, tp: Any = b"", tp_re: Any = b"", fn_name: Any = b"") -> None:
        names = [text_of(tp)] if tp else self.get_tracepoints(tp_re)
        for each in names:
            category, _, name = each.partition(":")
            self._attach("tracepoint", fn_name, category=category, name=name)

    def attach_raw_tracepoint(self, tp: Any = b"", fn_name: Any = b"") -> None:
        self._attach("rawTracepoint", fn_name, name=text_of(tp))

    def attach_perf_event(
        self, ev_type: int = -1, ev_config: int = -1, fn_name: Any = b"", sample_period: int = 0,
        sample_freq: int = 0, **_: Any,
    ) -> None:  # fmt: skip
        self._attach("perfEvent", fn_name, type=ev_type, config=ev_config, period=sample_period, frequency=sample_freq)

    def attach_uprobe(
        self, name: Any = b"", sym: Any = b"", sym_re: Any = b"", addr: Any = None, fn_name: Any = b"",
        pid: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        self._attach("uprobe", fn_name, library=text_of(name), symbol=text_of(sym) or text_of(sym_re))

    def attach_uretprobe(
        self, name: Any = b"", sym: Any = b"", sym_re: Any = b"", addr: Any = None, fn_name: Any = b"", pid: int = -1
    ) -> None:
        self._attach("uretprobe", fn_name, library=text_of(name), symbol=text_of(sym) or text_of(sym_re))

    def load_func(self, function: Any, kind: int, *_: Any) -> Anything:
        return Anything()

    def get_table(self, *_: Any, **__: Any) -> Anything:
        return Anything()

    def __getitem__(self, _: object) -> Anything:
        return Anything()

    def num_open_kprobes(self) -> int:
        return sum(each["kind"] in ("kprobe", "kretprobe") for each in self.made["attach"])

    def num_open_tracepoints(self) -> int:
        return sum(each["kind"] == "tracepoint" for each in self.made["attach"])

    num_open_uprobes = num_open_kprobes

    def get_syscall_prefix(self) -> bytes:
        return b"__x64_sys_"

    def get_syscall_fnname(self, name: Any) -> bytes:
        return b"__x64_sys_" + text_of(name).encode()

    fix_syscall_fnname = staticmethod(lambda name: name)
    perf_buffer_poll = ring_buffer_poll = ring_buffer_consume = kprobe_poll = staticmethod(finish)
    trace_print = trace_fields = trace_readline = trace_open = staticmethod(finish)

    def cleanup(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return Anything()

    @staticmethod
    def get_kprobe_functions(event_re: Any) -> list[str]:
        return [each for each in FACTS.functions if re.match(text_of(event_re), each)]

    @staticmethod
    def get_tracepoints(tp_re: Any) -> list[str]:
        return [":".join(each) for each in sorted(FACTS.tracepoints) if re.match(text_of(tp_re), ":".join(each))]

    @staticmethod
    def tracepoint_exists(category: Any, event: Any) -> bool:
        return (text_of(category), text_of(event)) in FACTS.tracepoints

    @staticmethod
    def ksymname(name: Any) -> int:
        return 1 if text_of(name) in FACTS.symbols else -1

    @staticmethod
    def kernel_struct_has_field(struct: Any, field: Any) -> int:
        return int(FACTS.has_member(text_of(struct), text_of(field)))

    # The other way of a tool, by kprobes: what it attaches then is said by names that any kernel has.
    support_kfunc = staticmethod(lambda: False)
    support_lsm = staticmethod(lambda: False)
    support_raw_tracepoint = staticmethod(lambda: True)
    support_raw_tracepoint_in_module = staticmethod(lambda: True)
    get_probe_limit = _probe_limit = staticmethod(lambda: 1000)
    monotonic_time = staticmethod(time.monotonic_ns)
    sym = ksym = staticmethod(lambda *_, **__: b"")


class Usdt:
    """bcc.USDT: the scripts' probes in other programs; which ones is all that is asked."""

    def __init__(self, pid: Any = None, path: Any = None) -> None:
        self.path_or_pid = str(path or pid)

    def enable_probe(self, **_: Any) -> None:
        pass

    enable_probe_or_bail = enable_probe

    def get_text(self) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        return Anything()


def main() -> None:
    """Run one script to the point where it waits."""
    global FACTS
    FACTS = Facts(Path(sys.argv[1]))
    tool, arguments = sys.argv[2], sys.argv[3:]
    bcc.BPF, bcc.USDT = Recorder, Usdt
    time.sleep = finish
    signal.pause = finish
    sys.argv = [tool, *arguments]
    why = ""
    try:
        runpy.run_path(tool, run_name="__main__")
    except Done:
        pass
    except SystemExit as ended:
        why = f"it ends by itself: {ended.code}" if not MODULES else ""
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    print(f"\n{MARK}{json.dumps({'modules': MODULES, 'why': why})}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
