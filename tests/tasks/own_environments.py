"""Environments as users write them, each named by what it does."""

import os
import time


def asks_twice(messages, answer, **columns):
    asked = sum(message["role"] == "assistant" for message in messages)
    return f"Once more, {columns['topic']} {answer}: {messages[-1]['content']}" if asked < 3 else None


def takes_messages_alone(messages):
    return {"role": "tool", "content": str(len(messages))}


def returns_a_number(messages, answer, **columns):
    return 4


def returns_half_a_turn(messages, answer, **columns):
    return {"content": "4"}


def raises(messages, answer, **columns):
    raise KeyError("lost")


def hangs(messages, answer, **columns):
    time.sleep(3600)


def exits(messages, answer, **columns):
    os._exit(3)


def fails_on_long_turns(messages, answer, **columns):
    """Ask one question; fail on some completions of a group and not on others."""
    if sum(message["role"] == "assistant" for message in messages) > 1:
        return None
    if len(messages[-1]["content"]) % 2:
        raise ValueError("an odd turn")
    return "Sure?"


def wants_completions(completions):
    return None
