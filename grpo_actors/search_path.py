"""The order in which Python searches for modules: the standard library first, then the folders of users.

A json.py or statistics.py in the working folder, or next to the package, would otherwise replace the module of that name
in all processes. Imports nothing that Python has not loaded at its start.
"""

import os
import sys


def put_after_standard_library(folder: str) -> None:
    """Make the modules of a folder importable, before those of installed packages."""
    standard = os.path.dirname(os.__file__)
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    first_installed = max(
        (i + 1 for i, entry in enumerate(sys.path) if entry in (standard, f"{standard}/lib-dynload")),
        default=0,
    )
    sys.path.insert(first_installed, folder)


def reorder_for_command() -> None:
    """Move the working folder and the folder of this package behind the standard library.

    Python puts the first in front for ``python -m``, the second for a script in it; PYTHONPATH does the same.
    """
    beside = os.path.dirname(os.path.dirname(__file__))
    in_front = [] if sys.flags.safe_path else sys.path[:1]
    for folder in (*in_front, beside):
        if folder in sys.path:
            put_after_standard_library(folder)
