"""Take personal paths out of what leaves this host. Pure."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: An absolute path of two or more parts; not one within an address such as https://host/path or owner/name.
_PATH = re.compile(
    r"(?<![\w/:.<~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"<>|()\[\]{}]+[/\\])+([^\s/\\:;,'\"<>|()\[\]{}]*)"
)


class Privacy:
    """What is personal on this host: the user's home, and where the run is."""

    def __init__(self, home: Path, folders: Sequence[Path]) -> None:
        # The longest first: the run folder may be inside the home.
        places = {str(place) for folder in (home, *folders) for place in (folder, folder.resolve())}
        self._places = sorted((place for place in places if len(place) > 1), key=len, reverse=True)
        self._home = str(home)

    def without_places(self, value: Any) -> Any:
        """Return JSON values whose texts do not have the places of this host; for what a model wrote."""
        return _mapped(value, self._without_places)

    def without_paths(self, value: Any) -> Any:
        """Return JSON values whose texts have only the last part of any absolute path; for settings and messages."""
        return _mapped(value, lambda text: _PATH.sub(r"…/\1", self._without_places(text)))

    def _without_places(self, text: str) -> str:
        for place in self._places:
            text = text.replace(place, "~" if place == self._home else "…")
        return text


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if not isinstance(key, str) else change(key): _mapped(item, change)
            for key, item in value.items()
        }
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
