"""``python -m vlmbatch.executors.process READ_FD WRITE_FD``: a worker at the end of two pipes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from typing import BinaryIO

from vlmbatch.errors import VlmbatchError
from vlmbatch.messages import Broken, Message, Setup, from_json, to_json
from vlmbatch.worker import Worker


def main() -> None:
    read_fd, write_fd = int(sys.argv[1]), int(sys.argv[2])
    for fd in (read_fd, write_fd):
        os.set_inheritable(fd, False)
    # The driver decides when to stop: a Ctrl-C or a SIGTERM to everybody must not end us half-way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from_driver, to_driver = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb", 0)
    try:
        setup = from_json(json.loads(from_driver.readline()))
        assert isinstance(setup, Setup)
        asyncio.run(_run(setup, from_driver, to_driver))
    except BaseException:
        logging.exception("the worker ends")
        os._exit(1)
    os._exit(0)  # at once: neither the listening thread nor those of a library may keep us alive


async def _run(setup: Setup, from_driver: BinaryIO, to_driver: BinaryIO) -> None:
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Message] = asyncio.Queue()

    def emit(message: Message) -> None:
        to_driver.write(f"{json.dumps(to_json(message))}\n".encode())

    def listen() -> None:
        for line in from_driver:
            loop.call_soon_threadsafe(inbox.put_nowait, from_json(json.loads(line)))
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the driver is gone: so is our engine

    threading.Thread(target=listen, daemon=True).start()
    try:
        worker = Worker(setup, emit)
    except VlmbatchError as error:
        emit(Broken(error.message, error.hint, True, error.exit_code))
        return
    await worker.run(inbox)


if __name__ == "__main__":
    main()
