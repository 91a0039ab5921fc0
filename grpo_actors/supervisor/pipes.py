"""Data that comes through a pipe: it can be read once, but each process of a run reads the data."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_actors.config import Config
from grpo_actors.errors import DataError


@contextlib.contextmanager
def without_pipes(config: Config) -> Iterator[Config]:
    """Yield the settings with a file of JSON lines in place of each pipe; it exists until the block ends.

    Raises:
        DataError: A pipe cannot be read.
    """
    with contextlib.ExitStack() as stack:

        def filed(settings: Any) -> dict[str, str]:
            """Return the paths of [data], or of a source, that are pipes, each with the file that it was copied to."""
            named = {key: getattr(settings, key) for key in ("path", "eval_path")}
            pipes = {key: Path(path) for key, path in named.items() if path and Path(path).is_fifo()}
            if not pipes:
                return {}
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-actors-data-")))
            return {key: _copied(pipe, folder / f"{key}.jsonl") for key, pipe in pipes.items()}

        data, evaluator = config.data, config.evaluator
        sources, eval_sources = (
            tuple(source.model_copy(update=filed(source)) for source in group)
            for group in (data.sources, evaluator.eval_sources)
        )
        yield config.model_copy(
            update={
                "data": data.model_copy(update={**filed(data), "sources": sources}),
                "evaluator": evaluator.model_copy(update={"eval_sources": eval_sources}),
            }
        )


def _copied(pipe: Path, file: Path) -> str:
    try:
        with pipe.open("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise DataError(f"{pipe}: cannot be read: {error.strerror or error}; check data.path") from error
    return str(file)
