"""A command in a terminal of its own, and its user."""

import os
import pty
import select
import subprocess
import sys

from bounds import HANG_S

#: Makes the terminal on its standard input its own, so that Ctrl-C reaches it, and becomes the command.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """The command, and what its user types and reads."""

    def __init__(self, command, *, environment, folder=None):
        self._master, slave = pty.openpty()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *map(str, command)],
            env={**os.environ, "TERM": "dumb", **environment},
            cwd=folder,
            **streams,
        )
        os.close(slave)

    def type(self, keys):
        os.write(self._master, keys.encode())

    def read(self):
        """Wait for the next byte."""
        assert select.select([self._master], [], [], HANG_S)[0], "nothing more is shown"
        return os.read(self._master, 1)

    def read_until(self, text):
        """Return the output up to and including `text`, with the terminal's two-character line ends as one."""
        data = b""
        while not data.endswith(text.encode()):
            data += self.read().replace(b"\r", b"")
        return data.decode(errors="replace")

    def ask(self, line):
        """Type a line and return the output up to the next prompt."""
        self.type(line + "\n")
        self.read_until("\n")  # the terminal's echo
        return self.read_until("\n> ").removesuffix("\n> ")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._master)
