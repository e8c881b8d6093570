"""The real operator as a process, against an API server that the test names; its log is kept and read.

Nothing of the operator is replaced. Not here: a pod around it, so it runs with a kubeconfig and listens on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.control_plane import free_port


@dataclass
class OperatorProcess:
    """One process. `port` is gRPC's, `http_port` health's and the query API's."""

    kubeconfig: Path
    log_path: Path
    namespace: str = "probefleet"
    identity: str = "operator-0"
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "error::ResourceWarning", "-m", "probefleet_operator.main"),
                    f"--namespace={self.namespace}",
                    f"--identity={self.identity}",
                    f"--kubeconfig={self.kubeconfig}",
                    f"--bind=127.0.0.1:{self.port}",
                    f"--http=127.0.0.1:{self.http_port}",
                    "--service-dns=localhost,127.0.0.1",
                    *self.options,
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def get(self, path: str, *, token: str = "") -> tuple[int, str]:
        """Status and body of one plain HTTP request."""
        headers = {"X-Probefleet-Token": token} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read().decode()

    def wait_ready(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                status, text = self.get("/readyz")
            except OSError as problem:
                status, text = 0, str(problem)
            if status == 200:
                return
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the operator is not ready: {text}\n{self.log_path.read_text()[-4000:]}")
            time.sleep(0.05)  # a kubelet polls as well

    def log(self) -> list[dict[str, Any]]:
        """Its log so far; every line must be JSON."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Signal it and wait; answers with exit status and seconds."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.process = None
        return status, time.monotonic() - began

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


@contextlib.contextmanager
def running(process: OperatorProcess) -> Iterator[OperatorProcess]:
    """Start, wait until ready, and end in any case."""
    process.start()
    try:
        process.wait_ready()
        yield process
    finally:
        if process.process is not None:
            process.stop()
