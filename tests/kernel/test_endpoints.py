"""The built-in map of endpoints: programs count by the pod on the other side, as the operator knows addresses."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from probefleet_agent.engine import Engine
from probefleet_agent.kernel import maps, mounts
from probefleet_cli import local_pods, preparation
from probefleet_core import aggregate, endpoints, result
from probefleet_wire.v1 import stream_pb2

from tests.kernel import policies

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WEB, CART, LATER = "u-web", "u-cart", "u-later"
COUNT = """
#include <probefleet_endpoints.h>
struct side { endpoint_t other; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, struct side); __type(value, u64); }
calls SEC(".maps");
SEC("tracepoint/syscalls/sys_enter_connect") int on_connect(struct trace_event_raw_sys_enter *ctx)
{
	struct sockaddr_in6 six = {};
	struct sockaddr_in four = {};
	struct side key = {};
	if (!ours())
		return 0;
	if (bpf_probe_read_user(&four, sizeof(four), (void *)ctx->args[1]))
		return 0;
	if (four.sin_family == 2) {
		key.other = probefleet_endpoint4(four.sin_addr.s_addr);
	} else if (four.sin_family == 10) {
		if (bpf_probe_read_user(&six, sizeof(six), (void *)ctx->args[1]))
			return 0;
		key.other = probefleet_endpoint(six.sin6_addr.in6_u.u6_addr8);
	} else {
		return 0;
	}
	probefleet_add(&calls, &key, 1);
	return 0;
}
"""
BCC = f"""
#include <probefleet_endpoints.h>
struct side {{ endpoint_t other; }};
BPF_HASH(calls, struct side, u64, 64);
TRACEPOINT_PROBE(syscalls, sys_enter_connect)
{{
    struct side key = {{}};
    u16 family = 0;
    u32 address = 0;
    if (bpf_get_current_pid_tgid() >> 32 != {os.getpid()})
        return 0;
    bpf_probe_read_user(&family, sizeof(family), (void *)args->uservaddr);
    if (family != 2)
        return 0;
    bpf_probe_read_user(&address, sizeof(address), (void *)args->uservaddr + 4);
    key.other = probefleet_endpoint4(address);
    calls.increment(key);
    return 0;
}}
"""
OUTPUTS: dict[str, Any] = {
    "outputs": [{"name": "calls", "from": {"map": "calls"}, "topk": {}, "groupBy": ["key.other"], "limit": 20}],
    "interval": "1s",
}


def connect(address: str, times: int) -> None:
    """Name an address to the kernel, by UDP: nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(times):
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            try:
                one.connect((address, 9))
            except OSError:
                continue  # no way there from here; the call was made


def bcc_policy() -> dict[str, Any]:
    made = policies.c_policy("", name="by-bcc", **OUTPUTS)
    made["spec"]["program"] = {"bcc": {"source": BCC}}
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    path = mounts.mount_bpffs() / f"probefleet-test-endpoints-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        with Engine.open(bpffs=path) as engine:
            engine.remove_everything()
        path.rmdir()


class Operator:
    """What an operator knows of addresses, and what it makes of the rows."""

    def __init__(self, *manifests: dict[str, Any]) -> None:
        self.book = endpoints.Endpoints()
        self.prepared = policies.prepare(*manifests)
        self.version = self.heard = 0

    def push(self, engine: Engine) -> stream_pb2.Push:
        self.version += 1
        made = preparation.push(self.prepared, pods=local_pods.find(), namespace=None, version=self.version)
        made.endpoints.CopyFrom(self.book.since(self.heard))
        self.heard = self.book.version
        engine.apply(made)
        for status in engine.status().policies:
            assert not status.reason, f"{status.reason}: {status.message}\n{status.log_tail}"
        return made

    def rows(self, engine: Engine, policy: int = 0) -> dict[str, int]:
        return {str(key): value for key, value in self.total(engine, policy)[0].items()}

    def total(self, engine: Engine, policy: int = 0) -> tuple[dict[Any, int], tuple[str, ...]]:
        merged = aggregate.Aggregate(result.PolicyFacts.of(self.prepared[policy].planned.plan))
        engine.hello()
        batch = engine.collect(time.time_ns(), force=True)
        assert batch is not None
        merged.apply("here", 1, batch, time.time_ns())
        found = merged.result(time.time_ns(), selected_nodes=frozenset({"here"}), names=self.name_of)
        total = found.outputs[0].total
        labels = [label[-1] for label in total.labels]  # the other side
        return dict(zip(labels, total.values[:, 0].tolist(), strict=True)), found.uncounted

    def name_of(self, uid: str) -> result.PodName | None:
        if uid.startswith(endpoints.MARK):
            uid = self.book.pod(int(uid.removeprefix(endpoints.MARK), 16)) or ""
        return result.PodName("shop", uid.removeprefix("u-"), nodes=("there",)) if uid else None


