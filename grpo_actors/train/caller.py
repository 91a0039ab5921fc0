"""A run that a program has started (`grpo_actors.api.train`): settings from it, and an end with it.

Standard input is a pipe from the program. It has the settings, one line of JSON, and closes when the program ends, for
whatever reason: the run then stops as after a closed terminal, with a checkpoint.
"""

import os
import signal
import threading

from grpo_actors.config import Config


def settings_of_caller() -> Config:
    """Return the settings, and from now on stop this process when the program has ended. Call it in the main thread."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the program may ignore it, as under nohup
    with open(0, "rb", closefd=False) as pipe:
        config = Config.model_validate_json(pipe.readline())
    threading.Thread(target=_follow, daemon=True).start()
    return config


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGHUP)
