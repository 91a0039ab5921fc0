"""Imports point down only: read from every module's source, whether or not the import ever runs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_actors"

ARRAYS = ("mlx", "mlx_lm", "numpy", "grpo_actors.policy", "grpo_actors.objective")
SOCKETS = ("zmq", "grpo_actors.transport")
WIRE = ("msgpack", "grpo_actors.wire")

#: Parts of the page that know no clock, no thread, no socket and no figure.
PURE_PAGE = ("charts", "curves", "run_state", "sample_filter", "settings", "timeline", "views")

#: Part of the package -> what no module of it may import.
FORBIDDEN = {
    "objective": (
        *SOCKETS,
        *WIRE,
        "mlx.nn",
        "mlx.optimizers",
        "mlx_lm",
        "grpo_actors.policy",
        "grpo_actors.tasks",
    ),
    "policy": SOCKETS,
    "transport": (*ARRAYS, *WIRE, "grpo_actors.schedule", "grpo_actors.tasks"),
    "tasks": ("mlx", "mlx_lm", "grpo_actors.policy", "grpo_actors.objective", *SOCKETS, *WIRE),
    "schedule": (*ARRAYS, *SOCKETS, *WIRE, "grpo_actors.tasks", "threading", "time", "asyncio"),
    "observe": (*ARRAYS, "grpo_actors.schedule", "grpo_actors.tasks"),
    "config": (*ARRAYS, *SOCKETS, *WIRE),
    # It plans with policy.locate and policy.copies, which load no MLX: the last test of this file proves it.
    "supervisor": ("mlx", "mlx_lm", "numpy", "grpo_actors.objective"),
    "supervisor/supervisor": ARRAYS,
    "supervisor/run": ARRAYS,
    "kernels": (*SOCKETS, *WIRE),
    "kernels/stage": ("mlx", "mlx_lm", "numpy", "grpo_actors.objective"),
    "kernels/files": ARRAYS,
    "tail": ARRAYS,
    "page": ("mlx", "mlx_lm", *WIRE, "zmq"),
    "report": ("mlx", "mlx_lm", *SOCKETS, *WIRE),
    **{f"page/{pure}": (*SOCKETS, "bokeh", "starlette", "threading", "time") for pure in PURE_PAGE},
    "wire": (*ARRAYS, *SOCKETS),
    "api": (*SOCKETS, *WIRE, "mlx", "mlx_lm"),
    **{f"api/{part}": ARRAYS for part in ("arguments", "run", "training")},
    "errors": ("grpo_actors",),
    "generate": (*SOCKETS, *WIRE),
    "generate/prompts": ARRAYS,
    "generate/output": ARRAYS,
    "generate/command_line": ARRAYS,
    "learner/exchange": ARRAYS,
    "learner/exchange/peers": (*ARRAYS, *SOCKETS),
    "learner/exchange/supply": (*ARRAYS, *SOCKETS),
}

#: Part -> the only parts of the package, and the only others beside the standard library, that it may import.
ALLOWED = {
    "objective": (
        *("mlx.core", "numpy", "grpo_actors.objective", "grpo_actors.backend", "grpo_actors.errors"),
        *("grpo_actors.config.objective", "grpo_actors.dealing"),
    ),
    "schedule": ("xxhash", "grpo_actors.schedule", "grpo_actors.errors"),
    "transport": (
        "zmq",
        "grpo_actors.transport",
        "grpo_actors.atomic",
        "grpo_actors.rundir.folder",
        "grpo_actors.invocation",
        "grpo_actors.errors",
    ),
}

#: Who may import both what computes and what talks: the actors, what only they are made of, and the bench of that.
JOINERS = {
    *("learner.opening", "learner.exchange_setup", "learner.local_worker", "learner.publishing"),
    *("learner.ranks", "learner.following"),
    *("rollout.participation", "rollout.worker", "rollout.joining", "rollout.following"),
    *("evaluator.__main__", "evaluator.following"),
    *("bench.publication", "bench.fetcher"),
}


def modules(part: str = "") -> list[Path]:
    """The files of one part of the package, or of all."""
    if not part:
        return sorted(PACKAGE.rglob("*.py"))
    found = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    assert all(path.is_file() for path in found), part
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, at its top or within a function."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            # `from mlx import nn` imports mlx.nn, `from numpy import array` no such module.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def only_types(path: Path, line: int) -> bool:
    """Whether an import stands under ``if TYPE_CHECKING``, where it never runs."""
    for node in nodes(path):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return node.lineno < line <= (node.end_lineno or line)
    return False


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_part_imports_what_it_refuses_to_know(part):
    broken = [
        f"{path.relative_to(ROOT)}:{line}: {part} must not import {name}"
        for path in modules(part)
        for line, name in imports(path)
        if any(within(name, forbidden) for forbidden in FORBIDDEN[part]) and not only_types(path, line)
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("part", ALLOWED)
def test_the_lowest_parts_import_only_what_is_listed(part):
    broken = [
        f"{path.relative_to(ROOT)}:{line}: {part} must not import {name}"
        for path in modules(part)
        for line, name in imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(within(name, allowed) for allowed in ALLOWED[part])
    ]
    assert not broken, "\n".join(broken)


def importers(*packages: str) -> set[str]:
    """The modules that import one of these, without the package's name."""
    return {
        name_of(path).removeprefix("grpo_actors.")
        for path in modules()
        if any(within(name, package) for _, name in imports(path) for package in packages)
    }


