"""Network programs count each packet, change none, keep up with interfaces that come and go, and displace nobody."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from probefleet_agent import execute
from probefleet_agent.errors import KernelError, NoSuchTarget, NotObserving, ProbefleetError
from probefleet_agent.kernel import (
    cgroups,
    features,
    hooks_network,
    interfaces,
    libbpf,
    links_network,
    maps,
    mounts,
    netlink,
    pins,
    syscall,
)
from probefleet_agent.kernel.spread import Pods
from probefleet_wire import verdicts
from probefleet_wire.v1 import plan_pb2

from tests.kernel import damage, network, support
from tests.kernel.network import PORT, Wire, ip

TIMES = 997
# An emulated machine takes minutes for what starts a command.
pytestmark = pytest.mark.timeout(400)

PRELUDE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
char LICENSE[] SEC("license") = "GPL";
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
hits SEC(".maps");
static __always_inline void hit(void)
{
	u32 zero = 0;
	u64 *count = bpf_map_lookup_elem(&hits, &zero);
	if (count)
		*count += 1;
}
#define PORT 4711
static __always_inline bool ours(void *data, void *end)
{
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct udphdr *udp = (void *)(ip + 1);

	if ((void *)(udp + 1) > end || eth->h_proto != bpf_htons(0x0800))
		return false;
	return ip->protocol == 17 && udp->dest == bpf_htons(PORT);
}
"""
# Each wants to drop what it counts: the verdict that is fixed lets it pass all the same.
XDP = """
SEC("xdp") int it(struct xdp_md *ctx)
{
	if (!ours((void *)(long)ctx->data, (void *)(long)ctx->data_end))
		return XDP_PASS;
	hit();
	return XDP_DROP;
}
"""
TC = """
SEC("tc") int it(struct __sk_buff *skb)
{
	bpf_skb_pull_data(skb, 42);
	if (!ours((void *)(long)skb->data, (void *)(long)skb->data_end))
		return 0;
	hit();
	return 2; /* TC_ACT_SHOT */
}
"""
CGROUP_SKB = """
SEC("cgroup_skb/egress") int it(struct __sk_buff *skb)
{
	u16 port = 0;
	u8 protocol = 0;

	bpf_skb_load_bytes(skb, 9, &protocol, 1);
	bpf_skb_load_bytes(skb, 22, &port, 2);
	if (protocol != 17 || port != bpf_htons(PORT))
		return 1;
	hit();
	return 0;
}
"""
SOCKET = """
SEC("socket") int it(struct __sk_buff *skb)
{
	u16 port = 0;

	if (skb->protocol != bpf_htons(0x0800) || skb->pkt_type)
		return 0;
	if (!bpf_skb_load_bytes(skb, 36, &port, 2) && port == bpf_htons(PORT))
		hit();
	return -1;
}
"""
SOCK_CREATE = """
SEC("cgroup/sock_create") int it(struct bpf_sock *ctx)
{
	if (ctx->type == 2 && ctx->family == 2)
		hit();
	return 0;
}
"""


@pytest.fixture(autouse=True)
def node() -> Iterator[interfaces.Namespace]:
    """The test runs in a network namespace of its own: this machine's network sees nothing of it."""
    with network.namespace() as here, interfaces.entered(here):
        yield here


@pytest.fixture
def wire() -> Iterator[Wire]:
    with network.wire() as made:
        yield made


class Running:
    """One program in the agent's own way: fixed, proved, loaded, pinned and followed."""

    def __init__(
        self, root: pins.Root, source: str, target: dict[str, object], verdict: int | None, section: str
    ) -> None:
        data = support.compile_object(PRELUDE + source, prelude=False)
        self.blob = data if verdict is None else verdicts.fixed(data, {"it": verdict})
        self.instance = plan_pb2.Instance(
            digest=hashlib.sha256(self.blob + str(target).encode()).hexdigest()[:32], title=f"c/{section}",
            attachments=[plan_pb2.Attachment(program="it", **{section: target})],
        )  # fmt: skip
        self.executor = execute.Executor(root, cgroup_root="/")
        self.loaded = self.executor.load(self.instance, blob=self.blob, probe_maps={}, budget_bytes=0, filter_on=False)

    def hits(self) -> int:
        return int(maps.sum_lost(self.loaded.maps["hits"].fd)[0])

    def follow(self, pods: Pods, now_ns: int = 1) -> None:
        self.executor.follow(self.loaded, pods, now_ns)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.remove(self.loaded)


