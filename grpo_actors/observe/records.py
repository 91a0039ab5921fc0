"""The records of a run: topics, fields and units, and their one strict JSON form.

This is the schema of ``metrics.jsonl``, ``completions.jsonl`` and the events socket. Every record has
``seq`` (1, 2, 3, … without a gap), ``time`` (Unix seconds) and ``topic``, then the topic's fields in
the order below; a field that was not measured is null. A number that JSON cannot say (NaN, ±infinity)
becomes null too, and its place is listed in ``nonfinite``: "loss was NaN" and "loss was not
measured" stay different. Knows no file and no socket.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from grpo_actors.errors import ProtocolError

Record = dict[str, Any]

#: Topic -> field -> meaning. Shares are 0 to 1, log-probs and entropy in nats, lengths in tokens.
FIELDS: Mapping[str, Mapping[str, str]] = {
    "start": {
        "run_name": "text",
        "model_name": "text",
        "total_updates": "planned, or null",
        "config": "the resolved configuration",
        "version": "of this package",
        "commit": "of the checkout that it runs from, or null",
        "versions": "package -> version, of what computes",
    },
    "metrics": {  # one an update
        "update": "counted from 1",
        "total_updates": "planned, or null",
        "epoch": "fractional",
        "loss": "of the update's tokens",
        "reward_mean": "weighted sum of the rewards",
        "reward_std": "over all completions",
        "rewards": "reward name -> mean",
        "kl": "to the reference, per token; null without one",
        "clip_share": "tokens whose ratio was clipped; null, with all down to entropy, where no completion was computed",
        "clip_delta_share": "tokens whose gradient the bound clip_delta or dual_clip removed; null: the loss has neither",
        "ratio_mean": "importance ratio, new to old policy",
        "ratio_max": "",
        "logprob_gap_mean": "|learner - worker| at the sampled version",
        "logprob_gap_max": "",
        "entropy": "per token",
        "staleness": "versions behind -> groups",
        "grad_norm": "before clipping",
        "learning_rate": "",
        "completion_length_mean": "tokens that were sampled",
        "completion_length_max": "tokens that were sampled",
        "turns_mean": "turns of the policy in a completion; 1 without an environment",
        "truncated_share": "completions cut by max_new_tokens",
        "zero_variance_share": "groups whose rewards are all equal",
        "rollout_tokens_per_s": "tokens that were sampled, by all workers together",
        "learner_tokens_per_s": "all that is computed: an environment's too, and a prompt counts with each of its completions, though it is computed once",
        "update_s": "wall time of the update, waiting included",
        "wait_s": "of it, waiting for groups",
        "learner_wait_share": "wait_s over update_s",
        "rollout_wait_share": "of all workers' time since the last update in which they had nothing to sample; null: untold",
        "groups": "",
        "groups_passed_over": "null without a selection; why -> groups that did not train: no_signal, too_hard, too_easy",
        "groups_resampled": "groups, sampled or under way, that became too old to train",
        "problems_skipped": "by the curriculum; null without one",
        "completions": "",
        "tokens": "of completions, those that were sampled",
        "padding_share": "of the tokens computed, a shared prompt being one",
        "skipped_steps": "non-finite steps so far",
        "memory_gb": "peak of the learner",
    },
    "worker": {
        "worker": "name",
        "state": "joined, sampling, waiting, left or lost",
        "groups": "delivered so far",
        "tokens_per_s": "all that is decoded: an environment's too",
        "version": "of the policy it samples with",
    },
    "headcount": {  # of the run's own workers, with rollout.workers = "auto"
        "update": "after which it was decided",
        "before": "workers until then",
        "workers": "from then on; the same: settled",
        "reason": "in words",
    },
    "eval": {
        "update": "",
        "checkpoint": "path",
        "samples": "problems",
        "accuracy": "greedy",
        "accuracy_low": "95 % interval",
        "accuracy_high": "95 % interval",
        "sampled_accuracy": "or null",
        "rewards": "reward name -> mean",
        "completion_length_mean": "tokens",
        "truncated_share": "",
        "best": "whether no earlier one was better",
    },
    "checkpoint": {"update": "", "path": "", "bytes": ""},
    "policy": {"version": "", "bytes": "", "digest": ""},
    "sample": {
        "update": "",
        "problem": "id",
        "prompt": "last user turn",
        "answer": "the true one",
        "completions": "list of {text, reward, rewards, truncated}",
    },
    "alarm": {"name": "", "text": "", "update": "that raised it, or null"},
    "log": {"level": "", "text": ""},
    "stop": {"reason": "", "exit_code": ""},
}


def make_record(seq: int, time: float, topic: str, fields: Mapping[str, Any]) -> Record:
    """A record in its final form: strict JSON values, the schema's keys in the schema's order.

    Fields that the schema does not name follow in alphabetical order. `ValueError`: unknown topic.
    """
    if topic not in FIELDS:
        raise ValueError(f"no such topic: {topic!r}; topics are {', '.join(FIELDS)}")
    nonfinite: list[str] = []
    clean = {str(key): _strict(value, str(key), nonfinite) for key, value in fields.items()}
    record: Record = {"seq": seq, "time": time, "topic": topic}
    record |= {key: clean.pop(key, None) for key in FIELDS[topic]}
    record |= {key: clean[key] for key in sorted(clean) if key not in record}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return record


def encode(record: Record) -> bytes:
    """One line of ASCII JSON without its newline; no text inside it can break the line."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii")


def decode(line: bytes) -> Record:
    """What `encode` made; a `ProtocolError` for anything that is not a record."""
    try:
        record = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a record must be one JSON object ({error}), got {line[:60]!r}") from error
    if not isinstance(record, dict) or not _is_numbered(record):
        raise ProtocolError(f"a record must have seq >= 1, time and topic, got {line[:60]!r}")
    return record


def _is_numbered(record: Record) -> bool:
    seq, time, topic = record.get("seq"), record.get("time"), record.get("topic")
    return (
        isinstance(seq, int)
        and not isinstance(seq, bool)
        and 1 <= seq < 2**53  # beyond, a reader in another language would round it
        and isinstance(time, int | float)
        and abs(time) < 1e12
        and isinstance(topic, str)
    )


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 is JSON and yet infinite
        raise ValueError(f"{text} is not finite")
    return number


def _strict(value: Any, path: str, nonfinite: list[str]) -> Any:
    """`value` with string keys and lists; non-finite numbers null, their paths added to `nonfinite`."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(path)
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item, f"{path}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{path}.{index}", nonfinite) for index, item in enumerate(value)]
    return value
