"""Everything that crosses a process border, typed.

A message carries facts (token ids, log-probs, rewards, versions), never derivations (advantages):
the algorithm then lives in one process, and a recorded stream of groups can be replayed through it.

The wire format is MessagePack (`codec`), read into pydantic models that forbid extra fields, bound
every length and refuse NaN and infinity. Arrays are raw little-endian bytes.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, Json, TypeAdapter, model_validator

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

# The codec is the other half of the wire format: whoever speaks it imports one module.
__all__ = ["decode", "encode", "floats", "ints", "read_floats", "read_ints"]

PROTOCOL_VERSION = 3

MAX_COMPLETIONS = 4096

Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=2**53)]
NotNegative = Annotated[float, Field(ge=0)]
#: Of a process's life: less than a century.
Seconds = Annotated[float, Field(ge=0, le=3e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
#: int32 values, little-endian.
Ints = Annotated[bytes, Field(max_length=MAX_ARRAY_BYTES)]
#: float32 values, little-endian.
Floats = Annotated[bytes, Field(max_length=MAX_ARRAY_BYTES)]


class Message(BaseModel):
    """What all messages have in common: they are strict and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- worker or evaluator -> learner ---------------------------------------------------------------


class Hello(Message):
    """First message of a connection."""

    kind: Literal["hello"] = "hello"
    protocol: Count
    role: Literal["rollout", "evaluator"]
    #: The peer's own name, which is also its socket identity: stable over reconnects.
    name: Name
    host: Name
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    #: The run it believes to join; empty: whichever answers.
    run_id: Name = ""


class Completion(Message):
    """One sampled answer, of one turn or of several. The stop token of each turn and its log-prob are part of it."""

    #: Token ids, int32 [T], T >= 1.
    tokens: Ints
    #: log π(token) under the policy that sampled it, at the sampling temperature, float32 [T].
    logprobs: Floats
    #: The policy version that sampled each token, int32 [T].
    versions: Ints
    #: False: it hit ``max_new_tokens``.
    finished: bool
    #: All tokens as text.
    text: Text
    #: Bounds of the runs of tokens that an environment put between two turns (`inserted`), int32 [2 R]: their log-probs
    #: mean nothing. Empty: one turn, all sampled.
    inserted: Ints = b""
    #: What was sampled in the last turn, as text; None: there is but one turn.
    last_turn: Text | None = None
    #: Reward function -> unweighted value; None: no valid reward.
    rewards: Annotated[dict[Name, float | None], Field(max_length=64)]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if not self.tokens or len(self.tokens) % 4:
            raise ValueError(f"tokens must hold at least one int32, got {len(self.tokens)} bytes")
        if not len(self.tokens) == len(self.logprobs) == len(self.versions):
            raise ValueError("tokens, logprobs and versions must be of one length")
        if not all(map(math.isfinite, memoryview(self.logprobs).cast("f"))):
            raise ValueError("logprobs must be finite")
        if len(self.inserted) % 8:
            raise ValueError(f"inserted must hold pairs of int32, got {len(self.inserted)} bytes")
        check_spans(memoryview(self.inserted).cast("i"), len(self.tokens) // 4)
        return self


class Group(Message):
    """All completions of one lease."""

    kind: Literal["group"] = "group"
    lease: Count
    attempt: Annotated[int, Field(ge=1, le=2**53)]
    completions: Annotated[list[Completion], Field(min_length=1, max_length=MAX_COMPLETIONS), FailFast()]
    #: Seconds of sampling and of scoring, this group's share of its batch.
    sampling_s: NotNegative
    scoring_s: NotNegative
    #: What went wrong in reward functions, in words.
    failures: Annotated[list[Text], Field(max_length=1000), FailFast()] = []


class Beat(Message):
    """Alive, and how things stand. Sent every second by the loop that makes progress: a hung loop
    sends none, whatever its sockets do. Absolute, not a change: a lost one costs nothing.
    """

    kind: Literal["beat"] = "beat"
    state: Literal["sampling", "scoring", "waiting", "evaluating"]
    #: The policy version that it holds; -1 before the first.
    version: Annotated[int, Field(ge=-1)] = -1
    #: Completion tokens decoded since the worker began: an environment's take a step each, as sampled ones do.
    tokens: Count = 0
    #: Time since the worker began in which it sampled and scored, and in which it had nothing to sample.
    working_s: Seconds = 0.0
    waiting_s: Seconds = 0.0
    #: Leases that it would hold at one time.
    credits: Count = 0
    #: Leases that it holds, results not yet acknowledged included. One that was granted some time
    #: ago and is missing here was lost on the way.
    holding: Annotated[list[Count], Field(max_length=10_000), FailFast()] = []


class Evaluation(Message):
    """The evaluator's verdict on one checkpoint."""

    kind: Literal["evaluation"] = "evaluation"
    update: Count
    checkpoint: Name
    samples: Count
    #: Share of greedy completions that are right, and its 95 % interval.
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    #: The same for completions sampled at the evaluator's temperature; None: not scored.
    sampled_accuracy: Share | None
    rewards: Annotated[dict[Name, float], Field(max_length=64)]
    completion_length_mean: NotNegative
    truncated_share: Share
    seconds: NotNegative


class Bye(Message):
    """Either side is leaving; leases held go back at once."""

    kind: Literal["bye"] = "bye"
    reason: Text = ""
    #: From the learner: say Hello again, it does not know this peer (it was restarted).
    again: bool = False
    #: From the learner, answering Hello: nothing is wrong, but nobody of this role is needed any more.
    dismissed: bool = False


# --- learner -> worker or evaluator ---------------------------------------------------------------


class Welcome(Message):
    """Answer to Hello: what the peer needs to take part."""

    kind: Literal["welcome"] = "welcome"
    run_id: Name
    #: The resolved configuration, JSON.
    config: Text
    #: Name, architecture and digests of the base model (`policy.identity.Identity`), JSON.
    identity: Text
    #: Endpoint of the weights socket, as the learner sees it.
    weights_endpoint: Text
    #: The peer should beat this often.
    beat_s: Annotated[float, Field(gt=0)]


class Lease(Message):
    """One problem to sample: everything the worker needs, so that it needs no data set."""

    #: Position in the order of problems; names the lease for ever.
    lease: Count
    #: Fencing number: a result of an older attempt is refused.
    attempt: Count
    #: Sample with this version or a newer one.
    min_version: Count
    problem_id: Text
    #: Prompt token ids, int32: never tokenised again.
    prompt: Ints
    #: One 64-bit seed a completion: the same tokens whichever worker samples them.
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_COMPLETIONS), FailFast()]
    messages: Annotated[list[dict[str, Text]], Field(max_length=1000), FailFast()]
    answer: Text
    #: The problem's further columns; JSON on the wire, for a data set may hold numbers that MessagePack has not.
    columns: Json[dict[str, Any]]


