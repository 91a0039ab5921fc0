"""Write a policy and its training state as a checkpoint, and load them back.

A checkpoint is frozen first, by the thread that trains, and can then be written by another one while training goes on.
It is written under a temporary name, made durable file by file, and then renamed. A kill at any moment leaves the
previous checkpoint or the new one, never half of one.

    RUN/checkpoint-40/   model.safetensors, config.json, tokenizer files   (full: mlx_lm.load reads it)
                         adapters.safetensors, adapter_config.json         (adapter: mlx_lm.load's adapter_path)
                         optimizer.safetensors, state.json, manifest.json
                         reference.safetensors                             (if the reference was refreshed)

A model, state or reference of more than `SHARD_BYTES` becomes several files: optimizer-00001-of-00008.safetensors, and
so on.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten

from grpo_actors.atomic import draft_of, write_contents, write_fault
from grpo_actors.config import ModelConfig
from grpo_actors.config.adapter_folder import ADAPTER_CONFIG, MLX_LM_WEIGHTS, read_adapter
from grpo_actors.config.peft_folder import PEFT_WEIGHTS
from grpo_actors.errors import ConfigError, ModelError, RunError
from grpo_actors.failpoints import reach
from grpo_actors.policy.adapter import adapted_layers, adapter_parameters
from grpo_actors.policy.casting import float_dtype
from grpo_actors.policy.config_dtype import with_dtype
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.policy.plan import GROUP_SIZE
from grpo_actors.policy.tokenizer_files import TEMPLATE, read_files
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoints import Checkpoint, as_json, seal
from grpo_actors.rundir.folder import MODEL, OPTIMIZER, REFERENCE, STATE, checkpoint_folder
from grpo_actors.rundir.tensor_files import Remote, TensorFile, freeze, write_files

GENERATION = "generation_config.json"

#: Arrays of more bytes together become several files, because a file's digest is computed by one core.
SHARD_BYTES = 1 << 30

#: Files taken over from the source model, next to weights, config and tokenizer: generation defaults, licence. Never its
#: code: whoever opens the folder would have to trust it.
_COPIED_FILES = (GENERATION, "LICENSE*")


@dataclass(frozen=True, slots=True)
class FrozenCheckpoint:
    """Everything that a checkpoint will contain, as it was when it was frozen. Any thread may `write` it."""

    #: Number of updates done.
    update: int
    tensors: list[TensorFile]
    #: Content of all other files by name; FOLDER/NAME is in a subfolder.
    others: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        """Bytes of its arrays: memory that it holds as soon as training has replaced them."""
        return sum(file.bytes for file in self.tensors)

    def write(self, run_dir: Path) -> Checkpoint:
        """Write the checkpoint into the run folder; return it when it is durable.

        Raises:
            RunError: The disk is full, or the folder is not writable. Nothing half-written is left.
        """
        final = checkpoint_folder(run_dir, self.update)
        temporary = draft_of(final)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            reach("checkpoint.begun")
            write_contents(temporary, self.others)
            entries = write_files(temporary, self.tensors)
            reach("checkpoint.written")
            seal(temporary, final, entries)
            reach("checkpoint.sealed")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"{final}: cannot be written: {write_fault(error, run_dir)}") from error
        return Checkpoint(final, self.update)


def freeze_checkpoint(
    update: int,
    policy: Policy,
    training: Training,
    state: Mapping[str, Any],
    *,
    reference: Mapping[str, mx.array] | None = None,
    remote_state: Mapping[str, Remote] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> FrozenCheckpoint:
    """Freeze the state of a run; copies no array.

    Args:
        update: Number of updates done.
        policy: Its trainable weights are saved; with full fine-tuning these are the whole model.
        training: Its state arrays are saved.
        state: JSON content of state.json: the run's id, its `Snapshot` and the number of skipped steps.
        reference: Arrays that `restore` returns; None if loading the model gives them again.
        remote_state: State arrays that other processes hold; fetch them before you write.
        shard_bytes: Weights, state and reference become several files each if they are larger.
    """
    if policy.has_adapter:
        tensors = freeze(Path(MLX_LM_WEIGHTS).stem, policy.trainable())  # one file: mlx-lm reads no more
        others = {ADAPTER_CONFIG: as_json(adapter_config(policy)), **_template(policy)}
    else:
        tensors = freeze(MODEL, dict(tree_flatten(policy.model.parameters())), shard_bytes)
        others = {"model.safetensors.index.json": _index(tensors), **companions(policy)}
    tensors += freeze(OPTIMIZER, {**training.state(), **remote_state}, shard_bytes)
    if reference is not None:
        tensors += freeze(REFERENCE, reference, shard_bytes)
    return FrozenCheckpoint(update, tensors, {**others, STATE: as_json({"update": update, **state})})


def restore(checkpoint: Checkpoint, policy: Policy, training: Training) -> dict[str, mx.array] | None:
    """Load a checkpoint's weights and optimizer state; return its reference, or None if it has none.

    Raises:
        ModelError: The checkpoint belongs to another model.
    """
    load_weights(checkpoint.path, policy)
    training.load_state(_read_arrays(_files(checkpoint.path, OPTIMIZER)))
    reference = _files(checkpoint.path, REFERENCE)
    return _read_arrays(reference) if reference else None


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter, whose weights are applied on top of a base model."""
    return (folder / MLX_LM_WEIGHTS).is_file() or (folder / PEFT_WEIGHTS).is_file()


def load_weights(path: Path, policy: Policy) -> None:
    """Load the weights of the checkpoint folder `path` into a policy of the same kind.

    Raises:
        ModelError: The folder has no weights, or those of another model.
    """
    files = [path / MLX_LM_WEIGHTS] if (path / MLX_LM_WEIGHTS).is_file() else _files(path, MODEL)
    if not files:
        raise ModelError(f"{path}: no weights here (neither {MLX_LM_WEIGHTS} nor model*.safetensors)")
    policy.load_trainable(_read_arrays(files))
    mx.eval(policy.model.parameters())


