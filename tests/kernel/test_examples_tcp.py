"""The example of TCP latency at the tracepoints that newer kernels have near its functions: same programs, same counts.

The example itself needs kprobes: `vm_only/test_examples_kprobes.py` runs it as it is. Linux 6.16 and later have
tcp_sendmsg_locked, where a message is about to be copied, and all have tcp_probe, where an established socket receives.
The machine's own connections are left out, by their network namespace.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from probefleet_agent.kernel import btf_kernel

from tests.kernel import examples_runner, tcp_latency

pytestmark = pytest.mark.timeout(2 * examples_runner.SECONDS)
AT_TRACEPOINTS = {
    'SEC("kprobe/tcp_sendmsg")': 'SEC("tp_btf/tcp_sendmsg_locked")',
    "BPF_KPROBE(on_send, struct sock *sk, struct msghdr *msg, size_t size)": (
        "BPF_PROG(on_send, struct sock *sk, struct msghdr *msg)"
    ),
    "packet.size = size;": "packet.size = BPF_CORE_READ(msg, msg_iter.count);",
    'SEC("kprobe/tcp_v4_do_rcv")': 'SEC("tp_btf/tcp_probe")',
    "BPF_KPROBE(on_receive,": "BPF_PROG(on_receive,",
    'SEC("kprobe/tcp_v4_destroy_sock")': 'SEC("tp_btf/tcp_destroy_sock")',
    "BPF_KPROBE(on_destroy,": "BPF_PROG(on_destroy,",
    "BPF_CORE_READ(sk, __sk_common.skc_family) != 2": "BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum) != NETWORK",
}


def test_tcp_latency_by_thread_and_by_socket_at_tracepoints(tmp_path: Path) -> None:
    if "tcp_sendmsg_locked" not in btf_kernel.raw_tracepoints():
        pytest.skip("this kernel has no tracepoint tcp_sendmsg_locked (Linux 6.16)")
    text = (examples_runner.EXAMPLES / "tcp-latency.yaml").read_text()
    for what, instead in AT_TRACEPOINTS.items():
        assert what in text
        text = text.replace(what, instead)
    policies = tmp_path / "tcp-latency.yaml"
    (tmp_path / "sys").mkdir()
    with tcp_latency.own_loopback(tmp_path / "sys") as steering:
        policies.write_text(text.replace("NETWORK", str(Path("/proc/thread-self/ns/net").stat().st_ino)))
        tcp_latency.hold(policies, steering)
