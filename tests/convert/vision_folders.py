"""A tiny random model that takes images, in the files and names of Hugging Face's Qwen2-VL."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo_actors.policy.locate import EMBEDDED

HIDDEN, HEADS, VOCAB = 64, 4, 512
VISION = {
    "model_type": "qwen2_vl",
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 14,
    "mlp_ratio": 2,
}
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vision_config": VISION,
}


def write(folder: Path) -> dict[str, mx.array]:
    """Fill `folder`; returns the weights by their names in its file."""
    from mlx_vlm.models.qwen2_vl import Model
    from mlx_vlm.models.qwen2_vl.config import ModelConfig, TextConfig, VisionConfig

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"})
    )
    config = ModelConfig.from_dict(dict(CONFIG))
    config.text_config = TextConfig.from_dict(CONFIG)
    config.vision_config = VisionConfig.from_dict(VISION)
    mx.random.seed(3)
    weights = {
        hugging_face_name(name): 0.1 * mx.random.normal(array.shape) + (1.0 if "norm" in name else 0.0)
        for name, array in tree_flatten(Model(config).parameters())
    }
    # Hugging Face stores the convolution in PyTorch's order: outputs, inputs, then time, height and width.
    patch = "visual.patch_embed.proj.weight"
    weights[patch] = weights[patch].transpose(0, 4, 1, 2, 3)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return weights


def hugging_face_name(name: str) -> str:
    return (
        name.replace("vision_tower.", "visual.")
        .replace("language_model.model.", "model.")
        .replace("language_model.lm_head", "lm_head")
    )
