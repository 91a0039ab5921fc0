"""The supervisor's stage before the actors start: kernels are compiled, if these settings need some (`kernels.stage`)."""

import time
from collections.abc import Callable

from grpo_actors.kernels.stage import USUAL_KERNELS, Stage
from grpo_actors.observe.json_events import JsonEvents
from grpo_actors.observe.status import StatusLine


def compile_kernels(
    stage: Stage | None, status: StatusLine | JsonEvents, gives_up: Callable[[], object]
) -> None:
    """Run the stage unless it is done, and show it; what it cannot compile, the actors compile when they need it.

    Args:
        stage: None where MLX compiles no kernels.
        status: The run's display.
        gives_up: Called again and again; if it returns something true, the stage ends at once.
    """
    if stage is None or stage.is_done:
        return
    started_s, count = time.monotonic(), 0
    failed: dict[str, list[str]] = {}  # reason -> parts

    def show(new: int) -> None:
        nonlocal count
        count = new
        status.show_preparation(f"compiling kernels for this GPU: {new} of about {max(new, USUAL_KERNELS)}")

    try:
        for outcome in stage.run(show, gives_up):
            if outcome.failure:
                failed.setdefault(outcome.failure, []).append(outcome.part)
    except OSError as error:
        failed.setdefault(str(error), []).append("all parts")
    status.show_preparation("")
    if count and stage.is_done:  # else it was given up
        seconds = time.monotonic() - started_s
        status.print_line(
            f"compiled {count} kernels in {seconds:.0f} s, once for this GPU and these settings"
        )
    for reason, parts in failed.items():
        status.print_line(
            f"kernels for {', '.join(sorted(parts))}: compiled when they are needed ({reason})", "yellow"
        )
