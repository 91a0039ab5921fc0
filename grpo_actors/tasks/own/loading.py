"""Load a user's own function by its name in the settings: ``file.py:function`` or ``module:function``.

A file is loaded under its own path and name, so that ``multiprocessing`` finds its functions in a new process. The files
of one folder can import each other. Only the process of that folder (`own.child`) calls `load`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_actors.errors import RewardError, nearest
from grpo_actors.search_path import put_after_standard_library
from grpo_actors.tasks.own.kinds import Kind

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments that a function takes by name."""

    #: None: any.
    accepts: list[str] | None
    #: Those without a default.
    requires: list[str]


def load(spec: str, kind: Kind) -> Callable[..., Any]:
    """Load the function or callable object that `spec` names; raise RewardError if it is unusable."""
    source, _, name = spec.rpartition(":")
    module = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, name):
        callables = [known for known, value in vars(module).items() if callable(value)]
        raise RewardError(f"{source} has no function {name!r}{nearest(name, callables, show=repr)}")
    return checked(getattr(module, name), name, kind)


def checked(function: object, name: str, kind: Kind) -> Callable[..., Any]:
    """Return a function or callable object; raise RewardError if it cannot be called as `kind` is."""
    if inspect.isclass(function):
        raise RewardError(f"must be a function or an object, got the class {name}; name an object of it")
    if not callable(function):
        raise RewardError(f"must be a function, got {type(function).__name__}")
    accepts = signature_of(function).accepts
    if accepts is not None and not set(kind.arguments).intersection(accepts):
        raise RewardError(
            f"must take the argument {' or '.join(kind.arguments)}, by name, got "
            f"{name}{inspect.signature(function)}; write {kind.signature}"
        )
    return function


def signature_of(function: Callable[..., Any]) -> Signature:
    """Return the arguments of a function; a function of C may have no signature and then takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return Signature(None, [])
    named = [parameter for parameter in parameters if parameter.kind in _BY_NAME]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return Signature(
        None if takes_any else [parameter.name for parameter in named],
        [parameter.name for parameter in named if parameter.default is parameter.empty],
    )


def _load_file(path: Path) -> ModuleType:
    path = path.absolute()
    name = _module_name(path)
    known = sys.modules.get(name)
    if known is not None:
        return known  # two functions of one file share its state
    if not path.is_file():
        raise RewardError(f"there is no file {path}; a relative one is looked up from the current folder")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, because its dataclasses look themselves up there
    put_after_standard_library(str(path.parent))  # so that it can import other files of its folder
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # or the next function of this file would be looked up in half a module
        raise
    return module


def _module_name(path: Path) -> str:
    """Return the name of the file; another one if it would replace a module of the standard library or of a package."""
    known = sys.modules.get(path.stem)
    is_other = known is not None and getattr(known, "__file__", None) != str(path)
    if is_other or path.stem in sys.stdlib_module_names or "." in path.stem:
        return f"own_{path.stem.replace('.', '_')}"
    return path.stem


def _load_module(name: str) -> ModuleType:
    put_after_standard_library(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports is missing
        raise RewardError(
            f"there is no module {name!r}; for a file write its path, such as {name}.py:function"
        ) from None
