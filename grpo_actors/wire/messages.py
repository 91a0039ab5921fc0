"""The typed messages between processes.

A message carries facts (token ids, log-probs, rewards, versions), never values derived from them (advantages). So the
algorithm is in one process only, and a recorded stream of groups can be replayed through it.

The wire format is MessagePack (`codec`), read into pydantic models that forbid extra fields, bound every length and
reject NaN and infinity. Arrays are raw little-endian bytes.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, Json, TypeAdapter, model_validator

from grpo_actors.score import Report, RewardName
from grpo_actors.wire.codec import (
    MAX_ARRAY_BYTES,
    MAX_TEXT,
    decode,
    encode,
    floats,
    ints,
    read_floats,
    read_ints,
)
from grpo_actors.wire.spans import check_spans

# Re-exported, so that the users of the wire format import one module.
__all__ = ["decode", "encode", "floats", "ints", "read_floats", "read_ints"]

PROTOCOL_VERSION = 8

MAX_COMPLETIONS = 4096

Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Logged = Annotated[str, Field(max_length=1000)] | bool | int | float | None
Count = Annotated[int, Field(ge=0, le=2**53)]
NotNegative = Annotated[float, Field(ge=0)]
#: Seconds within the life of a process: less than a century.
Seconds = Annotated[float, Field(ge=0, le=3e9)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
#: Fencing token of a grant.
Token = Annotated[int, Field(ge=0, lt=2**64)]
#: int32 values, little-endian.
Ints = Annotated[bytes, Field(max_length=MAX_ARRAY_BYTES)]
#: float32 values, little-endian.
Floats = Annotated[bytes, Field(max_length=MAX_ARRAY_BYTES)]


class Message(BaseModel):
    """Base of all messages: strictly typed and immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a column may hold NaN; numbers of messages are not written as JSON
    )


# --- worker or evaluator -> learner ---------------------------------------------------------------


class Hello(Message):
    """Peer -> learner: the first message of a connection."""

    kind: Literal["hello"] = "hello"
    protocol: Count
    role: Literal["rollout", "evaluator"]
    #: The peer's name, unique among all peers; the same after every reconnect.
    name: Annotated[str, Field(min_length=1, max_length=200)]
    host: Name
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    #: Name of the device on which the peer computes, as its host numbers it; empty: not told.
    device: Name = ""
    #: The run that the peer expects to join; empty: any.
    run_id: Name = ""
    #: Secret of the run's own evaluator, which nobody else has: only it may report scores.
    token: Name = ""


