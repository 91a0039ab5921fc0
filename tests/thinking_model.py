"""The embedded model as one that thinks: its tags of reasoning are those of thinking, and its template is like Qwen3's."""

import json
import shutil

from grpo_actors.policy.locate import EMBEDDED

#: Thinking is on unless it is switched off, and then an empty thought is in the prompt.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif opens is defined %}<think>\n{% endif %}"
)


def write_thinking_model(folder):
    """Write the model to a new folder, and return the folder."""
    shutil.copytree(EMBEDDED, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("reasoning>", "think>"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder
