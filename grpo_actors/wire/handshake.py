"""The handshake by which a peer joins a run: it sends Hello until the learner answers with Welcome or Bye."""

import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Literal

from grpo_actors.devices import own_device
from grpo_actors.errors import RunError
from grpo_actors.process import StopRequest
from grpo_actors.progress import begin_work
from grpo_actors.wire.messages import PROTOCOL_VERSION, Bye, Hello, Welcome, decode, encode, from_learner

if TYPE_CHECKING:
    from grpo_actors.transport.control import ControlClient

#: Seconds after which an unanswered Hello is sent again.
HELLO_S = 2.0


def hello(role: Literal["rollout", "evaluator"], name: str, run_id: str = "", token: str = "") -> Hello:
    """Return the Hello of this process; `run_id` is the run that it was part of before, if any."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        role=role,
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=own_device(),
        run_id=run_id,
        token=token,
    )


def handshake(
    control: "ControlClient",
    role: Literal["rollout", "evaluator"],
    stop: StopRequest,
    patience_s: float,
    token: str = "",
) -> Welcome | None:
    """Send Hello until the learner answers, and return its Welcome. `token`: that of the run's own evaluator.

    Returns None if a stop is requested meanwhile, or if the run needs no more peers of this role.

    Raises:
        RunError: the learner refused the peer, or did not answer within `patience_s`.
    """
    deadline_s = time.monotonic() + patience_s
    next_hello_s = 0.0
    while not stop:
        begin_work("")
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise RunError(
                f"{control.endpoint}: no learner answered within {patience_s:g} s; is the run live?"
            )
        if now_s >= next_hello_s and control.send(encode(hello(role, control.name, token=token))):
            next_hello_s = now_s + HELLO_S
        data = control.receive(0.05)
        if data is None:
            continue
        answer = decode(from_learner, data)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Bye) and answer.dismissed:
            print(f"{control.name} is not needed: {answer.reason}", file=sys.stderr)
            return None
        if isinstance(answer, Bye) and not answer.again:
            raise RunError(f"{control.endpoint}: the learner refused: {answer.reason}")
    return None
