"""The engine's own process: `python -m pelton.engine.child FD MODULE:FUNCTION`, started by `supervisor`.

FD is a socket to the parent; MODULE:FUNCTION builds the engine. When the parent is gone, so is this process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from queue import SimpleQueue

from pelton.config import Environment
from pelton.engine.host import host
from pelton.engine.messages import Command, Failed, Message
from pelton.engine.wire import FrameParser, WireError, encode
from pelton.errors import PeltonError

RECEIVE_BYTES = 1 << 18


def main(fd: int, builder: str) -> int:
    """Serve the parent at the other end of socket `fd`; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to stop, and may drain first
        signal.signal(number, signal.SIG_IGN)
    level = logging.getLevelNamesMapping().get(Environment.read().log_level, logging.INFO)
    logging.basicConfig(level=level, format="%(levelname)s %(asctime)s engine: %(message)s")
    parent = socket.socket(fileno=fd)
    commands: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_listen, args=(parent, commands), daemon=True).start()

    def send(message: Message) -> None:
        try:
            parent.sendall(encode(message))
        except OSError:  # the parent is gone
            os._exit(1)

    try:
        return 0 if host(builder, commands, send) else 1
    except PeltonError as error:  # a device that is lost: whoever waits is told
        send(Failed(error))
        return 1
    except Exception:
        logging.getLogger(__name__).exception("the engine failed")
        return 1


def _listen(parent: socket.socket, commands: SimpleQueue[Command]) -> None:
    """Passes commands on. Ends the process when the parent closes the socket or dies, whatever the engine does."""
    parser = FrameParser()
    try:
        while data := parent.recv(RECEIVE_BYTES):
            for command in parser.feed(data):
                commands.put(command)
    except (OSError, WireError) as error:
        logging.getLogger(__name__).error("%s", error)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
