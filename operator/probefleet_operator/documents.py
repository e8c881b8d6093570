"""What the operator says of policies: their statuses, their ProbeReports, and the answers of the query API.

Documents are only *offered* and *touched* here; kube.py decides when `_status_document` and `_report_document` are
called and whether their outcome is written.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Iterable

import structlog
from probefleet_core import aggregate, report, values
from probefleet_wire.v1 import stream_pb2

from probefleet_operator import api, controller, kube, map_status, planning, query, results, session, status

log = structlog.get_logger(__name__)

STATUS_SECONDS = 1.0  # a policy's status is written at most this often,
STATUS_SECONDS_PER_NODE = (
    0.002  # and on large clusters less: counting 5,000 nodes for each of a hundred policies adds up
)


class Documents:
    """Belongs to the main loop."""

    def __init__(
        self,
        control: controller.Controller,
        plans: planning.Planning,
        merged: results.Results,
        publisher: kube.Publisher,
        recorder: kube.Recorder,
        tokens: query.Tokens,
        *,
        report_seconds: float,
    ) -> None:
        self._control, self._plans, self._merged = control, plans, merged
        self._publisher, self._recorder, self._tokens = publisher, recorder, tokens
        self._report_seconds = report_seconds
        self._conditions: dict[values.PolicyUid, list[api.Json]] = {}
        self._map_conditions: dict[str, list[api.Json]] = {}
        self._latest: dict[values.PolicyUid, aggregate.Result] = {}
        merged.on_samples = self._samples_changed
        merged.on_status = self._status_changed

    # When something changes.

    def decided(self) -> None:
        """After every round of the controller: documents come and go with policies."""
        self._merged.refresh()
        entries = self._plans.entries
        wanted = {f"{kind}/{uid}" for uid in entries for kind in ("status", "report")}
        wanted |= {f"map/{uid}" for uid in self._plans.maps}
        for key in self._publisher.keys() - wanted:
            self._publisher.withdraw(key, delete=key.startswith("report/"))
        status_seconds = max(STATUS_SECONDS, STATUS_SECONDS_PER_NODE * len(self._control.sessions()))
        for uid in entries:
            self._publisher.offer(
                f"status/{uid}", functools.partial(self._status_document, uid), interval_seconds=status_seconds
            )
            self._publisher.offer(
                f"report/{uid}", functools.partial(self._report_document, uid), interval_seconds=self._report_seconds
            )
            self._publisher.touch(f"status/{uid}")
            self._publisher.touch(f"report/{uid}")  # there from the start, for its query token and its coverage
        for map_uid in self._plans.maps:
            key = f"map/{map_uid}"
            self._publisher.offer(key, functools.partial(self._map_document, map_uid), interval_seconds=status_seconds)
            self._publisher.touch(key)
        for entry in entries.values():
            if entry.refusal is not None:
                self._recorder.warn(entry.raw, entry.refusal.reason, entry.refusal.message, action="Plan")
        for uid in self._conditions.keys() - entries.keys():
            del self._conditions[uid]
        for gone in self._map_conditions.keys() - self._plans.maps.keys():
            del self._map_conditions[gone]
        for uid in self._latest.keys() - entries.keys():
            del self._latest[uid]

    def _samples_changed(self, uid: values.PolicyUid) -> None:
        self._publisher.touch(f"report/{uid}")

    def _status_changed(self, uid: values.PolicyUid) -> None:
        self._publisher.touch(f"status/{uid}")

    # What is written.

    def _status_document(self, uid: values.PolicyUid) -> kube.Document | None:
        entry = self._plans.entries.get(uid)
        if entry is None:
            return None
        previous = self._conditions.get(uid) or (entry.raw.get("status") or {}).get("conditions") or []
        rendered = status.status_of(self._facts(entry), previous=previous, now=datetime.datetime.now(datetime.UTC))
        self._conditions[uid] = rendered["conditions"]
        return kube.Document(
            kind="ProbePolicy",
            path=f"{api.GROUP_PATH}/namespaces/{entry.namespace}/probepolicies/{entry.name}",
            body=None,
            status={
                "apiVersion": "probefleet.io/v1alpha1",
                "kind": "ProbePolicy",
                # With the uid, an apply that comes too late does not bring a deleted policy back.
                "metadata": {"name": entry.name, "uid": entry.uid},
                "status": rendered,
            },
        )

    def _report_document(self, uid: values.PolicyUid) -> kube.Document | None:
        entry, body = self._plans.entries.get(uid), self.live_report(uid)
        if entry is None or body is None:
            return None
        owner = {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbePolicy",
            "name": entry.name,
            "uid": entry.uid,
            "controller": True,
            "blockOwnerDeletion": False,
        }
        head = {key: body[key] for key in ("apiVersion", "kind")}
        return kube.Document(
            kind="ProbeReport",
            path=f"{api.GROUP_PATH}/namespaces/{entry.namespace}/probereports/{entry.name}",
            body={**head, "metadata": {"name": entry.name, "ownerReferences": [owner]}},
            status={**head, "metadata": {"name": entry.name}, "status": body["status"]},
        )

    def live_report(self, uid: values.PolicyUid) -> api.Json | None:
        """Its ProbeReport of now; None before it has a plan and a place, and where the stored one says more."""
        entry = self._plans.entries.get(uid)
        if entry is None or self._control.placement is None:
            return None
        latest = self._merged.result(uid)
        if latest is None or self._merged.is_told_by_earlier(latest):
            return None
        self._latest[uid] = latest
        self._publisher.touch(f"status/{uid}")  # rate, overhead and coverage stand there too
        body = report.status(latest)
        body["query"] = {"token": self._tokens.of(uid)}
        return {
            "apiVersion": "probefleet.io/v1alpha1",
            "kind": "ProbeReport",
            "metadata": {"namespace": entry.namespace, "name": entry.name},
            "status": body,
        }

    def _map_document(self, uid: str) -> kube.Document | None:
        entry, raw = self._plans.maps.get(uid), self._plans.raw_map(uid)
        if entry is None or raw is None:
            return None
        users = [each for each in self._plans.entries.values() if planning.uses_map(each, uid)]
        desired = self._control.desired()
        nodes = sorted({node for user in users for node in desired.get(user.uid, ())})
        facts = map_status.MapFacts(
            generation=int(raw["metadata"].get("generation", 0)),
            settled=entry.generation == int(raw["metadata"].get("generation", 0)),
            refusal=(entry.refusal.reason, entry.refusal.message) if entry.refusal else None,
            policies=[user.name for user in users],
            max_entries=entry.compiled.probe_map.max_entries if entry.compiled else 0,
            said={node: self._map_on(node, uid) for node in nodes},
        )
        previous = self._map_conditions.get(uid) or (raw.get("status") or {}).get("conditions") or []
        rendered = map_status.status_of(facts, previous=previous, now=datetime.datetime.now(datetime.UTC))
        self._map_conditions[uid] = rendered["conditions"]
        return kube.Document(
            kind="ProbeMap",
            path=f"{api.GROUP_PATH}/namespaces/{entry.namespace}/probemaps/{entry.name}",
            body=None,
            status={
                "apiVersion": "probefleet.io/v1alpha1",
                "kind": "ProbeMap",
                "metadata": {"name": entry.name, "uid": entry.uid},
                "status": rendered,
            },
        )

    def _map_on(self, node: values.NodeName, uid: str) -> stream_pb2.MapStatus | None:
        here = self._control.sessions().get(node)
        return next((each for each in here.probe_maps if each.uid == uid), None) if here else None

    def _facts(self, entry: planning.Entry) -> status.Facts:
        decided = self._control.placement
        names = sorted(decided.desired.get(entry.uid, ())) if decided else []
        parsed = entry.policy
        latest = self._latest.get(entry.uid)
        return status.Facts(
            generation=entry.generation,
            settled=not entry.pending,
            refusal=(entry.refusal.reason, entry.refusal.message) if entry.refusal else None,
            suspended=parsed is not None and parsed.suspend,
            expired=parsed is not None and controller.expired(parsed, time.time_ns()),
            placed=decided is not None,
            nodes=[self._node(name, entry.uid) for name in names],
            held=[held for held in decided.held if held.policy == entry.uid] if decided else [],
            program=planning.program_title(entry),
            coverage=(latest.coverage.sampled, latest.coverage.selected) if latest and latest.since_ns else None,
            rate=report.rate_column(latest) if latest else "",
            overhead=report.overhead_column(latest.cost) if latest else "",
            cost=report.cost(latest.cost) if latest and latest.since_ns else None,
        )

    def _node(self, name: values.NodeName, policy: values.PolicyUid) -> status.NodeFacts:
        here, hello = self._control.sessions().get(name), self._control.hello(name)
        return status.NodeFacts(
            name=name,
            kernel=session.kernel_class(hello) if hello else None,
            connected=here is not None,
            said=here.said_of(policy) if here is not None else None,
        )

    # What the query API and the metrics ask.

    def results(self) -> Iterable[aggregate.Result]:
        """The results that reports were last made from."""
        return list(self._latest.values())

    def find(self, namespace: str, name: str) -> values.PolicyUid | None:
        """The policy of this name, if there is one."""
        for uid, entry in self._plans.entries.items():
            if entry.name == name and entry.namespace == namespace:
                return uid
        return None

    def node_rows(self, uid: values.PolicyUid) -> list[api.Json]:
        """Its nodes, each with what it says of the policy."""
        decided = self._control.placement
        rows: list[api.Json] = []
        for name in sorted(decided.desired.get(uid, ())) if decided else []:
            node, here = self._node(name, uid), self._control.sessions().get(name)
            hello, said = self._control.hello(name), node.said
            row: api.Json = {
                "name": name,
                "state": stream_pb2.PolicyStatus.State.Name(said.state) if said else "UNKNOWN",
                "connected": node.connected,
                "kernel": hello.kernel_release if hello else "",
                "agent": hello.agent_version if hello else "",
                "generation": said.generation if said else 0,
                "reason": said.reason if said else ("" if here else "NoAgent"),
                "message": said.message if said else ("" if here else "no agent of this node is connected"),
                "log": said.log_tail if said else "",
                "ways": list(said.ways) if said else [],
            }
            if here is not None and here.last_batch_at:
                row["sampleAgeSeconds"] = round(time.time() - here.last_batch_at, 1)
            rows.append(row)
        return rows

    def event_outputs(self, uid: values.PolicyUid) -> tuple[str, ...]:
        """Its outputs that are events."""
        merged = self._merged.aggregate_of(uid)
        return merged.event_outputs if merged else ()

    def event_page(self, uid: values.PolicyUid, output: str, cursor: int) -> api.Json:
        """Records since a cursor; raises KeyError where policy or output has gone."""
        merged = self._merged.aggregate_of(uid)
        if merged is None:
            raise KeyError(uid)
        page = merged.events_since(output, cursor, names=self._merged.name_of)
        return {"cursor": page.cursor, "missed": page.missed, "records": list(page.records)}

    async def wait_news(self, seconds: float) -> None:
        """Return when a batch came, or after that time."""
        await self._merged.wait_news(seconds)
