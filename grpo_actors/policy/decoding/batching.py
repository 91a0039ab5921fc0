"""The sampler: completions of many groups in one batch.

With continuous batching, a row that becomes free is used again while the other rows continue. This is not possible for
models whose layers cache something else than keys and values of positions (`fixed_batch`): the rows of a batch
begin together, and the next groups wait until all rows have ended.

A group's prompt runs through the model once, and its keys and values are copied to the row of each of its completions.
Sampling, the log-prob of the sampled token and the input of the stop test stay on the device. A step brings two numbers
per row to the host, and the next step is already under way when they are read.

If an environment replies to a turn (`Respond`), its tokens replace those that are drawn in the following steps: one step
each, as if the policy had sampled them. The random number of a token depends on its position in the completion, so that
here too the result does not depend on which completions share the batch. A closing tag that ends thinking
(`SamplingParams.think_tokens`) is inserted in the same way.

The weights may change between two steps (`Sampler.adopt`; PipelineRL, 2509.19128). The step that is under way belongs to
the old version and is recorded as such. The keys and values of rows in use are kept, so that each token is computed from
those of its own version and of earlier ones. Prompts that were prefilled for later are run again.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import mlx.core as mx
import numpy as np

from grpo_actors.policy.adapter import fused
from grpo_actors.policy.decoding.draw import Array, Respond, Sample, SamplingParams, draws
from grpo_actors.policy.decoding.fixed_batch import next_batch
from grpo_actors.policy.decoding.rows import Group, Row, Step, new_budget
from grpo_actors.policy.decoding.slots import Slots
from grpo_actors.policy.decoding.step import Decoder
from grpo_actors.policy.decoding.window import Window
from grpo_actors.policy.dora import fixed_norms
from grpo_actors.policy.model import Policy
from grpo_actors.policy.prefill import prompts_at_once

#: Rows are filled once at least one in this many is free.
FILLED_AT_ONCE = 16
#: A window drops its free rows once at most this share of its rows is in use.
WORTH_SHRINKING = 0.75
#: Most prompts that run through the model together; that many do, if they are waiting.
PREFILLED = 16


class Sampler:
    """A sampler of groups: `submit` any number at any time, and `step` until `idle`.

    While it is open, adapters are fused into the policy's weights (`adapter.fused`, `dora.fixed_norms`), and the policy
    must not train. `close` restores the policy.
    """

    def __init__(self, policy: Policy, params: SamplingParams, max_rows: int, version: int = 0) -> None:
        """Prepare the policy to sample.

        Args:
            policy: The model that samples; set to evaluation mode by its owner.
            params: Sampling parameters of all groups.
            max_rows: Most completions that are decoded at a time. If the rows of a batch begin together, a larger group is
                not divided.
            version: Number of the weights that the policy holds, recorded with every token sampled with them.
        """
        self.policy, self.params, self.max_rows, self.version = policy, params, max_rows, version
        self._prepared = ExitStack()
        self._waiting: deque[Group] = deque()
        self._flight: Step | None = None
        #: (row index, prompt) of new rows whose prompts are not in `_seen` yet.
        self._unseen: list[tuple[int, Sequence[int]]] = []
        self._prepare()
        self._reset_rows(0)

    def submit(
        self, key: int, prompt: Sequence[int], seeds: Sequence[int], respond: Respond | None = None
    ) -> list[Sample]:
        """Add a group: `len(seeds)` completions of `prompt`, which `step` returns under `key`.

        Returns the samples at once, so that the caller can watch them grow.

        Raises:
            ModelError: the prompt has a token that the model cannot read.
        """
        self.policy.check_readable(prompt, "a prompt")
        samples = [Sample() for _ in seeds]
        self._waiting.append(Group(key, prompt, seeds, samples, respond))
        return samples

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Load new weights and use them from the next step on.

        Raises:
            ModelError: the weights belong to another model.
        """
        self.close()
        self.policy.load_trainable(arrays)
        self._prepare()
        self.version = version
        for group in self._waiting:
            group.prompts = None

    def close(self) -> None:
        """Restore the policy for training, and drop all copies of its weights; may be called twice."""
        self._prepared.close()
        self._decoder.forget_weights()

    def drop(self, key: int) -> None:
        """Drop a group: its rows become free, and `step` does not return it."""
        self._waiting = deque(group for group in self._waiting if group.key != key)
        for row in self._rows:
            if row is not None and row.group.key == key:
                self._vacate(row)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and nothing waits."""
        return self._flight is None and not self._waiting and not any(self._rows)

    def step(self) -> tuple[int, list[tuple[int, list[Sample]]]]:
        """Decode one token of every row; return how many tokens were read, and the groups that they completed."""
        self._fit()
        if self._waiting:
            self._fill()
        launched = self._launch()
        landed, self._flight = self._flight, launched
        return self._read(landed) if landed else (0, [])

    def _prepare(self) -> None:
        self._prepared.enter_context(fused(self.policy.model))
        self._prepared.enter_context(fixed_norms(self.policy.model))
        # After the two lines above, because it may copy the weights.
        self._decoder = Decoder(self.policy, self.params)

    # --- rows -------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Adapt the number of rows to the work: add rows for waiting completions, drop rows once enough of them are free."""
        live = [index for index, row in enumerate(self._rows) if row is not None]
        together, over_slots = self._decoder.together, self._decoder.over_slots
        if not live:
            self._reset_rows(self._needed_rows())
        elif self._waiting and not together and not over_slots:
            self._add(min(self.max_rows, len(live) + self._queued()) - len(self._rows))
        elif not over_slots and len(live) <= WORTH_SHRINKING * len(self._rows):
            self._keep(np.array(live, np.int32))

    def _queued(self) -> int:
        """Return how many completions wait for a row."""
        return sum(len(group.seeds) - group.assigned for group in self._waiting)

    def _needed_rows(self) -> int:
        """Return how many rows the waiting completions need, given that none is under way."""
        if self._decoder.together:
            batch = next_batch(self.policy, self._waiting, self.max_rows)
            return sum(len(group.seeds) for group in batch)
        # Each number of slots needs its own compilation.
        all_slots = self._decoder.over_slots and self._waiting
        return self.max_rows if all_slots else min(self.max_rows, self._queued())

    def _reset_rows(self, rows: int) -> None:
        """Start with an empty cache and `rows` free rows; no row's past is needed."""
        self._window = self._decoder.cache(rows)
        self._rows: list[Row | None] = [None] * rows
        #: [R], the token that each row is fed next.
        self._token = mx.zeros(rows, mx.uint32)
        #: By row, tokens to feed next instead of drawn ones; only if the decoder feeds itself.
        self._given: dict[int, int] = {}
        #: [R, V] bool: the tokens of each row's prompt and completion; only with a repetition penalty.
        self._seen: mx.array | None = None

    def _add(self, count: int) -> None:
        if count <= 0:
            return
        assert isinstance(self._window, Window)
        self._window.add(count)
        self._rows += [None] * count
        self._token = mx.pad(self._token, (0, count))
        self._seen = None if self._seen is None else mx.pad(self._seen, [(0, count), (0, 0)])

    def _keep(self, indices: Array) -> None:
        assert not isinstance(self._window, Slots)
        self._window.keep(indices)
        self._rows = [self._rows[index] for index in indices]
        for index, row in enumerate(self._rows):
            assert row is not None
            row.index = index
        self._token = self._token[mx.array(indices)]
        self._seen = None if self._seen is None else self._seen[mx.array(indices)]

    def _fill(self) -> None:
        """Assign free rows to the waiting completions, first come first served."""
        free = [index for index, row in enumerate(self._rows) if row is None]
        # Filling one row costs about as much as filling many, so a few free rows wait for each other.
        if len(free) * (1 if self._decoder.together else FILLED_AT_ONCE) < len(self._rows):
            return
        taken: list[tuple[Group, int]] = []  # (group, index of its sample) that gets row free[i]
        new = 0
        while self._waiting and len(taken) < len(free):
            group = self._waiting[0]
            new += group.prompts is None
            if new > PREFILLED and not self._decoder.together:
                break  # their turn comes with the next step: the memory of a prefill grows with its prompts
            last = min(len(group.seeds), group.assigned + len(free) - len(taken))
            taken += [(group, i) for i in range(group.assigned, last)]
            group.assigned = last
            if last == len(group.seeds):
                self._waiting.popleft()
        indices = np.array(free[: len(taken)], np.int32)
        self._prefill([group for group, _ in taken])
        self._decoder.rest()
        for prompts in dict.fromkeys(group.prompts for group, _ in taken):
            of_these = [at for at, (group, _) in enumerate(taken) if group.prompts is prompts]
            chosen = np.array([taken[at][0].prompt_index for at in of_these], np.int32)
            self._window.place(indices[of_these], prompts, chosen)
        for index, (group, i) in zip(indices, taken, strict=True):
            uniforms = draws(group.seeds[i], self.params.max_new_tokens)
            budget = new_budget(self.policy, self.params, group.prompt)
            self._rows[index] = Row(int(index), group, group.samples[i], uniforms, budget=budget)
            if self.params.repetition_penalty != 1:
                self._unseen.append((int(index), group.prompt))
            if group.assigned == len(group.seeds):
                group.prompts = None
        last_tokens = np.array([group.prompt[-1] for group, _ in taken], np.uint32)
        if self._decoder.feeds:
            self._given.update(zip(indices.tolist(), last_tokens.tolist(), strict=True))
            return
        self._token[mx.array(indices)] = mx.array(last_tokens)
        # Submitted separately: CUDA then reuses one graph for all steps, instead of building another one for this step.
        mx.async_eval(self._token)  # type: ignore[no-untyped-call]

    def _prefill(self, groups: Sequence[Group]) -> None:
        """Prefill the prompts of `groups` that were not prefilled yet, together with some of the next groups."""
        new = [group for group in dict.fromkeys(groups) if group.prompts is None]
        if not new:
            return
        if not self._decoder.together:
            next_ones = [group for group in self._waiting if group.prompts is None and group not in new]
            new += next_ones[: max(0, PREFILLED - len(new))]
        # The rows of a fixed batch begin together.
        count = len(new) if self._decoder.together else prompts_at_once(max(len(g.prompt) for g in new))
        for first in range(0, len(new), count):
            part = new[first : first + count]
            prompts = self._decoder.prefill([group.prompt for group in part])
            for index, group in enumerate(part):
                group.prompts, group.prompt_index = prompts, index

    # --- steps ------------------------------------------------------------------------------------

    def _launch(self) -> Step | None:
        """Start the next step; return None if all tokens of every row have been requested."""
        limit, requested = self.params.max_new_tokens, False
        uniforms = np.zeros(len(self._rows), np.float32)
        fed: dict[int, int] = {}
        for row in self._rows:
            if row is not None and row.requested < limit:
                uniforms[row.index] = row.uniforms[row.requested]
                given = row.given_at(row.requested - 1)
                if given is not None:
                    fed[row.index] = given
                row.requested += 1
                requested = True
        if not requested:
            return None
        if self._decoder.feeds:
            self._given.update(fed)
        elif fed:
            self._feed(fed)
        self._window.reserve()
        if self.params.repetition_penalty != 1:
            self._update_seen()
        instead, self._given = self._given, {}
        self._token, read = self._decoder.step(self._window, self._token, instead, uniforms, self._seen)
        return Step(read, list(self._rows), self.version)

    def _feed(self, tokens: dict[int, int]) -> None:
        """Feed these rows the given tokens (row index -> token) instead of the drawn ones."""
        values, chosen = np.zeros(len(self._rows), np.uint32), np.zeros(len(self._rows), np.bool_)
        indices = list(tokens)
        values[indices], chosen[indices] = list(tokens.values()), True
        # A new array, because the old one belongs to the step under way and is still to be read.
        self._token = mx.where(mx.array(chosen), mx.array(values), self._token)

    def _update_seen(self) -> None:
        """Add the tokens that are fed now, and the prompts of new rows, to `_seen`."""
        vocabulary = self.policy.vocabulary
        if self._seen is None:
            self._seen = mx.zeros((len(self._rows), vocabulary), mx.bool_)
        for index, prompt in self._unseen:
            mask = np.zeros(vocabulary, np.bool_)
            ids = np.asarray(prompt)
            mask[ids[ids < vocabulary]] = True  # a model may read tokens that it never predicts
            self._seen[index] = mx.array(mask)
        self._unseen.clear()
        self._seen = mx.put_along_axis(self._seen, self._token[:, None], mx.array(True), axis=1)

    def _read(self, step: Step) -> tuple[int, list[tuple[int, list[Sample]]]]:
        """Wait for a step and append its tokens to the completions that have not ended; see `step` for the result."""
        tokens, logprobs = step.read()
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
        self._rows[row.index] = None
        self._window.free(row.index)