class Grant(Message):
    """Leases to be sampled together, in one batch: so their numbers do not depend on timing."""

    kind: Literal["grant"] = "grant"
    leases: Annotated[list[Lease], Field(min_length=1, max_length=1024), FailFast()]


class Ack(Message):
    """The fate of one group. Refused work is not sent again."""

    kind: Literal["ack"] = "ack"
    lease: Count
    attempt: Count
    accepted: bool
    reason: Text = ""


class Announcement(Message):
    """A version can be fetched from the weights socket. Sent when it is published, and as the answer
    to every Beat: one that was lost is made up for, and silence means that the learner is gone.
    """

    kind: Literal["announcement"] = "announcement"
    version: Count


# --- weights socket -------------------------------------------------------------------------------


class FetchManifest(Message):
    """Worker -> learner: what is the newest version made of?"""

    kind: Literal["fetch_manifest"] = "fetch_manifest"


class TensorEntry(Message):
    """Where one tensor lies in a version's bytes, and how they read."""

    name: Annotated[str, Field(max_length=500)]
    dtype: Literal["float32", "float16", "bfloat16", "uint32", "uint8"]
    shape: Annotated[list[Count], Field(max_length=8)]
    offset: Count


class Manifest(Message):
    """Learner -> worker: one version as a byte range; tensors lie in it one after the other."""

    kind: Literal["manifest"] = "manifest"
    version: Count
    size: Count
    #: xxh3-128 of all bytes, hexadecimal.
    digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    chunk_bytes: Annotated[int, Field(ge=1, le=MAX_ARRAY_BYTES)]
    #: Addresses of the bytes, one a line, each of one outlet (`transport.weights`): a file of shared memory; empty: none.
    path: Annotated[str, Field(max_length=4096)] = ""
    tensors: Annotated[list[TensorEntry], Field(max_length=10_000), FailFast()]


class FetchChunk(Message):
    """Worker -> learner: the bytes from index × chunk_bytes on."""

    kind: Literal["fetch_chunk"] = "fetch_chunk"
    version: Count
    index: Count


class Chunk(Message):
    """Learner -> worker: header of a chunk; the bytes are the next frame. Empty frame: version gone."""

    kind: Literal["chunk"] = "chunk"
    version: Count
    index: Count


FromPeer = Hello | Group | Beat | Evaluation | Bye
FromLearner = Welcome | Grant | Ack | Announcement | Bye
WeightsRequest = FetchManifest | FetchChunk
WeightsReply = Manifest | Chunk

from_peer: TypeAdapter[FromPeer] = TypeAdapter(Annotated[FromPeer, Field(discriminator="kind")])
from_learner: TypeAdapter[FromLearner] = TypeAdapter(Annotated[FromLearner, Field(discriminator="kind")])
weights_request: TypeAdapter[WeightsRequest] = TypeAdapter(
    Annotated[WeightsRequest, Field(discriminator="kind")]
)
weights_reply: TypeAdapter[WeightsReply] = TypeAdapter(Annotated[WeightsReply, Field(discriminator="kind")])
