"""What is to be said of the pods that ``run`` is to count: before it begins, where nobody here can tell; after it,
where there was none. A count of nothing must not look like a measurement.

``run`` calls it around the measurement. ``-n`` needs names, which the kubelet's folders have as well; labels, by ``-l``
or a policy's own ``spec.pods.selector``, are known to the container runtime alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from probefleet_core import values

from probefleet_cli import local_pods, measurement, pod_watch, preparation, selectors
from probefleet_cli.failures import BadInput

HOW = (
    "Name the socket of the container runtime by --runtime-endpoint (`crictl info` and the kubelet's "
    "--container-runtime-endpoint say which one it is), or measure on the cluster: kubectl probefleet run"
)


def check(prepared: Sequence[preparation.Prepared], watch: pod_watch.Watch, choice: selectors.Choice) -> str | None:
    """Who is chosen is known, or BadInput says what to do. Words for a person where it is nobody yet."""
    by_labels = next((each for each in prepared if each.policy.pods not in (None, values.Selector())), None)
    if by_labels is not None:
        words = choice.words if choice.labels else f"{by_labels.where}: spec.pods.selector"
        if watch.runtime is None:
            or_names = " Pods of a namespace can be had without: -n NAMESPACE." if watch.pods.names else ""
            raise BadInput(
                f"{words}: which pods have these labels is for the container runtime to say, and none answers here:\n"
                f"{watch.without}\n{HOW}.{or_names}"
            )
        if watch.silence is not None:
            raise BadInput(f"{words}: {watch.runtime.name} at {watch.runtime.socket} {watch.silence}. {HOW}")
    if choice and watch.runtime is None and not watch.pods.names:
        raise BadInput(
            f"{choice.words}: there are no pods on this machine, as far as it can be seen: {local_pods.PODS} has none, "
            f"and no container runtime answers:\n{watch.without}\n{HOW}"
        )
    if choice and not any(preparation.selected(each.policy, watch.pods, choice.namespace) for each in prepared):
        there = ", ".join(watch.pods.namespaces) or "none"
        return f"{choice.words}: no such pod is here yet; any that comes is counted. Namespaces with pods here: {there}"
    nobody = [each for each in prepared if not choice and preparation.selected(each.policy, watch.pods, None) == ()]
    return "\n".join(f"{_only(each)}, and none is on this machine yet. {_instead(each)}" for each in nobody) or None


def warnings(measured: measurement.Measurement, watch: pod_watch.Watch, choice: selectors.Choice) -> Iterator[str]:
    """What a reader of the numbers has to know."""
    if watch.silence is not None and watch.runtime is not None:
        since = time.strftime("%H:%M:%S", time.localtime(watch.silent_since))
        yield (
            f"{watch.runtime.name} at {watch.runtime.socket} {watch.silence}, since {since}: pods that came later are "
            "known by what the kubelet wrote, and chosen by no label"
        )
    for each, chosen in zip(measured.prepared, measured.chosen(), strict=True):
        if chosen == () and not choice:
            yield f"{_only(each)}, and none was on this machine"


def _only(each: preparation.Prepared) -> str:
    whose = "the pods that it selects" if each.policy.pods else f"pods of namespace {each.policy.namespace}"
    return f"{each.where}: it counts {whose} only"


def _instead(each: preparation.Prepared) -> str:
    if each.policy.pods:
        return "Leave spec.pods out to count all that its scope has"
    return "scope: Cluster counts all that runs here, -n NAMESPACE the pods of another namespace"
