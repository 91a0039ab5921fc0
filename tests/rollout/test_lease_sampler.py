"""The leases that a worker samples."""

from grpo_actors.config import Config
from grpo_actors.policy.decoding.sampling import SamplingParams
from grpo_actors.rollout.lease_sampler import LeaseSampler
from grpo_actors.wire.messages import Lease, ints


def lease(number):
    fields = {"lease": number, "attempt": 1, "token": 0, "min_version": 0, "problem_id": "p"}
    prompt = {"prompt": ints([2, 21, 22, 3]), "messages": [], "answer": "1", "columns": "{}"}
    return Lease.model_validate(fields | prompt | {"seeds": [number]})


def test_whole_leases_that_waited_for_a_dropped_one_come_without_another_token(tiny):
    tiny.stop_tokens = frozenset()  # every completion has all four tokens
    params = SamplingParams(4, max_kv_tokens=4 + 4)  # a row
    sampler = LeaseSampler(tiny, Config(), params, lambda _: None)
    sampler.begin([lease(0), lease(1)], 0)
    while not sampler.leases[0].whole:
        assert sampler.step()[1] == []
    sampler.drop([1])
    tokens, [done] = sampler.step()
    assert (tokens, done.lease.lease) == (0, 0)
    assert done.sampling_s > 0.0
    assert [len(sample.tokens) for sample in done.samples] == [4]
