"""A Kubernetes object in, a frozen value out, or everything that is wrong with it.

``handlers`` (operator) and ``probefleet check`` call ``parse_policy`` and ``parse_probe_map`` with the object as YAML or
the API server gave it. In a cluster the CRD has refused most mistakes already; on one machine this module is all there
is, so it holds the same bounds (a test walks both and compares). Unknown fields are refused with near matches, as
``kubectl`` does by its strict validation.
"""

from __future__ import annotations

from collections.abc import Mapping

from probefleet_core import values


def parse_policy(manifest: Mapping[str, object], *, namespace: str = "default") -> values.ProbePolicy:
    """The value of a ProbePolicy; raises ``errors.PolicyRefused`` with every problem found.

    ``namespace`` is for manifests without one. A manifest that never was in a cluster has no uid: it gets
    ``local-<namespace>-<name>``, so that one machine can tell its policies apart too.
    """
    raise NotImplementedError


def parse_probe_map(manifest: Mapping[str, object], *, namespace: str = "default") -> values.ProbeMap:
    """The value of a ProbeMap; raises ``errors.ProbeMapRefused`` with every problem found."""
    raise NotImplementedError
