"""Leave an accelerator to training for half of the time.

Cores have priorities, and Linux gives the evaluator what training leaves. A GPU has none that help: an evaluation at full speed
made updates up to 1.5 times as long (H200, with CUDA MPS and a low client priority).
"""

import time
from collections.abc import Callable

#: Steps that are measured at full speed, and how many with pauses follow.
MEASURED, PACED = 4, 60


class Pacing:
    """Pauses between decoding steps, which then take at least twice their own time.

    A step is submitted before the one before it is read, so that a pause which is shorter than a step would change nothing.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Measure with `clock` and pause with `sleep`, both in seconds."""
        self._clock, self._sleep = clock, sleep
        self._steps = 0
        self._last_s = clock()
        #: The shortest of the steps that were measured last: the others waited for training.
        self._step_s = 0.0

    def pause(self) -> None:
        """Pause after a step."""
        at, self._steps = self._steps % (MEASURED + PACED), self._steps + 1
        now_s = self._clock()
        if at < MEASURED:
            # The first one follows a pause, during which it was computed.
            self._step_s = min(now_s - self._last_s, self._step_s if at > 1 else float("inf"))
        elif (rest_s := self._last_s + 2 * self._step_s - now_s) > 0:
            self._sleep(rest_s)
            now_s = self._clock()
        self._last_s = now_s
