"""The operator's options as one frozen value. main.py fills it from the command line and environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator is told at its start."""

    namespace: str  # where its Lease, Secret and ConfigMap lie
    identity: str  # differs between processes that can live at the same time
    bind: str = "0.0.0.0:8443"  # gRPC over TLS, for agents
    http: str = "0.0.0.0:8080"  # health, metrics, query API
    service_dns: tuple[str, ...] = ()  # names (or addresses) by which agents reach us: the certificate's
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    catalog: Path | None = None
    token_audience: str = "probefleet-agent"
    agent_account: str = ""  # "system:serviceaccount:NAMESPACE:NAME"
    kubeconfig: Path | None = None
    lease: str = "probefleet-operator"
    secret: str = "probefleet-authority"
    bundle: str = "probefleet-ca"
    series_per_policy: int = 2000
    report_seconds: float = 10.0  # a report is written at most this often
