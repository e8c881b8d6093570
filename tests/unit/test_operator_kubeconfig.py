"""A kubeconfig becomes an access, without the Kubernetes client in this process."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from probefleet_operator import errors, kubeconfig


def written(path: Path, *, user: dict[str, Any], cluster: dict[str, Any]) -> Path:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return path


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_keys_that_stand_in_the_file_are_there_after_the_process_that_read_it(tmp_path: Path) -> None:
    config = written(
        tmp_path / "config",
        user={"client-certificate-data": encoded("the certificate"), "client-key-data": encoded("the key")},
        cluster={"server": "https://10.0.0.1:6443", "certificate-authority-data": encoded("the ca")},
    )
    access = kubeconfig.access(config)
    assert (access.server, access.token, access.verify) == ("https://10.0.0.1:6443", None, True)
    assert access.ca_file is not None and access.ca_file.read_text() == "the ca"
    assert access.certificate_file is not None and access.certificate_file.read_text() == "the certificate"
    assert access.key_file is not None and access.key_file.read_text() == "the key"


def test_a_plugin_is_asked_for_the_token(tmp_path: Path) -> None:
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "of-the-plugin"},
    }  # fmt: skip
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
        "command": sys.executable, "args": ["-c", f"print({json.dumps(json.dumps(credential))})"],
    }  # fmt: skip
    config = written(
        tmp_path / "config",
        user={"exec": plugin},
        cluster={"server": "https://10.0.0.1:6443", "insecure-skip-tls-verify": True},
    )
    access = kubeconfig.access(config)
    assert (access.bearer(), access.verify, access.ca_file) == ("of-the-plugin", False, None)


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(errors.SettingsError, match=r"--kubeconfig .*missing cannot be used: .*"):
        kubeconfig.access(tmp_path / "missing")
