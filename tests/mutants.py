"""Change the package in one place at a time, and see whether its tests notice: ``make mutants``.

    python tests/mutants.py --seed 1 --count 300             # spread over the parts of the package
    python tests/mutants.py --seed 1 --count 20 --module rundir

A mutant runs against the tests that call its function, in the file that mirrors its module and then in the mirror folder
and every file that imports the module; then against those tests of these files that start other processes, in which nobody
sees what is called. (mutmut and cosmic-ray would run one command for all.) Which test calls which function is found by one
run without mutants, and kept until the package changes. The tests run in forks of a process that has loaded MLX and the
other packages: to load them takes longer than most tests.

Each result is one JSON line in --results; the same command continues there. Mutants that change no behaviour are listed in
equivalent_mutants.toml, with the reason.
"""

import argparse
import ast
import builtins
import contextlib
import copy
import functools
import hashlib
import importlib
import json
import marshal
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "grpo_actors"
EXEMPT = Path(__file__).with_name("equivalent_mutants.toml")
#: Files of the tests that change no test.
OWN = ("tests/mutants.py", "tests/equivalent_mutants.toml")
#: Modules that whole runs test -> those tests, besides the files that are found by name and by import.
WHOLE_RUNS = {
    "api/evaluation.py": ("tests/run/test_api_run.py",),
    "api/models.py": ("tests/run/test_api_run.py",),
    "api/run.py": ("tests/run/test_api_run.py", "tests/run/test_api_programs.py"),
    "api/training.py": ("tests/run/test_api_run.py",),
    "evaluator/following.py": ("tests/run/test_whole_run.py",),
    "export/__main__.py": ("tests/run/test_export.py",),
    "export/card.py": ("tests/run/test_export.py",),
    "export/forms.py": ("tests/run/test_export.py",),
    "hub.py": ("tests/run/test_export.py",),
    "init/__main__.py": ("tests/test_wheel.py",),
    "init/files/rewards.py": ("tests/test_wheel.py",),
    "keys/__main__.py": ("tests/run/test_keys_run.py",),
    "learner/opening.py": ("tests/run/test_whole_run.py",),
    "learner/replay.py": ("tests/run/test_replay.py",),
    "targets.py": ("tests/tail/test_tail.py", "tests/page/test_page_command.py"),
    "train/caller.py": ("tests/run/test_api_run.py", "tests/run/test_api_programs.py"),
    "options.py": ("tests/test_command.py", "tests/config/test_launch.py"),
    "process.py": ("tests/run/test_stop.py",),
    "ranks/group.py": ("tests/run/test_ranks_run.py",),
    "ranks/processes.py": ("tests/run/test_ranks_run.py",),
    "rollout/__main__.py": ("tests/run/test_attach.py",),
    "rollout/rank.py": ("tests/run/test_sharded_run.py", "tests/run/test_attach.py"),
    "supervisor/preflight.py": ("tests/run/test_bad_input.py",),
    "supervisor/next_commands.py": ("tests/run/test_stop.py", "tests/run/test_whole_run.py"),
    "supervisor/run.py": ("tests/run/test_stop.py", "tests/run/test_deaths.py"),
    "supervisor/supervisor.py": (
        "tests/run/test_stop.py",
        "tests/run/test_deaths.py",
        "tests/run/test_auto.py",
    ),
    "supervisor/worker_pool.py": ("tests/run/test_auto.py",),
    "train/__main__.py": (
        "tests/config/test_launch.py",
        "tests/runs/test_listing.py",
        "tests/trial/test_trial.py",
    ),
}
#: Tests count as hung, and the mutant as killed, after so many seconds and this many times what they took without it.
LIMIT_S, LIMIT_TIMES = 60.0, 10.0
#: Seconds that a run of other files may take.
LONG_LIMIT_S = 900.0
#: A function that does not exist: it stands for whatever a test may call in processes that it starts.
UNSEEN = "other processes"
#: Audit events of the start of a process.
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")
#: Other packages' modules that are slow to load. None may start a thread: the tests run in forks.
PRELOADED = ("mlx.nn", "mlx_lm", "transformers", "pydantic", "zmq", "msgpack", "hypothesis")
#: Exit codes of pytest: all passed; all are left out by their marks.
PASSED = (0, 5)

