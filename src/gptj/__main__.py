"""`gptj` and `python -m gptj`: an interrupt ends it with status 130, without a traceback, from the first import on."""

from __future__ import annotations

import os
import signal


def run() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until there is anything to put in order, an interrupt may fall into any library's import.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from gptj.command.main import main

    main()


if __name__ == "__main__":
    run()
