"""Answer chats greedily with transformers, as a program of its own: it runs under several versions of transformers.

python greedy.py FOLDER TOKENS   <  [[message, …], …]   >  {"version": …, "prompts": […], "answers": […]}
"""

import json
import sys

import torch
import transformers


def main() -> None:
    """Read the chats, write the token ids of their prompts and answers."""
    folder, tokens = sys.argv[1], int(sys.argv[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    prompts, answers = [], []
    for chat in json.load(sys.stdin):
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # Without the sampling settings of its generation_config.json.
        plain = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=0,
        )
        made = model.generate(torch.tensor([ids]), generation_config=plain)
        prompts.append(ids)
        answers.append(made[0, len(ids) :].tolist())
    json.dump({"version": transformers.__version__, "prompts": prompts, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