SWAPS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the text `old`, which begins at byte `start` of the module, becomes `new`."""

    module: str
    line: int
    start: int
    kind: str
    old: str
    new: str

    @property
    def part(self) -> str:
        return self.module.partition("/")[0]


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (kind, new text) for each way in which this node can be changed."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "compare", _with(node, ops=[SWAPS[type(op)]()])
        case ast.BoolOp(op=op):
            yield "and/or", _with(node, op=SWAPS[type(op)]())
        case ast.BinOp(op=op) if type(op) in SWAPS and not _is_text(node):
            yield "arithmetic", _with(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "not", f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool(value)):
            yield "constant", str(not value)
        case ast.Constant(value=int(value)):
            yield from (("constant", f"({value + step})") for step in (1, -1))
        case ast.Constant(value=float(value)):
            yield from (
                ("constant", f"({changed!r})") for changed in ((2 * value, value / 2) if value else (1.0,))
            )
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return", "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "statement", "pass"


def _with(node: ast.expr, **fields: object) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in ast.walk(node)
    )


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of a module, given by its path within the package."""
    source = (ROOT / PACKAGE / module).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in _code(ast.parse(source)):
        for kind, new in changes(node):
            start = starts[node.lineno - 1] + node.col_offset
            old = source[start : starts[node.end_lineno - 1] + node.end_col_offset].decode()
            found.append(Mutant(module, node.lineno, start, kind, old, new))
    return found


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over what runs and decides: no annotations, patterns, texts, words of errors, imports of types, or named numbers."""
    if isinstance(
        node, ast.JoinedStr | ast.pattern
    ):  # the first has wrong positions, the second allows no parentheses
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
        return
    if _names_a_number(node):
        return
    yield node
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _names_a_number(node: ast.AST) -> bool:
    """Return whether a constant gets its number here: a choice, which tests take by its name and so cannot tell from another."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    parts = [part for part in ast.walk(node.value) if isinstance(part, ast.expr)]
    numbers = (ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.Tuple)
    return all(name.id.isupper() for name in names) and all(isinstance(part, numbers) for part in parts)


def function_at(mutant: Mutant) -> str:
    """Return ``MODULE:QUALIFIED.NAME`` of the innermost function around a mutant, ``MODULE:`` outside of functions."""
    source = (ROOT / PACKAGE / mutant.module).read_bytes()
    last = mutant.line + mutant.old.count("\n")
    names, scope = [], ast.parse(source)
    found = ""
    while scope is not None:
        inner = (
            node
            for node in _blocks(scope)
            if node.lineno <= mutant.line and last <= (node.end_lineno or node.lineno)
        )
        parent, scope = scope, next(inner, None)
        if scope is not None:
            names += ["<locals>"] if isinstance(parent, ast.FunctionDef) else []
            names.append(scope.name)
            found = ".".join(names) if isinstance(scope, ast.FunctionDef) else found
    return f"{mutant.module}:{found}"


