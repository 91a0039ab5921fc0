"""Define every error that this package raises on purpose.

The classes form one tree. All are picklable and carry one line that says where, the rule,
the value got and the cure; a command-line tool prints that line and exits with 2
(`grpo_actors.process`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches


class GrpoActorsError(Exception):
    """Base class of all. Caught at the outermost frame of a process, which prints its line."""


class ConfigError(GrpoActorsError):
    """The user's settings are unusable. Raised before anything starts."""


class DataError(GrpoActorsError):
    """A data set, or one line of it, is unusable; the text names file and line."""


class ModelError(GrpoActorsError):
    """A model folder, checkpoint or adapter is unusable, or is not the requested one."""


class RewardError(GrpoActorsError):
    """A reward or an environment cannot be loaded, fails, or returns a value of the wrong kind."""


class RunError(GrpoActorsError):
    """The run folder is in use, its port is taken, or it cannot be resumed."""


class ProtocolError(GrpoActorsError):
    """A peer sent data that the protocol forbids. Caught by the actor's loop, which drops the peer."""


class TrainingError(GrpoActorsError):
    """Training cannot continue, for example after too many non-finite steps in a row."""


@contextlib.contextmanager
def os_errors_in_one_line() -> Iterator[None]:
    """Turn an OSError of the block into a RunError that names the file. Also a decorator.

    For what happens before a run writes anything: a path that the user gave is to blame, and no traceback explains it.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        raise RunError(f"{where}{error.strerror or error}") from error


def nearest(
    name: str,
    known: Iterable[str],
    *,
    count: int = 1,
    show: Callable[[str], str] = str,
    otherwise: str = "",
) -> str:
    """Return ``; did you mean …?`` with up to `count` known names like an unknown one, or `otherwise` if none is near."""
    near = get_close_matches(name, list(known), n=count)
    return f"; did you mean {' or '.join(map(show, near))}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of another library's exception, or its class name if it has no text."""
    return (str(error) or type(error).__name__).splitlines()[0]
