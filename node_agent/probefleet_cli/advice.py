"""What ``check`` advises on a policy's own program, from the instructions that it became.

Catalog probes are left out: whoever runs them cannot change them. bpftrace keeps its maps to itself.
"""

from __future__ import annotations

from probefleet_core import values
from probefleet_wire import bpf_code, hints

from probefleet_cli import preparation


def of(prepared: preparation.Prepared) -> tuple[hints.Hint, ...]:
    """Hints on one policy that has been compiled and loaded."""
    program = prepared.policy.program
    # What others use as well, or a policy fills, is not only what this program does with it.
    elsewhere = {use.name for use in prepared.policy.maps if use.probe_map or use.pinned or use.entries is not None}
    if isinstance(program, values.CProgram | values.ObjectProgram):
        return hints.of_object(
            prepared.planned.objects[prepared.planned.plan.instance.object.sha256], elsewhere=elsewhere
        )
    if isinstance(program, values.BccProgram):
        return _of_bcc(prepared, elsewhere)
    return ()


def _of_bcc(prepared: preparation.Prepared, elsewhere: set[str]) -> tuple[hints.Hint, ...]:
    """Compiled once more: the engine keeps what it loaded, not what it was made of."""
    from probefleet_agent.kernel import bcc

    source = prepared.planned.plan.instance.bcc
    made = bcc.compile(source.source, name=source.file_name)
    bodies = []
    for each in made.functions:
        function = bpf_code.Function(each.name, (0, 0), bpf_code.decode(each.instructions))
        maps = dict(each.references)
        # Only calls are asked for; libbcc's line records would be decoded for each.
        lines = {
            number: f"{source.file_name}:{line}"
            for number, it in enumerate(function.instructions)
            if it.code == bpf_code.CALL and (line := each.line_of(number))
        }
        bodies.append(hints.Body(function, maps, lines))
    return hints.of(bodies, [each.definition for each in made.maps], elsewhere=elsewhere)