def _blocks(scope: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the functions and classes within a scope, but not those within them."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        else:
            yield from _blocks(node)


def chosen(seed: int, count: int, module: str, skipped: dict[str, str]) -> list[Mutant]:
    """Choose mutants: the parts take turns, and each module of a part is as likely as its share of mutants."""
    chance = random.Random(seed)
    by_part: dict[str, list[Mutant]] = defaultdict(list)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        if name.startswith(module) and not any(name.startswith(skip) for skip in skipped):
            for mutant in mutants_of(name):
                by_part[mutant.part].append(mutant)
    parts = sorted(by_part)
    for part in parts:
        chance.shuffle(by_part[part])
    chance.shuffle(parts)
    turns = max(map(len, by_part.values()), default=0)
    return [by_part[part][turn] for turn in range(turns) for part in parts if turn < len(by_part[part])][
        :count
    ]


def files_testing(module: str) -> tuple[list[str], list[str]]:
    """Return the test files that mirror a module, and all that test it, in the order in which they run.

    All are: the files that import the module, those of the mirror folder first, the others of that folder, and `WHOLE_RUNS`;
    where these are none, the mirrors of the modules that import it.
    """
    folder, mirrors = _mirrors(module)
    beside = sorted(folder.glob("test_*.py")) if folder != ROOT / "tests" else []
    imports = _import_of(module)
    importing = [path for path, text in _naming_the_package("tests") if imports.search(text)]
    whole_runs = [ROOT / name for name in WHOLE_RUNS.get(module, ())]
    near = [path for path in importing if path in beside]
    every = [*mirrors, *near, *importing, *beside, *whole_runs]
    if not every:
        users = [path for path, text in _naming_the_package(PACKAGE) if imports.search(text)]
        every = [
            found for user in users for found in _mirrors(user.relative_to(ROOT / PACKAGE).as_posix())[1]
        ]
    return _names(mirrors), _names(every)


def _mirrors(module: str) -> tuple[Path, list[Path]]:
    """Return the nearest folder of tests, and the files in it that have the module's name."""
    package, name = _place(module)
    folder = next(
        found for found in (ROOT / "tests" / p for p in (package, *package.parents)) if found.is_dir()
    )
    return folder, sorted(folder.glob(f"test_{name}*.py")) or sorted(folder.glob(f"test_*{name}*.py"))


def _place(module: str) -> tuple[Path, str]:
    """Return the folder and the name under which a module is imported."""
    path = Path(module)
    is_folder = path.stem in ("__init__", "__main__") and path.parent.name
    return (path.parent.parent, path.parent.name) if is_folder else (path.parent, path.stem)


def _import_of(module: str) -> re.Pattern[str]:
    package, name = _place(module)
    parent = re.escape(".".join((PACKAGE, *package.parts)))
    return re.compile(rf"\b{parent}(\.{name}\b|.*\bimport .*\b{name}\b)")


@functools.cache
def _naming_the_package(folder: str) -> list[tuple[Path, str]]:
    """Return files and their lines that name the package; of tests, none of `run`, which take too long to come by chance."""
    unfit = {"run", "test_imports.py", "test_docs.py", "test_mutants.py"}
    paths = sorted((ROOT / folder).rglob("test_*.py" if folder == "tests" else "*.py"))
    named = {path: [line for line in path.read_text().splitlines() if PACKAGE in line] for path in paths}
    return [(path, "\n".join(lines)) for path, lines in named.items() if unfit.isdisjoint(path.parts)]


def _names(paths: list[Path]) -> list[str]:
    return list(dict.fromkeys(path.relative_to(ROOT).as_posix() for path in paths))


class Scratch:
    """A copy of the repository in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        self._digests: dict[str, str] = {}
        shared = hashlib.sha256()
        for name in sorted(files.stdout.splitlines()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (folder / name).symlink_to((ROOT / name).readlink())
            elif (ROOT / name).is_file():  # else it is deleted, and not committed yet
                shutil.copy(ROOT / name, folder / name)
                digest = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
                if Path(name).name.startswith("test_"):
                    self._digests[name] = digest
                elif name.startswith((PACKAGE, "tests/", "configs/")) and name not in OWN:
                    shared.update(f"{name} {digest}\n".encode())
        self._shared = shared.hexdigest()
        self._writes = 0
        self._preloaded = self._preload()

    def digest(self, file: str) -> str:
        """Return the digest of a test file and of all that several of them use."""
        return f"{self._shared} {self._digests[file]}"

    def _preload(self) -> frozenset[str]:
        """Load what the tests need from other packages; return those files of this one that had to be loaded first."""
        os.environ["PYTHONPATH"] = str(self.folder)
        # Containers often tell Python to keep no bytecode; each fork would compile the package again.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        sys.path[0] = str(self.folder)
        with noting(self.folder):
            importlib.import_module(PACKAGE)  # the BLAS comes before MLX
        own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE}
        for name in PRELOADED:
            importlib.import_module(name)
        files = (Path(module.__file__ or "") for module in own.values())
        return frozenset(path.relative_to(self.folder / PACKAGE).as_posix() for path in files)

    def passes(self, files: list[str], tests: "Tests | None" = None, module: str = "") -> bool:
        """Run the tests of these files until the first failure; return whether all passed in time.

        Args:
            files: The files.
            tests: Those to run, in this order; None: all.
            module: The one that is changed. Where a fork would have it loaded already, a new interpreter runs all tests.
        """
        in_fork = module not in self._preloaded
        plugins = [Only(tests)] if tests is not None else []
        limit_s = LIMIT_S + LIMIT_TIMES * sum(tests.values()) if in_fork and tests else LONG_LIMIT_S
        return self._run(["-x", *files], plugins, limit_s, in_fork=in_fork) in PASSED

    def trace(self, file: str) -> dict[str, Any]:
        """Run the tests of a file; return {test: seconds and functions} (`Tracer`)."""
        notes = self.folder / "called.json"
        notes.write_text("{}")
        self._run([file], [Tracer(self.folder, notes)], LONG_LIMIT_S, in_fork=True)
        traced: dict[str, Any] = json.loads(notes.read_text())
        return traced

    def _run(self, arguments: list[str], plugins: list[object], limit_s: float, *, in_fork: bool) -> int:
        arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported", *arguments]
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            if not in_fork:
                os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])  # noqa: S606 - itself
            code = 1
            with contextlib.suppress(BaseException):  # the fork must not go on as this script
                code = int(pytest.main(arguments, plugins))
            os._exit(code)
        return _code_in_time(pid, limit_s)

    @contextlib.contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Put a mutant in place within the block."""
        path = self.folder / PACKAGE / mutant.module
        source = path.read_bytes()
        end = mutant.start + len(mutant.old.encode())
        try:
            self._write(path, source[: mutant.start] + mutant.new.encode() + source[end:])
            yield
        finally:
            self._write(path, source)

    def _write(self, path: Path, source: bytes) -> None:
        """Write a module with a time of its own: by size and whole seconds Python knows what it has compiled."""
        path.write_bytes(source)
        self._writes += 1
        os.utime(path, (self._writes, self._writes))


def _code_in_time(pid: int, limit_s: float) -> int:
    """Wait for a process, not for ever; return its exit code, -1 if it is ended. What it has started is killed."""
    deadline_s = time.monotonic() + limit_s
    code = None
    while time.monotonic() < deadline_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if code is None:
        os.waitpid(pid, 0)
        return -1
    return code


#: Name among the builtins of what each function of the package calls first where its calls are noted.
NOTE = "__note_call_of__"


class NotingLoader(SourceFileLoader):
    """Loads a module whose functions tell when they are called. (To trace every call of Python takes ten times as long.)"""

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code, compiled once."""
        kept = Path(f"{self.path}.noting")
        if not kept.exists():
            tree = ast.parse(self.get_data(self.path))
            _note_calls(tree, f"{self.path.partition(f'/{PACKAGE}/')[2]}:", "")
            code = compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)
            kept.write_bytes(marshal.dumps(code))
        loaded: CodeType = marshal.loads(kept.read_bytes())  # noqa: S302 - written here
        return loaded


def _note_calls(scope: ast.AST, module: str, outer: str) -> None:
    for inner in _blocks(scope):
        name = f"{outer}{inner.name}"
        is_function = isinstance(inner, ast.FunctionDef)
        _note_calls(inner, module, f"{name}.<locals>." if is_function else f"{name}.")
        if is_function:
            note = ast.parse(f"{NOTE}({module + name!r})").body[0]
            at = 1 if ast.get_docstring(inner, clean=False) is not None else 0
            inner.body.insert(at, ast.copy_location(note, inner.body[0]))


class NotingFinder:
    """Finds the modules of the package in a folder, for `NotingLoader`."""

    def __init__(self, folder: Path) -> None:
        self._package = f"{folder / PACKAGE}/"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and (spec.origin or "").startswith(self._package):
            spec.loader = NotingLoader(name, spec.origin or "")
        return spec


@contextlib.contextmanager
def noting(folder: Path) -> Iterator[None]:
    """Load modules whose functions tell when they are called within the block; at first nobody listens."""
    setattr(builtins, NOTE, lambda _: None)
    finder = NotingFinder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class Tracer:
    """A plugin of pytest that notes which functions of the package each test calls, and how long it takes."""

    def __init__(self, folder: Path, notes: Path) -> None:
        self._folder, self._notes = folder, notes
        #: Test -> functions; "": those called for several tests, by an import or a fixture of a module.
        self._called: dict[str, set[str]] = defaultdict(set)
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()
        self._test = ""
        self._noting = contextlib.ExitStack()

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        sys.addaudithook(self._hear)
        self._noting.enter_context(noting(self._folder))
        setattr(builtins, NOTE, self._note)

    def _note(self, function: str) -> None:
        self._called[self._test].add(function)

    def _hear(self, event: str, _: object) -> None:
        if event in STARTS:
            self._called[self._test].add(UNSEEN)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began_s, self._test = time.monotonic(), item.nodeid
        self._called[item.nodeid] |= set()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid], self._test = time.monotonic() - began_s, ""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        test = self._test
        if fixturedef.scope != "function":
            self._test = ""
        try:
            return (yield)
        finally:
            self._test = test

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # perhaps because the machine is busy
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._noting.close()
        tests = {
            test: {
                "seconds": self._seconds.get(test, 0.0),
                "calls": [UNSEEN] if test in self._failed else sorted(calls),
            }
            for test, calls in self._called.items()
        }
        self._notes.write_text(json.dumps(tests))


#: The tests to run, in order, and how many seconds each took when it was traced.
Tests = dict[str, float]


class Only:
    """A plugin of pytest that runs some of the tests, in the given order."""

    def __init__(self, tests: Tests) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )


class Calls:
    """Which test calls which function. Found by running a file once, and kept for as long as nothing changes."""

    def __init__(self, scratch: Scratch, kept: Path) -> None:
        self._scratch, self._kept = scratch, kept
        self._files: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def is_known(self, file: str) -> bool:
        """Return whether a file has been run already."""
        return self._files.get(file, {}).get("digest") == self._scratch.digest(file)

    def of_file(self, file: str) -> dict[str, Any]:
        """Return {test: seconds and functions} of a file; "": functions that are called for several tests."""
        if not self.is_known(file):
            self._files[file] = {"digest": self._scratch.digest(file), "tests": self._scratch.trace(file)}
            self._kept.write_text(json.dumps(self._files))
        tests: dict[str, Any] = self._files[file]["tests"]
        return tests

    def tests_calling(self, function: str, files: list[str]) -> Tests:
        """Return the tests of these files that call a function, the fastest first; all of a file whose fixtures do.

        Args:
            function: ``MODULE:QUALIFIED.NAME``, ``MODULE:`` for any of that module, or `UNSEEN`.
            files: The files.
        """
        found = {}
        for file in files:
            tests = self.of_file(file)
            for_all = "" in tests and _includes(tests[""]["calls"], function)
            for test, noted in tests.items():
                if test and (for_all or _includes(noted["calls"], function)):
                    found[test] = noted["seconds"]
        return dict(sorted(found.items(), key=lambda item: item[1]))


def _includes(calls: list[str], function: str) -> bool:
    if function.endswith(":"):
        return any(call.startswith(function) for call in calls)
    return function in calls


class Judge:
    """Finds the outcome of mutants in a scratch copy."""

    def __init__(self, scratch: Scratch, calls: Calls, equivalent: list[dict[str, str]]) -> None:
        self._scratch, self._calls = scratch, calls
        self._equivalent = equivalent
        #: Whether files pass without any change.
        self._sound: dict[tuple[str, ...], bool] = {}

    def outcome(self, mutant: Mutant) -> str:
        """Return ``killed``, ``survived`` or ``equivalent``."""
        if any(is_named(mutant, entry) for entry in self._equivalent):
            return "equivalent"
        first, every = files_testing(mutant.module)
        if not every:
            sys.exit(f"error: no test file mirrors or imports {mutant.module}; name one in WHOLE_RUNS")
        runs = [file for file in every if file.startswith("tests/run/")]
        beside = [file for file in every if file not in first and file not in runs]
        function = function_at(mutant)
        rounds = []
        for files in (first, beside):
            rounds += [(function, part) for part in self._in_turn(files)]
            rounds.append((UNSEEN, files))
        for of, files in rounds:
            tests = self._calls.tests_calling(of, files)
            # A test that calls the function has passed when it was traced.
            if tests and self._fails(mutant, files_of(tests), tests, known=of == function):
                return "killed"
        # What is not within a function, a test may use without a call.
        near = [file for file in every if Path(file).parent == _mirrors(mutant.module)[0].relative_to(ROOT)]
        rest = [*runs, *((first or near) if function.endswith(":") else [])]
        return "killed" if rest and self._fails(mutant, rest) else "survived"

    def _in_turn(self, files: list[str]) -> list[list[str]]:
        """Return first the files that have been run without mutants, then one by one those that must be run for that."""
        unknown = [file for file in files if not self._calls.is_known(file)]
        return [[file for file in files if file not in unknown], *([file] for file in unknown)]

    def _fails(
        self, mutant: Mutant, files: list[str], tests: Tests | None = None, *, known: bool = False
    ) -> bool:
        with self._scratch.changed(mutant):
            if self._scratch.passes(files, tests, mutant.module):
                return False
        return known or self._is_sound(files, tests)

    def _is_sound(self, files: list[str], tests: Tests | None) -> bool:
        """Return whether tests pass without any change: on a busy machine one may fail by itself."""
        key = (*files, *(tests or ()))
        if key not in self._sound:
            self._sound[key] = self._scratch.passes(files, tests)
            if not self._sound[key]:
                print(
                    f"warning: {' '.join(files)} fail without any change, and judge nothing", file=sys.stderr
                )
        return self._sound[key]


def is_named(mutant: Mutant, entry: dict[str, str]) -> bool:
    """Return whether an entry of equivalent_mutants.toml is about a mutant; one with ``where`` is about lines with this text."""
    if (mutant.module, mutant.old, mutant.new) != (entry["module"], entry["old"], entry["new"]):
        return False
    line = (ROOT / PACKAGE / mutant.module).read_text().split("\n")[mutant.line - 1]
    return entry.get("where", "") in line


def files_of(tests: Tests) -> list[str]:
    """Return the files that hold these tests."""
    return sorted({test.partition("::")[0] for test in tests})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument(
        "--module", default="", help="start of a path within the package, such as learner/exchange"
    )
    parser.add_argument("--results", type=Path, help="default: outputs/mutants-SEED.jsonl")
    args = parser.parse_args()
    results = args.results or ROOT / "outputs" / f"mutants-{args.seed}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    exempt = tomllib.loads(EXEMPT.read_text())
    mutants = chosen(args.seed, args.count, args.module, exempt["skipped"])
    done = {}
    if results.exists():
        lines = map(json.loads, results.read_text().splitlines())
        done = {Mutant(**line["mutant"]): line for line in lines}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, results.open("a") as file:
        scratch = Scratch(Path(folder))
        judge = Judge(scratch, Calls(scratch, results.with_name("mutants-calls.json")), exempt["equivalent"])
        for number, mutant in enumerate(mutants, 1):
            if mutant not in done:
                began_s = time.monotonic()
                outcome, took_s = judge.outcome(mutant), round(time.monotonic() - began_s, 1)
                done[mutant] = {"mutant": asdict(mutant), "outcome": outcome, "seconds": took_s}
                print(json.dumps(done[mutant]), file=file, flush=True)
            what = f"{mutant.module}:{mutant.line} {mutant.old[:60]!r} → {mutant.new[:60]!r}"
            print(f"{number}/{len(mutants)} {done[mutant]['outcome']:10} {what}", flush=True)
    show([done[mutant] for mutant in mutants])


def show(lines: list[dict]) -> None:
    """Print the share that was killed, for each part."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        for part in (line["mutant"]["module"].partition("/")[0], "all"):
            counts[part][line["outcome"]] += 1
    print(f"\n{'part':16}{'mutants':>9}{'killed':>9}{'survived':>10}{'equivalent':>12}{'share':>8}")
    for part, of in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        judged = of["killed"] + of["survived"]
        share = f"{of['killed'] / judged:8.1%}" if judged else "       –"
        print(f"{part:16}{of.total():9}{of['killed']:9}{of['survived']:10}{of['equivalent']:12}{share}")


if __name__ == "__main__":
    main()
