"""Rewards as users of TRL write them, in one file that is used unchanged; `test_trl_rewards` says what each must give.

The second half has the signatures of the rewards in open-r1's GRPO recipe; the code is our own.
"""

import asyncio
import json
import math
import multiprocessing
import re
from collections import Counter
from functools import partial

import numpy as np


def message(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


# --- forms of a function, and of its values -------------------------------------------------------


def bools(completions, **kwargs):
    return ["5" in message(c) for c in completions]


def numpy_array(completions, **kwargs):
    return np.array([len(message(c)) for c in completions], dtype=np.float32)


def numpy_scalars(completions, **kwargs):
    return [np.float64(0.5) if i else np.bool_(1) for i, _ in enumerate(completions)]


def generator(completions, **kwargs):
    return (float(i) for i, _ in enumerate(completions))


def sometimes_nan(completions, **kwargs):
    return [math.nan if i % 2 else 1.0 for i, _ in enumerate(completions)]


def sometimes_none(completions, **kwargs):
    return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]


async def asynchronous(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0] * len(completions)


class Session:
    """Something that belongs to the event loop in which it was made, as an HTTP client does."""

    loop = None

    async def __call__(self, completions, **kwargs):
        now = asyncio.get_running_loop()
        self.loop = self.loop or now
        return [float(self.loop is now)] * len(completions)


session = Session()


class Bonus:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)


bonus = Bonus(0.5)


def scaled(completions, factor, **kwargs):
    return [factor * len(message(c)) for c in completions]


tenth = partial(scaled, factor=0.1)


def fails(completions, **kwargs):
    raise KeyError("label")


def wrong_length(completions, **kwargs):
    return [1.0]


def texts(completions, **kwargs):
    return ["1.0"] * len(completions)


def infinite(completions, **kwargs):
    return [1.0, math.inf]


# --- arguments ------------------------------------------------------------------------------------


def types(prompts, completions, **kwargs):
    """Return 1 where prompt and completion are texts, 2 where they are chats."""
    assert {type(p) for p in prompts} == {type(c) for c in completions}
    return [{str: 1.0, list: 2.0}[type(p)] for p in prompts]


def prompt_length(prompts, **kwargs):
    return [len(p) if isinstance(p, str) else -len(p[-1]["content"]) for p in prompts]


def integer_answer(completions, answer, **kwargs):
    found = [re.search(r"<answer>\s*(-?\d+)\s*</answer>", message(c)) for c in completions]
    return [float(bool(f) and int(f[1]) == a) for f, a in zip(found, answer, strict=True)]


def needs_solution(completions, solution, **kwargs):
    return [float(s in message(c)) for c, s in zip(completions, solution, strict=True)]


def equal_columns(completions, solution, answer, kind, **kwargs):
    return [float(s == a) + (k == "sum") for s, a, k in zip(solution, answer, kind, strict=True)]


def column_types(completions, answer, **kwargs):
    """Return 1 where a row has the values, and their types, that the test put into it."""
    rows = zip(*(kwargs[name] for name in ("flag", "whole", "nothing", "nested", "part")), strict=True)
    expected = [True, 2**70, None, {"list": [1, 2.5, "x"]}]
    return [
        float(row == expected and [type(v) for v in row[:2]] == [bool, int] and math.isnan(part) and a == 31)
        for (*row, part), a in zip(rows, answer, strict=True)
    ]


def token_count(completions, completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def only_tokens(completion_ids):
    return [float(ids[-1]) for ids in completion_ids]


def step(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("length", [len(message(c)) for c in completions])
    log_metric("calls", 1.0)
    return [trainer_state.global_step + trainer_state.max_steps / 1000 + trainer_state.epoch] * len(
        completions
    )


def columns_of_trl(completions, **kwargs):
    given = {"prompts", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric", "question"}
    # Beside these, own rewards get the thoughts, which TRL does not have.
    return [float(set(kwargs) == given | {"thoughts"})] * len(completions)


def worth(number):
    return 10.0 * number


def in_other_processes(completions, **kwargs):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(worth, range(len(completions)))


# --- the rewards of open-r1's GRPO recipe, by signature -------------------------------------------


def accuracy_reward(
    completions: list[list[dict[str, str]]], solution: list[str], **kwargs
) -> list[float | None]:
    """Compare numbers; None where the solution is none."""
    values: list[float | None] = []
    for completion, true in zip(completions, solution, strict=True):
        number = re.search(r"-?\d+", true)
        given = re.findall(r"\\boxed\{(-?\d+)\}", completion[0]["content"])
        values.append(None if number is None else float(bool(given) and given[-1] == number[0]))
    return values


def format_reward(completions, **kwargs):
    form = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>", re.DOTALL)
    return [1.0 if form.fullmatch(completion[0]["content"]) else 0.0 for completion in completions]


def tag_count_reward(completions, **kwargs) -> list[float]:
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(0.25 for tag in tags if c[0]["content"].count(tag) == 1) for c in completions]


def len_reward(completions: list[dict[str, str]], solution: list[str], **kwargs) -> float:
    """Among the completions of a call, the shortest gets 0.5 and the longest -0.5; a wrong one never more than 0."""
    right = accuracy_reward(completions, solution)
    lengths = [len(completion[0]["content"]) for completion in completions]
    low, high = min(lengths), max(lengths)
    shares = [0.5 - (length - low) / (high - low) if high > low else 0.0 for length in lengths]
    return [share if r else min(0.0, share) for share, r in zip(shares, right, strict=True)]


def get_cosine_scaled_reward(
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
):
    def cosine_scaled_reward(completions, solution, **kwargs):
        values = []
        for completion, right in zip(completions, accuracy_reward(completions, solution), strict=True):
            cosine = math.cos(len(completion[0]["content"]) / max_len * math.pi)
            low, high = (
                (min_value_correct, max_value_correct) if right else (max_value_wrong, min_value_wrong)
            )
            values.append(float(low + 0.5 * (high - low) * (1.0 + cosine)))
        return values

    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float, language: str = "en"):
    def repetition_penalty_reward(completions, **kwargs) -> float:
        values = []
        for completion in completions:
            words = completion[0]["content"].lower().split()
            grams = Counter(zip(*[words[i:] for i in range(ngram_size)], strict=False))
            total = sum(grams.values())
            values.append((1 - len(grams) / total) * max_penalty if total else 0.0)
        return values

    return repetition_penalty_reward


def code_reward(completions, num_parallel: int = 2, provider_type: str = "local", **kwargs) -> list[float]:
    """Return the share of test cases whose output the program gives; the column is a dict of JSON, as there."""
    values = []
    for completion, info in zip(completions, kwargs["verification_info"], strict=True):
        cases = (json.loads(info) if isinstance(info, str) else info)["test_cases"]
        program = re.findall(r"```python\n(.*?)```", completion[0]["content"], re.DOTALL)
        double = {"print(int(input()) * 2)": 2}.get(program[-1].strip(), 0) if program else 0
        values.append(sum(str(int(case["input"]) * double) == case["output"] for case in cases) / len(cases))
    return values


cosine_scaled_reward = get_cosine_scaled_reward(max_len=100)
repetition_penalty_reward = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
