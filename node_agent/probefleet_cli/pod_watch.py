"""Follows the pods of this machine while a run lasts: they come and go, and what they counted keeps their name.

A thread of its own looks once a second, because the runtime may take its time to answer and the run has rings to empty
meanwhile. In: the container runtime, where one answers, and the kubelet's folders. Out: ``pods``, everything that was
seen since the run began; ``measurement`` takes it in before each sample. (Polled, not by CRI's stream of events: that
came with containerd 1.7 and is off in CRI-O by default.)
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from probefleet_cli import container_runtime, local_pods
from probefleet_cli.failures import BadInput

if TYPE_CHECKING:
    from probefleet_cli import cri_client

LOOK_SECONDS = 1.0


class Watch:
    """What is known of the machine's pods by now."""

    def __init__(
        self,
        runtime: cri_client.Runtime | None,
        *,
        without: container_runtime.NoRuntime | None = None,
        folders: Callable[[], local_pods.LocalPods] = local_pods.find,
    ) -> None:
        self.runtime = runtime
        #: Why there is no runtime.
        self.without = without
        #: What the runtime does instead of answering, and since when (wall clock); None where it answers.
        self.silence: str | None = None
        self.silent_since = 0.0
        self.pods = local_pods.LocalPods()
        self._folders = folders
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="pods", daemon=True)

    def look(self) -> None:
        """Look now. A runtime that does not answer keeps what is known, and is noted."""
        with self._looking:
            found = self._folders()
            if self.runtime is not None:
                try:
                    found = found.then(local_pods.of_runtime(self.runtime.pods()))
                    self.silence = None
                except container_runtime.NoAnswer as error:
                    if self.silence is None:
                        self.silent_since = time.time()
                    self.silence = str(error)
            self.pods = self.pods.then(found)

    def start(self) -> None:
        """Look for the first time, and from now on each second."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it: it may be in a call, which has its own end."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()


@contextlib.contextmanager
def following(endpoint: str | None) -> Iterator[Watch]:
    """A watch that runs. BadInput where an endpoint was named and does not answer; else it does with what it has."""
    with contextlib.ExitStack() as owned:
        try:
            watch = Watch(owned.enter_context(container_runtime.find(endpoint)))
        except container_runtime.NoRuntime as none:
            if endpoint:
                raise BadInput(
                    f"--runtime-endpoint {endpoint}: no container runtime answers there:\n{none}\n"
                    "`crictl info` and the kubelet's --container-runtime-endpoint say which socket it is"
                ) from none
            watch = Watch(None, without=none)
        owned.callback(watch.stop)
        watch.start()
        yield watch
