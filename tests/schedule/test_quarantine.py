"""Which workers are quarantined: those beyond the band of the others for three updates."""

import pytest

from grpo_actors.schedule.quarantine import MIN_TOKENS, Gap, Quarantine

MAX_GAP = 0.1


def gap(mean: float, lag: int = 0, tokens: int = 100) -> Gap:
    return Gap(lag, tokens, mean * tokens)


def judged(updates: list[list[tuple[str, Gap]]]) -> list[list[str]]:
    """Return the workers that are quarantined after each update."""
    quarantine = Quarantine(MAX_GAP)
    return [list(quarantine.judge(update)) for update in updates]


def is_out(worker: str, update: list[tuple[str, Gap]]) -> bool:
    return worker in judged([update] * 3)[2]


def test_a_worker_is_out_after_three_updates_beyond_the_band_and_counted_anew_then():
    update = [("a", gap(0.02)), ("b", gap(0.02)), ("liar", gap(2.0))]
    assert judged([update] * 7) == [[], [], ["liar"], [], [], ["liar"], []]


def test_an_update_within_the_band_ends_the_count_and_one_without_evidence_does_not():
    bad = [("a", gap(0.02)), ("w", gap(2.0))]
    good = [("a", gap(0.02)), ("w", gap(0.05))]
    absent = [("a", gap(0.02))]
    few = [("a", gap(0.02)), ("w", gap(2.0, tokens=MIN_TOKENS - 1))]
    assert judged([bad, bad, good, bad, bad]) == [[]] * 5
    assert judged([bad, absent, bad, few, bad])[-1] == ["w"]


@pytest.mark.parametrize(
    ("own", "others", "out"),
    [
        (0.09, [0.001, 0.002], False),  # within max_gap
        (0.1, [0.001, 0.002], False),
        (0.11, [0.001, 0.002], True),
        (0.39, [0.1, 0.2], False),  # 4 times the lower median, which is 0.1
        (0.41, [0.1, 0.2], True),
        (0.41, [0.1, 0.2, 0.3], False),  # 4 times 0.2
        (5.0, [0.02, 5.0], True),  # two liars among three do not excuse each other
        (0.02, [5.0], False),
    ],
)
def test_the_band_is_four_times_the_gap_of_the_others(own, others, out):
    update = [("w", gap(own)), *((f"other-{i}", gap(mean)) for i, mean in enumerate(others))]
    assert is_out("w", update) is out


@pytest.mark.parametrize(
    ("mean", "lag", "out"), [(0.99, 0, False), (1.01, 0, True), (2.9, 2, False), (3.1, 2, True)]
)
def test_a_worker_alone_has_ten_times_the_largest_gap_for_each_version(mean, lag, out):
    assert is_out("w", [("w", gap(mean, lag))]) is out


def test_a_worker_is_compared_at_its_own_lag():
    # The policy moves fast: whoever sampled with the version before is 0.5 nats off.
    fair = [("a", gap(0.02)), ("b", gap(0.5, lag=1)), ("c", gap(0.4, lag=1))]
    assert judged([fair] * 3)[2] == []
    assert is_out("c", [("a", gap(0.02)), ("b", gap(0.02)), ("c", gap(0.5))])


def test_gaps_at_several_lags_are_weighted_by_their_tokens():
    # w may have (100 · 4 · 0.05 + 300 · 4 · 0.25) / 400 = 0.8 nats on average.
    others = [("a", gap(0.05)), ("a", gap(0.25, lag=1))]
    for mean, out in ((0.79, False), (0.81, True)):
        assert is_out("w", [*others, ("w", gap(mean)), ("w", gap(mean, lag=1, tokens=300))]) is out


def test_the_completions_of_a_worker_add_up():
    update = [("a", gap(0.02)), *[("w", gap(2.0, tokens=MIN_TOKENS // 4))] * 4]
    assert is_out("w", update)


def test_the_reason_gives_the_gap_and_the_limit():
    quarantine = Quarantine(MAX_GAP)
    update = [("a", gap(0.05)), ("w", gap(2.0))]
    reasons = [quarantine.judge(update) for _ in range(3)][2]
    assert reasons == {"w": "log-probs 2 nats off the learner's, 0.2 at most, in 3 updates in a row"}
