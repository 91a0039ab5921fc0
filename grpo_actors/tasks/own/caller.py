"""Reach the functions of the program that started the run with `grpo_actors.api.train`: a notebook or a script.

In the settings they are called ``caller:NAME``. They run where they were defined, so that nothing is pickled: the program
serves them on a Unix socket (`serving`), and the run's processes find it by an environment variable, which they inherit.
"""

import os
import socket
import time
from collections.abc import Sequence

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.frames import send

#: Stands before the name of such a function, in place of a file or module.
CALLER = "caller"
#: Environment variable with the token that the socket asks for, and its path: ``TOKEN@PATH``.
ADDRESS = "GRPO_ACTORS_CALLER"
#: Seconds to connect in: the program may be busy.
CONNECT_TIMEOUT_S = 30.0


def is_of_caller(spec: str) -> bool:
    """Return whether a name in the settings is a function of the program that started the run."""
    return spec.startswith(f"{CALLER}:")


def bare_name(spec: str) -> str:
    """Return the name of such a function in its program."""
    return spec.removeprefix(f"{CALLER}:")


class Caller:
    """The place of these functions. Nobody can end a function there: its program goes on with it."""

    takes_turns = True
    after_timeout = "it goes on in the program that started the run, where no other call gets its turn before"

    def __init__(self, specs: Sequence[str], setting: str) -> None:
        """`setting`: The one that names the functions, for errors."""
        self._specs = specs
        self._setting = setting

    def open(self) -> socket.socket:
        """Connect; return the channel.

        Raises:
            RewardError: There is nobody to connect to.
        """
        named = f"{self._setting}: {', '.join(self._specs)}"
        token, _, path = os.environ.get(ADDRESS, "").partition("@")
        if not path:
            function = bare_name(self._specs[0])
            raise RewardError(
                f"{named} lives in the notebook or script that started the run with train(); to go on, pass {function} to "
                f"train() or evaluate() there again, or write it to a file and set {self._setting} to file.py:{function}"
            )
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.settimeout(CONNECT_TIMEOUT_S)
            channel.connect(path)
            send(channel, {"token": token}, time.monotonic() + CONNECT_TIMEOUT_S)
        except OSError as error:
            channel.close()
            reason = error.strerror or error
            raise RewardError(
                f"{named}: the program that started the run cannot be reached ({reason}); it has ended, or has closed the run"
            ) from None
        return channel

    def close(self) -> None:
        """Do nothing: the channel is all that there is here."""

    def close_ended(self) -> str:
        """Describe how the channel ended."""
        return "the program that started the run has ended, or has closed the run"