def test_connections_are_counted_by_the_pod_on_the_other_side(folder: Path) -> None:
    operator = Operator(policies.c_policy(COUNT, name="by-c", **OUTPUTS), bcc_policy())
    operator.book.put(WEB, ["127.0.0.2"])
    operator.book.put(CART, ["127.0.0.3", "::1"])
    with Engine.open(bpffs=folder) as engine:
        operator.push(engine)
        connect("127.0.0.2", 997)
        connect("127.0.0.3", 23)
        connect("::1", 7)
        connect("127.0.0.9", 5)
        assert operator.rows(engine) == {"shop/web": 997, "shop/cart": 30, "(no pod)": 5}
        assert operator.rows(engine, 1) == {"shop/web": 997, "shop/cart": 23, "(no pod)": 5}
        assert operator.total(engine)[1] == ()
        # One map for both programs.
        ids = {
            handle.info.id
            for loaded in engine._installed.loaded.values()
            for name, handle in loaded.maps.items()
            if name == endpoints.MAP
        }
        assert len(engine._installed.loaded) == 2 and len(ids) == 1
        # The address goes over to another pod: what was counted before stays whose it was.
        operator.book.put(CART, [])
        operator.book.put(LATER, ["127.0.0.3"])
        assert not operator.push(engine).endpoints.whole
        connect("127.0.0.3", 11)
        connect("::1", 3)
        assert operator.rows(engine) == {"shop/web": 997, "shop/cart": 30, "shop/later": 11, "(no pod)": 8}
    # An agent that comes again adopts the map, and is told everything anew.
    with Engine.open(bpffs=folder) as engine:
        connect("127.0.0.2", 2)
        operator.book.put(WEB, [])
        operator.heard = 0
        assert operator.push(engine).endpoints.whole
        connect("127.0.0.2", 1)
        assert operator.rows(engine) == {"shop/web": 999, "shop/cart": 30, "shop/later": 11, "(no pod)": 9}
        (_, handle) = next(iter(engine._installed.maps.values()))
        assert len(maps.read(handle.fd, handle.info)[0]) == 1
        # It goes with the last program that shares it.
        engine.apply(stream_pb2.Push(term=1, version=operator.version + 1))
        assert list((folder / "probefleet/maps").iterdir()) == []


@pytest.mark.shows("example/connects-by-pod")
def test_the_example_says_which_pod_connects_to_which(folder: Path) -> None:
    operator = Operator(yaml.safe_load((EXAMPLES / "connects-by-pod.yaml").read_text()))
    operator.book.put(WEB, ["127.0.0.2"])
    operator.book.put(CART, ["::1"])
    with Engine.open(bpffs=folder) as engine:
        operator.push(engine)
        connect("127.0.0.2", 997)
        connect("::1", 23)
        rows = operator.rows(engine)
        assert (rows["shop/web"], rows["shop/cart"]) == (997, 23)


def test_on_a_machine_without_an_operator_the_map_is_empty_and_that_is_said() -> None:
    with policies.run(policies.c_policy(COUNT, **OUTPUTS)) as run:
        connect("127.0.0.2", 23)
        assert run.rows("calls") == {("(no pod)",): 23}
        (words,) = run.measured.results()[0].uncounted
        assert words == "endpoints is not filled: no operator has said yet which pod has which address"
