"""Define the records of a run: topics, fields and units, and their strict JSON form.

This is the schema of ``metrics.jsonl``, ``completions.jsonl`` and the events socket, and the source of its reference in the
documentation. Every record has ``seq`` (1, 2, 3, … without a gap), ``time`` (Unix seconds), ``session`` (which learner wrote
it: `reading`) and ``topic``, then all of the topic's fields in the order below; a field that was not measured is null. A number
that JSON cannot represent (NaN, ±infinity) becomes null too, and its path is listed in ``nonfinite``: "loss was NaN" and
"loss was not measured" stay different. This module has no file and no socket.
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
        "run_id": "of the run, the same after a resume",
        "model_name": "text",
        "total_updates": "planned, or null",
        "update": "the last one done: 0, or that of the checkpoint from which the run goes on",
        "config": "the resolved configuration",
        "version": "of this package",
        "commit": "of the checkout that the package runs from, or null",
        "versions": "package -> version, of the libraries that compute",
        "device": "on which the learner computes",
    },
    "metrics": {  # one per update
        "update": "counted from 1",
        "total_updates": "planned, or null",
        "epoch": "fractional",
        "loss": "over the update's tokens",
        "reward_mean": "weighted sum of the rewards",
        "reward_std": "over all completions",
        "rewards": "reward name -> mean",
        "reward_failures": "reward name -> completions without a value because the function failed",
        "logged": "metric that a reward function logged by log_metric -> mean of its values in the update",
        "invalid_completions": "with no value from any reward that has a weight; they do not train",
        "kl": "to the reference, per token; null without one",
        "clip_share": "tokens whose ratio was clipped; null, like all fields down to entropy, if no completion was computed",
        "clip_low_share": "those of them below the clip range",
        "clip_high_share": "those of them above it",
        "clip_delta_share": "tokens whose gradient the bound clip_delta or dual_clip removed; null if the loss has neither",
        "ratio_mean": "importance ratio, new to old policy",
        "ratio_max": "",
        "logprob_gap_mean": "|learner - worker| at the sampled version",
        "logprob_gap_max": "",
        "logprob_gaps": "worker -> mean over its tokens",
        "mismatch_kl": "KL from the policy as the worker computed it to the learner's, at the sampled version, per token",
        "correction_share": "tokens whose weight objective.correction cut, or that it left out",
        "entropy": "per token",
        "expert_load_max": "largest load of an expert over the mean, mean of the layers: 1 if all are chosen equally often; null without experts",
        "staleness": "versions behind -> groups",
        "grad_norm": "before clipping",
        "learning_rate": "",
        "completion_length_mean": "sampled tokens",
        "completion_length_max": "sampled tokens",
        "turns_mean": "turns of the policy in a completion; 1 without an environment",
        "truncated_share": "completions cut by max_new_tokens",
        "thinking_length_mean": "tokens of thinking in a completion; null, like the next two, if the vocabulary has no tags for it",
        "thinking_share": "tokens of thinking over sampled tokens",
        "thinking_cut_share": "completions whose thinking was ended by rollout.think_tokens",
        "zero_variance_share": "groups whose rewards are all equal",
        "rollout_tokens_per_s": "sampled tokens, of all workers together",
        "learner_tokens_per_s": "all computed tokens, an environment's included; a prompt counts once per completion, though it is computed once",
        "update_s": "wall time of the update, including waiting",
        "wait_s": "part of update_s spent waiting for groups",
        "learner_wait_share": "wait_s over update_s",
        "rollout_wait_share": "share of all workers' time since the last update in which they had nothing to sample; null if unknown",
        "groups": "",
        "groups_by_source": "of a mixture: source -> groups; null without one",
        "reward_by_source": "of a mixture: source -> mean of the weighted reward, or null; null without one",
        "groups_passed_over": "reason (no_signal, too_hard, too_easy) -> groups that did not train; null without a selection",
        "groups_resampled": "groups, sampled or in progress, that became too old to train",
        "problems_skipped": "by the curriculum; null without one",
        "completions": "",
        "tokens": "sampled tokens of the completions",
        "padding_share": "of the computed tokens; a shared prompt counts once",
        "skipped_steps": "non-finite steps so far",
        "memory_gb": "peak of the learner's arrays so far",
        "peers_memory_gb": "worker or evaluator -> the same of its process; null before its first sign of life",
        "ledger": "[lease, epoch, problem, worker] of each group that the update trained on",
    },
    "worker": {
        "worker": "name",
        "role": "rollout or evaluator",
        "state": "joined, sampling, waiting, quarantined, left or lost",
        "why": "it is quarantined or lost, or null",
        "groups": "delivered so far",
        "tokens_per_s": "all decoded tokens, an environment's included",
        "version": "of the policy it samples with",
        "memory_gb": "peak of its arrays so far, or null",
        "device": "on which it computes, as its host numbers it, or null",
    },
    "headcount": {  # size of the run's worker pool, with rollout.workers = "auto"
        "update": "after which it was decided",
        "before": "workers until then",
        "workers": "workers from then on; equal to before: settled",
        "reason": "in words",
    },
    "eval": {
        "update": "",
        "checkpoint": "name; base for update 0",
        "score": "what decides which checkpoint is best: {value, low, high, measure}; measure: {metric, weights, problems, "
        "digest, temperature (0: greedy), max_new_tokens}",
        "gain": "the score over the base model's on the same problems: {value, low, high}, or null",
        "accuracy": "greedy",
        "accuracy_low": "95 % interval",
        "accuracy_high": "95 % interval",
        "reward": "greedy: mean of the weighted reward, or null",
        "sampled_accuracy": "sampled, or null",
        "sampled_reward": "sampled, or null",
        "rewards": "greedy: reward name -> mean",
        "by_source": "of a mixture: source -> its part of the score, {value, low, high}",
        "completion_length_mean": "tokens",
        "truncated_share": "",
        "seconds": "that the evaluation took",
        "best": "whether it is the best so far; a checkpoint must beat the base model",
    },
    "checkpoint": {  # once it is durable
        "update": "",
        "path": "",
        "bytes": "",
        "wait_s": "that training stood still for it; null: written before a resume",
        "write_s": "until it was durable, in the background, or null",
    },
    "policy": {"version": "", "bytes": "", "digest": ""},
    "sample": {
        "update": "",
        "problem": "id",
        "prompt": "last user turn",
        "answer": "the true one",
        "completions": "list of {text, reward, rewards, truncated, extra, answer, parser}; extra: what rewards logged by log_extra; parser: what found the answer",
    },
    "alarm": {"name": "", "text": "", "update": "the update that raised it, or null"},
    "log": {"level": "", "text": ""},
    "stop": {"reason": "", "exit_code": ""},
}


#: Topic -> fields whose texts are sent to readers on other hosts: names and words that this package or the user's
#: command line gave.
PUBLIC_TEXTS: Mapping[str, tuple[str, ...]] = {
    "start": ("run_name", "version", "commit", "versions", "device"),
    "worker": ("worker", "role", "state", "why", "device"),
    "headcount": ("reason",),
    "eval": ("checkpoint", "score"),
    "policy": ("digest",),
    "alarm": ("name",),
    "log": ("level",),
}
#: Stands for any other text there.
WITHHELD = "(kept on the learner's host)"


def make_record(seq: int, time: float, topic: str, fields: Mapping[str, Any], session: str = "") -> Record:
    """Build a record in its final form: strict JSON values, and the schema's keys in the schema's order.

    Fields that the schema lacks follow in alphabetical order: a run must not end because of one.

    Raises:
        ValueError: the topic is unknown.
    """
    if topic not in FIELDS:
        raise ValueError(f"no such topic: {topic!r}; topics are {', '.join(FIELDS)}")
    nonfinite: list[str] = []
    clean = {str(key): _strict(value, str(key), nonfinite) for key, value in fields.items()}
    record: Record = {"seq": seq, "time": time, **({"session": session} if session else {}), "topic": topic}
    record |= {key: clean.pop(key, None) for key in FIELDS[topic]}
    record |= {key: clean[key] for key in sorted(clean) if key not in record}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return record


def encode(record: Record) -> bytes:
    """Encode a record as one line of ASCII JSON without its newline; no text inside it can break the line."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii")


