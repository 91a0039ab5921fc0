"""Write one checkpoint of a run in an export format: model folder, adapter or GGUF file; folders with a model card."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from grpo_actors import consent
from grpo_actors.atomic import write_fault
from grpo_actors.config import Config, read_config
from grpo_actors.config.adapter_folder import ADAPTER_CONFIG, MLX_LM_WEIGHTS
from grpo_actors.config.peft_folder import PEFT_WEIGHTS
from grpo_actors.errors import ModelError, RunError
from grpo_actors.export.card import Form, base_name, card
from grpo_actors.export.fidelity import Fidelity, measure
from grpo_actors.export.fusing import load_fused
from grpo_actors.policy.carried import carrying, template_text
from grpo_actors.policy.chat_template import choose
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import load_policy, source_folder
from grpo_actors.policy.peft import to_peft
from grpo_actors.policy.tokenizer import load_tokenizer
from grpo_actors.policy.tokenizer_files import TEMPLATE
from grpo_actors.rundir.checkpoint_weights import (
    check_adapter,
    is_adapter,
    load_weights,
    read_model,
    write_model,
)
from grpo_actors.rundir.checkpoints import Checkpoint, best_checkpoint, find_checkpoints, verify, write_json
from grpo_actors.rundir.folder import CONFIG_FILE
from grpo_actors.rundir.prompting import prompting_of_run

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Export:
    """A verified checkpoint and the settings that it was trained with."""

    run_dir: Path
    config: Config
    checkpoint: Checkpoint

    @classmethod
    def choose(cls, run_dir: Path, which: str, allowed: Sequence[str] = ()) -> "Export":
        """Find the checkpoint `which`: a number of updates, ``best``, ``last``, or empty for the best, else the last.

        Raises:
            RunError: `run_dir` is not a run folder, has no such checkpoint, or the checkpoint is damaged.
            ConfigError: the run's settings name code that is not `allowed` (`consent`).
        """
        if not (run_dir / CONFIG_FILE).is_file():
            raise RunError(
                f"{run_dir} is no run folder ({CONFIG_FILE} not found); give a run's output folder"
            )
        checkpoint = _find(run_dir, which)
        damage = verify(checkpoint)
        if damage is not None:
            raise RunError(f"{damage}; choose another --checkpoint")
        config = read_config(run_dir / CONFIG_FILE)
        consent.check(consent.code_of_model(config.model), allowed, run_dir / CONFIG_FILE)
        return cls(run_dir, config, checkpoint)

    def write_model(self, folder: Path, name: str, dtype: str | None, *, dequantize: bool) -> Fidelity | None:
        """Write a whole model, called `name`, which mlx-lm loads, and transformers if it supports the architecture.

        Returns what an adapter has lost in its base; None if there was no adapter, or no memory to measure it.

        Raises:
            ModelError: see `load_fused`, or the disk is full.
        """
        self._fuse(folder, dtype, dequantize=dequantize)
        self._write_card(folder, name, "model")
        if not is_adapter(self.checkpoint.path):
            return None
        return measure(self.checkpoint.path, self.config.model, folder)

    def write_adapter(self, folder: Path, name: str, *, for_others: bool) -> None:
        """Write only what was trained, in mlx-lm's format; `for_others`: without the local path of its base.

        Of a run that trained all weights, that is all weights: mlx-lm's ``fine_tune_type`` full.

        Raises:
            ModelError: the disk is full.
        """
        if is_adapter(self.checkpoint.path):
            shutil.copy(self.checkpoint.path / MLX_LM_WEIGHTS, folder)
            described = json.loads((self.checkpoint.path / ADAPTER_CONFIG).read_text())
        else:
            _save(folder / MLX_LM_WEIGHTS, read_model(self.checkpoint.path))
            described = {"fine_tune_type": "full", "model": str(locate(self.config.model.model_name))}
        base = {"model": base_name(self.config)} if for_others else {}
        write_json(folder / ADAPTER_CONFIG, described | base)
        self._write_template(folder)
        self._write_card(folder, name, "adapter")

    def write_peft(self, folder: Path, name: str, *, for_others: bool) -> None:
        """Write only the adapter, as peft loads it; `for_others`: without the local path of its base.

        Raises:
            ModelError: the run trained all weights, peft has no counterpart of an adapted module, or the disk is full.
        """
        if not is_adapter(self.checkpoint.path):
            raise ModelError(f"--peft: {self.run_dir} trained all weights and has no adapter; take --fuse")
        check_adapter(self.checkpoint.path, self.config.model)
        # What it started from need not exist any more.
        policy = load_policy(self.config.model.model_copy(update={"adapter_path": ""}), seed=0)
        load_weights(self.checkpoint.path, policy)
        base = base_name(self.config) if for_others else str(locate(self.config.model.model_name))
        arrays, described = to_peft(policy.model, base, set(read_model(policy.source)))
        _save(folder / PEFT_WEIGHTS, arrays)
        write_json(folder / ADAPTER_CONFIG, described)
        self._write_template(folder)
        self._write_card(folder, name, "peft adapter")

    def write_gguf(self, file: Path, dtype: str, *, dequantize: bool) -> None:
        """Write one GGUF file, through a temporary model folder next to it.

        Raises:
            ModelError: the writer does not support the architecture or the tokenizer.
        """
        from grpo_actors.convert.gguf.writer import write_file  # noqa: PLC0415  needs the extra gguf

        with TemporaryDirectory(dir=file.parent) as folder:
            self._fuse(Path(folder), None, dequantize=dequantize)
            write_file(Path(folder), file, dtype)

    def _fuse(self, folder: Path, dtype: str | None, *, dequantize: bool) -> None:
        policy = load_fused(self.checkpoint.path, self.config.model, dequantize=dequantize, dtype=dtype)
        if template := self._template(policy.tokenizer):
            policy.chat.use(template)
        try:
            write_model(folder, policy)
        except RuntimeError as error:  # how MLX reports a full disk
            raise ModelError(f"{folder}: cannot be written: {write_fault(error, folder)}") from error

    def _template(self, tokenizer: Any) -> str:
        """Return the chat template with the prompt of the training; empty if the training added nothing to it."""
        prompting, own = prompting_of_run(self.run_dir), template_text(tokenizer)
        with_prompt = carrying(own, prompting.system, prompting.template_settings)
        return "" if not own or with_prompt == own else with_prompt

    def _write_template(self, folder: Path) -> None:
        """Write the chat template of an adapter, if it is not its base's: the run's own, or with the run's prompt."""
        source = source_folder(self.config.model)
        tokenizer = load_tokenizer(source, trust_remote_code=self.config.model.trust_remote_code)
        own = self.checkpoint.path / TEMPLATE
        if own.is_file():
            choose(tokenizer, own.read_text("utf-8"), self.config.model.model_name)
        template = self._template(tokenizer) or (template_text(tokenizer) if own.is_file() else "")
        if template:
            (folder / TEMPLATE).write_text(template, encoding="utf-8")

    def _write_card(self, folder: Path, name: str, form: Form) -> None:
        text = card(self.run_dir, self.config, self.checkpoint, name=name, form=form)
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _save(path: Path, arrays: dict[str, mx.array]) -> None:
    try:
        # peft, too, rejects a file that does not name a framework.
        mx.save_safetensors(
            str(path), arrays, metadata={"format": "mlx" if path.name == MLX_LM_WEIGHTS else "pt"}
        )
    except RuntimeError as error:  # how MLX reports a full disk
        raise ModelError(f"{path}: cannot be written: {error}; free some disk space") from error


def _find(run_dir: Path, which: str) -> Checkpoint:
    kept = find_checkpoints(run_dir)
    if not kept:
        raise RunError(f"{run_dir} has no checkpoint yet; let the run write one (Ctrl-C does)")
    marked = best_checkpoint(run_dir) if which in ("", "best") else None
    if which == "last" or (not which and marked is None):
        return kept[-1]
    if which == "best" and marked is None:
        raise RunError(f"--checkpoint best: no checkpoint of {run_dir} has beaten the base model; take last")
    wanted = which if marked is None else str(marked.update)
    for checkpoint in kept:
        if str(checkpoint.update) == wanted:
            return checkpoint
    known = ", ".join(str(checkpoint.update) for checkpoint in kept)
    raise RunError(f"--checkpoint must be best, last or one of {known}, got {wanted}")