def no_xdp() -> bool:
    """Nothing is left on any interface: before Linux 6.9 a pin lets go of its link some milliseconds late."""
    return not any(each.xdp_program for each in netlink.interfaces())


Start = Callable[..., Running]


@pytest.fixture
def start(root: pins.Root) -> Start:
    def begin(source: str, verdict: int | None, /, **target: dict[str, object]) -> Running:
        ((section, where),) = target.items()
        return Running(root, source, where, verdict, section)

    return begin


@pytest.mark.parametrize("native", [False, True], ids=["generic", "native"])
@pytest.mark.shows("attach/xdp")
def test_xdp_counts_each_packet_and_lets_all_pass(wire: Wire, start: Start, native: bool) -> None:
    with start(XDP, 2, xdp={"interfaces": [wire.near], "native": native}) as running:
        assert wire.send_here(TIMES) == TIMES, "the program answers XDP_DROP, and is not heard"
        assert running.hits() == TIMES
        assert wire.near in running.loaded.ways[0] and "xdp" in running.loaded.ways[0]
    assert wire.send_here(23) == 23
    support.wait_until(no_xdp)


@pytest.mark.parametrize("egress", [False, True], ids=["ingress", "egress"])
@pytest.mark.shows("attach/tc")
def test_tc_counts_each_packet_and_lets_all_pass(wire: Wire, start: Start, egress: bool) -> None:
    with start(TC, -1, tc={"interfaces": [wire.near], "egress": egress}) as running:
        assert (wire.send_there if egress else wire.send_here)(TIMES) == TIMES
        assert running.hits() == TIMES
        assert (wire.send_here if egress else wire.send_there)(23) == 23
        assert running.hits() == TIMES, "only its own direction"
    index = socket.if_nametoindex(wire.near)
    assert netlink.filters(index, egress=egress) == []


