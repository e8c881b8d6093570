"""The operator's own health for Prometheus; merged outputs are in exposition.py.

Module-level, as prometheus_client means it: any module counts where the thing happens. `/metrics` (query.py) serves it.
"""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Counter, Gauge, Histogram

SESSIONS = Gauge("probefleet_sessions", "Agents with an open stream.")
STREAMS_REFUSED = Counter(
    "probefleet_streams_refused", "Streams that were refused or closed for what they said, by gRPC code.", ["code"]
)
PUSHES = Counter("probefleet_pushes", "Pushes sent to agents.")
SENT_BYTES = Counter("probefleet_sent_bytes", "Bytes of messages sent to agents.")
RECEIVED_BYTES = Counter("probefleet_received_bytes", "Bytes of messages received from agents.")
SLOWED = Counter("probefleet_streams_slowed", "Reads that were delayed because a stream was over its rate.")
BATCHES = Counter("probefleet_batches", "Batches merged.")
TABLES_IGNORED = Counter(
    "probefleet_tables_ignored", "Tables and event chunks of policies that the node does not run (late or hostile)."
)
FOREIGN_ROWS = Gauge(
    "probefleet_foreign_rows", "Rows that nodes sent of pods which are on other nodes: wrong or hostile agents."
)
NODES_AHEAD = Gauge(
    "probefleet_nodes_ahead", "Connected nodes that have applied a push of an operator with a higher term than ours."
)
RECONCILE_SECONDS = Histogram(
    "probefleet_reconcile_seconds",
    "Time to decide every node's desired state.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)
COMPILE_SECONDS = Histogram(
    "probefleet_compile_seconds", "Time of one compilation.", buckets=(0.1, 0.3, 1, 3, 10, 30, 60)
)
COMPILE_CACHE = Counter(
    "probefleet_compile_cache_requests",
    "Sources that were to be compiled here, by whether what came of them was known (hit) or not (miss).",
    ["result"],
)
COMPILE_CACHE_BYTES = Gauge("probefleet_compile_cache_bytes", "Objects and mistakes that are kept.")
AGENT_COMPILE_CACHE = Gauge(
    "probefleet_agent_compile_cache_requests",
    "BCC programs that connected agents were to compile since they started, likewise.",
    ["result"],
)
for _result in ("hit", "miss"):  # 0 is a measurement too
    COMPILE_CACHE.labels(_result)
    AGENT_COMPILE_CACHE.labels(_result)
POLICIES = Gauge("probefleet_policies", "ProbePolicies, by whether they could be planned.", ["planned"])
API_WRITES = Counter("probefleet_api_writes", "Writes to the API server.", ["kind", "result"])
LOOP_LAG_SECONDS = Gauge("probefleet_loop_lag_seconds", "How late the main loop woke up at the last look.")
LEADING = Gauge("probefleet_leading", "1 while this replica holds the Lease.")


async def watch_loop_lag(period_seconds: float = 1.0) -> None:
    """Measure for ever how much later than asked the loop comes round."""
    while True:
        asked = time.monotonic()
        await asyncio.sleep(period_seconds)
        LOOP_LAG_SECONDS.set(max(0.0, time.monotonic() - asked - period_seconds))
