"""Read the rows of any data set through the `datasets` library: files, folders, a saved data set, the hub, a function.

This module knows where rows come from and what a value of a row may be. `dataset` gives the columns their meaning.
`datasets` is imported late: it takes a second, and a task that makes its own problems does not need it.
"""

import contextlib
import json
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from grpo_actors.errors import DataError, first_line
from grpo_actors.tasks.lines import excerpt, read_lines, read_rows
from grpo_actors.tasks.own.kinds import is_own

Row = Mapping[str, Any]

#: File type -> the reader of `datasets`.
READERS: Mapping[str, str] = {
    **dict.fromkeys(("json", "jsonl", "ndjson"), "json"),
    **dict.fromkeys(("csv", "tsv"), "csv"),
    "parquet": "parquet",
    "arrow": "arrow",
}
#: Endings of compressed files, which `datasets` unpacks.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


@dataclass(frozen=True, slots=True)
class Location:
    """Where the rows of a data set are."""

    #: A file, a glob of files, a folder, ``file.py:function``, or a hub id.
    path: str
    #: Configuration of a data set of the hub (`load_dataset` calls it name); empty: its only one.
    subset: str = ""
    split: str = "train"
    #: Branch, tag or commit of a data set of the hub; empty: its newest.
    revision: str = ""

    def __str__(self) -> str:
        parts = (self.path, self.subset, self.split if self.split != "train" else "")
        return " ".join(part for part in parts if part)


def read(where: Location) -> Iterator[tuple[int, Row]]:
    """Yield every row with its number, from 1. A value has a type of JSON; a number that is none is None.

    Raises:
        DataError: There is no such data set, or a row cannot be read; one line with row number, column and reason.
    """
    number = 0
    try:
        for number, row in plain_rows(_rows(where), where):
            yield number, row
    except UnicodeDecodeError as error:  # `datasets` decodes a row when it is read
        _find_bad_line(Path(where.path).expanduser())
        raise DataError(f"{where}, row {number + 1}: must be UTF-8 ({error}); convert the file") from None
    if not number:
        raise DataError(f"{where}: must have a row, got none; check data.path")


def plain_rows(rows: Iterable[Any], where: object) -> Iterator[tuple[int, Row]]:
    """Yield rows with their numbers, from 1, and their values in types of JSON. Pictures and dates of a data set are left out.

    Raises:
        DataError: A row has no columns, or a value no such type; the text begins with `where`.
    """
    rows = _decodable(rows) if hasattr(rows, "remove_columns") else rows
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}, row {number}: must have named columns, got {excerpt(row)}")
        at = f"{where}, row {number}, column"
        yield number, {str(name): _plain(value, f"{at} {name}") for name, value in row.items()}


def _rows(where: Location) -> Iterable[Any]:
    if is_own(where.path):
        return _from_function(where)
    path = Path(where.path).expanduser()
    if path.is_dir() or path.is_file() or _matches(path):
        return _from_disk(where, path)
    if where.path.count("/") == 1 and not path.suffix and not where.path.startswith((".", "/", "~")):
        return _loaded(where, where.path, name=where.subset or None, revision=where.revision or None)
    raise DataError(f"{where.path}: no such file, folder or hub id; check data.path")


def _matches(path: Path) -> list[Path]:
    """Return the files of a glob such as ``data/*.csv``, in the order of their names."""
    if not any(character in str(path) for character in "*?["):
        return []
    root = Path(path.anchor or ".")
    return sorted(found for found in root.glob(str(path.relative_to(path.anchor))) if found.is_file())


def _from_disk(where: Location, path: Path) -> Iterable[Any]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(where, path)
    files = _matches(path) or ([path] if path.is_file() else [])
    if not files:
        return _loaded(where, str(path), name=where.subset or None)
    readers = {_reader(file) for file in files}
    if len(readers) > 1:
        raise DataError(f"{where.path}: files must be of one type, got {', '.join(sorted(readers))}")
    options = {"sep": "\t"} if _type_of(files[0]) == "tsv" else {}
    # A file has no splits: all its rows are in one.
    whole = Location(where.path)
    return _loaded(whole, readers.pop(), data_files=[str(file) for file in files], **options)


def _type_of(file: Path) -> str:
    name = Path(file.stem) if file.suffix in COMPRESSED else file
    return name.suffix.removeprefix(".").lower()


def _reader(file: Path) -> str:
    reader = READERS.get(_type_of(file))
    if reader is None:
        raise DataError(f"{file}: must be a file of type {', '.join(READERS)}, also compressed; rename it")
    return reader


