"""The Kubernetes API as the plugin needs it: JSON over the caller's own kubeconfig, and refusals in words.

``cluster_commands`` calls it. The kubernetes package reads the kubeconfig (exec plugins, client certificates, proxies);
requests go through its connection pool as plain JSON, because these resources have no generated classes. The operator's
query API is reached through the API server's service proxy, with the token of the policy's ProbeReport.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

import urllib3
from probefleet_core import errors as core_errors

from probefleet_cli.failures import BadInput, Failure

Json = dict[str, Any]
GROUP = "/apis/probefleet.io/v1alpha1"
TOKEN_HEADER = "X-Probefleet-Token"
DEFAULT_SYSTEM_NAMESPACE = "probefleet-system"
NAME_SUFFIX_BYTES = 3


class ApiError(Failure):
    """The API server said no; ``code`` is HTTP's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cluster:
    """One API server as one user. ``namespace`` is the context's own."""

    def __init__(self, client: Any, *, namespace: str, system_namespace: str = DEFAULT_SYSTEM_NAMESPACE) -> None:
        self._client, self.namespace, self._system = client, namespace, system_namespace

    @classmethod
    def connect(
        cls, *, kubeconfig: Path | None, context: str | None, system_namespace: str = DEFAULT_SYSTEM_NAMESPACE
    ) -> Self:
        """By the kubeconfig (the option, else KUBECONFIG, else ~/.kube/config)."""
        from kubernetes import client, config

        configuration = client.Configuration()
        file = str(kubeconfig) if kubeconfig else None
        try:
            config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
            contexts, active = config.list_kube_config_contexts(config_file=file)
        except (config.ConfigException, OSError) as error:
            raise BadInput(
                f"no cluster: {str(error).rstrip('.')}. Give --kubeconfig and --context, or set KUBECONFIG"
            ) from error
        chosen = next((each for each in contexts if each["name"] == context), active)
        namespace = (chosen.get("context") or {}).get("namespace") or "default"
        return cls(client.ApiClient(configuration), namespace=namespace, system_namespace=system_namespace)

    # Requests ---------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Json:
        """GET; raises ApiError."""
        return self._json("GET", path)

    def post(self, path: str, body: Json) -> Json:
        """POST; raises ApiError."""
        return self._json("POST", path, body)

    def delete(self, path: str) -> None:
        """DELETE; what is gone already is fine."""
        try:
            self._json("DELETE", path)
        except ApiError as error:
            if error.code != 404:
                raise

    def lines(self, path: str, *, headers: Mapping[str, str], idle_seconds: float = 60.0) -> Iterator[str]:
        """The lines of a stream as they come, until the other side ends it; ApiError."""
        response = self._open("GET", path, None, headers, read_seconds=idle_seconds)
        buffer = b""
        try:
            while part := response.read1(65536):
                *whole, buffer = (buffer + part).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole if line.strip())
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, f"the stream broke: {error}") from error
        finally:
            response.close()

    def _json(self, method: str, path: str, body: Json | None = None, headers: Mapping[str, str] | None = None) -> Json:
        response = self._open(method, path, body, headers or {}, read_seconds=30.0)
        try:
            answer: Json = json.loads(response.read())
        except (ValueError, urllib3.exceptions.HTTPError) as error:
            raise ApiError(response.status, f"{method} {path}: the answer is not JSON: {error}") from error
        return answer

    def _open(
        self, method: str, path: str, body: Json | None, headers: Mapping[str, str], *, read_seconds: float
    ) -> urllib3.BaseHTTPResponse:
        client = self._client
        sent = {"Accept": "application/json", "User-Agent": "kubectl-probefleet", **headers}
        if body is not None:
            sent["Content-Type"] = "application/json"
        client.update_params_for_auth(sent, [], ["BearerToken"], path, method, body)
        try:
            response: urllib3.BaseHTTPResponse = client.rest_client.pool_manager.request(
                method,
                client.configuration.host + path,
                body=None if body is None else json.dumps(body).encode(),
                headers=sent,
                preload_content=False,
                retries=False,
                timeout=urllib3.Timeout(connect=10.0, read=read_seconds),
            )
        except urllib3.exceptions.HTTPError as error:
            host = client.configuration.host
            raise ApiError(0, f"the API server {host} cannot be reached: {error}. Is the context right?") from error
        if response.status >= 400:
            raise self._refusal(method, path, response)
        return response

    @staticmethod
    def _refusal(method: str, path: str, response: urllib3.BaseHTTPResponse) -> ApiError:
        text = response.read().decode("utf-8", "replace")
        response.close()
        try:
            body = json.loads(text)
            message = str(body.get("message") or body.get("error") or text)
        except (ValueError, AttributeError):
            message = text.strip()[:500]
        if response.status == 403 and "/proxy/" in path and "services" in message:
            message += ". It takes the verb get on services/proxy in the operator's namespace"
        elif response.status == 403 and GROUP in path:
            verb = {"GET": "get", "POST": "create", "DELETE": "delete"}[method]
            resource = path.split("/namespaces/")[-1].split("/")[1]
            message += (
                f". It takes the verb {verb} on {resource}.probefleet.io in this namespace: ask for a Role with it"
            )
        elif response.status == 404 and GROUP in path and "could not find the requested resource" in message:
            message = (
                "this cluster has no Probefleet (no resources probefleet.io/v1alpha1). Install it with its Helm chart"
            )
        return ApiError(response.status, message)

    # Probefleet's own ------------------------------------------------------------------------------------------------

    def policy(self, namespace: str, name: str) -> Json:
        """A ProbePolicy; where there is none, near names."""
        try:
            return self.get(_path(namespace, "probepolicies", name))
        except ApiError as error:
            if error.code != 404 or "Probefleet" in str(error):
                raise
            raise BadInput(self._no_policy(namespace, name)) from None

    def report(self, namespace: str, name: str) -> Json | None:
        """A policy's ProbeReport, once there is one."""
        try:
            return self.get(_path(namespace, "probereports", name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def create_policy(self, manifest: Json) -> Json:
        """Create it under its name and five or six random characters; the object as stored."""
        metadata = manifest["metadata"]
        name = f"{metadata['name']}-{secrets.token_hex(NAME_SUFFIX_BYTES)}"
        return self.post(
            _path(metadata["namespace"], "probepolicies"), {**manifest, "metadata": {**metadata, "name": name}}
        )

    def delete_policy(self, namespace: str, name: str) -> None:
        """Delete it."""
        self.delete(_path(namespace, "probepolicies", name))

    def live_report(self, namespace: str, name: str, report: Json) -> Json | None:
        """The report of this moment, newer than the stored one; None where the query API does not answer."""
        try:
            answer = self.query(namespace, name, "report", report)
        except ApiError:
            return None
        return answer if "status" in answer else None

    def query(self, namespace: str, name: str, what: str, report: Json) -> Json:
        """An answer of the operator's query API."""
        return self._json("GET", self._query_path(namespace, name, what, {}), headers=_token(report))

    def event_lines(self, namespace: str, name: str, report: Json, **parameters: str) -> Iterator[Json]:
        """Pages of events: output, cursor, missed, records."""
        path = self._query_path(namespace, name, "events", parameters)
        for line in self.lines(path, headers=_token(report)):
            yield json.loads(line)

    def _query_path(self, namespace: str, name: str, what: str, parameters: Mapping[str, str]) -> str:
        proxy = f"/api/v1/namespaces/{self._system}/services/http:probefleet-operator:http/proxy"
        query = f"?{urlencode(parameters)}" if parameters else ""
        return f"{proxy}/query/v1/namespaces/{quote(namespace)}/probepolicies/{quote(name)}/{what}{query}"

    def _no_policy(self, namespace: str, name: str) -> str:
        text = f"no ProbePolicy {name!r} in namespace {namespace}"
        try:
            items = self.get(_path(namespace, "probepolicies")).get("items", [])
        except ApiError:
            return f"{text}. Give its namespace with -n"
        known = [str(item["metadata"]["name"]) for item in items]
        return f"{text}. {core_errors.did_you_mean(name, known, what='ProbePolicy in it; give a namespace with -n')}"


def _path(namespace: str, resource: str, name: str = "") -> str:
    return f"{GROUP}/namespaces/{quote(namespace)}/{resource}" + (f"/{quote(name)}" if name else "")


def _token(report: Json) -> dict[str, str]:
    token = ((report.get("status") or {}).get("query") or {}).get("token")
    if not token:
        raise Failure(
            "the ProbeReport has no status.query.token yet: the operator has not written it. Try again in 10 s"
        )
    return {TOKEN_HEADER: str(token)}
