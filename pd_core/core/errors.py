"""The ways a run ends early, and the exit code of each."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """The settings or the input are wrong. Exit code 2; the message is one line: what, where, what to do."""


class RunError(RuntimeError):
    """A stage could not finish. Exit code 1; the message names the stage, the part and the next step."""


class CredentialsRefused(PermissionError):
    """An object store refuses the credentials, also those that were read anew.

    Not a UserError, so that what handles errors of storage handles this one too, and names the setting concerned;
    `files.explain` makes the line of it.

    Args:
        text: the store's error code and what it says.
        uri: what was asked for.
    """

    def __init__(self, text: str, uri: str = ""):  # a copy from another process is made of the text, then gets the rest
        super().__init__(text)
        self.uri = uri


EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOTHING_NEW = 3
EXIT_HELD_BACK = 4
EXIT_INTERRUPTED = 130


LINE_CHARACTERS = 200


def one_line(error: BaseException | str) -> str:
    """What another library said, as part of a line of ours: without line breaks, cut between words where it is long."""
    text = " ".join(str(error).split())
    if len(text) <= LINE_CHARACTERS:
        return text
    head = text[:LINE_CHARACTERS]
    words = head.rpartition(" ")[0]
    return f"{words if len(words) > LINE_CHARACTERS // 2 else head} ..."


def printable(text: str) -> str:
    """A text of strangers for a line of ours: what a terminal would act on, or not show, is a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text)


# bounded lengths: a text of many URLs would else be read from each of them to its end
_USER = re.compile(r"://[^/\s'\"]{0,2000}@")
_QUERY = re.compile(r"(https?://[^\s'\"?#]{0,2000}\?|[?#](?=[A-Za-z][\w.-]*=))[^\s'\"]*", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with `user:password@` of every URL in it replaced by `***@`, and queries by `***`: they may hold
    a signature or a token.

    A query is what follows `?` in an http(s) URL, and `?name=...` or `#name=...` anywhere: libraries tell paths without
    the host. A `?` of a glob is none.
    """
    return _QUERY.sub(r"\1***", _USER.sub("://***@", text))


def shown(text: str) -> str:
    """What leaves us for a terminal: without credentials, and with nothing in a line that would not print."""
    return "\n".join(map(printable, redact(text).split("\n")))


def exit_code(program: Callable[[], int | None]) -> int:
    """Run a workflow; what went wrong becomes one line on standard error and an exit code. A program may return its
    own code.

    An exception that is neither kind of error is a defect of this program and keeps its traceback. SIGTERM, by which
    schedulers end a job, is as Ctrl-C (`session.connect` sees to it that Ray leaves it so).
    """
    try:
        with _terminated_as_interrupted():
            return program() or EXIT_DONE
    except UserError as error:
        print(shown(f"error: {_in_one_line(error)}"), file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as error:
        print(shown(f"failed: {_in_one_line(error)}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:  # a refusal of argparse, or --help
            raise
        return _interrupted()  # by the handler that Ray has in place while it starts


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).splitlines())


def _interrupted() -> int:
    print("interrupted: what is done is kept; run the same command again to go on", file=sys.stderr)
    return EXIT_INTERRUPTED


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the body; other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: one that is not of Python