def _saved(where: Location, path: Path) -> Iterable[Any]:
    """Return the rows of a data set that ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk  # noqa: PLC0415

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where.path}: not a saved data set: {first_line(error)}") from error
    if not isinstance(loaded, DatasetDict):
        return _decodable(loaded)
    if where.split not in loaded:
        raise DataError(f"{where.path}: has the splits {', '.join(loaded)}, got data.split = {where.split!r}")
    return _decodable(loaded[where.split])


def _loaded(where: Location, source: str, **options: Any) -> Iterable[Any]:
    """Return the rows that `load_dataset` finds."""
    import datasets  # noqa: PLC0415

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is raised, too
    load = partial(datasets.load_dataset, source, split=where.split, **options)
    try:
        loaded = load()
        integers = _integers(loaded, load)
    except StopIteration:  # the file is empty
        return []
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        if "corresponds to no data" in str(error):  # the file has only blank lines
            return []
        for file in options.get("data_files", ()):
            _find_bad_line(Path(file))
        cause = error.__cause__ or error
        raise DataError(
            f"{where}: cannot be loaded ({type(cause).__name__}: {first_line(cause)}); check data.path"
        ) from error
    rows = _decodable(loaded)
    return _replaced(rows, integers) if integers else rows


def _integers(loaded: Any, load: Callable[..., Any]) -> dict[str, list[int | None]]:
    """Return the columns of a CSV that hold integers and gaps, which pandas reads as floats; here from their texts."""
    import datasets  # noqa: PLC0415

    if loaded.info.builder_name != "csv":
        return {}
    text, real = datasets.Value("string"), datasets.Value("float64")
    gaps = [
        name
        for name, feature in loaded.features.items()
        if feature == real and loaded.data.column(name).null_count
    ]
    if not gaps:
        return {}
    texts = load(usecols=gaps, features=datasets.Features(dict.fromkeys(gaps, text)))
    found = {}
    for name in gaps:
        with contextlib.suppress(ValueError):  # a fraction: a column of floats
            found[name] = [None if value is None else int(value) for value in texts[name]]
    return found


def _replaced(rows: Iterable[Row], columns: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield {**row, **{name: values[number] for name, values in columns.items()}}


def _find_bad_line(file: Path) -> None:
    """Name the line of a file that cannot be read; `datasets` only knows its block.

    Raises:
        DataError: There is a line that is not UTF-8, or in a file of JSON lines one that is no row.
    """
    kind = _type_of(file)
    if not file.is_file() or file.suffix in COMPRESSED or READERS.get(kind) not in ("json", "csv"):
        return
    if kind not in ("jsonl", "ndjson"):
        for _ in read_lines(file, setting="data.path"):
            pass
        return
    for number, row in read_rows(file):
        for name, value in row.items():
            _plain(value, f"{file}, row {number}, column {name}")


def _decodable(loaded: Any) -> Iterable[Any]:
    """Return the rows without the columns of other types than JSON's, such as pictures and dates: no reward can get them."""
    import datasets  # noqa: PLC0415

    def is_plain(feature: Any) -> bool:
        if isinstance(feature, dict):
            return all(map(is_plain, feature.values()))
        if isinstance(feature, datasets.List | datasets.LargeList):
            return is_plain(feature.feature)
        if isinstance(feature, datasets.Value):
            return not feature.dtype.startswith(
                ("binary", "large_binary", "time", "date", "duration", "decimal")
            )
        return isinstance(feature, datasets.ClassLabel | datasets.Json)

    others = [name for name, feature in (loaded.features or {}).items() if not is_plain(feature)]
    rows: Iterable[Any] = loaded.remove_columns(others) if others else loaded
    return rows


def _from_function(where: Location) -> Iterable[Any]:
    """Return what the user's function returns: rows, or a data set, or a mapping split -> one of these."""
    file, _, name = where.path.rpartition(":")
    try:
        if file.endswith(".py"):
            found = runpy.run_path(str(Path(file).expanduser()), run_name=Path(file).stem)
            load = found[name]
        else:
            load = resolve_name(where.path)
        rows = load()
    # The user's code may raise anything.
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"data.path: {where.path} cannot be called ({what})") from error
    if isinstance(rows, Mapping):
        if where.split not in rows:
            raise DataError(
                f"{where.path}: has the splits {', '.join(rows)}, got data.split = {where.split!r}"
            )
        rows = rows[where.split]
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise DataError(f"{where.path}: must return rows with named columns, got {excerpt(rows)}")
    return rows


def _plain(value: Any, where: str) -> Any:
    """Return a value in types of JSON; raise DataError for one that has none."""
    match value:
        case str():
            return _encodable(value, where)
        case None | bool() | int():
            return value
        case float():
            if math.isinf(value):
                raise DataError(f"{where}: must be a finite number, got {value}; mend the row")
            return None if math.isnan(value) else value
        case list() | tuple():
            return [_plain(item, where) for item in value]
        case Mapping():
            return {_encodable(str(name), where): _plain(item, where) for name, item in value.items()}
    if hasattr(value, "tolist"):  # of NumPy
        return _plain(value.tolist(), where)
    raise DataError(f"{where}: must have a type of JSON, got {type(value).__name__}; mend the row")


def _encodable(text: str, where: str) -> str:
    """Return a text; raise DataError if it has half of a surrogate pair, which no UTF-8 and so no tokenizer has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"{where}: must be text, got the lone surrogate {lone} at character {error.start + 1} of "
            f"{json.dumps(text)[:60]}; mend the row"
        ) from None
    return text
