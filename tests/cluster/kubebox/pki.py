"""Certificates and kubeconfigs: one authority a cluster, made at `up`, gone at `down`.

Kubernetes reads identity out of a client certificate: CN is the user, O the groups. Called by control and node.
"""

import base64
import json
import subprocess
from dataclasses import dataclass

from . import settings
from .settings import Layout

DAYS = "30"
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who holds a certificate, and under which names and addresses it is reached."""

    name: str
    user: str
    groups: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def subject(self) -> str:
        """OpenSSL's way to write it."""
        return "".join(f"/O={group}" for group in self.groups) + f"/CN={self.user}"

    def alternative_names(self) -> str:
        """OpenSSL's way to write `hosts`; a certificate without any gets its own name."""
        hosts = self.hosts or (self.name,)
        return ",".join(f"IP:{host}" if host.replace(".", "").isdigit() else f"DNS:{host}" for host in hosts)


def make_authority(layout: Layout) -> None:
    """The cluster's own CA, and the key that signs ServiceAccount tokens."""
    layout.pki.mkdir(mode=0o700, parents=True)
    # OpenSSL's default configuration would add extensions of its own to every certificate.
    (layout.pki / "openssl.cnf").write_text("[req]\ndistinguished_name=dn\n[dn]\n")
    _request(
        layout,
        "ca",
        "/CN=probefleet-cluster",
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,keyCertSign,cRLSign",
        "subjectKeyIdentifier=hash",
    )
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(layout.pki / "sa.key"))


def issue(layout: Layout, identity: Identity) -> None:
    """Key and certificate `<name>.key`, `<name>.crt`, good for both ends of a connection."""
    _request(
        layout,
        identity.name,
        identity.subject(),
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        "extendedKeyUsage=serverAuth,clientAuth",
        f"subjectAltName={identity.alternative_names()}",
        signed_by="ca",
    )


def kubeconfig(layout: Layout, identity: Identity) -> None:
    """A certificate, and the kubeconfig that uses it. JSON is YAML."""
    issue(layout, identity)

    def inline(file: str) -> str:
        return base64.b64encode((layout.pki / file).read_bytes()).decode()

    server = f"https://{settings.CONTROL_ADDRESS}:{settings.API_PORT}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "probefleet", "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")}}
        ],
        "users": [
            {
                "name": identity.name,
                "user": {
                    "client-certificate-data": inline(f"{identity.name}.crt"),
                    "client-key-data": inline(f"{identity.name}.key"),
                },
            }
        ],
        "contexts": [{"name": "probefleet", "context": {"cluster": "probefleet", "user": identity.name}}],
        "current-context": "probefleet",
    }
    path = layout.kubeconfig(identity.name)
    path.write_text(json.dumps(config, indent=1))
    path.chmod(0o600)


def _request(layout: Layout, name: str, subject: str, *extensions: str, signed_by: str | None = None) -> None:
    pki = layout.pki
    words = ["req", "-x509", *NEW_KEY, "-config", f"{pki}/openssl.cnf", "-days", DAYS, "-subj", subject]
    words += ["-keyout", f"{pki}/{name}.key", "-out", f"{pki}/{name}.crt"]
    if signed_by:
        words += ["-CA", f"{pki}/{signed_by}.crt", "-CAkey", f"{pki}/{signed_by}.key"]
    for extension in extensions:
        words += ["-addext", extension]
    _openssl(*words)


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)
