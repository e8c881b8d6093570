"""A kubeconfig file in, how to reach its API server out: exec plugins, client certificates, tokens.

The Kubernetes client reads it. That takes 20 MiB, and nothing else here needs the client, so it is done in a process of
its own, `python -m probefleet_operator.kubeconfig FILE FOLDER`, which prints JSON: the fields of `api.Access`, or
`problem`. Called by app.py outside a cluster.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from probefleet_operator import api, errors

PATHS = ("ca_file", "certificate_file", "key_file")


def access(path: Path) -> api.Access:
    """Access by the file's current context; raises SettingsError."""
    # Keys that stand in the kubeconfig itself become files in it.
    folder = tempfile.mkdtemp(prefix="probefleet-kubeconfig-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "-m", __name__, str(path), folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # a plugin may ask on the terminal
    said: api.Json = {"problem": "the Kubernetes client failed: see above"}
    if done.returncode == 0:
        said = json.loads(done.stdout)
    if problem := said.get("problem"):
        raise errors.SettingsError(f"--kubeconfig {path} cannot be used: {problem}")
    said.update({name: Path(said[name]) for name in PATHS if said[name]})
    return api.Access(**said)


def _read(path: str, folder: str) -> dict[str, str | bool | None]:
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_kube_config(config_file=path, client_configuration=configuration, temp_file_path=folder)
    except (config.ConfigException, OSError) as problem:
        return {"problem": str(problem)}
    authorization = configuration.get_api_key_with_prefix("BearerToken", alias="authorization") or ""
    return {
        "server": configuration.host,
        "ca_file": configuration.ssl_ca_cert or None,
        "token": authorization.removeprefix("Bearer ") or None,
        "certificate_file": configuration.cert_file or None,
        "key_file": configuration.key_file or None,
        "verify": configuration.verify_ssl,
    }


if __name__ == "__main__":
    print(json.dumps(_read(*sys.argv[1:])), flush=True)
    os._exit(0)  # the client deletes the files at a process's end, and ours reads them after
