"""Resolve a configuration: defaults < file < ``--set`` < arguments of a call, with the origin of every value.

The name of an algorithm stands for several settings. Nothing starts with an unusable setting: each error is one line
with the source, the dotted key, the rule and the value got.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli
from pydantic import ValidationError

from grpo_actors.config.adapter_folder import check_start, read_adapter
from grpo_actors.config.advice import advice
from grpo_actors.config.legacy import modernise
from grpo_actors.config.names import leaf_of, leaves
from grpo_actors.config.objective import PRESETS, QUANTISED_ROLLOUT
from grpo_actors.config.schema import OWNER, SECTIONS, Config
from grpo_actors.config.wording import broken_rule, kind_of
from grpo_actors.errors import ConfigError, nearest

DEFAULT = "default"
OVERRIDE = "--set"
#: Origin of the settings that a program gives as values.
ARGUMENT = "argument"

#: How Python, but not TOML, may write a number: ``.5`` and ``1.``.
_NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")

#: The folder of configurations that ship with the program: in a checkout, a link to the one at its top.
SHIPPED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A resolved configuration, with the origin of each value."""

    config: Config
    #: Dotted key -> ``default``, the file's path, ``--set`` or ``argument``; contains every key of `config`.
    origins: Mapping[str, str]
    #: Notes that the user should see: on older names, and on settings without effect.
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """The values of one source by leaf name."""

    where: str
    values: Mapping[str, Any]
    #: Whether the user did not write the values: another setting implies them, or a run saved all its settings.
    implied: bool = False


def load_config(
    path: Path | str | None, overrides: Sequence[str] = (), arguments: Mapping[str, Any] | None = None
) -> LoadedConfig:
    """Resolve a configuration.

    Args:
        path: A TOML file, looked up as given, then in ``configs/``, then among the shipped ones, where ``.toml`` may be
            left out; or the config.json of a run folder; None: defaults only.
        overrides: Items ``key=value``, with a dotted or bare key, and a value in TOML or bare text. The last wins.
            ``functions.NAME=2`` sets one entry of a table and keeps its others.
        arguments: Name of a setting -> its value, from a program. They win over all others.

    Raises:
        ConfigError: The file, a name, a value or a combination of values is unusable.
    """
    layers: list[_Layer] = []
    notes: list[str] = []
    values: dict[str, Any] = {}
    if path is not None:
        file = find_config(path)
        where = _display_name(file)
        saved = file.suffix == ".json"
        values, flat = leaves((_read_json if saved else _read_toml)(file, where), where)
        layers.append(_Layer(where, values, implied=saved))
        if flat:
            notes.append(
                f"{where}: flat keys of MLX-GRPO; keys that it leaves out have this program's defaults"
            )
    layers.append(_Layer(OVERRIDE, _parse_overrides(overrides, values)))
    layers.append(_Layer(ARGUMENT, leaves(arguments or {}, ARGUMENT)[0]))
    layers, decisions = _modernised(layers)
    start = _adapter_layer(layers)
    config, origins = _merge([*start, *_expanded(layers)])
    if start:
        check_start(config.model)
    config = _with_template(config, origins)
    notes += decisions
    by_hand = {f"{OWNER[leaf]}.{leaf}" for layer in layers if not layer.implied for leaf in layer.values}
    notes += [f"{key} {reason}" for key, reason in advice(config) if key in by_hand]
    return LoadedConfig(config, origins, notes)


def _with_template(config: Config, origins: Mapping[str, str]) -> Config:
    """Return the settings with the text of the template file that they name: a run keeps it, and other hosts get it."""
    named = config.data.chat_template
    if "{" in named or not (named.endswith((".jinja", ".j2")) or "/" in named):
        return config
    try:
        text = Path(named).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        where = origins["data.chat_template"]
        raise ConfigError(f"{where}: data.chat_template: {named} cannot be read: {reason}") from error
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_template": text})})


def read_config(path: Path) -> Config:
    """Read the resolved configuration that a run folder keeps as JSON (``Config.model_dump_json``).

    Raises:
        ConfigError: The file cannot be read or does not hold a valid configuration.
    """
    try:
        return Config.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "json_invalid":
            raise ConfigError(f"{path}: not JSON: {problem['ctx']['error']}") from error
        raise ConfigError(broken_rule(error, lambda _keys: str(path))) from error


def find_config(path: Path | str) -> Path:
    """Return the file that ``--config`` names.

    Raises:
        ConfigError: There is no such file; the message lists the files that exist.
    """
    folders = [Path("configs"), SHIPPED_CONFIGS]
    for candidate in (Path(path), *(folder / name for name in (path, f"{path}.toml") for folder in folders)):
        if candidate.is_file():
            return candidate
    known = sorted({file.name for folder in folders for file in folder.glob("*.toml")})
    listing = f"; configs/ has {', '.join(known)}" if known else ""
    raise ConfigError(f"{path}: no such file{nearest(Path(path).name, known)}{listing}")


def _display_name(file: Path) -> str:
    """Return a short name of the file: relative if it is below the working folder."""
    absolute = file.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _read_text(file: Path, where: str) -> str:
    try:
        # utf-8-sig: Windows editors write a byte order mark first, which TOML does not allow.
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: must be UTF-8, got byte 0x{error.object[error.start]:02x}") from error


def _read_json(file: Path, where: str) -> dict[str, Any]:
    """Read the sections of a saved configuration, without settings that are null (not set)."""
    try:
        document = json.loads(_read_text(file, where))
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(value, dict) for value in document.values()):
        raise ConfigError(f"{where}: must be a run folder's config.json, got JSON of another shape")
    return {
        section: {leaf: value for leaf, value in values.items() if value is not None}
        for section, values in document.items()
    }


