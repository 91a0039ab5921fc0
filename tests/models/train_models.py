"""Train a tiny random model of every architecture that mlx-lm has, through real processes, and print a table.

    python tests/models/train_models.py [--out FILE] [FAMILY …]

Three updates, full and with an adapter, on prompts of different lengths. The figures, in nats, are the largest differences
of a token's log-prob: of worker and learner; of the worker, and of plain `mlx_lm.load` with the checkpoint of the same
weights; of the export and the last checkpoint. FILE keeps one line for each model; the same command continues it.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import grpo_actors.policy  # noqa: F401, I001 - loads the BLAS that must come before MLX
import mlx.core as mx
import mlx_lm
import numpy as np
from architectures import build, config_json, families
from commands import run_here
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import save_model

from grpo_actors.export.__main__ import main as export
from grpo_actors.learner.recording import RecordedGroup, Recording
from grpo_actors.policy.locate import EMBEDDED

ROOT = Path(__file__).parents[2]
KINDS = ("full", "lora")
#: Far above rounding, far below what another text or position changes.
NATS = 1e-4
DEADLINE_S = 600.0
#: Architectures of which no model can be built from small sizes, with the reason.
NOT_BUILT = {
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "reads weights packed in its own 2-bit format only",
}
#: The adapter of a model that has modules which none fits.
LORA_KEYS = {
    "afm7": ["self_attn.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma3n": ["self_attn.q_proj"],
}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_new_tokens": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "batch_groups": 2,
    "workers": 1,
    "max_staleness": 0,
    "max_updates": 3,
    "save_steps": 1,
    "eval_every_updates": 3,
    "eval_subset_size": 4,
    "learning_rate": 1e-3,
    "record_groups": True,
    # Random text has no reward that differs: the entropy trains.
    "entropy_coeff": 0.1,
    "skip_zero_advantage": False,
}


def train(family: str, kind: str, folder: Path) -> dict[str, Any]:
    """Train one model in `folder`; return its row: figures, or the reason why it is refused."""
    started_s = time.monotonic()
    row: dict[str, Any] = {"family": family, "kind": kind}
    if family in NOT_BUILT:
        return {**row, "refused": NOT_BUILT[family]}
    base, run = folder / "model", folder / "run"
    write_model(base, family)
    settings = {**SETTINGS, "model_name": str(base), "fine_tune_type": kind, "output_dir": str(run)}
    if kind == "lora":
        settings["lora_keys"] = LORA_KEYS.get(family, [])
    options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    launched = _python(str(ROOT / "launch.py"), "--config", "smoke_test.toml", *options)
    if launched.returncode:
        return {**row, "refused": _error_in(launched.stderr), "exit": launched.returncode}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["topic"] == "metrics"]
    exported = run_here(export, run, "--checkpoint", "last", "--fuse", folder / "export")
    notes = [r["text"] for r in records if r["topic"] == "log" and "equal length" in r.get("text", "")]
    third = _plain(base, run / "checkpoint-3", kind)
    return {
        **row,
        "gap": max(record["logprob_gap_max"] for record in updates),
        "skipped": updates[-1]["skipped_steps"],
        "evaluated": any(record["topic"] == "eval" and record.get("update") == 3 for record in records),
        "checkpoint": _checkpoint_gap(_plain(base, run / "checkpoint-2", kind), run),
        "export": _error_in(exported.stderr)
        if exported.returncode
        else _logit_gap(third, mlx_lm.load(str(folder / "export"))[0]),
        "apart": bool(notes),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def write_model(folder: Path, family: str) -> None:
    """Write a folder for `mlx_lm.load`: random weights, with the tokenizer of the embedded model."""
    tiny = json.loads((EMBEDDED / "config.json").read_text())
    tokens = {name: tiny[name] for name in ("eos_token_id", "pad_token_id")}
    config = config_json(family, vocabulary=tiny["vocab_size"])
    folder.mkdir()
    save_model(folder, build(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**config, **tokens, "torch_dtype": "float32"}))


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a model trained, and everything agrees."""
    figures = [row.get(name) for name in ("gap", "checkpoint", "export")]
    agrees = all(isinstance(figure, float) and figure <= NATS for figure in figures)
    return agrees and row["evaluated"] and not row["skipped"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as in docs/reference/models.md."""
    lines = [
        "| architecture | kind | worker − learner | checkpoint | export | seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(_cell(row.get(name)) for name in ("gap", "checkpoint", "export", "seconds"))
        lines.append(f"| {row['family']} | {row['kind']} | {figures} | {_verdict(row)} |")
    return "\n".join(lines)


def _verdict(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    apart = "prompts of equal length side by side" if row["apart"] else ""
    return apart if is_right(row) else f"WRONG {apart}".strip()


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value < 1 else "" if value is None else str(value)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def _error_in(text: str) -> str:
    """Return the last line that is an error, or else the last line."""
    lines = text.strip().splitlines()
    return next((line for line in reversed(lines) if "error: " in line), lines[-1])


def _plain(base: Path, checkpoint: Path, kind: str) -> Any:
    """Load a checkpoint as a user of mlx-lm does."""
    if kind == "full":
        return mlx_lm.load(str(checkpoint))[0]
    return mlx_lm.load(str(base), adapter_path=str(checkpoint))[0]


def _checkpoint_gap(model: Any, run: Path) -> float:
    """Compare log-probs recorded by the worker with those of `model`, which has the weights that sampled them."""
    gaps = [0.0]
    for group in _sampled_by(run, version=2):
        for completion in group.completions:
            ids = [*group.prompt, *completion.tokens]
            logits = model(mx.array([ids[:-1]]), cache=make_prompt_cache(model))[0, len(group.prompt) - 1 :]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.take_along_axis(logprobs, mx.array(completion.tokens)[:, None], axis=-1)[:, 0]
            gaps.append(float(np.abs(np.array(chosen) - np.array(completion.logprobs)).max()))
    return max(gaps)


def _sampled_by(run: Path, *, version: int) -> Iterator[RecordedGroup]:
    with Recording(run) as recording:
        while groups := recording.take(1):
            if all(set(completion.versions) == {version} for completion in groups[0].completions):
                yield groups[0]


def _logit_gap(one: Any, other: Any) -> float:
    tokens = mx.array([[2, 21, 22, 15, 23, 24, 1, 3, 9, 9]])
    gap = float(mx.abs(one(tokens) - other(tokens)).max())
    return gap if math.isfinite(gap) else math.inf


def main() -> int:
    """Train what FILE lacks, each model in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="modules of mlx-lm; default: all")
    parser.add_argument("--out", type=Path, default=Path("outputs/models.jsonl"), help="default: %(default)s")
    parser.add_argument("--one", metavar="KIND", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory(prefix="grpo-models-") as folder:
            print(json.dumps(train(args.families[0], args.one, Path(folder))))
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["family"], row["kind"]) for row in rows}
    for family in args.families or families():
        for kind in KINDS:
            if (family, kind) in done:
                continue
            one = _python(__file__, family, "--one", kind)
            last = one.stdout.strip().splitlines()[-1:]
            row = json.loads(last[0]) if not one.returncode else {"refused": _error_in(one.stderr)}
            rows.append({"family": family, "kind": kind, **row})
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    wrong = [row for row in rows if "refused" not in row and not is_right(row)]
    print(f"{len(rows)} trained or refused, {len(wrong)} wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
