"""What Sphinx does not know by itself: reference made from the code, settings as link targets, drawings that follow the theme.

A page has ``<!-- generate: NAME -->`` where a text of `GENERATORS` belongs. The comment is all that a reader of the
source sees; the site, and the tests of the links, have the text.
"""

import re
from collections.abc import Callable, Mapping

from site_builder import commands, events, memory, settings

#: Name in a page -> the function that returns its Markdown.
GENERATORS: Mapping[str, Callable[[], str]] = {
    "commands": commands.markdown,
    "events": events.markdown,
    "memory": memory.markdown,
    "settings": settings.markdown,
}
_MARK = re.compile(r"<!-- generate: (\w+) -->")


def completed(page: str) -> str:
    """Return the Markdown of a page with the generated texts in their places."""
    return _MARK.sub(lambda match: GENERATORS[match[1]](), page)
