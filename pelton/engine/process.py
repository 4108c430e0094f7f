"""Processes beside this one, each tied to the one that launched it by a socket, over which both send messages.

They are fresh interpreters, not forks: a script needs no `if __name__ == "__main__"` around what it does. The socket is
the only tie between the two. It closes when either end dies, which tells the other at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from pelton.config import Environment
from pelton.engine.wire import FrameParser, WireError, encode

RECEIVE_BYTES = 1 << 18
EXIT_S = 1.0  # how long a process whose socket is closed may take to exit by itself

Send = Callable[[Any], None]


def launch(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m MODULE FD ARGUMENTS`; returns the process and this end of its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what is printed by accident goes where log lines go, not into the output of a command
            env={
                **os.environ, **(environment or {}),
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
            start_new_session=True,  # Ctrl-C in a terminal is for the parent
        )
    return process, ours


def how_it_ended(code: int) -> str:
    """An exit code in words, as the end of a sentence about the process."""
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by signal {-code}" + (", as happens when memory runs out" if code == -9 else "")


def attach(fd: int, name: str, at_end: Callable[[], object] = lambda: None) -> tuple[SimpleQueue[Any], Send]:
    """To be called first in such a process, which logs as `name`: what arrives, and a function that sends.

    When the parent is gone, so is this process, whatever it does; `at_end` is called before.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to stop, and may drain first
        signal.signal(number, signal.SIG_IGN)
    level = logging.getLevelNamesMapping().get(Environment.read().log_level, logging.INFO)
    logging.basicConfig(level=level, format=f"%(levelname)s %(asctime)s {name}: %(message)s")
    parent = socket.socket(fileno=fd)
    arrived: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(parent, arrived, at_end), daemon=True).start()

    def send(message: Any) -> None:
        try:
            parent.sendall(encode(message))
        except OSError:  # the parent is gone
            os._exit(1)

    return arrived, send


def _listen(parent: socket.socket, arrived: SimpleQueue[Any], at_end: Callable[[], object]) -> None:
    parser = FrameParser()
    try:
        while data := parent.recv(RECEIVE_BYTES):
            for message in parser.feed(data):
                arrived.put(message)
    except (OSError, WireError) as error:
        logging.getLogger(__name__).error("%s", error)
    try:
        at_end()
    finally:
        os._exit(0)