class Completion(Message):
    """One sampled completion of one or several turns. It includes the stop token of each turn, with its log-prob.

    Its text is not sent: it is what the tokens decode to.
    """

    #: Token ids, int32 [T], T >= 1.
    tokens: Ints
    #: log π(token) under the policy that sampled it, at the sampling temperature, float32 [T].
    logprobs: Floats
    #: The policy version that sampled each token, int32 [T].
    versions: Ints
    #: False if the completion was cut at ``max_new_tokens``.
    finished: bool
    #: Bounds of the environment spans (`wire.spans`), int32 [2 S]; the log-probs of their tokens mean nothing. Empty if
    #: the completion has one turn, all of it sampled.
    inserted: Ints = b""
    #: Bounds of the closing tags that ended the policy's thinking (``rollout.think_tokens``), likewise.
    forced: Ints = b""
    #: Reward function -> unweighted value; None if there is no valid reward.
    rewards: Annotated[dict[RewardName, float | None], Field(max_length=64)]
    #: Column -> value that a reward function logged for this completion, for its record.
    extra: Annotated[dict[Name, Logged], Field(max_length=64)] = {}

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if not self.tokens or len(self.tokens) % 4:
            raise ValueError(f"tokens must hold at least one int32, got {len(self.tokens)} bytes")
        if not len(self.tokens) == len(self.logprobs) == len(self.versions):
            raise ValueError("tokens, logprobs and versions must have the same length")
        # Float32 values cannot overflow this sum: it is finite if and only if all of them are.
        if not math.isfinite(sum(memoryview(self.logprobs).cast("f"))):
            raise ValueError("logprobs must be finite")
        for name, spans in (("inserted", self.inserted), ("forced", self.forced)):
            if len(spans) % 8:
                raise ValueError(f"{name} must hold pairs of int32, got {len(spans)} bytes")
            check_spans(name, memoryview(spans).cast("i"), len(self.tokens) // 4)
        return self


class Group(Message):
    """All completions of one lease."""

    kind: Literal["group"] = "group"
    lease: Count
    attempt: Annotated[int, Field(ge=1, le=2**53)]
    #: That of the lease.
    token: Token
    completions: Annotated[list[Completion], Field(min_length=1, max_length=MAX_COMPLETIONS), FailFast()]
    #: Seconds of sampling and of scoring: this group's share of its batch.
    sampling_s: NotNegative
    scoring_s: NotNegative
    #: Metric -> the values that reward functions logged.
    logged: Annotated[dict[Name, Annotated[list[float], Field(max_length=4096)]], Field(max_length=64)] = {}
    #: Reward function that failed, or "environment" -> the error in one line, and perhaps a traceback.
    failures: Annotated[dict[RewardName, Text], Field(max_length=65)] = {}


class Beat(Message):
    """Sign of life and state of a peer.

    The loop that makes progress sends it every second, so that a hung loop sends none even while its sockets still work.
    Its values are absolute, not changes, so that a lost beat costs nothing.
    """

    kind: Literal["beat"] = "beat"
    state: Literal["sampling", "scoring", "waiting", "evaluating"]
    #: Policy version that the peer holds; -1 before the first.
    version: Annotated[int, Field(ge=-1)] = -1
    #: Completion tokens decoded since the worker began, those of environments included: each takes a step, too.
    tokens: Count = 0
    #: Seconds since the worker began in which it sampled or scored, and in which it had nothing to sample.
    working_s: Seconds = 0.0
    waiting_s: Seconds = 0.0
    #: Most bytes of arrays that the process has held at a time.
    peak_bytes: Count = 0
    #: Number of leases that the worker is willing to hold at a time.
    credits: Count = 0
    #: Leases that the worker holds, including those whose results are not yet acknowledged. A lease that was granted
    #: some time ago and is missing here was lost in transit.
    holding: Annotated[list[Count], Field(max_length=10_000), FailFast()] = []


class Evaluation(Message):
    """The evaluator's report on one checkpoint, or on the base model."""

    kind: Literal["evaluation"] = "evaluation"
    update: Count
    checkpoint: Name
    report: Report


class Unscored(Message):
    """The evaluator will send no score of this checkpoint; the learner need not wait for it."""

    kind: Literal["unscored"] = "unscored"
    update: Count
    checkpoint: Name
    reason: Text


class Bye(Message):
    """Either side is leaving. The leases that the peer holds can be granted again at once."""

    kind: Literal["bye"] = "bye"
    reason: Text = ""
    #: From the learner: send Hello again, because the learner does not know this peer (it was restarted).
    again: bool = False
    #: From the learner: no error, but no more peers of this role are needed.
    dismissed: bool = False


# --- learner -> worker or evaluator ---------------------------------------------------------------


class Welcome(Message):
    """Answer to Hello: everything that the peer needs to take part."""

    kind: Literal["welcome"] = "welcome"
    run_id: Name
    #: The resolved configuration, JSON.
    config: Text
    #: Name, architecture and digests of the base model (`policy.identity.Identity`), JSON.
    identity: Text
    #: Endpoint of the weights socket, as the learner bound it.
    weights_endpoint: Text
    #: Seconds between two beats of the peer.
    beat_s: Annotated[float, Field(gt=0)]
    #: Planned updates of the run; 0: unknown.
    total_updates: Count = 0


class Lease(Message):
    """One problem to sample, with everything that the worker needs: it needs no data set."""

    #: Position in the order of problems; identifies the lease permanently.
    lease: Count
    #: Counts the grants of the lease: the learner refuses a result of an older attempt.
    attempt: Count
    #: Random; the group returns it, which proves that its sender was granted the lease.
    token: Token
    #: Sample with this version or a newer one.
    min_version: Count
    problem_id: Text
    #: Prompt token ids, int32; they are never tokenised again.
    prompt: Ints
    #: One 64-bit seed per completion, so that every worker samples the same tokens.
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_COMPLETIONS), FailFast()]
    messages: Annotated[list[dict[str, Text]], Field(max_length=1000), FailFast()]
    answer: Text
    #: The problem's columns; JSON on the wire, because a data set may hold numbers that MessagePack does not have.
    columns: Json[dict[str, Any]]
    #: Whether the prompt is a text in the data set, not a chat.
    text_prompt: bool = False
    #: Whether the answer is mathematics.
    mathematics: bool = False
    #: Passes over the data that were finished before this problem.
    epoch: Count = 0
    #: Name of the problem's source in a mixture.
    source: Name = ""


