"""What a user reads when something goes wrong: one line that names the value, the rule and the fix.

`UserError` is raised for anything that a user can put right; every entry point (the `toolkit` command and the
recipes) runs inside `one_line_errors`, which prints it without a traceback and exits with a non-zero status. Any
other exception is a mistake of ours and keeps its traceback.
"""

import atexit
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from toolkit.redact import redact

EXIT_USER_ERROR = 1


class UserError(ValueError):
    """A problem that the user can solve; the message holds the value, the rule and the fix in one line."""


def speaks() -> bool:
    """True in the process of each machine that says what goes wrong: the launcher's first, or one that trains alone.

    Why: known before a process group exists, so that eight processes do not print one error eight times, and what only
    one machine meets (another command line, a missing file) is read there. Some clusters set RANK and LOCAL_RANK for every
    program, but WORLD_SIZE only for those that they launched together.
    """
    return os.environ.get("LOCAL_RANK", "0") in ("", "0") or os.environ.get("WORLD_SIZE", "1") in ("", "0", "1")


def describe_os_error(error: OSError) -> str:
    """One line for an operating system error: which file, what happened, and what helps where that is known."""
    where = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "; free some space or choose another folder",
        errno.EDQUOT: "; your quota is used up: free some space or choose another folder",
        errno.EFBIG: "; the file size limit (ulimit -f) or the file system does not allow a file this large",
        errno.EACCES: "; choose a folder that you may read and write",
        errno.EROFS: "; choose a folder on a writable file system",
        errno.EMFILE: "; raise the limit of open files (ulimit -n)",
    }.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}{advice}"


@contextmanager
def one_line_errors(*, always: bool = False) -> Iterator[None]:
    """Turns `UserError`, an operating system error and Ctrl-C into one line on stderr and a non-zero exit.

    Printed where a process `speaks`, or `always`. The line is without secrets: a path may be a URL with a password in it.
    What stdout and stderr cannot encode is escaped from here on, so that no name of a file ends a program.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        message, status = f"error: {error}", EXIT_USER_ERROR
    except BrokenPipeError:  # the reader of our output has gone (`toolkit generate ... | head`): nothing to say
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives until exit, so that the last flush cannot fail
        raise SystemExit(EXIT_USER_ERROR) from None
    except OSError as error:
        message, status = f"error: {describe_os_error(error)}", EXIT_USER_ERROR
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    finally:
        atexit.unregister(_end_at_once_on_ctrl_c)
        atexit.register(_end_at_once_on_ctrl_c)  # the last one registered is the first to run
    if always or speaks():
        with suppress(OSError):  # stderr's reader has gone, or its disk is full
            print(redact(message), file=sys.stderr, flush=True)
    raise SystemExit(status)


def _end_at_once_on_ctrl_c() -> None:
    """At the end of the process: another Ctrl-C ends it without a word, unless it is ignored.

    Why: Python would raise KeyboardInterrupt in whatever clears up then, and print its tracebacks. Why not before: in a
    notebook the interpreter goes on after an error.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_closed_streams() -> None:
    """Gives a program that was started without stdin, stdout or stderr (`2>&-`) the null device in their place.

    Why: the first file that is opened would get the free number, and messages of libraries would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - lives until exit
