"""No decision depends on the time of day: only what is shown, recorded or measured from outside may read it."""

import ast

from test_imports import PACKAGE, modules, nodes

#: Modules that read the time of day, and what for.
READERS = {
    "observe/sinks.py": "the time of each record",
    "api/run.py": "compared with the times of events",
    "observe/json_events.py": "the time of each event that is printed",
    "runs/listing.py": "when a run was last at work",
    "rundir/decisions.py": "the time of each decision",
    "transport/keys.py": "the day on which a key was made, and whether the list of keys has changed",
    "bench/job.py": "compared with the times of records",
    "bench/launched.py": "compared with the times of records",
    "bench/startup.py": "compared with the times of records",
    "bench/watching.py": "compared with the times of records",
}


def reads_clock(node: ast.AST) -> bool:
    """Whether a piece of source reads the time of day, or the time at which a file was written."""
    if isinstance(node, ast.Attribute):
        of_time = node.attr in ("time", "time_ns") and ast.unparse(node.value) == "time"
        return of_time or node.attr.startswith("st_mtime")
    return isinstance(node, ast.Import | ast.ImportFrom) and "datetime" in ast.unparse(node)


def test_only_a_few_modules_read_the_time_of_day():
    readers = {str(path.relative_to(PACKAGE)) for path in modules() if any(map(reads_clock, nodes(path)))}
    assert readers <= READERS.keys()