class Grant(Message):
    """Leases to be sampled together in one batch, so that the numbers do not depend on timing."""

    kind: Literal["grant"] = "grant"
    leases: Annotated[list[Lease], Field(min_length=1, max_length=1024), FailFast()]


class Ack(Message):
    """Whether one group was accepted. The worker does not send a refused group again."""

    kind: Literal["ack"] = "ack"
    lease: Count
    attempt: Count
    accepted: bool
    reason: Text = ""


class Announcement(Message):
    """A version that can be fetched from the weights socket.

    Sent when the version is published and in answer to every Beat. So a lost announcement is made up for, and silence
    means that the learner is gone.
    """

    kind: Literal["announcement"] = "announcement"
    version: Count


# --- weights socket -------------------------------------------------------------------------------


class FetchManifest(Message):
    """Worker -> learner: request for the manifest of the newest version."""

    kind: Literal["fetch_manifest"] = "fetch_manifest"


class TensorEntry(Message):
    """Position and type of one tensor in a version's bytes."""

    name: Annotated[str, Field(max_length=500)]
    dtype: Literal["float32", "float16", "bfloat16", "uint32", "uint8"]
    shape: Annotated[list[Count], Field(max_length=8)]
    offset: Count


class Manifest(Message):
    """Learner -> worker: one version as a range of bytes, in which its tensors follow one another."""

    kind: Literal["manifest"] = "manifest"
    version: Count
    size: Count
    #: xxh3-128 of all bytes, hexadecimal.
    digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    chunk_bytes: Annotated[int, Field(ge=1, le=MAX_ARRAY_BYTES)]
    #: Addresses of the bytes, one per line and sender (`transport.weights`), such as a file in shared memory; empty: none.
    path: Annotated[str, Field(max_length=4096)] = ""
    tensors: Annotated[list[TensorEntry], Field(max_length=10_000), FailFast()]


class FetchChunk(Message):
    """Worker -> learner: request for the chunk that begins at byte index × chunk_bytes."""

    kind: Literal["fetch_chunk"] = "fetch_chunk"
    version: Count
    index: Count


class Chunk(Message):
    """Learner -> worker: header of a chunk, whose bytes are the next frame. That frame is empty if the version is gone."""

    kind: Literal["chunk"] = "chunk"
    version: Count
    index: Count


FromPeer = Hello | Group | Beat | Evaluation | Unscored | Bye
FromLearner = Welcome | Grant | Ack | Announcement | Bye
WeightsRequest = FetchManifest | FetchChunk
WeightsReply = Manifest | Chunk

from_peer: TypeAdapter[FromPeer] = TypeAdapter(Annotated[FromPeer, Field(discriminator="kind")])
from_learner: TypeAdapter[FromLearner] = TypeAdapter(Annotated[FromLearner, Field(discriminator="kind")])
weights_request: TypeAdapter[WeightsRequest] = TypeAdapter(
    Annotated[WeightsRequest, Field(discriminator="kind")]
)
weights_reply: TypeAdapter[WeightsReply] = TypeAdapter(Annotated[WeightsReply, Field(discriminator="kind")])
