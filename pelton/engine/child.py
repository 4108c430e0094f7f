"""The engine's own process: `python -m pelton.engine.child FD MODULE:FUNCTION`, started by `supervisor`.

FD is a socket to the parent; MODULE:FUNCTION builds the engine.
"""

from __future__ import annotations

import logging
import sys

from pelton.engine.host import host
from pelton.engine.messages import Failed
from pelton.engine.process import attach
from pelton.errors import PeltonError


def main(fd: int, builder: str) -> int:
    """Serve the parent at the other end of socket `fd`; returns the exit code."""
    commands, send = attach(fd, "engine")
    try:
        return 0 if host(builder, commands, send) else 1
    except PeltonError as error:  # a device or a rank that is lost: whoever waits is told
        send(Failed(error))
        return 1
    except Exception:
        logging.getLogger(__name__).exception("the engine failed")
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
