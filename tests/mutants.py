"""Change the package in one place at a time, and see whether its tests notice: ``make mutants``.

    python tests/mutants.py --seed 1 --count 300             # spread over the parts of the package
    python tests/mutants.py --seed 1 --count 20 --module rundir

A mutant runs first against the test file that mirrors its module, then against the mirror folder and every test file that
imports the module. (mutmut and cosmic-ray would run one command for all.) Each result is one JSON line in --results; the
same command continues there. Mutants that change no behaviour are listed in equivalent_mutants.toml, with the reason.
"""

import argparse
import ast
import contextlib
import copy
import functools
import json
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "grpo_actors"
EXEMPT = Path(__file__).with_name("equivalent_mutants.toml")
#: Modules that whole runs test -> those tests, besides the files that are found by name and by import.
WHOLE_RUNS = {
    "hub.py": ("tests/run/test_export.py",),
    "supervisor/supervisor.py": ("tests/run/test_stop.py", "tests/run/test_deaths.py"),
    "supervisor/preflight.py": ("tests/run/test_bad_input.py",),
    "learner/opening.py": ("tests/run/test_whole_run.py",),
    "learner/replay.py": ("tests/run/test_replay.py",),
    "evaluator/following.py": ("tests/run/test_whole_run.py",),
    "failpoints.py": ("tests/run/faults/test_faults_of_workers.py",),
}
#: Seconds after which the tests count as hung, and the mutant as killed.
LIMIT_S = 900

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
    """Walk over what runs and decides: no annotations, patterns, texts, words of errors, or imports of types."""
    if isinstance(
        node, ast.JoinedStr | ast.pattern
    ):  # the first has wrong positions, the second allows no parentheses
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
        return
    yield node
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


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

    All are: the mirror folder, the files that import the module, and `WHOLE_RUNS`; where these are none, the mirrors of
    the modules that import it.
    """
    folder, mirrors = _mirrors(module)
    beside = sorted(folder.glob("test_*.py")) if folder != ROOT / "tests" else []
    imports = _import_of(module)
    importing = [path for path, text in _naming_the_package("tests") if imports.search(text)]
    whole_runs = [ROOT / name for name in WHOLE_RUNS.get(module, ())]
    every = [*mirrors, *beside, *importing, *whole_runs]
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
        for name in files.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    def passes(self, tests: list[str]) -> bool:
        """Run tests until the first failure; return whether all passed in time."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        ) as process:
            try:
                return process.wait(LIMIT_S) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what the tests have started

    def killers(self, mutant: Mutant, stages: list[list[str]]) -> list[str]:
        """Return the tests of the first stage that fails with the mutant in place; [] if it survives all."""
        path = self.folder / PACKAGE / mutant.module
        source = path.read_bytes()
        end = mutant.start + len(mutant.old.encode())
        path.write_bytes(source[: mutant.start] + mutant.new.encode() + source[end:])
        try:
            return next((tests for tests in stages if not self.passes(tests)), [])
        finally:
            path.write_bytes(source)


class Judge:
    """Finds the outcome of mutants in a scratch copy."""

    def __init__(self, scratch: Scratch, equivalent: set[tuple[str, str, str]]) -> None:
        self._scratch = scratch
        self._equivalent = equivalent
        #: Tests that pass without any change.
        self._sound: set[tuple[str, ...]] = set()

    def outcome(self, mutant: Mutant) -> str:
        """Return ``killed``, ``survived`` or ``equivalent``."""
        if (mutant.module, mutant.old, mutant.new) in self._equivalent:
            return "equivalent"
        first, every = files_testing(mutant.module)
        stages = [stage for stage in (first, [test for test in every if test not in first]) if stage]
        if not stages:
            sys.exit(f"error: no test file mirrors or imports {mutant.module}; name one in ALSO")
        killers = self._scratch.killers(mutant, stages)
        if not killers:
            return "survived"
        if tuple(killers) not in self._sound and not self._scratch.passes(killers):
            sys.exit(f"error: {' '.join(killers)} fail without any change, so they can judge nothing")
        self._sound.add(tuple(killers))
        return "killed"


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
    equivalent = {(m["module"], m["old"], m["new"]) for m in exempt["equivalent"]}
    mutants = chosen(args.seed, args.count, args.module, exempt["skipped"])
    done = {}
    if results.exists():
        lines = map(json.loads, results.read_text().splitlines())
        done = {Mutant(**line["mutant"]): line for line in lines}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, results.open("a") as file:
        judge = Judge(Scratch(Path(folder)), equivalent)
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
