"""What both names begin with: a Ctrl-C while the program itself is still being loaded ends it without a word.

Loading takes a third of a second; Python would answer with a traceback of whatever import it was in. It imports nothing
that takes time before its handler is there. From then on ``main`` decides what a Ctrl-C means.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def main() -> int:
    """The entry point."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from probefleet_cli import main as command_line

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())
