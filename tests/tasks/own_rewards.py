"""Rewards as users write them, each named by what it does; loaded by path, as a user would."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NOT_A_FUNCTION = 3
calls = 0


def length(prompts, completions, answer, **columns):
    return [len(completion[0]["content"]) for completion in completions]


def echo_arguments(prompts, completions, answer, **columns):
    print("noise on standard output")
    os.write(1, b"more noise\n")
    for given_by_trl in ("trainer_state", "log_extra", "log_metric"):
        del columns[given_by_trl]
    expected = {
        "prompts": [[{"role": "user", "content": "1+1?"}]] * len(completions),
        "answer": ["2"] * len(completions),
        "columns": {
            "topic": ["sums"] * len(completions),
            "level": [3] * len(completions),
            "thoughts": [None] * len(completions),
        },
    }
    return [
        float({"prompts": prompts, "answer": answer, "columns": columns} == expected) for _ in completions
    ]


def takes_two(completions, level):
    return [level[0]] * len(completions)


def not_applicable(completions, **columns):
    return [None if completion[0]["content"] == "skip" else 1.0 for completion in completions]


def counts_calls(completions, **columns):
    global calls  # noqa: PLW0603
    calls += 1
    return [calls] * len(completions)


def needs_more(completions, missing):
    return [0.0] * len(completions)


def raises(completions, **columns):
    raise ValueError("no such\nluck")


def raises_what_cannot_be_shown(completions, **columns):
    class UnshowableError(Exception):
        def __str__(self):
            raise RuntimeError

    raise UnshowableError


def says_so(completions, **columns):
    print("called", flush=True)
    return [0.0] * len(completions)


def hangs(completions, **columns):
    print("called", flush=True)
    while True:
        pass


def hangs_deaf(completions, **columns):
    print("called", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1000)


def hangs_in_a_regular_expression(completions, **columns):
    print("called", flush=True)
    re.fullmatch(r"(a*)*b", "a" * 100)  # holds the interpreter's lock: no other thread can run


def hangs_with_a_child(completions, **columns):
    subprocess.run(["sleep", "1000"], check=True)


def exits(completions, **columns):
    sys.exit(3)


def exits_at_once(completions, **columns):
    os._exit(4)


def segfaults(completions, **columns):
    ctypes.string_at(0)


def eats_memory(completions, **columns):
    return [len(bytearray(2**62))]


def returns_its_rank_for_the_out_of_memory_killer(completions, **columns):
    return [int(Path("/proc/self/oom_score_adj").read_text())] * len(completions)


def returns_text(completions, **columns):
    return "1.0"


def returns_nothing(completions, **columns):
    pass


def returns_too_few(completions, **columns):
    return [1.0]


def returns_too_much(completions, **columns):
    return [1e300] * len(completions)


def takes_no_completions(prompts):
    return [0.0]


class Judge:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **columns):
        return [self.value] * len(completions)
