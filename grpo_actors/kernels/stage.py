"""The stage before a run's actors start: compile the kernels that they will need, one process for each part of the work.

A process keeps its kernels in a folder of its own. What it has finished goes into the user's cache and to the other
processes, which then do not compile it again (`files`). A marker in the cache remembers which settings are done, so that
the stage costs nothing the next time, even if a part has failed. It only saves time: a kernel that no part has compiled
is compiled by the actor that needs it. Loads no MLX.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from grpo_actors import __version__, host
from grpo_actors.backend import KERNELS
from grpo_actors.config import Config
from grpo_actors.kernels.files import compiled_in, copy, kernels_in, link, publish
from grpo_actors.policy.locate import locate
from grpo_actors.process import LIFELINE

#: Kernels of a usual run, for the progress display.
USUAL_KERNELS = 45
#: Suffix of the file with what a part prints.
OUTPUT = ".output"
#: Seconds between two looks at the processes, and after which a part is given up.
TICK_S, PART_S = 0.1, 300.0

#: Section -> settings that decide which kernels a run needs; none: all of them.
_DECIDING: dict[str, tuple[str, ...]] = {
    "model": ("dtype", "fine_tune_type", "base_bits", "lora_scale", "lora_dropout", "lora_keys"),
    "objective": (),
    "learner": (
        *("optimizer", "adam_beta1", "adam_beta2", "weight_decay"),
        *("use_compile", "gradient_checkpointing"),
    ),
    "rollout": (
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("quantize_for_rollouts", "rollout_bits", "kv_bits", "num_generations", "batch_groups"),
    ),
    "evaluator": ("eval_temperature", "eval_sampled", "eval_batch_size"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one part."""

    part: str
    seconds: float
    #: Names of the kernels that it compiled; another part may have compiled the same ones at the same moment.
    kernels: Sequence[str]
    #: Reason why it failed; empty if it did not.
    failure: str


@dataclass
class _Part:
    """One process, with its kernel folder."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, folder: Path, stage: "Stage") -> "_Part":
        """Start the part that the folder is named after."""
        with folder.with_suffix(OUTPUT).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *stage.program, folder.name, stage.config.model_dump_json()],
                env={
                    **os.environ,
                    **stage.environment,
                    KERNELS: str(folder),
                    LIFELINE: "0",
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdin=subprocess.PIPE,  # the lifeline: it closes when this process ends, for whatever reason
                stdout=output,
                stderr=output,
                process_group=0,  # Ctrl-C reaches this process only
            )
        return cls(folder, process)

    def outcome(self) -> Outcome | None:
        """Return how it ended; None while it runs. Ends it if it takes too long."""
        seconds, code = time.monotonic() - self.started_s, self.process.poll()
        if code is None and seconds < PART_S:
            return None
        self.end()
        failure = f"not done after {PART_S:.0f} s" if code is None else ""
        if code:
            lines = self.folder.with_suffix(OUTPUT).read_text(errors="replace").splitlines()
            failure = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        return Outcome(self.folder.name, seconds, sorted(compiled_in(self.folder)), failure)

    def end(self) -> None:
        """Kill it if it runs; may be called twice."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass(frozen=True)
class Stage:
    """The stage of one run; `find` says whether it is needed."""

    config: Config
    cache: Path
    marker: Path
    #: Python's arguments for the program that runs one part; name and settings follow.
    program: Sequence[str] = ("-m", "grpo_actors.kernels.part")
    #: Variables of the processes: the device on which they compute.
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(
        cls, config: Config, build: str | None, environment: Mapping[str, str] | None = None
    ) -> "Stage | None":
        """Return the stage of these settings; None without CUDA, or if there is no cache.

        Args:
            config: The settings.
            build: `backend.cuda_build()`.
            environment: Variables of the device on which to compile.
        """
        folder = os.environ.get(KERNELS)
        if build is None or not folder:
            return None
        return cls(
            config,
            Path(folder),
            Path(folder) / f"{_digest(config, build)}.done",
            environment=environment or {},
        )

    @property
    def is_done(self) -> bool:
        """Whether all parts have run; a run does not try again what failed."""
        return self.marker.exists()

    @property
    def is_complete(self) -> bool:
        """Whether all parts have run and none failed."""
        return self.is_done and not self.marker.read_text()

    def run(
        self,
        show: Callable[[int], None] = lambda _: None,
        gives_up: Callable[[], object] = lambda: False,
        processes: int | None = None,
    ) -> Generator[Outcome, None, None]:
        """Run all parts; yield each as it ends.

        Args:
            show: Called again and again with the number of new kernels in the cache.
            gives_up: Called again and again; if it returns something true, all parts end at once, and are not done.
            processes: Most processes at a time; None: one for each core.

        Raises:
            OSError: The cache or the temporary folder cannot be written.
        """
        waiting, running, new, failed = parts_of(self.config), list[_Part](), set[str](), list[str]()
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-kernels-")))
            self.cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.cache).close()  # fails now, not after the first kernel
            known = list(kernels_in(self.cache))
            while waiting or running:
                if gives_up():
                    return
                while waiting and len(running) < (processes or host.cores()):
                    folder = place / waiting.pop(0)
                    folder.mkdir()
                    link([*known, *new], self.cache, folder)
                    running.append(_Part.start(folder, self))
                    stack.callback(running[-1].end)
                outcomes = [part.outcome() for part in running]
                new |= self._exchange(running)
                show(len(new))
                failed += [outcome.part for outcome in outcomes if outcome is not None and outcome.failure]
                running = [part for part, outcome in zip(running, outcomes, strict=True) if outcome is None]
                yield from (outcome for outcome in outcomes if outcome is not None)
                time.sleep(TICK_S)
            self.marker.write_text("".join(f"{part}\n" for part in failed))

    def _exchange(self, running: Sequence[_Part]) -> set[str]:
        """Publish what the processes have finished, and give it to the others; return the names."""
        new = {
            name for part in running for name in publish(compiled_in(part.folder), part.folder, self.cache)
        }
        for part in running:
            copy(new, self.cache, part.folder)
        return new


def parts_of(config: Config) -> list[str]:
    """Return the names of the parts that these settings need, the long ones first; all of them are in `parts`.

    The last one does everything that the learner's parts do; it compiles what is left.
    """
    evaluation = ["evaluation"] if config.evaluator.eval_every_updates else []
    return [
        "body",
        "embedding",
        "loss",
        "statistics",
        "head",
        "step",
        "sampling",
        *evaluation,
        "weights",
        "update",
    ]


def _digest(config: Config, build: str) -> str:
    """Return a digest of all that decides which kernels a run needs, besides the GPU, which the cache is for."""
    settings = {
        section: getattr(config, section).model_dump(mode="json", include=set(names) or None)
        for section, names in _DECIDING.items()
    }
    location = locate(config.model.model_name)
    architecture = str(location)
    if isinstance(location, Path):
        with contextlib.suppress(OSError):
            architecture = (location / "config.json").read_text(errors="replace")
    content = json.dumps([__version__, build, settings, parts_of(config), architecture], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
