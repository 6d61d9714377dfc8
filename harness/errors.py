"""Errors that a person can mend, and the one place where they become a message and an exit status. Torch-free."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_USER_ERROR = 2
# What SLURM (or any scheduler) sees after an orderly leave with a checkpoint: run the same command again.
EXIT_PREEMPTED = 85


# what an administrator or a `chmod` mends, not a change of the code
_SURROUNDINGS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)


class UserError(Exception):
    """A mistake of the caller, told in one message: what is wrong (file, key, value), what is allowed, what to do."""


class TrainingError(UserError):
    """A run that cannot go on (a loss that is not finite, a stalled rank); repeating it unchanged would not help."""


class Preempted(Exception):  # noqa: N818 - an orderly leave, not an error
    """The run wrote a checkpoint because it was asked to leave; running it again goes on from there."""


def is_user_error(error: BaseException) -> bool:
    """Whether `error` is meant for a person's eyes as it stands: `UserError`, or the `SbsError` of a loaded `sbs`."""
    sbs_errors = sys.modules.get("sbs.errors")  # looked up, not imported: this module must start without torch
    known = (UserError,) if sbs_errors is None else (UserError, sbs_errors.SbsError)
    return isinstance(error, known)


def run_cli(app: Callable[[], object]) -> None:
    """Run a command line; user errors become one message and status 2, an orderly leave status 85.

    Files that cannot be read or written for want of rights or room are user errors, too, wherever they turn up.
    """
    try:
        app()
    except Preempted as leave:
        print(leave, file=sys.stderr, flush=True)
        sys.exit(EXIT_PREEMPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
            message = _about_file(error)
        elif is_user_error(error):
            message = str(error)
        else:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


def _about_file(error: OSError) -> str:
    remedy = "Give this user the right to it, or name another place."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Make room, or name another place."
    elif error.errno in (errno.ENOTDIR, errno.EISDIR):
        remedy = "Name a folder where a folder is meant, and a file where a file is."
    return f"{error.filename or 'a file'}: {error.strerror}. {remedy}"


def nearest(word: str, allowed: list[str]) -> str:
    """Text that points from a misspelt `word` to the closest allowed one, or lists what is allowed."""
    import difflib

    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(allowed)}."


def require_file(path: Path, what: str, remedy: str) -> Path:
    """Return `path` if it is a file, else raise `UserError` with the `remedy`."""
    if not path.is_file():
        raise UserError(f"{what} not found: {path}. {remedy}")
    return path
