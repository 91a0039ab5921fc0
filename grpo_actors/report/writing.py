"""Build the report of a run: its views and as many of its samples as fit."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo_actors.atomic import write_whole
from grpo_actors.errors import RunError
from grpo_actors.observe.follow import HistoryReader
from grpo_actors.observe.records import Record
from grpo_actors.page.document import ShownRun, whole_page
from grpo_actors.page.run_state import RunState
from grpo_actors.page.samples import Samples
from grpo_actors.page.settings import config_of
from grpo_actors.page.views import run_view
from grpo_actors.report.privacy import Privacy
from grpo_actors.rundir.folder import METRICS_FILE

#: Largest size of a report; a tracker of issues takes no larger file.
MAX_BYTES = 5_000_000
#: Bytes of JSON for the samples. The rest, with Bokeh's 1.3 MB, takes less than half of `MAX_BYTES`.
SAMPLE_BYTES = 2_000_000
#: Most groups: more are not looked at, and each is a row of a list.
MOST_GROUPS = 300


def write_report(folder: Path, file: Path) -> int:
    """Write the report of a run folder, whole or not at all; return its size in bytes.

    Raises:
        RunError: There is no run, or the file cannot be written.
    """
    data = build_report(folder).encode()
    if len(data) > MAX_BYTES:
        raise RunError(f"{file}: would have {len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        write_whole(file, data.decode())
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror}); choose another --output") from error
    return len(data)


def build_report(folder: Path) -> str:
    """Return the report. Raises `RunError` if the folder holds no run."""
    if not (folder / METRICS_FILE).is_file():
        raise RunError(f"{folder} has no {METRICS_FILE}: give the output folder of a run")
    privacy = Privacy(Path.home(), [folder])
    state = RunState()
    # As recorded: the names of rewards in the samples are those of these settings.
    start: Record | None = None
    with closing(HistoryReader(folder)) as reader:
        while (record := reader.read()) is not None:
            if record["topic"] == "start":
                start = record
            # Before they are a view: there, curves are base64, in which a slash is no path.
            state.apply(privacy.without_paths(record))
    samples = privacy.without_places(_samples(folder, start))
    return whole_page(
        ShownRun(folder.resolve().name, state), {"views": [run_view(state)], "samples": samples}
    )


def _samples(folder: Path, start: Record | None) -> dict[str, Any]:
    """Return the list of groups and their contents, at most `SAMPLE_BYTES`, spread over the whole run."""
    with closing(Samples(folder, config_of(start))) as samples:
        samples.catch_up()
        total = len(samples.entries)
        contents: dict[int, dict[str, Any]] = {}
        left = SAMPLE_BYTES
        for position in spread(total):
            group = samples.read(position).as_json()
            left -= len(json.dumps(group, separators=(",", ":")))
            if left < 0 or len(contents) == MOST_GROUPS:
                break
            contents[position] = group
        return {
            "groups": [samples.listed(position) for position in sorted(contents, reverse=True)],
            "contents": contents,
            "unit": samples.unit,
            "of": total if total > len(contents) else None,
        }


def spread(total: int) -> Iterator[int]:
    """Yield each of `total` positions once, so that however many are taken, they are spread evenly: the ends first.

    >>> list(spread(5))
    [4, 0, 2, 3, 1]
    """
    seen: set[int] = set()
    parts = 1
    while len(seen) < total:
        for part in range(parts, -1, -1):
            position = round(part * (total - 1) / parts)
            if position not in seen:
                seen.add(position)
                yield position
        parts *= 2
