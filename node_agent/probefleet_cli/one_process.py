"""``run --pid``: a plan restricted to one process in the kernel, exactly or not at all.

``preparation`` hands over each plan that the planner made. A process can be told apart where the program itself asks
``probefleet_selected_process()`` with the process that its events belong to (probes of the catalog do; in a wake-up
that is the woken task's, not the current one), and at uprobes, where the kernel does it. Everything else is refused:
who runs when a program runs is not always whose event it is, and only the program's author knows.
"""

from __future__ import annotations

import struct
from pathlib import Path

from probefleet_core import planner
from probefleet_wire.elf import Elf
from probefleet_wire.v1 import plan_pb2

from probefleet_cli.failures import BadInput

VARIABLE, FUNCTION, MACRO = "probefleet_tgid", "probefleet_selected_process", "PROBEFLEET_TGID"
CATALOG = "catalog/"
#: The inode of the first pid namespace: PROC_PID_INIT_INO, include/linux/proc_ns.h. Programs see its numbers only.
FIRST_NAMESPACE = "pid:[4026531836]"


def check(pid: int, *, proc: Path = Path("/proc")) -> None:
    """BadInput where no process has this number, or where the kernel knows it by another."""
    if str((proc / "self/ns/pid").readlink()) != FIRST_NAMESPACE:
        raise BadInput(
            f"--pid {pid}: this command runs in a pid namespace (a container), where numbers are not those that the "
            "kernel counts by. Run it on the host, or in a container with hostPID"
        )
    try:
        status = (proc / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise BadInput(f"--pid {pid}: there is no process with this number. pgrep NAME finds it") from None
    process = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Tgid:"))
    if process != pid:
        raise BadInput(f"--pid {pid}: this is a thread of process {process}. Write --pid {process}")


def restrict(planned: planner.Planned, pid: int, where: str) -> None:
    """Let a plan's programs see this process only; BadInput where they cannot tell.

    The instance keeps its digest: all plans of a run are restricted alike, and its folder of pins is its own.
    """
    instance = planned.plan.instance
    if _asks(planned, instance):
        if instance.HasField("bcc"):
            # Lines keep their numbers in what the compiler says.
            instance.bcc.source = f"#undef {MACRO}\n#define {MACRO} {pid}\n#line 1\n{instance.bcc.source}"
        else:
            instance.parameters.append(plan_pb2.Parameter(variable=VARIABLE, value=struct.pack("<I", pid)))
        return
    if instance.title.startswith(CATALOG):
        name = instance.title.removeprefix(CATALOG)
        raise BadInput(
            f"{where}: --pid {pid}: what {name} counts is no process's doing, and the kernel does not say "
            f"whose it was. `probefleet catalog {name}` says what it goes by. Leave --pid out"
        )
    attached = instance.attachments
    if not attached or not all(each.WhichOneof("target") == "uprobe" for each in attached):
        raise BadInput(
            f"{where}: --pid {pid}: this program does not say whose its events are, so one process cannot be told from "
            f"another. In its source, write `if (!{FUNCTION}(bpf_get_current_pid_tgid() >> 32)) return 0;` behind "
            "#include <probefleet.h> (with the process that the event belongs to, where that is not the current one), "
            "or leave --pid out"
        )
    for each in attached:
        each.uprobe.pid = pid


def _asks(planned: planner.Planned, instance: plan_pb2.Instance) -> bool:
    if instance.HasField("bcc"):
        return FUNCTION in instance.bcc.source
    return Elf.parse(planned.objects[instance.object.sha256]).uses(VARIABLE)
