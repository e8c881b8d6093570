"""The operator's own small CA: made once, kept in a Secret, rotated before it ends; and the server certificate under
it.

Flow: Secret ⇄ `Authorities` (pure value) → bundle in a ConfigMap that every agent mounts, and a server certificate that
lives in memory only (each process makes its own; its key is never stored). grpc asks `certificate()` at each
handshake, so a renewal needs no restart.

Rotation has two steps, because agents learn the bundle from a mounted file that takes a minute or two to arrive: first
the *next* CA appears in the bundle; an hour later it becomes the *active* one that signs; the old one stays in the
bundle until it ends.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from probefleet_operator import api, errors

log = structlog.get_logger(__name__)

CA_LIFE = datetime.timedelta(days=365)
CA_RENEW_BEFORE = datetime.timedelta(days=120)
BUNDLE_SETTLES = datetime.timedelta(hours=1)  # from the bundle's change until every agent has certainly read it
SERVER_LIFE = datetime.timedelta(days=30)
SERVER_RENEW_BEFORE = datetime.timedelta(days=10)
CLOCK_SKEW = datetime.timedelta(minutes=5)  # nodes' clocks may be behind ours


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA certificate with its key, both PEM. `repr` hides the key."""

    certificate_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Issuer({self.certificate().serial_number:x})"

    def certificate(self) -> x509.Certificate:
        """The certificate, parsed."""
        return x509.load_pem_x509_certificate(self.certificate_pem)


@dataclass(frozen=True, slots=True)
class Authorities:
    """All CAs of the moment."""

    active: Issuer
    next: Issuer | None = None
    retired_pem: tuple[bytes, ...] = ()

    def bundle(self, now: datetime.datetime) -> bytes:
        """What agents trust: every CA that may have signed a certificate in use, now or soon."""
        parts = [self.active.certificate_pem, *([self.next.certificate_pem] if self.next else [])]
        parts += [pem for pem in self.retired_pem if not_after(pem) > now]
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What the gRPC server shows: chain and key, PEM."""

    chain_pem: bytes
    key_pem: bytes
    renew_at: datetime.datetime

    def __repr__(self) -> str:
        return f"ServerCertificate(renew_at={self.renew_at:%Y-%m-%dT%H:%MZ})"


def utc_now() -> datetime.datetime:
    """Wall clock, aware."""
    return datetime.datetime.now(datetime.UTC)


def not_after(pem: bytes) -> datetime.datetime:
    """When a certificate ends."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_issuer(now: datetime.datetime) -> Issuer:
    """A fresh CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"probefleet {now:%Y-%m-%d}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return Issuer(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def issue(issuer: Issuer, names: Iterable[str], now: datetime.datetime) -> ServerCertificate:
    """A server certificate for DNS names and addresses."""
    signer = serialization.load_pem_private_key(issuer.key_pem, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    authority = issuer.certificate()
    key = ec.generate_private_key(ec.SECP256R1())
    subjects = list(names)
    end = min(now + SERVER_LIFE, authority.not_valid_after_utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subjects[0][:64])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in subjects]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    chain = certificate.public_bytes(serialization.Encoding.PEM) + issuer.certificate_pem
    return ServerCertificate(chain, _key_pem(key), renew_at=end - SERVER_RENEW_BEFORE)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def rotate(authorities: Authorities, now: datetime.datetime) -> Authorities:
    """The state that should be now; equal to the given one nearly always."""
    if authorities.active.certificate().not_valid_after_utc <= now:
        # Asleep for longer than a CA lives: agents must read the bundle anew in any case.
        promoted = authorities.next or new_issuer(now)
        return Authorities(promoted)
    if authorities.next is not None:
        born = authorities.next.certificate().not_valid_before_utc + CLOCK_SKEW
        if now - born >= BUNDLE_SETTLES:
            retired = (authorities.active.certificate_pem, *authorities.retired_pem)
            return Authorities(authorities.next, None, tuple(pem for pem in retired if not_after(pem) > now))
        return authorities
    if authorities.active.certificate().not_valid_after_utc - now <= CA_RENEW_BEFORE:
        return replace(authorities, next=new_issuer(now))
    return authorities


def to_secret_data(authorities: Authorities) -> dict[str, str]:
    """`data` of the Secret."""
    plain = {"ca.crt": authorities.active.certificate_pem, "ca.key": authorities.active.key_pem}
    if authorities.next:
        plain |= {"next.crt": authorities.next.certificate_pem, "next.key": authorities.next.key_pem}
    if authorities.retired_pem:
        plain["retired.crt"] = b"".join(authorities.retired_pem)
    return {key: base64.b64encode(value).decode() for key, value in plain.items()}


def from_secret_data(data: api.Json) -> Authorities | None:
    """The CAs in a Secret's `data`; None where it has none."""
    plain = {key: base64.b64decode(value) for key, value in data.items()}
    if not plain.get("ca.crt") or not plain.get("ca.key"):
        return None
    successor = Issuer(plain["next.crt"], plain["next.key"]) if plain.get("next.crt") else None
    retired = x509.load_pem_x509_certificates(plain["retired.crt"]) if plain.get("retired.crt") else []
    return Authorities(
        Issuer(plain["ca.crt"], plain["ca.key"]),
        successor,
        tuple(each.public_bytes(serialization.Encoding.PEM) for each in retired),
    )