def read_model(folder: Path) -> dict[str, mx.array]:
    """Return all arrays of a whole model's folder, not computed yet."""
    return _read_arrays(_files(folder, MODEL))


def load_whole(folder: Path, config: ModelConfig, *, dtype: str | None = None) -> Policy:
    """Load a complete model from a folder, as a base without an adapter.

    Args:
        folder: A model folder or a checkpoint. A checkpoint has none of its model's code, so a model with such code is
            loaded as section [model] describes, before it gets the checkpoint's weights.
        config: Section [model]: of a run, if it is its checkpoint.
        dtype: As for `load_base`.

    Raises:
        ModelError: The folder, or the model that has its code, is unusable.
    """
    if config.trust_remote_code and not any(folder.glob("*.py")):
        policy = load_policy(config, seed=0)
        load_weights(folder, policy)
        return policy
    plain = {
        "model_name": str(folder.resolve()),
        "fine_tune_type": "full",
        "base_bits": 0,
        "adapter_path": "",
    }
    return load_base(config.model_copy(update=plain), dtype=dtype)


def check_adapter(path: Path, config: ModelConfig) -> None:
    """Check that the settings describe the adapter in the folder `path`; with others its weights mean something else.

    Raises:
        ModelError: as `read_adapter`.
        ConfigError: Its kind, its scale or the bits of its base differ. (An adapter of another size fails to load.)
    """
    trained = read_adapter(path).settings
    wrong = [
        f"model.{key} = {trained[key]}"
        for key in ("fine_tune_type", "lora_scale", "base_bits")
        if key in trained and getattr(config, key) != trained[key]
    ]
    if wrong:
        raise ConfigError(
            f"{path} holds an adapter of {trained.get('model_name', 'another model')}; give the --config it was trained "
            f"with, or set {' and '.join(wrong)} and model.model_name"
        )


#: Does not keep a policy alive.
_COMPANIONS: WeakKeyDictionary[Policy, Mapping[str, bytes]] = WeakKeyDictionary()


def write_model(folder: Path, policy: Policy) -> None:
    """Write a model without an adapter: weights, config, tokenizer, and the `_COPIED_FILES` of its source.

    Unlike a checkpoint, it may have weights that are not computed yet: they are, one file at a time.
    """
    mlx_lm.utils.save_model(folder, policy.model)
    write_contents(folder, companions(policy))


def companions(policy: Policy) -> Mapping[str, bytes]:
    """Return all files of a model's folder but its weights; made once for each policy.

    None of them changes while a policy trains, and its source may be gone when a checkpoint is due: a run makes them before
    its first update.

    Raises:
        ModelError: A file of the source cannot be read.
    """
    if policy not in _COMPANIONS:
        try:
            _COMPANIONS[policy] = _make_companions(policy)
        except OSError as error:
            raise ModelError(
                f"{error.filename or policy.source}: cannot be taken over into checkpoints: {error.strerror}"
            ) from error
    return _COMPANIONS[policy]


def _make_companions(policy: Policy) -> Mapping[str, bytes]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        mlx_lm.utils.save_config(_architecture(policy), folder / "config.json")
        config = (folder / "config.json").read_bytes()
    copied = (path for pattern in _COPIED_FILES for path in policy.source.glob(pattern) if path.is_file())
    return {
        "config.json": config,
        **read_files(policy.source),
        **{path.name: path.read_bytes() for path in copied},
        **_template(policy),
        **_end_tokens(policy),
    }


def _template(policy: Policy) -> dict[str, bytes]:
    """Return the file of the chat template that the policy was trained with, if it is not its model's default."""
    return {TEMPLATE: policy.chat.text.encode()} if policy.chat.text else {}


def _end_tokens(policy: Policy) -> dict[str, bytes]:
    """Return the generation defaults with the token that ends a turn, if those of its model lack it."""
    if policy.chat.turn_end is None:
        return {}
    file = policy.source / GENERATION
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {GENERATION: as_json({**settings, "eos_token_id": sorted(policy.stop_tokens)})}


def _index(files: list[TensorFile]) -> bytes:
    """Return the content of the index that transformers needs if the weights are in several files."""
    places = {name: file.name for file in files for name in file.data}
    return as_json({"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": places})


def _architecture(policy: Policy) -> dict[str, Any]:
    """Return config.json with the dtype that the weights have now: transformers casts them to the dtype given there."""
    return with_dtype(policy.architecture, float_dtype(policy.model))


def adapter_config(policy: Policy) -> dict[str, Any]:
    """Return what mlx-lm needs to load the adapter onto its base, and the name of that base.

    With base_bits, no file holds the quantised base; ``convert -q --bits N`` of ``model`` makes it.
    """
    config = policy.config
    described = {
        "fine_tune_type": config.fine_tune_type,
        "model": str(EMBEDDED) if policy.source == EMBEDDED else config.model_name,
        "num_layers": adapted_layers(policy.model, config),
        "lora_parameters": adapter_parameters(config),
    }
    if config.base_bits:
        described["base_quantization"] = {"group_size": GROUP_SIZE, "bits": config.base_bits}
    return described


def _files(folder: Path, stem: str) -> list[Path]:
    """Return the files in which `freeze` laid out the arrays called `stem`."""
    return sorted(folder.glob(f"{stem}*.safetensors"))


def _read_arrays(files: list[Path]) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for path in files:
        try:
            loaded = mx.load(str(path))
        except RuntimeError as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
        assert isinstance(loaded, dict)
        arrays |= loaded
    return arrays
