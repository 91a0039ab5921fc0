"""Generate text with a policy: encode prompts, check their lengths, and sample answers with fixed seeds.

A sample depends only on the seed, the index of the prompt and the number of the sample: not on the other rows of a
batch, nor on when it is sampled.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_actors.errors import DataError, ModelError
from grpo_actors.generate.prompts import Prompt
from grpo_actors.generate.streaming import Detokenizer
from grpo_actors.policy.config_json import text_part
from grpo_actors.policy.decoding.sampling import Sample, SamplingParams, grow_sample
from grpo_actors.policy.model import Policy
from grpo_actors.schedule.order import sample_seeds


@dataclass
class Generator:
    """A policy with its sampling settings."""

    policy: Policy
    params: SamplingParams
    seed: int
    #: Most tokens of prompt and answer together; 0: the model's own limit.
    max_context: int = 0

    @cached_property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None: unknown."""
        own = text_part(self.policy.architecture).get("max_position_embeddings")
        return self.max_context or (int(own) if own else None)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            ModelError: the prompt is a chat, and the model has no chat template; or the model cannot read its tokens.
            DataError: the prompt has no tokens.
        """
        if isinstance(prompt, str):
            ids: list[int] = self.policy.tokenizer.encode(prompt)
            if not ids:
                raise DataError(f"a prompt must have a token, got {prompt!r}")
            self.policy.check_readable(ids, "a prompt")
            return ids
        self.require_chat_template()
        return self.policy.chat.encode(prompt)

    def require_chat_template(self) -> None:
        """Check that the model has a chat template.

        Raises:
            ModelError: it has none.
        """
        if not self.policy.tokenizer.has_chat_template:
            raise ModelError(
                f"{self.policy.name}: its tokenizer has no chat template; give a PROMPT and --raw to continue a text, "
                "or use an instruction-tuned model"
            )

    def excess(self, tokens: int) -> int:
        """Return by how many tokens a prompt of `tokens` tokens is too long; 0 or less: it fits."""
        return tokens + self.params.max_new_tokens - self.context if self.context else 0

    def encode_fitting(self, prompt: Prompt, where: str) -> list[int]:
        """Encode a prompt and check that it leaves space for an answer.

        Raises:
            DataError: it does not; the text begins with `where`.
            ModelError: as `encode`.
        """
        ids = self.encode(prompt)
        if self.excess(len(ids)) > 0:
            raise DataError(
                f"{where}: prompt and answer may have {self.context} tokens, got {len(ids)} and --max-tokens "
                f"{self.params.max_new_tokens}; shorten the prompt, lower --max-tokens or raise --max-context"
            )
        return ids

    def seeds(self, index: int, samples: int) -> list[int]:
        """Return one 64-bit seed for each completion of prompt number `index`."""
        return sample_seeds(self.seed, 0, f"generate/{index}", samples)

    def answer(
        self, ids: list[int], index: int, on_text: Callable[[str], object], stop: Callable[[], object] = bool
    ) -> Sample:
        """Sample one completion of the tokens `ids` and stream its text.

        Args:
            ids: Token ids of a prompt, from `encode`.
            index: The prompt's number.
            on_text: Called with each piece of text that ends with a complete character.
            stop: Called after each token; a true result ends the answer.

        Returns:
            The completion; unfinished if it was cut.
        """
        [seed] = self.seeds(index, 1)
        detokenizer = Detokenizer(self.policy)
        sample = Sample()
        with closing(grow_sample(self.policy, ids, seed, self.params)) as growing:
            for sample in growing:
                on_text(detokenizer.add(sample.tokens[-1]))
                if stop():
                    break
        on_text(detokenizer.rest())
        return sample

    def record(self, index: int, number: int, prompt_tokens: int, sample: Sample) -> dict[str, Any]:
        """Return a completion as JSON: prompt index, sample number, text, how it ended, lengths in tokens."""
        return {
            "index": index,
            "sample": number,
            "completion": self.policy.decode(sample.tokens),
            "finish_reason": "stop" if sample.finished else "length",
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(sample.tokens),
        }
