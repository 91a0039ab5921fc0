"""The text of each token of a run's model, without the model: from the tokenizer.json of its folder."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import locate
from grpo_actors.rundir.folder import CHECKPOINT, update_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


class Pieces:
    """The tokenizer of a run."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @classmethod
    def of_run(cls, folder: Path, model_name: str) -> "Pieces | None":
        """Find the tokenizer of a run: in its newest checkpoint, else in the model's folder. None: there is none here.

        Nothing is downloaded.
        """
        numbered = ((update_of(path), path) for path in folder.glob(f"{CHECKPOINT}*"))
        checkpoints = sorted(
            ((update, path) for update, path in numbered if update is not None), reverse=True
        )
        try:
            model = locate(model_name) if model_name else ""
        except ModelError:
            model = ""
        places = [
            *(path for _, path in checkpoints),
            *([model] if isinstance(model, Path) else _downloaded(model)),
        ]
        return next(
            (cls(place / TOKENIZER_FILE) for place in places if (place / TOKENIZER_FILE).is_file()), None
        )

    def split(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token, [T]. A character of several tokens stands at its last one."""
        from tokenizers.decoders import DecodeStream  # noqa: PLC0415

        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(self._tokenizer, token) or "" for token in tokens]
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        # What a cut completion ends with may be half a character, which the stream holds back.
        return [*pieces[:-1], pieces[-1] or whole[len("".join(pieces[:-1])) :]] if pieces else []

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer  # noqa: PLC0415 - only a page that shows tokens loads it

        return Tokenizer.from_file(str(self._file))


def _downloaded(hub_id: str) -> list[Path]:
    """Return the folder of a hub's model that was downloaded before."""
    if not hub_id:
        return []
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - rarely needed

    file = try_to_load_from_cache(hub_id, TOKENIZER_FILE)
    return [Path(file).parent] if isinstance(file, str) else []
