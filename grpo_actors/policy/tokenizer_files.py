"""The files of a tokenizer: taken over as they are, so that whatever reads the source reads its copy in the same way.

transformers would write them in the form of its own version, under the class that it chose itself, which older
versions and other programs do not know.
"""

import json
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
#: Repeats the special tokens of `CONFIG`, for older versions of transformers.
OLDER_SPECIAL_TOKENS = "special_tokens_map.json"
#: The default chat template; it wins over the one in `CONFIG`.
TEMPLATE = "chat_template.jinja"
#: Where processors of images had it.
OLDER_TEMPLATE = "chat_template.json"
#: What the tokenizers that mlx-lm loads are read from.
_PATTERNS = (
    *("tokenizer*", OLDER_SPECIAL_TOKENS, "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*.jinja"),
)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a tokenizer's files by name; FOLDER/NAME is in a subfolder. Code is left out.

    A configuration in the form of transformers 5 is changed to one that version 4 reads too, and a template that only
    processors of images read is also given to the tokenizer.
    """
    found = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in found
        if path.is_file() and path.suffix != ".py"
    }
    if CONFIG in files:
        config = json.loads(files[CONFIG])
        if OLDER_TEMPLATE in files and TEMPLATE not in files and "chat_template" not in config:
            files[TEMPLATE] = json.loads(files[OLDER_TEMPLATE])["chat_template"].encode()
        if (changed := _for_all_versions(config)) != config:
            files[CONFIG] = json.dumps(changed, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _for_all_versions(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json in words that transformers 4 and 5 understand alike."""
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed
