"""The mutants of `make mutants`: each is valid Python and another program, and a seed always chooses the same ones."""

import ast
import tomllib
from collections import Counter
from types import CodeType

import pytest
from mutants import (
    EXEMPT,
    PACKAGE,
    ROOT,
    WHOLE_RUNS,
    chosen,
    files_testing,
    function_at,
    is_named,
    mutants_of,
)


@pytest.mark.parametrize("module", ["learner/archive.py", "supervisor/children.py"])
def test_every_mutant_is_another_valid_program(module):
    source = (ROOT / PACKAGE / module).read_bytes()
    program = ast.dump(ast.parse(source))
    mutants = mutants_of(module)
    for mutant in mutants:
        end = mutant.start + len(mutant.old.encode())
        mutated = source[: mutant.start] + mutant.new.encode() + source[end:]
        assert ast.dump(ast.parse(mutated)) != program, mutant
    assert len(mutants) > 20
    assert len(set(mutants)) == len(mutants)


@pytest.mark.parametrize("module", ["learner/exchange/lease_desk.py", "atomic.py"])
def test_the_function_of_a_mutant_has_the_name_that_a_trace_gives_it(module):
    def names(code: CodeType) -> set[str]:
        inner = [names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
        return {code.co_qualname}.union(*inner)

    mutants = mutants_of(module)
    traced = names(compile((ROOT / PACKAGE / module).read_bytes(), module, "exec"))
    found = {function_at(mutant).removeprefix(f"{module}:") for mutant in mutants}
    assert len(found) > 1
    assert found - {""} <= traced


def test_a_seed_chooses_the_same_mutants_and_a_larger_count_adds_to_them():
    few, more, others = (chosen(seed, count, "r", {}) for seed, count in ((1, 30), (1, 60), (2, 30)))
    assert more[:30] == few
    assert others != few
    turns = Counter(mutant.part for mutant in few)
    parts = {"ranks", "report", "rollout", "rundir", "runs"}
    assert turns == dict.fromkeys(parts, 6), "the parts take turns"


def test_modules_that_the_tests_cannot_judge_are_left_out():
    assert {m.module for m in chosen(0, 10_000, "rundir", {"rundir/c": "reason"})}.isdisjoint(
        {"rundir/claim.py"}
    )


def test_each_change_that_is_called_equivalent_is_one_that_is_made():
    entries = tomllib.loads(EXEMPT.read_text())["equivalent"]
    made = {module: mutants_of(module) for module in {entry["module"] for entry in entries}}
    assert [e for e in entries if not any(is_named(mutant, e) for mutant in made[e["module"]])] == []
    [seed, _] = [e for e in entries if e.get("where") == "seed=0"]
    assert len([m for m in made[seed["module"]] if is_named(m, seed)]) == 1, "not the exit code"


def test_a_module_is_tested_by_its_mirror_first_and_then_by_all_that_import_it():
    first, every = files_testing("learner/archive.py")
    assert first == ["tests/learner/test_archive.py", "tests/learner/test_archive_files.py"]
    assert {"tests/learner/test_archive.py", "tests/learner/test_loop.py"} <= set(every)


def test_every_module_is_tested_by_some_file():
    paths = [path.relative_to(ROOT / PACKAGE).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")]
    skipped = tomllib.loads(EXEMPT.read_text())["skipped"]
    untested = [m for m in paths if not m.startswith(tuple(skipped)) and not files_testing(m)[1]]
    assert [module for module in untested if mutants_of(module)] == []


def test_every_file_that_is_named_exists():
    assert [test for tests in WHOLE_RUNS.values() for test in tests if not (ROOT / test).is_file()] == []