def numbers_only(line: bytes) -> bytes:
    """Return an encoded record without the texts that may hold a prompt, a completion, or something else of the user's."""
    record = decode(line)
    public = ("seq", "time", "session", "topic", *PUBLIC_TEXTS.get(record["topic"], ()))
    return encode({key: value if key in public else _withhold(value) for key, value in record.items()})


def _withhold(value: Any) -> Any:
    if isinstance(value, str):
        return WITHHELD
    if isinstance(value, dict):
        return {key: _withhold(item) for key, item in value.items()}
    return [_withhold(item) for item in value] if isinstance(value, list) else value


def decode(line: bytes) -> Record:
    """Decode a line made by `encode`.

    Raises:
        ProtocolError: the line is not a record.
    """
    try:
        record = json.loads(line, parse_constant=_reject_constant, parse_float=_finite)
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
        and 1 <= seq < 2**53  # above, a reader in another language would round it
        and isinstance(time, int | float)
        and abs(time) < 1e12
        and isinstance(topic, str)
    )


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 is valid JSON, but infinite as a float
        raise ValueError(f"{text} is not finite")
    return number


def _strict(value: Any, path: str, nonfinite: list[str]) -> Any:
    """Return `value` with string keys and lists; make non-finite numbers null and add their paths to `nonfinite`."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(path)
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item, f"{path}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{path}.{index}", nonfinite) for index, item in enumerate(value)]
    return value