def test_tc_by_clsact_counts_each_packet_and_goes_without_a_trace(
    wire: Wire, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels before 6.6 have; newer ones have it still."""
    monkeypatch.setattr(features, "tcx", lambda: False)
    index = socket.if_nametoindex(wire.near)
    with start(TC, -1, tc={"interfaces": [wire.near]}) as running:
        assert "tc ingress" in running.loaded.ways[0]
        (filter_,) = netlink.filters(index, egress=False)
        assert filter_.name.startswith("probefleet:") and filter_.name.endswith(":it")
        assert wire.send_here(TIMES) == TIMES
        assert running.hits() == TIMES
        # Killed, the agent leaves its filter; the next one puts its own in that one's place.
        links_network.spread(
            running.loaded.programs["it"], running.instance.attachments[0],
            links_network.Surroundings(mark=filter_.name.removesuffix(":it")),
        ).follow({}, 0)  # fmt: skip
        assert len(netlink.filters(index, egress=False)) == 1
    assert netlink.filters(index, egress=False) == []


def test_filters_that_a_killed_agent_left_are_swept_away(
    wire: Wire, root: pins.Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "tcx", lambda: False)
    index = socket.if_nametoindex(wire.near)
    running = Running(root, TC, {"interfaces": [wire.near], "egress": True}, -1, "tc")
    digest = running.instance.digest
    monkeypatch.setattr(links_network._TcFilter, "close", lambda _: None)
    running.executor.remove(running.loaded)
    assert len(netlink.filters(index, egress=True)) == 1
    assert links_network.sweep(root.path, but=[digest]) == 0
    assert links_network.sweep(root.path.parent / "another") == 0
    assert links_network.sweep(root.path) == 1
    assert netlink.filters(index, egress=True) == []


@pytest.mark.parametrize("kind", hooks_network.KINDS)
def test_what_a_packet_costs_on_its_way_to_a_program_is_measured(kind: str) -> None:
    assert 0 < hooks_network.measure(kind) < 100_000


def test_what_cannot_be_looked_at_is_said_and_what_is_attached_stays(
    wire: Wire, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(XDP, 2, xdp={"interfaces": ["pf*"]}) as running:
        with monkeypatch.context() as patched:
            patched.setattr(interfaces, "of_node", lambda _: (_ for _ in ()).throw(PermissionError("no")))
            running.follow({})
            (sentence,) = running.loaded.followers.sentences()
            assert sentence.endswith("it cannot be looked what is there: no")
        assert wire.send_here(23) == 23 and running.hits() == 23
        running.follow({})
        assert running.loaded.followers.sentences() == []


def test_two_tc_programs_both_count(wire: Wire, start: Start) -> None:
    support.needs(features.tcx)
    with (
        start(TC, -1, tc={"interfaces": [wire.near]}) as first,
        start(TC + "\n", -1, tc={"interfaces": ["pf*n"]}) as second,
    ):
        assert wire.send_here(TIMES) == TIMES
        assert (first.hits(), second.hits()) == (TIMES, TIMES)


@pytest.mark.shows("attach/socketFilter")
def test_a_socket_filter_counts_each_packet_and_keeps_none_from_others(wire: Wire, start: Start) -> None:
    with start(SOCKET, 0, socket_filter={"interfaces": [wire.near]}) as running:
        assert wire.send_here(TIMES) == TIMES
        assert running.hits() == TIMES
    assert wire.send_here(23) == 23


@pytest.mark.shows("attach/cgroupSkb")
def test_cgroup_skb_counts_what_the_cgroup_sends_and_lets_it_go(wire: Wire, start: Start) -> None:
    with support.in_cgroup("pf-test-skb") as path:
        with start(CGROUP_SKB, 1, cgroup_skb={"cgroup": path, "egress": True}) as running:
            assert wire.send_there(TIMES) == TIMES, "the program answers 0 (drop), and is not heard"
            assert running.hits() == TIMES
        assert wire.send_there(23) == 23


@pytest.mark.shows("attach/cgroupSock")
def test_cgroup_sock_counts_sockets_and_forbids_none(start: Start) -> None:
    with support.in_cgroup("pf-test-sock") as path:
        with start(SOCK_CREATE, 1, cgroup_sock={"cgroup": path}) as running:
            for _ in range(23):
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
            assert running.hits() == 23


def test_pods_are_found_by_their_cgroups_and_counted_in_their_own_network(wire: Wire, start: Start) -> None:
    """A process in the pod's cgroup and network namespace is all that a pod is here."""
    mount = cgroups.mount_point()
    folder = mount / "pf-test-pod"
    folder.mkdir()
    with interfaces.entered(wire.there):
        process = subprocess.Popen(["sleep", "600"])
    try:
        (folder / "cgroup.procs").write_text(str(process.pid))
        with start(XDP, 2, xdp={"pods": True}) as running:
            assert wire.send_there(23) == 23
            assert running.hits() == 0 and "nothing yet" in running.loaded.ways[0]
            running.follow({"0a-pod": ["/pf-test-pod"]})
            assert wire.send_there(TIMES) == TIMES
            assert running.hits() == TIMES
            assert f"{wire.far} of pod 0a-pod" in running.loaded.ways[0]
            running.follow({}, 2)
            with interfaces.entered(wire.there):
                support.wait_until(no_xdp)
            assert wire.send_there(23) == 23
            assert running.hits() == TIMES, "a pod that is not selected any more is not counted"
    finally:
        process.kill()
        process.wait()
        folder.rmdir()


def test_a_pod_on_the_nodes_network_is_said_and_not_counted_as_the_node(start: Start) -> None:
    with support.in_cgroup("pf-test-host") as path, start(XDP, 2, xdp={"pods": True}) as running:
        running.follow({"0b-pod": [path]})
        (sentence,) = running.loaded.followers.sentences()
        assert "uses the node's network" in sentence


def test_interfaces_of_a_pattern_come_and_go_and_the_gap_is_said(start: Start) -> None:
    with start(XDP, 2, xdp={"interfaces": ["pfx*"]}) as running:
        assert running.loaded.followers.sentences() == ["no interface fits pfx* now"]
        ip("link", "add", "pfx1", "type", "veth", "peer", "name", "other1")
        try:
            looked_ns = running.loaded.followers.each[0].spread.looked_ns
            running.follow({}, looked_ns + 5)
            assert running.loaded.followers.sentences() == []
            ((start_ns, end_ns, why),) = running.loaded.gaps
            assert (start_ns, end_ns) == (looked_ns, looked_ns + 5) and why.startswith("pfx1 came")
            folder = running.executor.root.instances / running.instance.digest
            assert [path.name for path in folder.glob("link_*")] == ["link_0_it"]
        finally:
            ip("link", "del", "pfx1")
        running.follow({}, looked_ns + 9)
        assert list(folder.glob("link_*")) == [] and "nothing yet" in running.loaded.ways[0]


def test_an_agent_that_starts_again_goes_on_counting(wire: Wire, root: pins.Root) -> None:
    target: dict[str, object] = {"interfaces": [wire.near]}
    running = Running(root, XDP, target, 2, "xdp")
    assert wire.send_here(TIMES) == TIMES
    running.loaded.close()  # as if killed: pins stay
    assert wire.send_here(23) == 23
    running.loaded = running.executor.adopt(running.instance.digest, stopped_ns=1)
    running.follow({}, 5)
    assert running.loaded.gaps == [], "the link never went"
    assert wire.send_here(23) == 23
    assert running.hits() == TIMES + 46
    running.executor.remove(running.loaded)
    support.wait_until(no_xdp)


POLICY = """
apiVersion: probefleet.io/v1alpha1
kind: ProbePolicy
metadata: {name: datagrams}
spec:
  scope: Cluster
  program:
    c:
      source: |
        #include <probefleet.h>
        struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __type(key, be_port_t); __type(value, u64); }
        datagrams SEC(".maps");

        static __always_inline int count(void *data, void *end)
        {
            struct ethhdr *eth = data;
            struct iphdr *ip = data + sizeof(*eth);
            struct udphdr *udp = (void *)(ip + 1);

            if ((void *)(udp + 1) > end || eth->h_proto != bpf_htons(0x0800) || ip->protocol != 17)
                return 0;
            probefleet_add(&datagrams, &udp->dest, 1);
            return 0;
        }

        SEC("xdp") int received(struct xdp_md *ctx)
        {
            return count((void *)(long)ctx->data, (void *)(long)ctx->data_end);
        }

        SEC("tc") int sent(struct __sk_buff *skb)
        {
            bpf_skb_pull_data(skb, 42);
            return count((void *)(long)skb->data, (void *)(long)skb->data_end);
        }

        char LICENSE[] SEC("license") = "GPL";
  attach:
  - {program: received, xdp: {interfaces: ["pf*n"]}}
  - {program: sent, tc: {interfaces: ["pf*n", other*], direction: egress}}
"""


def test_a_policy_counts_by_port_what_an_interface_receives_and_sends(wire: Wire, tmp_path: Path) -> None:
    """XDP_ABORTED (0), which the program returns, would drop every packet: all arrive."""
    path = tmp_path / "datagrams.yaml"
    path.write_text(POLICY)
    command = [sys.executable, "-m", "probefleet_cli.main", "run", str(path), "--output", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tree = mounts.BPFFS / f"probefleet-run-{process.pid}"
    deadline = time.monotonic() + 180
    # bpffs tells nobody of new names, so this looks again and again; a run that died ends it.
    while not list(tree.glob("probefleet/instances/[0-9a-f]*/link_*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert wire.send_here(TIMES) == TIMES
    assert wire.send_there(23) == 23
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    report = json.loads(said)
    (output,) = report["status"]["outputs"]
    assert {row["key"][0]: row["value"] for row in output["total"]["rows"]} == {str(PORT): TIMES + 23}
    assert report["status"]["columns"]["lost"] == "0"
    assert not tree.exists()
    support.wait_until(no_xdp)


def test_a_taken_xdp_hook_is_left_to_its_owner(wire: Wire, start: Start) -> None:
    with start(XDP, 2, xdp={"interfaces": [wire.near]}) as owner:
        with pytest.raises(KernelError, match=rf"XDP of {wire.near}.*program it \(id \d+\) is there; it is left"):
            start(XDP + "\n", 2, xdp={"interfaces": [wire.near]})
        assert wire.send_here(23) == 23 and owner.hits() == 23
        with start(XDP + "\n\n", 2, xdp={"interfaces": ["pf*", "lo"]}) as second:
            assert second.loaded.ways == ["it: xdp (generic) pf* lo on lo"]
            assert [text.split(":")[0] for text in second.loaded.followers.sentences()] == [wire.near]


def test_a_cgroups_hook_that_its_owner_shares_with_nobody_is_left_to_it(wire: Wire, start: Start) -> None:
    """bpftool attaches without BPF_F_ALLOW_MULTI: nobody else may be there, nor below."""
    data = support.compile_object(PRELUDE + CGROUP_SKB.replace("return 0;", "return 1;"), prelude=False)
    with support.in_cgroup("pf-test-taken") as path, libbpf.open_object(data, "owner") as opened:
        opened.load()
        folder = f"{cgroups.mount_point()}{path}"
        with opened.program_fd("it") as owner, opened.map_fd("hits") as hits:
            words = ["egress", "id", str(syscall.program_info(owner).id)]
            subprocess.run(["bpftool", "cgroup", "attach", folder, *words], check=True, capture_output=True)
            try:
                says = (
                    rf"^attach to egress of {path}: .*\(EBUSY\). A program was attached there, or above, that allows no"
                )
                with pytest.raises(KernelError, match=says) as caught:
                    start(CGROUP_SKB, 1, cgroup_skb={"cgroup": path, "egress": True})
                assert caught.value.reason == "TargetBusy"
                assert wire.send_there(23) == 23 and maps.sum_lost(hits)[0] == 23, "it is left in place"
            finally:
                subprocess.run(["bpftool", "cgroup", "detach", folder, *words], check=True, capture_output=True)


def test_an_interface_that_is_not_there_is_named_with_near_ones(wire: Wire, start: Start) -> None:
    with pytest.raises(NoSuchTarget, match=rf"no interface {wire.near}x on this machine; near: .*{wire.near}"):
        start(XDP, 2, xdp={"interfaces": [f"{wire.near}x"]})


def test_a_program_whose_verdict_is_not_fixed_is_not_loaded(wire: Wire, start: Start, root: pins.Root) -> None:
    # A program is where a descriptor, a pin or a link is; no XDP is on any interface.
    before = damage.descriptors(), damage.pins(root.path)
    with pytest.raises(NotObserving, match="something other than XDP_PASS"):
        start(XDP, None, xdp={"interfaces": [wire.near]})
    assert (damage.descriptors(), damage.pins(root.path)) == before
    assert no_xdp()


def test_what_is_compiled_on_the_node_is_not_asked_about_packets(root: pins.Root) -> None:
    instance = plan_pb2.Instance(digest="b" * 32, title="bcc/it")
    instance.bcc.source = "int it(struct xdp_md *ctx) { return 1; }"
    instance.attachments.add(program="it").xdp.interfaces.append("lo")
    with pytest.raises(NotObserving, match="its verdict was not fixed"):
        execute.Executor(root).load(instance, blob=None, probe_maps={}, budget_bytes=0, filter_on=False)


def test_a_program_that_writes_into_packets_is_not_loaded(wire: Wire, start: Start) -> None:
    source = """
    SEC("xdp") int it(struct xdp_md *ctx)
    {
        u8 *data = (void *)(long)ctx->data;
        if (data + 1 > (u8 *)(long)ctx->data_end)
            return 2;
        *data = 0;
        return 2;
    }
    """
    with pytest.raises(ProbefleetError, match="may write into the packet"):
        start(source, 2, xdp={"interfaces": [wire.near]})
