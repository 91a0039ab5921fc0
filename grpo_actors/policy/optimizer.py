"""The optimizers of section [learner]: MLX's, with one meaning of the rate and of the decay for all of them.

With each optimizer, a rate of 1e-5 moves a weight by about 1e-5 per step; with Lion by exactly that (its paper
recommends a rate 3 to 10 times smaller than AdamW's). Muon's own scale differs, see `_Muon`.

The decay is decoupled, as in AdamW (1711.05101): w ← w − rate · decay · w in addition to the step, so nothing
that the optimizer does to a gradient affects it. It is applied here and not by MLX, whose optimizers disagree
about it (Muon adds it to the gradient) and support no exceptions. Only matrices decay: a layer can work with a
smaller matrix, but the scale of a norm is neutral at 1, not at 0, and a bias does not cause overfitting.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from grpo_actors.config import LearnerConfig


def build_optimizer(config: LearnerConfig, model: Any) -> optim.Optimizer:
    """Return the optimizer of `model`'s trainable parameters; its state is empty, and it applies no decay."""
    rate = config.learning_rate
    match config.optimizer:
        case "lion":
            # MLX's betas: Lion's second mean is of the gradient, not of its square, so adam_beta2 does not apply.
            return optim.Lion(rate)
        case "adafactor":
            # By default it replaces the given rate by its own, and scales that with each matrix.
            return optim.Adafactor(rate, relative_step=False, scale_parameter=False)
        case "muon":
            within_layers = _layer_prefixes(model)
            return _Several(
                [_Muon(rate, weight_decay=0.0), _adam(config)],
                # Excludes stacks of matrices (experts): MLX would flatten each stack into one matrix.
                [lambda name, array: array.ndim == 2 and name.startswith(within_layers)],
            )
        case "adam" | "adamw":
            return _adam(config)


def decayed(weights: Any, share: mx.array) -> Any:
    """Return `weights` with its matrices, and stacks of them, reduced by `share` of their values."""
    return tree_map(lambda w: w * (1 - share) if w.ndim >= 2 else w, weights)


class _Several(optim.MultiOptimizer):  # type: ignore[misc]
    """An optimizer for each part of the arrays.

    MLX joins the moved parts as trees, which fails where a list of layers has gaps: with several ranks, each moves some of
    the arrays only.
    """

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        moved: dict[str, mx.array] = {}
        for optimizer, own in zip(self.optimizers, self._split_dictionary(gradients), strict=True):
            moved |= dict(tree_flatten(optimizer.apply_gradients(own, parameters)))
        return tree_unflatten(list(moved.items()))


class _Muon(optim.Muon):  # type: ignore[misc]  # MLX's optimizers have no types
    """Muon with steps as long as AdamW's, so that one rate serves both parts. 2502.16982, section 2.2.

    The entries of a [m, n] matrix with singular values 1 have a root mean square of √(1 / max(m, n)). The scale
    0.2 · √max(m, n) makes it 0.2, which AdamW's steps have in practice.
    """

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> Any:
        # MLX scales by √max(1, m / n) afterwards, and √n · √max(1, m / n) = √max(m, n).
        return 0.2 * math.sqrt(X.shape[1]) * super()._zeropower_via_newtonschulz5(X, steps)


def _adam(config: LearnerConfig) -> optim.Adam:
    return optim.Adam(
        config.learning_rate,
        betas=[config.adam_beta1, config.adam_beta2],
        bias_correction=True,  # off by default in MLX: the first steps would be far too long
    )


def _layer_prefixes(model: Any) -> tuple[str, ...]:
    """Return the name prefixes of all layers; the embedding and the output head have none of them."""
    layers = {id(layer) for layer in getattr(model, "layers", ())}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in layers)
