"""A policy that is asked for text: how prompts become tokens, how long they may be, with which draws it answers.

What is sampled depends on the seed, the place of the prompt and the number of the sample, and on nothing else: not on
what shares a batch, nor on when it is asked.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_actors.errors import DataError, ModelError
from grpo_actors.generate.prompts import Prompt
from grpo_actors.generate.streaming import Detokenizer
from grpo_actors.policy.decoding.sampling import Sample, SamplingParams, grow_sample
from grpo_actors.policy.model import Policy
from grpo_actors.schedule.order import sample_seeds


@dataclass
class Speaker:
    """A policy with the settings to ask it by."""

    policy: Policy
    params: SamplingParams
    seed: int
    #: Tokens of prompt and answer together; 0: what the model was made for.
    max_context: int = 0

    @cached_property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: nobody says."""
        described = self.policy.architecture
        own = described.get("max_position_embeddings") or described.get("text_config", {}).get(
            "max_position_embeddings"
        )
        return self.max_context or (int(own) if own else None)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ModelError: it is a chat, and the model knows none.
            DataError: it has no tokens.
        """
        if isinstance(prompt, str):
            ids: list[int] = self.policy.tokenizer.encode(prompt)
            if not ids:
                raise DataError(f"a prompt must have a token, got {prompt!r}")
            return ids
        self.require_turns()
        return self.policy.encode_chat(prompt)

    def require_turns(self) -> None:
        """Refuse a model that knows no chat. `ModelError`: it is one."""
        if not self.policy.tokenizer.has_chat_template:
            raise ModelError(
                f"{self.policy.name}: its tokenizer has no chat template; give a PROMPT and --raw to have it gone on "
                "with as it stands, or use an instruction-tuned model"
            )

    def excess(self, tokens: int) -> int:
        """By how many tokens a prompt of so many is too long; 0 or less: it is not."""
        return tokens + self.params.max_new_tokens - self.context if self.context else 0

    def encode_fitting(self, prompt: Prompt, where: str) -> list[int]:
        """As `encode`, for a prompt that has to leave room for an answer.

        Raises:
            DataError: it leaves none; begins with `where`.
        """
        ids = self.encode(prompt)
        if self.excess(len(ids)) > 0:
            raise DataError(
                f"{where}: prompt and answer may have {self.context} tokens, got {len(ids)} and --max-tokens "
                f"{self.params.max_new_tokens}; shorten the prompt, lower --max-tokens or raise --max-context"
            )
        return ids

    def seeds(self, index: int, samples: int) -> list[int]:
        """One 64-bit seed for each completion of prompt number `index`."""
        return sample_seeds(self.seed, 0, f"generate/{index}", samples)

    def answer(
        self, ids: list[int], index: int, say: Callable[[str], object], stop: Callable[[], object] = bool
    ) -> Sample:
        """Sample one completion of the tokens `ids` and say its text as it comes.

        Args:
            ids: Of a prompt, as `encode` gives them.
            index: The prompt's number.
            say: Called with each piece of the text that is whole.
            stop: Asked after each token whether to leave it at that.

        Returns:
            The completion; unfinished where it was cut.
        """
        [seed] = self.seeds(index, 1)
        detokenizer = Detokenizer(self.policy)
        sample = Sample()
        with closing(grow_sample(self.policy, ids, seed, self.params)) as growing:
            for sample in growing:
                say(detokenizer.add(sample.tokens[-1]))
                if stop():
                    break
        say(detokenizer.rest())
        return sample

    def record(self, index: int, number: int, prompt_tokens: int, sample: Sample) -> dict[str, Any]:
        """A completion as JSON: which prompt's, which of its samples, the text, how it ended, lengths in tokens."""
        return {
            "index": index,
            "sample": number,
            "completion": self.policy.decode(sample.tokens),
            "finish_reason": "stop" if sample.finished else "length",
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(sample.tokens),
        }