class AuthorityStore:
    """The CA's Secret, the bundle's ConfigMap, and the server certificate of this process."""

    def __init__(self, client: api.Api, *, namespace: str, secret: str, bundle: str, names: tuple[str, ...]) -> None:
        self._client = client
        self._namespace, self._secret, self._bundle = namespace, secret, bundle
        self._names = names
        self._authorities: Authorities | None = None
        self._server: ServerCertificate | None = None
        self._published = b""

    def certificate(self) -> ServerCertificate:
        """The server certificate of the moment; `refresh` has run before."""
        assert self._server is not None
        return self._server

    async def refresh(self) -> bool:
        """Bring Secret, bundle and server certificate up to date; True where the server certificate is a new one."""
        now = utc_now()
        authorities = await self._load_or_create(now)
        if (rotated := rotate(authorities, now)) != authorities:
            authorities = await self._store(rotated)
            log.info("certificate authority rotated", active=repr(authorities.active), next=repr(authorities.next))
        await self._publish(authorities.bundle(now))
        changed = self._authorities is None or self._authorities.active != authorities.active
        self._authorities = authorities
        if self._server is None or changed or now >= self._server.renew_at:
            self._server = issue(authorities.active, self._names, now)
            log.info("server certificate issued", names=self._names, renew_at=self._server.renew_at.isoformat())
            return True
        return False

    async def _load_or_create(self, now: datetime.datetime) -> Authorities:
        path = f"/api/v1/namespaces/{self._namespace}/secrets/{self._secret}"
        try:
            secret = await self._client.get(path)
        except errors.NotFound:
            return await self._create(Authorities(new_issuer(now)))
        found = from_secret_data(secret.get("data") or {})
        return found if found is not None else await self._store(Authorities(new_issuer(now)))

    async def _create(self, authorities: Authorities) -> Authorities:
        body: api.Json = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._secret, "namespace": self._namespace, "labels": LABELS},
            "type": "Opaque",
            "data": to_secret_data(authorities),
        }
        try:
            await self._client.request("POST", f"/api/v1/namespaces/{self._namespace}/secrets", body=body)
        except errors.Conflict:  # another replica was first: its CA is the CA
            return await self._load_or_create(utc_now())
        log.info("certificate authority created", secret=self._secret)
        return authorities

    async def _store(self, authorities: Authorities) -> Authorities:
        path = f"/api/v1/namespaces/{self._namespace}/secrets/{self._secret}"
        data = to_secret_data(authorities)
        gone: api.Json = {key: None for key in ("next.crt", "next.key", "retired.crt") if key not in data}
        await self._client.request(
            "PATCH", path, body={"data": data | gone}, content_type="application/merge-patch+json"
        )
        return authorities

    async def _publish(self, bundle: bytes) -> None:
        if bundle != self._published:
            await publish_bundle(self._client, self._namespace, self._bundle, bundle, secret=self._secret)
            self._published = bundle


class GivenCertificate:
    """A certificate that somebody else makes and renews (cert-manager): read from files, again when they change."""

    def __init__(
        self,
        client: api.Api,
        *,
        namespace: str,
        secret: str,
        bundle: str,
        certificate: Path,
        key: Path,
        ca: Path | None,
    ) -> None:
        self._client, self._namespace, self._secret, self._bundle = client, namespace, secret, bundle
        self._certificate, self._key, self._ca = certificate, key, ca
        self._server: ServerCertificate | None = None
        self._published = b""

    def certificate(self) -> ServerCertificate:
        """The server certificate of the moment; `refresh` has run before."""
        assert self._server is not None
        return self._server

    async def refresh(self) -> bool:
        """Read the files; True where the certificate is a new one."""
        try:
            chain, key = self._certificate.read_bytes(), self._key.read_bytes()
            bundle = self._ca.read_bytes() if self._ca else b""
            current = ServerCertificate(chain, key, renew_at=not_after(chain))
        except (OSError, ValueError) as problem:
            raise errors.SettingsError(f"--tls-cert, --tls-key or --tls-ca cannot be read: {problem}") from problem
        if bundle and bundle != self._published:
            await publish_bundle(self._client, self._namespace, self._bundle, bundle, secret=self._secret)
            self._published = bundle
        if current == self._server:
            return False
        self._server = current
        return True


async def publish_bundle(client: api.Api, namespace: str, name: str, bundle: bytes, *, secret: str) -> None:
    """Put the CA bundle where agents mount it from. It is owned by the Secret, so an uninstallation takes both."""
    metadata: api.Json = {"name": name, "namespace": namespace, "labels": LABELS}
    try:
        owner = await client.get(f"/api/v1/namespaces/{namespace}/secrets/{secret}")
    except errors.NotFound:
        pass  # with a certificate given and no chart nobody made one
    else:
        reference = {"apiVersion": "v1", "kind": "Secret", "name": secret, "uid": owner["metadata"]["uid"]}
        metadata["ownerReferences"] = [reference]
    await client.apply(
        f"/api/v1/namespaces/{namespace}/configmaps/{name}",
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"ca.crt": bundle.decode()}},
    )


LABELS = {"app.kubernetes.io/name": "probefleet", "app.kubernetes.io/managed-by": "probefleet-operator"}
