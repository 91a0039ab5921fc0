"""Keys for sockets on TCP: the file that a peer holds, and the folder in which a learner keeps its own key and its list.

CURVE encrypts a connection and proves both ends: a peer pins the learner's public key, and the learner lets in only keys on
its list (`access`). A key has one role, so that a key given away for watching cannot train. Every file here is readable
by its owner only, and one that is not is refused.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import zmq

from grpo_actors.atomic import whole_file
from grpo_actors.errors import RunError
from grpo_actors.rundir.folder import RUN_KEY_FILE

#: What the holder of a listed key may do: sample and fetch weights, report scores, or follow the records.
ROLES = ("worker", "evaluator", "reader")
#: The role of a run's own key, which its processes on the learner's host share while it lives. It is never listed.
RUN_ROLE = "run"
#: Characters of a key as text (Z85).
KEY_CHARS = 40
#: A list or a key file is small; anything larger is something else.
MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ClientKey:
    """All that a peer needs to connect: its own pair of keys, and the public key of the learner that it trusts."""

    name: str
    role: str
    public: str
    secret: str
    learner: str

    @classmethod
    def make(cls, name: str, role: str, learner: str) -> Self:
        """Make a new pair of keys for a peer of the learner with this public key."""
        public, secret = zmq.curve_keypair()
        return cls(name, role, public.decode(), secret.decode(), learner)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a key file.

        Raises:
            RunError: it is not there, not a key file, or readable by others.
        """
        given = _read_private(path)
        names = {field.name for field in fields(cls)}
        if given.keys() != names or not all(isinstance(value, str) for value in given.values()):
            raise RunError(f"{path}: is no key file; make one with grpo keys new NAME")
        if any(len(given[part]) != KEY_CHARS for part in ("public", "secret", "learner")):
            raise RunError(f"{path}: its keys must have {KEY_CHARS} characters; copy the file again")
        return cls(**given)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all, readable by its owner only."""
        _write_private(path, asdict(self))

    @property
    def options(self) -> list[tuple[int, bytes]]:
        """Options of a connecting socket."""
        return [
            (zmq.CURVE_PUBLICKEY, self.public.encode()),
            (zmq.CURVE_SECRETKEY, self.secret.encode()),
            (zmq.CURVE_SERVERKEY, self.learner.encode()),
        ]


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a learner's list."""

    name: str
    role: str
    #: Day on which it was made.
    since: str


class KeyFolder:
    """A learner's keys: ``learner.json`` with its own pair, ``allowed.json`` with the public keys that it lets in."""

    def __init__(self, folder: Path) -> None:
        """Keep the path; nothing is read or made yet."""
        self.folder = folder.expanduser()
        self._learner, self._list = self.folder / "learner.json", self.folder / "allowed.json"

    def learner(self) -> tuple[str, str]:
        """Return the learner's public and secret key; made when first asked for.

        Raises:
            RunError: the file cannot be made, is damaged, or readable by others.
        """
        with self._locked():
            if not self._learner.exists():
                _, made = zmq.curve_keypair()
                _write_private(self._learner, {"secret": made.decode()})
            secret = _read_private(self._learner).get("secret")
        if not isinstance(secret, str) or len(secret) != KEY_CHARS:
            raise RunError(f"{self._learner}: is damaged; remove it, and make all keys anew")
        return zmq.curve_public(secret.encode()).decode(), secret

    def new(self, name: str, role: str) -> ClientKey:
        """Make a key, and let it in from now on.

        Raises:
            RunError: a key of this name is listed.
        """
        learner, _ = self.learner()
        with self._locked():
            listed = self._read()
            if any(entry.name == name for entry in listed.values()):
                raise RunError(f"{name}: a key of this name is listed; choose another, or revoke it first")
            made = ClientKey.make(name, role, learner)
            self._write({**listed, made.public: Listed(name, role, time.strftime("%Y-%m-%d"))})
        return made

    def revoke(self, name: str) -> None:
        """Let the key of this name in no more, from the next message on.

        Raises:
            RunError: no key of this name is listed.
        """
        with self._locked():
            listed = self._read()
            kept = {public: entry for public, entry in listed.items() if entry.name != name}
            if len(kept) == len(listed):
                raise RunError(f"{name}: no key of this name is listed in {self._list}")
            self._write(kept)

    def listed(self) -> dict[str, Listed]:
        """Return the list: public key -> entry.

        Raises:
            RunError: it is damaged, or readable by others.
        """
        return self._read()

    def check(self) -> None:
        """Check the files that are there; make none.

        Raises:
            RunError: one is damaged, or readable by others.
        """
        if self._learner.exists():
            self.learner()
        self.listed()

    def state(self) -> tuple[int, ...]:
        """Return numbers that change with the list, which is replaced as a whole: cheap to ask for on every message.

        Without a list there are none; if it cannot be reached, it is the error's number.
        """
        try:
            found = self._list.stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            return (error.errno or -1,)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> dict[str, Listed]:
        if not self.state():
            return {}
        try:
            listed = {public: Listed(**entry) for public, entry in _read_private(self._list).items()}
        except TypeError:
            raise RunError(
                f"{self._list}: is damaged; restore it, or remove it and make all keys anew"
            ) from None
        return {public: entry for public, entry in listed.items() if entry.role in ROLES}

    def _write(self, listed: Mapping[str, Listed]) -> None:
        _write_private(self._list, {public: asdict(entry) for public, entry in listed.items()})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from changing the folder; make it if it is not there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self.folder / "lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise RunError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror}); "
                "set transport.keys_dir to a folder that you own"
            ) from None


@contextmanager
def run_key(run_dir: Path, folder: KeyFolder | None) -> Iterator[None]:
    """Keep a key in the run folder within the block, for the run's own processes. Without keys, only remove an old one.

    Raises:
        RunError: the learner's key is damaged or readable by others.
    """
    path = run_dir / RUN_KEY_FILE
    path.unlink(missing_ok=True)  # of a killed run
    if folder is not None:
        ClientKey.make("run", RUN_ROLE, folder.learner()[0]).write(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_run_key(run_dir: Path) -> ClientKey | None:
    """Return the key of the live run in a folder; None if its sockets ask for none.

    Raises:
        RunError: the file is damaged or readable by others.
    """
    path = run_dir / RUN_KEY_FILE
    return ClientKey.read(path) if path.exists() else None


def _write_private(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path, durable=True) as draft:
        draft.unlink(missing_ok=True)
        # The mode is set by the call that makes the file: at no moment can others open it.
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")


def _read_private(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise RunError(
            f"{path}: other users may open it, so it may be known to them; chmod 600 it, or make a new key"
        )
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RunError(f"{path}: is no key file; make one with grpo keys new NAME")
    return content
