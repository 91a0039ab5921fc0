"""Let the processes of a run open as many files and sockets as many workers and readers need."""

import resource

#: Files that a process of a run may need. Linux and macOS start a shell with 1024 and 256.
WANTED = 4096


def raise_limit() -> str | None:
    """Raise the limit of this process and its children to `WANTED`; return a note if the system allows less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(WANTED, _number(hard))
    if _number(soft) < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == WANTED:
        return None
    return (
        f"a process may open {allowed} files here, fewer than {WANTED}: with many workers or readers it may find no room; "
        f"ask for a higher hard limit (ulimit -Hn {WANTED})"
    )


def _number(limit: int) -> int:
    return WANTED if limit == resource.RLIM_INFINITY else limit