def test_only_transport_imports_zmq():
    assert {name for name in importers("zmq") if not within(name, "transport")} == set()


def test_no_actor_knows_the_page_and_the_supervisor_only_starts_its_report():
    tools = importers("grpo_actors.page", "grpo_actors.report")
    actors = ("supervisor", "learner", "rollout", "evaluator")
    knowing = {name for name in tools if any(within(name, actor) for actor in actors)}
    # It asks whether the extra is there, and starts a process that writes the report.
    assert knowing == {"supervisor.closing_report"}


def test_only_the_page_imports_its_extra():
    assert {name for name in importers("bokeh", "starlette", "uvicorn") if not within(name, "page")} == set()


#: Outside `policy`, what imports mlx.nn or mlx_lm, and why: it makes, writes or measures models.
MODEL_MAKERS = {
    "assets.make_tiny": "trains the embedded model from nothing",
    "bench.policies": "times a step with mlx-lm's own cache",
    "bench.random_model": "makes models of well-known shapes with random weights",
    "bench.sampling_process": "times mlx-lm's own sampler",
    "convert": "writes model folders with mlx-lm, and compares them with their sources",
    "export.fidelity": "compares a fused model with its base and its adapter",
    "export.fusing": "adds an adapter to its base",
    "kernels.small_model": "makes a small model of a run's architecture with random weights",
    "rundir.checkpoint_weights": "writes checkpoints that mlx-lm loads",
}


def test_only_policy_and_what_makes_writes_or_measures_models_imports_mlx_nn_and_mlx_lm():
    outside = {name for name in importers("mlx.nn", "mlx_lm") if not within(name, "policy")}
    places = {name: [place for place in MODEL_MAKERS if within(name, place)] for name in outside}
    assert [name for name, found in places.items() if not found] == []
    assert {place for found in places.values() for place in found} == set(MODEL_MAKERS)


def test_only_the_actors_join_what_computes_with_what_talks():
    computes = ("grpo_actors.policy", "grpo_actors.objective")

    def reaches(path: Path, parts: tuple[str, ...]) -> bool:
        names = {name for _, name in imports(path) if not within(name, "grpo_actors.policy.locate")}
        return any(within(name, part) for name in names for part in parts)

    joiners = {name_of(path) for path in modules() if reaches(path, computes) and reaches(path, SOCKETS)}
    assert {name.removeprefix("grpo_actors.") for name in joiners} <= JOINERS


#: May read pickles, through an Unpickler of its own that resolves no name by itself.
UNPICKLER = "convert/nanochat/pickles.py"


def test_no_module_imports_pickle():
    forbidden = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
    broken = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules()
        for line, name in imports(path)
        if name.partition(".")[0] in forbidden and path != PACKAGE / UNPICKLER
    ]
    assert not broken, "\n".join(broken)
    # The functions that would resolve names.
    used = {ast.unparse(node) for node in nodes(PACKAGE / UNPICKLER) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {
        "pickle.Unpickler",
        "pickle.UnpicklingError",
    }


def test_no_circle_of_imports_lies_between_the_parts():
    """Part a imports part b, and b a: then neither is lower. Single files count as parts of their own."""

    def part_of(name: str) -> str:
        return name.split(".")[1]

    edges: dict[str, set[str]] = {}
    for path in modules():
        here = name_of(path)
        if here == "grpo_actors":
            continue
        for line, name in imports(path):
            if within(name, "grpo_actors") and name.count(".") and not only_types(path, line):
                target = part_of(name)
                known = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
                if known and target != part_of(here):
                    edges.setdefault(part_of(here), set()).add(target)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            step == goal or (step not in seen and reaches(step, goal, seen | {step}))
            for step in edges.get(start, ())
        )

    circles = sorted(part for part in edges if reaches(part, part, {part}))
    assert not circles, circles


def test_the_command_line_imports_nothing_that_takes_seconds():
    # launch.py --help answers in under 0.3 s.
    slow = ("mlx", "mlx_lm", "transformers", "datasets", "numpy", "zmq", "pydantic")
    tree = ast.parse((ROOT / "launch.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in top]
    assert not [name for name in names if name.partition(".")[0] in slow]


def test_what_only_watches_never_loads_mlx_nor_does_a_command_before_it_has_read_its_arguments():
    # Transitively, as it really happens: the machine's memory belongs to the actors.
    names = (
        *("supervisor.run", "supervisor.preflight", "config", "observe.view", "tail.__main__"),
        *("learner.exchange.exchange", "page.run_reader", "page.samples", "page.views", "api"),
        "learner.exchange.exchange",
        *("learner.__main__", "rollout.__main__", "evaluator.__main__"),
    )
    code = f"import sys\nfor name in {names}: __import__(f'grpo_actors.{{name}}')\n"
    code += (
        "print([name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mlx_lm', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
