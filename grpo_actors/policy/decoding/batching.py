"""The sampler: completions of many groups in one batch.

With continuous batching a place that gets free is taken again, while the others go on. Models whose layers cache something else
than the keys and values of every position (`fixed_batch`) cannot do that: the rows of a batch begin together, and the
next groups wait until all of them have ended.

A group's prompt runs through the model once; its keys and values are copied to every place that one of its
completions gets. Sampling, the chosen token's log-prob and the stop test's input stay on the device; a step
brings two numbers a row to the host, and the next step is under way before they are read.

Where an environment replies to a turn (`Respond`), its tokens take the place of those that are drawn in the following
steps: one step each, as if the policy had sampled them. The draw of a token goes by its place in the completion, so
that here too nothing depends on who shares the batch.

The weights may change between two steps (`Sampler.adopt`; PipelineRL, 2509.19128): the step that is under way is the old
ones' work, and recorded as such. Keys and values of what has a place stay as they are, so that each token is computed on
those of its own version and of those before it; prompts that are kept for later are run again.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property

import mlx.core as mx
import numpy as np

from grpo_actors.policy.adapter import fused
from grpo_actors.policy.decoding.draw import Array, Respond, Sample, SamplingParams, draws
from grpo_actors.policy.decoding.fixed_batch import next_batch
from grpo_actors.policy.decoding.rows import Group, Row, Step
from grpo_actors.policy.decoding.slots import Slots
from grpo_actors.policy.decoding.step import Decoder
from grpo_actors.policy.decoding.window import Window
from grpo_actors.policy.dora import fixed_norms
from grpo_actors.policy.model import Policy

#: A share of the places, one in so many, that has to be free before any is filled.
FILLED_AT_ONCE = 16
#: Share of the rows of a window in use at which to go on without the others.
WORTH_SHRINKING = 0.75
#: Prompts that run through the model together.
PREFILLED = 16


class Sampler:
    """Groups in, groups out: `submit` any number at any time, `step` until `idle`.

    While it is open, adapters are part of the policy's weights (`adapter.fused`, `dora.fixed_norms`), and the policy must
    not train. `close` gives it back as it was.
    """

    def __init__(self, policy: Policy, params: SamplingParams, places: int, version: int = 0) -> None:
        """Prepare the policy to sample.

        Args:
            policy: The model that samples; set to evaluation mode by its owner.
            params: The same for all groups.
            places: Completions that are decoded at a time, at most. Where the rows of a batch begin together, a larger
                group is not divided.
            version: Number of the weights that the policy holds, recorded with every token that they sample.
        """
        self.policy, self.params, self.places, self.version = policy, params, places, version
        self._prepared = ExitStack()
        self._waiting: deque[Group] = deque()
        self._flight: Step | None = None
        #: Prompts that are not in `_seen` yet.
        self._unseen: list[tuple[int, Sequence[int]]] = []
        self._prepare()
        self._begin(0)

    def submit(
        self, key: int, prompt: Sequence[int], seeds: Sequence[int], respond: Respond | None = None
    ) -> list[Sample]:
        """One more group: `len(seeds)` completions of `prompt`, handed back under `key`; returned at once, to be watched."""
        samples = [Sample() for _ in seeds]
        self._waiting.append(Group(key, prompt, seeds, samples, respond))
        return samples

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Go on with these weights: all steps from the next one on are theirs.

        Raises:
            ModelError: they are another model's.
        """
        self.close()
        self.policy.load_trainable(arrays)
        self._prepare()
        self.version = version
        for group in self._waiting:
            group.prompts = None

    def close(self) -> None:
        """Give the policy back as it trains, and hold no copy of its weights; may be called twice."""
        self._prepared.close()
        self._decoder.forget_weights()

    def drop(self, key: int) -> None:
        """Nobody wants this group any more: its places are free, and it is not handed back."""
        self._waiting = deque(group for group in self._waiting if group.key != key)
        for row in self._rows:
            if row is not None and row.group.key == key:
                self._vacate(row)

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing waits."""
        return self._flight is None and not self._waiting and not any(self._rows)

    def step(self) -> tuple[int, list[tuple[int, list[Sample]]]]:
        """Decode one token of every row; returns how many were read, and the groups that they completed."""
        self._fit()
        if self._waiting:
            self._fill()
        launched = self._launch()
        landed, self._flight = self._flight, launched
        return self._read(landed) if landed else (0, [])

    def _prepare(self) -> None:
        self._prepared.enter_context(fused(self.policy.model))
        self._prepared.enter_context(fixed_norms(self.policy.model))
        # Afterwards: it may hold copies of the weights.
        self._decoder = Decoder(self.policy, self.params)

    # --- places -----------------------------------------------------------------------------------

    def _fit(self) -> None:
        """As many rows as there is work for; fewer once enough of them are of no use."""
        live = [place for place, row in enumerate(self._rows) if row is not None]
        together, over_slots = self._decoder.together, self._decoder.over_slots
        if not live:
            self._begin(self._rows_to_begin())
        elif self._waiting and not together and not over_slots:
            self._add(min(self.places, len(live) + self._left()) - len(self._rows))
        elif not over_slots and len(live) <= WORTH_SHRINKING * len(self._rows):
            self._keep(np.array(live, np.int32))

    def _left(self) -> int:
        """Completions that wait for a place."""
        return sum(len(group.seeds) - group.placed for group in self._waiting)

    def _rows_to_begin(self) -> int:
        """How many rows there should be for what waits, where nothing is under way."""
        if self._decoder.together:
            batch = next_batch(self.policy, self._waiting, self.places)
            return sum(len(group.seeds) for group in batch)
        # Every number of slots is compiled by itself.
        return self.places if self._decoder.over_slots and self._waiting else min(self.places, self._left())

    def _begin(self, rows: int) -> None:
        """Begin anew, at column 0, with so many free rows: nobody's past is needed."""
        self._window = self._decoder.cache(rows)
        self._rows: list[Row | None] = [None] * rows
        #: [R] what is fed next.
        self._token = mx.zeros(rows, mx.uint32)
        #: [R, V] bool, with a repetition penalty: the tokens of each row's prompt and completion.
        self._seen: mx.array | None = None

    def _add(self, count: int) -> None:
        if count <= 0:
            return
        assert isinstance(self._window, Window)
        self._window.add(count)
        self._rows += [None] * count
        self._token = mx.pad(self._token, (0, count))
        self._seen = None if self._seen is None else mx.pad(self._seen, [(0, count), (0, 0)])

    def _keep(self, places: Array) -> None:
        assert not isinstance(self._window, Slots)
        self._window.keep(places)
        self._rows = [self._rows[place] for place in places]
        for place, row in enumerate(self._rows):
            assert row is not None
            row.place = place
        self._token = self._token[mx.array(places)]
        self._seen = None if self._seen is None else self._seen[mx.array(places)]

    def _fill(self) -> None:
        """Give free places to the completions that wait, first come first served."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        # To place one costs about as much as to place many: a few places wait for each other.
        if len(free) * (1 if self._decoder.together else FILLED_AT_ONCE) < len(self._rows):
            return
        taken: list[tuple[Group, int]] = []  # (group, which of its samples) that gets free[i]
        while self._waiting and len(taken) < len(free):
            group = self._waiting[0]
            last = min(len(group.seeds), group.placed + len(free) - len(taken))
            taken += [(group, i) for i in range(group.placed, last)]
            group.placed = last
            if last == len(group.seeds):
                self._waiting.popleft()
        places = np.array(free[: len(taken)], np.int32)
        self._prefill([group for group, _ in taken])
        for prompts in dict.fromkeys(group.prompts for group, _ in taken):
            of_these = [at for at, (group, _) in enumerate(taken) if group.prompts is prompts]
            chosen = np.array([taken[at][0].index for at in of_these], np.int32)
            self._window.place(places[of_these], prompts, chosen)
        for place, (group, i) in zip(places, taken, strict=True):
            uniforms = draws(group.seeds[i], self.params.max_new_tokens)
            self._rows[place] = Row(int(place), group, group.samples[i], uniforms)
            if self.params.repetition_penalty != 1:
                self._unseen.append((int(place), group.prompt))
            if group.placed == len(group.seeds):
                group.prompts = None
        last_tokens = np.array([group.prompt[-1] for group, _ in taken], np.uint32)
        self._token[mx.array(places)] = mx.array(last_tokens)
        # By itself: CUDA then takes every step for the same graph, instead of making another one for this one.
        mx.async_eval(self._token)  # type: ignore[no-untyped-call]

    def _prefill(self, groups: Sequence[Group]) -> None:
        """Run the prompts of `groups` through the model, unless they have been, and some of those that come next."""
        new = [group for group in dict.fromkeys(groups) if group.prompts is None]
        if not new:
            return
        if not self._decoder.together:
            next_ones = [group for group in self._waiting if group.prompts is None and group not in new]
            new += next_ones[: max(0, PREFILLED - len(new))]
        prompts = self._decoder.prefill([group.prompt for group in new])
        for index, group in enumerate(new):
            group.prompts, group.index = prompts, index

    # --- steps ------------------------------------------------------------------------------------

    def _launch(self) -> Step | None:
        """Start the next step; None: every row has been asked for all of its tokens."""
        limit, asked = self.params.max_new_tokens, False
        uniforms = np.zeros(len(self._rows), np.float32)
        fed: dict[int, int] = {}
        for row in self._rows:
            if row is not None and row.asked < limit:
                uniforms[row.place] = row.uniforms[row.asked]
                given = row.given_at(row.asked - 1)
                if given is not None:
                    fed[row.place] = given
                row.asked += 1
                asked = True
        if not asked:
            return None
        if fed:
            self._feed(fed)
        self._window.reserve()
        if self.params.repetition_penalty != 1:
            self._see()
        token, logprob = self._decoder.step(self._window, self._token, mx.array(uniforms), self._seen)
        self._token = token
        return Step(token, logprob, list(self._rows), self.version)

    def _feed(self, tokens: dict[int, int]) -> None:
        """Feed these places something else than what was drawn for them."""
        values, chosen = np.zeros(len(self._rows), np.uint32), np.zeros(len(self._rows), np.bool_)
        places = list(tokens)
        values[places], chosen[places] = list(tokens.values()), True
        # A new array: the old one is the step's under way, which is still to be read.
        self._token = mx.where(mx.array(chosen), mx.array(values), self._token)

    def _see(self) -> None:
        """Bring what is fed now, and the new rows' prompts, into `_seen`."""
        vocabulary = self._vocabulary
        if self._seen is None:
            self._seen = mx.zeros((len(self._rows), vocabulary), mx.bool_)
        for place, prompt in self._unseen:
            mask = np.zeros(vocabulary, np.bool_)
            mask[np.asarray(prompt)] = True
            self._seen[place] = mx.array(mask)
        self._unseen.clear()
        self._seen = mx.put_along_axis(self._seen, self._token[:, None], mx.array(True), axis=1)

    @cached_property
    def _vocabulary(self) -> int:
        """Logits of a token; a tokenizer may know fewer."""
        return int(self.policy.model(mx.array([[1]])).shape[-1])

    def _read(self, step: Step) -> tuple[int, list[tuple[int, list[Sample]]]]:
        """Wait for a step, and append its tokens to the completions that have not ended."""
        tokens, logprobs = np.array(step.token).tolist(), np.array(step.logprob).tolist()
        count, done = 0, []
        for row, token, logprob in zip(step.rows, tokens, logprobs, strict=True):
            if row is None or row.ended:
                continue
            count += 1
            if row.record(token, logprob, step.version, self.policy, self.params):
                self._vacate(row)
                group = row.group
                group.ended += 1
                if group.ended == len(group.samples):
                    done.append((group.key, group.samples))
        return count, done

    def _vacate(self, row: Row) -> None:
        row.ended = True
        self._rows[row.place] = None
        self._window.free(row.place)
