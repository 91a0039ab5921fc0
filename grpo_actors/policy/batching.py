"""Continuous batching: completions of many groups in one batch, each place taken again as soon as it is free.

A group's prompt runs through the model once; its keys and values are copied to every place that one of its
completions gets. Sampling, the chosen token's log-prob and the stop test's input stay on the device; a step
brings two numbers a row to the host, and the next step is under way before they are read.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from grpo_actors.policy.draw import Array, Sample, SamplingParams, draw, draws
from grpo_actors.policy.model import Policy
from grpo_actors.policy.window import Prompts, Window


@dataclass(slots=True, eq=False)
class _Group:
    key: Hashable
    prompt: Sequence[int]
    seeds: Sequence[int]
    samples: list[Sample]
    #: Samples that have or had a place.
    placed: int = 0


@dataclass(slots=True, eq=False)
class _Row:
    """A completion that has a place."""

    group: _Group
    sample: Sample
    #: One for each of its tokens.
    uniforms: Array
    #: Tokens asked of the device so far: one more than were read.
    asked: int = 0


@dataclass(slots=True)
class _Step:
    """What the device is computing, and for whom; a row that has ended meanwhile is ignored when it is read."""

    token: mx.array
    logprob: mx.array
    rows: list[_Row | None]
    version: int


@dataclass
class Sampler:
    """Groups in, groups out: `submit` any number at any time, `step` until `idle`."""

    policy: Policy
    params: SamplingParams
    #: Completions that are decoded at a time, at most.
    places: int
    _waiting: deque[_Group] = field(default_factory=deque)
    _rows: list[_Row | None] = field(default_factory=list)
    _window: Window = field(init=False)
    #: [R] what is fed next.
    _token: mx.array = field(default_factory=lambda: mx.zeros(0, mx.uint32))
    #: [R, V] bool, with a repetition penalty: the tokens of each row's prompt and completion.
    _seen: mx.array | None = None
    #: Prompts that are not in `_seen` yet.
    _unseen: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    _flight: _Step | None = None

    def submit(self, key: Hashable, prompt: Sequence[int], seeds: Sequence[int]) -> None:
        """One more group: `len(seeds)` completions of `prompt`, handed back under `key`."""
        self._waiting.append(_Group(key, prompt, seeds, [Sample() for _ in seeds]))

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing waits."""
        return self._flight is None and not self._waiting and not any(self._rows)

    @property
    def free_places(self) -> int:
        """Places that no completion has or waits for."""
        waiting = sum(len(group.seeds) - group.placed for group in self._waiting)
        return self.places - sum(row is not None for row in self._rows) - waiting

    def step(self, version: int = 0) -> tuple[int, list[tuple[Hashable, list[Sample]]]]:
        """Decode one token of every row.

        Args:
            version: Of the weights that the model holds now; recorded with each token.

        Returns:
            How many tokens were read, and the groups that they completed.
        """
        self._fit()
        if self._waiting:
            self._fill()
        launched = self._launch(version)
        landed, self._flight = self._flight, launched
        return self._read(landed) if landed else (0, [])

    # --- places -----------------------------------------------------------------------------------

    def _fit(self) -> None:
        """As many rows as there is work for; fewer once a quarter is of no use."""
        live = [place for place, row in enumerate(self._rows) if row is not None]
        waiting = sum(len(group.seeds) - group.placed for group in self._waiting)
        wanted = min(self.places, len(live) + waiting)
        if not live and waiting:
            # Nobody's past is needed: begin anew, at column 0.
            self._window = Window(self.policy.model, wanted)
            self._rows, self._token, self._seen = [None] * wanted, mx.zeros(wanted, mx.uint32), None
        elif wanted > len(self._rows):
            self._add(wanted - len(self._rows))
        elif 4 * wanted <= 3 * len(self._rows):
            self._keep(np.array(live, np.int32))

    def _add(self, count: int) -> None:
        self._window.add(count)
        self._rows += [None] * count
        self._token = mx.pad(self._token, (0, count))
        self._seen = None if self._seen is None else mx.pad(self._seen, [(0, count), (0, 0)])

    def _keep(self, places: Array) -> None:
        self._window.keep(places)
        self._rows = [self._rows[place] for place in places]
        self._token = self._token[mx.array(places)]
        self._seen = None if self._seen is None else self._seen[mx.array(places)]

    def _fill(self) -> None:
        """Give free places to the completions that wait, first come first served."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        groups: list[_Group] = []
        taken: list[int] = []  # of free[i]: which of the groups
        while self._waiting and len(taken) < len(free):
            group = self._waiting[0]
            last = min(len(group.seeds), group.placed + len(free) - len(taken))
            for i in range(group.placed, last):
                uniforms = draws(group.seeds[i], self.params.max_new_tokens)
                self._rows[free[len(taken)]] = _Row(group, group.samples[i], uniforms)
                taken.append(len(groups))
            group.placed = last
            groups.append(group)
            if last == len(group.seeds):
                self._waiting.popleft()
        if not taken:
            return
        prompts = [group.prompt for group in groups]
        places, chosen = np.array(free[: len(taken)], np.int32), np.array(taken, np.int32)
        self._window.place(places, Prompts(self.policy.model, prompts), chosen)
        self._token[mx.array(places)] = mx.array(np.array([prompts[i][-1] for i in taken], np.uint32))
        self._unseen += [(place, prompts[i]) for place, i in zip(places, taken, strict=True)]

    # --- steps ------------------------------------------------------------------------------------

    def _launch(self, version: int) -> _Step | None:
        """Start the next step; None: every row has been asked for all of its tokens."""
        limit = self.params.max_new_tokens
        if not any(row is not None and row.asked < limit for row in self._rows):
            return None
        uniforms = np.zeros(len(self._rows), np.float32)
        for place, row in enumerate(self._rows):
            if row is not None and row.asked < limit:
                uniforms[place] = row.uniforms[row.asked]
                row.asked += 1
        self._window.make_room()
        logits = self._window.decode(self._token)
        if self.params.repetition_penalty != 1:
            self._see(logits.shape[-1])
        token, logprob = draw(logits, mx.array(uniforms), self.params, self._seen)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token[:, None], mx.array(True), axis=1)
        mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
        self._token = token
        return _Step(token, logprob, list(self._rows), version)

    def _see(self, vocabulary: int) -> None:
        """Bring the new rows' prompts into `_seen`."""
        if self._seen is None:
            self._seen = mx.zeros((len(self._rows), vocabulary), mx.bool_)
        for place, prompt in self._unseen:
            mask = np.zeros(vocabulary, np.bool_)
            mask[np.asarray(prompt)] = True
            self._seen[place] = mx.array(mask)
        self._unseen.clear()

    def _read(self, step: _Step) -> tuple[int, list[tuple[Hashable, list[Sample]]]]:
        """Wait for a step, and append its tokens to the completions that have not ended."""
        tokens, logprobs = np.array(step.token).tolist(), np.array(step.logprob).tolist()
        count, touched = 0, {}
        for row, token, logprob in zip(step.rows, tokens, logprobs, strict=True):
            if row is None or row.sample.ended:
                continue
            count += 1
            sample = row.sample
            sample.append(token, logprob, step.version)
            sample.finished = self.policy.ends(sample.tokens, self.params.stop)
            if sample.finished or len(sample.tokens) == self.params.max_new_tokens:
                sample.ended = True
                place = self._rows.index(row)
                self._rows[place] = None
                self._window.free(place)
                touched[id(row.group)] = row.group
        done = [group for group in touched.values() if all(sample.ended for sample in group.samples)]
        return count, [(group.key, group.samples) for group in done]
