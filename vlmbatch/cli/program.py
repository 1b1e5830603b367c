"""What all commands share: how they start, what they print, and how their errors end."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from vlmbatch.errors import VlmbatchError

if TYPE_CHECKING:
    from vlmbatch.batches.importing import Imported
    from vlmbatch.evaluation import Evaluation
    from vlmbatch.exports.exporting import Exported
    from vlmbatch.exports.openai_batch import Exported as ExportedRequests
    from vlmbatch.planning import Plan
    from vlmbatch.reparse import Reparsed
    from vlmbatch.summary import Summary


class Program(click.Group):
    """The group, made safe against how it was started."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_standard_streams()
        for word in sys.argv[1:]:
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                click.echo(
                    f"Error: an argument is not valid UTF-8: {word!r}\n"
                    "  -> rename what it names, or set a UTF-8 locale, such as LC_ALL=C.UTF-8",
                    err=True,
                )
                sys.exit(2)
        return super().main(*args, **kwargs)


def _open_standard_streams() -> None:
    """A file that we open must never become descriptor 0, 1 or 2 because that one was closed; and
    no character that a terminal lacks may end a run."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def clean_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of ours is one message and its exit code, never a traceback.

    SIGTERM is a Ctrl-C, also before and after the time in which the driver listens to signals.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return command(*args, **kwargs)
        except VlmbatchError as error:
            say("Error", str(error))
            sys.exit(error.exit_code)
        except BrokenPipeError:  # nobody reads what we print; not even Python's last flush is read
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            reason = f"{error.strerror or error}{where}"
            try:
                os.getcwd()
            except OSError:
                reason = "the current folder is gone\n  -> change to one that exists"
            say("Error", reason)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return wrapped


def tell(
    summary: Summary | Exported | ExportedRequests | Imported | Reparsed | Evaluation | Plan,
    as_json: bool,
) -> None:
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(summary.as_text())
    for warning in summary.warnings:
        say("Warning", warning)


def say(kind: str, message: str) -> None:
    from vlmbatch.placeholders import hidden  # only here: it takes 10 ms of every start

    click.echo(f"{kind}: {hidden(message)}", err=True)
