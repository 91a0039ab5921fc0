"""The command line of a training, and what it prints where."""

import os
import subprocess
import sys
from pathlib import Path

from bounds import HANG_S

from grpo_actors.train.__main__ import parser, trial_parser

ROOT = Path(__file__).parents[1]


def test_a_trial_is_a_training_that_is_tried_only():
    words = ["quickstart", "--set", "seed=1"]
    assert trial_parser("grpo trial").parse_args(words) == parser().parse_args([*words, "--trial"])


def test_notes_on_the_settings_come_after_them_also_where_both_go_to_one_file():
    done = subprocess.run(
        [sys.executable, "-m", "grpo_actors.train", "quickstart", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    notes = [line.startswith("note: ") for line in done.stdout.splitlines()]
    assert notes == sorted(notes)
    assert any(notes)
