"""The bench measures what a run does; its figures are for people, not for tests."""

import json

from grpo_actors.bench import main


def test_every_figure_is_there_and_positive(capsys):
    assert main(["--groups", "1", "--tokens", "4", "--rounds", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"rollout tokens/s", "learner tokens/s", "weights MB"} < figures.keys()
    assert all(value > 0 for value in figures.values())
    # float32 weights of 697,472 parameters.
    assert figures["weights MB"] == 697_472 * 4 / 1e6


def test_mlx_lm_samples_in_turn_when_it_is_asked_for(capsys):
    assert main(["--groups", "1", "--tokens", "4", "--rounds", "1", "--against", "mlx-lm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mlx-lm tokens/s"] > 0