def _read_toml(file: Path, where: str) -> dict[str, Any]:
    try:
        return tomli.loads(_read_text(file, where))
    except tomli.TOMLDecodeError as error:
        # A message like "Invalid value (at line 3, column 5)".
        raise ConfigError(f"{where}: not TOML: {error}") from error


def _parse_overrides(overrides: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaf name -> value; `given` are the values of the file, whose tables may get single entries."""
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise ConfigError(f"{OVERRIDE}: must be key=value, got {override}")
        table, entry = _entry_of(name)
        leaf = leaf_of(table, OVERRIDE)
        value = _parse_value(leaf, text)
        if entry:
            before = values.get(leaf, given.get(leaf, {}))
            # The schema rejects another type later.
            value = {**before, entry: value} if isinstance(before, dict) else before
        values[leaf] = value
    return values


def _entry_of(name: str) -> tuple[str, str]:
    """Split ``reward.functions.my.py:f`` into a table's name and its entry's; the entry is empty for another setting."""
    parts = name.split(".")
    for count in (1, 2):
        leaf = parts[count - 1] if len(parts) > count else ""
        if leaf in OWNER and get_origin(kind_of(SECTIONS[OWNER[leaf]].model_fields[leaf])) is dict:
            return ".".join(parts[:count]), ".".join(parts[count:]).strip("\"'")
    return name, ""


def _parse_value(leaf: str, text: str) -> Any:
    """Parse a value of TOML or of Python; if it is none, return the text, because a shell often removes the quotes."""
    if not _holds_text(leaf):
        if text in ("True", "False"):
            return text == "True"
        if _NUMBER.fullmatch(text):
            return float(text)
    try:
        document = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    # Text with a line break could define further keys.
    value = document["value"] if len(document) == 1 else text
    # run_name=42 and path=2024-01-01 are meant as text.
    return text if _holds_text(leaf) and not isinstance(value, str) else value


def _holds_text(leaf: str) -> bool:
    if leaf not in OWNER:  # an older name: all of them are numbers
        return False
    kind = kind_of(SECTIONS[OWNER[leaf]].model_fields[leaf])
    return kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))


def _modernised(layers: Sequence[_Layer]) -> tuple[list[_Layer], list[str]]:
    accumulation = Config().learner.gradient_accumulation_steps
    for layer in layers:
        given = layer.values.get("gradient_accumulation_steps")
        # The schema rejects a value out of bounds later.
        accumulation = given if type(given) is int and given >= 1 else accumulation
    result: list[_Layer] = []
    notes: list[str] = []
    for layer in layers:
        values, decisions = modernise(
            layer.values, where=layer.where, gradient_accumulation_steps=accumulation
        )
        result.append(replace(layer, values=values))
        notes += decisions
    return result, notes


def _expanded(layers: Sequence[_Layer]) -> Iterator[_Layer]:
    """Yield the layers, each preceded by a layer of the settings that it implies.

    So a preset yields to values set by hand in its own layer and in later ones, and wins over earlier layers::

        file:   loss = "clip", clip_eps = 0.3
        --set algorithm=gspo              -> clip_eps = 0.0003, from the preset
        --set algorithm=gspo clip_eps=0.1 -> clip_eps = 0.1, set by hand

    If several layers name an algorithm, only the last one counts.
    """
    given = {leaf: value for layer in layers for leaf, value in layer.values.items()}
    for layer in layers:
        for leaf in ("quantize_for_rollouts", "kv_bits"):
            if layer.values.get(leaf):
                yield _Layer(leaf, QUANTISED_ROLLOUT, implied=True)
        algorithm = layer.values.get("algorithm")
        # The schema rejects an unknown name later.
        if isinstance(algorithm, str) and algorithm == given["algorithm"] and algorithm in PRESETS:
            yield _Layer(f'algorithm "{algorithm}"', PRESETS[algorithm], implied=True)
        yield layer


def _adapter_layer(layers: Sequence[_Layer]) -> list[_Layer]:
    """Return a layer of what the adapter to start from implies: its base, its kind and its sizes.

    It comes before all others, because the user may name the base by another path, or train all weights.
    """
    paths = [layer.values.get("adapter_path") for layer in layers if not layer.implied]
    # The schema rejects another type later.
    path = next((path for path in reversed(paths) if path is not None), None)
    if not path or not isinstance(path, str):
        return []
    return [_Layer(f"adapter {path}", read_adapter(Path(path).expanduser()).settings, implied=True)]


def _merge(layers: Sequence[_Layer]) -> tuple[Config, dict[str, str]]:
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins = {f"{section}.{leaf}": DEFAULT for leaf, section in OWNER.items()}
    for layer in layers:
        for leaf, value in layer.values.items():
            merged[OWNER[leaf]][leaf] = value
            origins[f"{OWNER[leaf]}.{leaf}"] = layer.where

    def where(keys: Sequence[str]) -> str:
        """Return the last source that set one of the keys: without it, the others were fine. One by hand before an implied one."""
        given = [origins[key] for key in keys if origins[key] != DEFAULT]
        by_hand = [layer.where for layer in layers if not layer.implied and layer.where in given]
        return by_hand[-1] if by_hand else given[0] if given else DEFAULT

    try:
        return Config.model_validate(merged), origins
    except ValidationError as error:
        raise ConfigError(broken_rule(error, where)) from error
