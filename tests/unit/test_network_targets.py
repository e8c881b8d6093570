"""Interfaces and cgroups as targets: what SEC() and a policy say of them, and what a plan becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
from probefleet_core import catalog, errors, network_targets, planner, policy, to_wire, values
from probefleet_core.network_targets import CgroupSkb, CgroupSock, Hook, SocketFilter, Tc, Xdp
from probefleet_wire import bpf_code, network_programs, verdicts

from tests import bpf_c

PRELUDE = """
#include <probefleet.h>
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); }
packets SEC(".maps");
char LICENSE[] SEC("license") = "GPL";
"""
COUNTS = """
SEC("xdp") int on_packet(struct xdp_md *ctx) { u32 zero = 0; probefleet_add(&packets, &zero, 1); return XDP_DROP; }
"""
WRITES = """
SEC("xdp") int on_packet(struct xdp_md *ctx)
{
	u8 *data = (void *)(long)ctx->data;

	if (data + 1 <= (u8 *)(long)ctx->data_end)
		*data = 0;
	bpf_xdp_adjust_head(ctx, 4);
	return XDP_PASS;
}
"""


def compiled(source: str) -> bytes:
    return bpf_c.compiled(PRELUDE + source)


def manifest(source: str, *attach: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": policy.API_VERSION,
        "kind": "ProbePolicy",
        "metadata": {"name": "packets"},
        "spec": {"scope": "Cluster", "program": {"c": {"source": source}}, "attach": list(attach), **spec},
    }


def planned(source: str, *attach: dict[str, Any], **spec: Any) -> planner.Planned:
    parsed = policy.parse_policy(manifest(source, *attach, **spec))
    return planner.plan(parsed, catalog=catalog.Catalog({}), elf=compiled(source), probe_maps={})


def refused(source: str, *attach: dict[str, Any], **spec: Any) -> list[str]:
    with pytest.raises(errors.Refused) as caught:
        planned(source, *attach, **spec)
    return [str(problem) for problem in caught.value.problems]


ON_ETH = {"program": "on_packet", "xdp": {"interfaces": ["eth*"]}}


@pytest.mark.parametrize(
    ("section", "kind", "fits", "target"),
    [
        ("xdp", network_programs.XDP, "xdp", None),
        ("?xdp.frags", network_programs.XDP, "xdp", None),
        ("tc", network_programs.TC, "tc", None),
        ("tcx/egress", network_programs.TC, "tc", None),
        ("classifier", network_programs.TC, "tc", None),
        ("socket", network_programs.SOCKET_FILTER, "socketFilter", None),
        ("cgroup_skb/egress", network_programs.CGROUP_SKB, "cgroupSkb", CgroupSkb(egress=True)),
        ("cgroup/skb", network_programs.CGROUP_SKB, "cgroupSkb", None),
        ("cgroup/sock", network_programs.CGROUP_SOCK, "cgroupSock", CgroupSock()),
        ("cgroup/post_bind6", network_programs.CGROUP_SOCK, "cgroupSock", CgroupSock(hook=Hook.POST_BIND6)),
    ],
)
def test_sections_mean_what_libbpf_says(
    section: str, kind: network_programs.Kind, fits: str, target: network_targets.Target | None
) -> None:
    found = network_targets.read_section(section)
    assert found is not None
    assert (found.kind, found.fits, found.target) == (kind, (fits,), target)


@pytest.mark.parametrize("section", ["xdp/devmap", "cgroup/connect4", "sk_skb", "kprobe/x", "sockops", "lwt_in"])
def test_other_sections_are_not_of_the_network_or_refused(section: str) -> None:
    assert network_targets.read_section(section) is None


@pytest.mark.parametrize(
    ("attach", "target", "words"),
    [
        ({"xdp": {"interfaces": ["eth0", "eth0"], "mode": "native"}}, Xdp(("eth0",), native=True), "xdp eth0 (native)"),
        ({"xdp": {"pods": True}}, Xdp(pods=True), "xdp the selected pods (generic)"),
        ({"tc": {"interfaces": ["a", "b*"], "direction": "egress"}}, Tc(("a", "b*"), egress=True), "tc a b* egress"),
        ({"socketFilter": {"interfaces": ["lo"]}}, SocketFilter(("lo",)), "socketFilter lo"),
        ({"cgroupSkb": {"direction": "ingress"}}, CgroupSkb(), "cgroupSkb the node ingress"),
        (
            {"cgroupSock": {"hook": "postBind4", "cgroup": "/a"}},
            CgroupSock("/a", hook=Hook.POST_BIND4),
            "cgroupSock /a postBind4",
        ),
    ],
)
def test_a_policy_says_where(attach: dict[str, Any], target: network_targets.Target, words: str) -> None:
    parsed = policy.parse_policy(manifest("int x;", {"program": "on_packet", **attach}))
    assert parsed.attach == (values.Attachment("on_packet", target),)
    assert to_wire.describe(target) == words
    (kind,) = attach
    wire = to_wire.attachment(parsed.attach[0])
    found = getattr(wire, str(wire.WhichOneof("target")))
    assert to_wire.kind_of(target) == kind and found.pods == target.pods


@pytest.mark.parametrize(
    ("attach", "words"),
    [
        ({"xdp": {}}, "no place: it looks at interfaces of the node, or at the pods' own"),
        ({"xdp": {"interfaces": ["eth0"], "pods": True}}, "interfaces and pods at once"),
        ({"xdp": {"interfaces": ["a name of its own"]}}, "Write an interface's name, or a pattern such as eth*"),
        ({"xdp": {"interfaces": []}}, "interfaces: empty: it would look at nothing"),
        ({"xdp": {"pods": False}}, "only pods: true says something"),
        ({"tc": {"interfaces": ["eth0"]}}, "direction"),
        ({"cgroupSkb": {"direction": "ingress", "cgroup": "/a", "pods": True}}, "cgroup and pods at once"),
        ({"cgroupSock": {"hook": "bind"}}, "hook"),
    ],
)
def test_what_is_wrong_with_a_place_is_said(attach: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.PolicyRefused) as caught:
        policy.parse_policy(manifest("int x;", {"program": "on_packet", **attach}))
    assert words in str(caught.value)


def test_the_object_of_a_plan_lets_every_packet_pass() -> None:
    made = planned(COUNTS, ON_ETH)
    sha256 = made.plan.instance.object.sha256
    assert made.objects[sha256] != compiled(COUNTS)
    assert verdicts.pass_proved(bpf_code.read(made.objects[sha256]), "on_packet", 2)
    assert made.summary.programs == ("on_packet: xdp eth* (generic)",)
    assert made.plan.instance.attachments[0].xdp.interfaces == ["eth*"]


def test_what_could_change_packets_is_refused_with_its_line() -> None:
    found = refused(WRITES, ON_ETH)
    assert len(found) == 2
    assert "on_packet: it calls bpf_xdp_adjust_head" in found[0] and "line" in found[0]
    assert "on_packet: it may write into the packet (line" in found[1]
    assert "observes only" in found[1]


def test_a_program_without_a_place_is_told_what_to_write() -> None:
    (found,) = refused(COUNTS)
    assert 'SEC("xdp") names no target' in found and "xdp" in found


def test_a_program_of_one_type_on_a_place_for_another_is_refused() -> None:
    (found,) = refused(COUNTS, {"program": "on_packet", "tc": {"interfaces": ["eth0"], "direction": "ingress"}})
    assert 'tc for a program of SEC("xdp")' in found


def test_attached_to_pods_the_program_is_the_policys_own_and_may_select() -> None:
    """Without probefleet_selected(): it sees nothing but the packets of these pods."""
    at_pods = {"program": "on_packet", "xdp": {"pods": True}}
    pods = {"selector": {"matchLabels": {"app": "web"}}}
    made = planned(COUNTS, at_pods, pods=pods)
    assert made.plan.instance.pods_of == made.plan.policy_uid != ""
    assert planned(COUNTS, ON_ETH).plan.instance.pods_of == ""
    assert "cannot leave other pods out" in refused(COUNTS, ON_ETH, pods=pods)[0]


def test_bcc_programs_are_not_asked_about_packets() -> None:
    given = manifest("int x;", ON_ETH)
    given["spec"]["program"] = {
        "bcc": {"source": "BPF_ARRAY(n, u64, 1); int on_packet(struct xdp_md *c) { return 2; }"}
    }
    with pytest.raises(errors.PolicyRefused, match="BCC compiles there"):
        planner.plan(policy.parse_policy(given), catalog=catalog.Catalog({}), elf=None, probe_maps={})
