"""One optimizer step: sum the gradients of micro-batches, check, clip and apply them.

Depends on a model, an optimizer and a loss function only, not on what the loss means.

The optimizer updates float32 weights, and the model holds them rounded to its own type. A step of 1e-6 on a
bfloat16 weight of 0.02 is a hundredth of the distance to the next bfloat16 value: added to the rounded weight, it
would be lost every time.

One of several processes that train the same model may own a part of its arrays: it holds float32 weights and optimizer
state of these alone, and the step moves no others. It may hold their gradient alone, too: then the gradients of each
micro-batch are added up over the processes at once. Who adds them up, and exchanges the moved weights, is not known here.

On a GPU both halves (gradient and step) are compiled over explicit state. State that a compiled function changes,
or that changes between two calls, must be among its inputs and outputs; otherwise the function keeps the arrays of
its first call. On a CPU, MLX runs faster uncompiled (0.44 s against 0.64 s for the embedded model's update).
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_reduce, tree_unflatten

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.gated_delta import delta_layers
from grpo_actors.policy.gpu_rows import GRADIENT_PART
from grpo_actors.policy.optimizer import build_optimizer, decayed
from grpo_actors.policy.recomputation import recomputed_blocks, recomputed_gates, recomputed_layers

#: (model, arrays of a micro-batch) -> (loss, statistics vector).
LossFunction = Callable[[nn.Module, Mapping[str, mx.array]], tuple[mx.array, mx.array]]

#: Replaces arrays in place by their sums over all processes; each calls it as often, with arrays of the same shapes.
AddUp = Callable[[list[mx.array]], None]

#: Number of parts in which a step is evaluated; each waits for the device.
STEP_PARTS = 8

#: Name prefixes of the two parts of the saved state.
_OPTIMIZER = "optimizer."
_WEIGHTS = "weights."


class Training:
    """A model's optimizer state and float32 weights; accumulates gradients and applies them."""

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        loss: LossFunction,
        *,
        owned: Collection[str] | None = None,
        compiled: bool | None = None,
    ) -> None:
        """Prepare to train the parameters that are trainable now.

        Args:
            model: The model.
            config: Section [learner].
            loss: The loss of a micro-batch.
            owned: Names of the arrays that steps move; None: all.
            compiled: Whether to compile; None: on a GPU, if configured.
        """
        self._model = model
        self._config = config
        self._owned = owned
        self._loaded: dict[str, mx.array] = {}
        self.optimizer = build_optimizer(config, model)
        #: The float32 weights that steps move; if the model itself is float32, the same arrays.
        self._weights = {"": _float32(self._own(model.trainable_parameters()))}
        self.optimizer.init(self._weights[""])
        self._gradients: Any = None
        value_and_grad = nn.value_and_grad(model, loss)

        # `so_far` is None for the first micro-batch of an update, so a shape may be compiled twice. Starting from
        # zeros instead would write and read one float32 per weight in every update.
        def gradient(arrays: Mapping[str, mx.array], so_far: Any) -> tuple[mx.array, Any]:
            (_, statistics), gradients = value_and_grad(model, arrays)
            gradients = _float32(gradients)
            return statistics, gradients if so_far is None else tree_map(mx.add, so_far, gradients)

        if compiled is None:
            compiled = config.use_compile and mx.default_device().type == mx.DeviceType.gpu
        self._gradient, self._squares, self._apply = gradient, _sum_of_squares, self._move
        if compiled:
            inputs = [model.state, mx.random.state]
            self._gradient = mx.compile(gradient, inputs=inputs, outputs=inputs)
            self._squares = mx.compile(_sum_of_squares)
            inputs = [model.state, self.optimizer.state, self._weights]
            self._apply = mx.compile(self._move, inputs=inputs, outputs=inputs)

    def accumulate(self, arrays: Mapping[str, mx.array], add_up: AddUp | None = None) -> mx.array:
        """Add one micro-batch's gradient; return its statistics, evaluated.

        Evaluates at every micro-batch: lazily, the activations of all micro-batches would be alive at once.

        Args:
            arrays: The micro-batch.
            add_up: What adds up the gradients of all processes, of which each keeps those of its own arrays; None: nothing
                does, and all of this micro-batch's gradient is kept.
        """
        if add_up is not None:
            with self._recomputed():
                statistics, gradients = self._gradient(arrays, None)
            found = tree_flatten(gradients)
            del gradients  # so that nothing holds a part that was added up
            self._add_own(found, add_up)
            mx.eval(statistics)
            return statistics
        so_far, self._gradients = self._gradients, None
        with self._recomputed():
            statistics, self._gradients = self._gradient(arrays, so_far)
        del so_far  # so that the sum can reuse its memory
        mx.eval(statistics, self._gradients)
        return statistics

    def accumulate_nothing(self, add_up: AddUp) -> None:
        """Add up the gradients of the other processes as `accumulate` does, without a micro-batch of this one."""
        shapes = tree_flatten(self._model.trainable_parameters())
        self._add_own([(name, mx.zeros(array.shape)) for name, array in shapes], add_up)

    def _add_own(self, found: list[tuple[str, mx.array]], add_up: AddUp) -> None:
        """Add up gradients over all processes, and add those that this one owns to what it has; empties `found`.

        Part by part, from the last layer back, as the backward pass finds them: the others are never there at once.
        """
        own = dict(tree_flatten(self._gradients or {}))
        self._gradients = None
        while found:
            names, arrays, size = [], [], 0
            while found and (not size or size + found[-1][1].size <= GRADIENT_PART):
                name, array = found.pop()
                names.append(name)
                arrays.append(array)
                size += array.size
            del array
            mx.eval(arrays)
            add_up(arrays)
            for name in reversed(names):
                total = arrays.pop()
                if self._owned is None or name in self._owned:
                    # A sum may be a view of a larger array, which it would hold; zeros plus the sum is an array of its own.
                    own[name] = own.pop(name, mx.zeros(total.shape)) + total
                    mx.eval(own[name])
                del total
        # In the order of the model, by which a compiled step knows the arrays.
        places = self._own(self._model.trainable_parameters())
        self._gradients = tree_map_with_path(lambda name, _: own[name], places)

    def forget_gradient(self) -> None:
        """Drop what was accumulated."""
        self._gradients = None

    def change_gradient(self, change: Callable[[list[mx.array]], None]) -> None:
        """Let `change` replace the arrays of the accumulated gradient in place; those that it replaces are freed.

        The arrays are zeros if nothing was accumulated. Their order depends on the model alone.
        """
        gradient, self._gradients = self._gradients, None
        if gradient is None:
            gradient = tree_map(lambda array: mx.zeros(array.shape), self._model.trainable_parameters())
        named = dict(sorted(tree_flatten(gradient)))
        arrays, structure = list(named.values()), tree_map_with_path(lambda name, _: name, gradient)
        names = list(named)
        del gradient, named
        change(arrays)
        changed = dict(zip(names, arrays, strict=True))
        self._gradients = tree_map(lambda name: changed[name], structure)

    def norm(self) -> float:
        """Return the norm of the accumulated gradients; 0 without any."""
        return 0.0 if self._gradients is None else self._norm(self._gradients)

    def _norm(self, gradients: Any) -> float:
        return math.sqrt(float(self._squares(gradients)))

    def step(self, learning_rate: float, agree: Callable[[float], float] | None = None) -> tuple[float, bool]:
        """Apply the accumulated gradients to the arrays that this process owns.

        Args:
            learning_rate: The rate.
            agree: Called with the gradient's norm; returns the one that counts. None: that norm itself.

        Returns:
            The gradient's norm before clipping, and whether the step was taken. A gradient that is not finite is
            dropped entirely, because a single such step would ruin every weight.
        """
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            return 0.0, False
        norm = self._norm(gradients) if agree is None else agree(self._norm(gradients))
        if not math.isfinite(norm):
            return norm, False
        limit = self._config.max_grad_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        self.optimizer.learning_rate = learning_rate
        own = self._own(gradients)
        del gradients
        self._apply(own, mx.array(factor))
        del own
        self._evaluate_step()
        return norm, True

    def weights(self) -> dict[str, mx.array]:
        """Return the model's trained arrays by name, also those that others own."""
        return dict(tree_flatten(self._model.trainable_parameters()))

    def replace_weights(self, arrays: Mapping[str, mx.array]) -> None:
        """Give the model new values of arrays that others own."""
        self._model.update(tree_unflatten(list(arrays.items())))

    def state(self) -> dict[str, mx.array]:
        """Return everything that the next step of this process depends on besides the model's weights, by name."""
        rounded = dict(tree_flatten(self._model.trainable_parameters()))
        arrays = {_OPTIMIZER + name: array for name, array in tree_flatten(self.optimizer.state)}
        for name, array in tree_flatten(self._weights[""]):
            if rounded[name].dtype != mx.float32:
                arrays[_WEIGHTS + name] = array
        return arrays

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """Continue from a `state`, of this process or of all; the model must have its weights already.

        Fills the state in place: compiled functions hold references to their containers.

        Raises:
            ModelError: the state belongs to another model or optimizer.
        """
        missing = {_OPTIMIZER + name for name, _ in tree_flatten(self.optimizer.state)} - arrays.keys()
        if missing:
            raise ModelError(
                f"optimizer state: {min(missing)} is missing; it was written for another model or optimizer"
            )
        _fill(self.optimizer.state, arrays, _OPTIMIZER)
        rounded = _float32(self._own(self._model.trainable_parameters()))
        self._weights[""] = tree_map_with_path(
            lambda name, array: arrays.get(_WEIGHTS + name, array), rounded
        )
        mx.eval(self.optimizer.state, self._weights)
        own = self.state().keys()
        self._loaded = {name: array for name, array in arrays.items() if name not in own}

    def take_loaded(self) -> dict[str, mx.array]:
        """Return once what `load_state` was given of arrays that others own; what was read from a file is not computed yet."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    @contextlib.contextmanager
    def _recomputed(self) -> Iterator[None]:
        """Choose what backward passes within this block recompute."""
        with contextlib.ExitStack() as stack:
            if self._config.gradient_checkpointing:
                stack.enter_context(recomputed_blocks(self._model))
            else:
                stack.enter_context(recomputed_layers(delta_layers(self._model)))
                # Not on a CPU, where exponentials are expensive and memory is not.
                if mx.default_device().type == mx.DeviceType.gpu:
                    stack.enter_context(recomputed_gates(self._model))
            yield

    def _evaluate_step(self) -> None:
        """Evaluate the step part by part.

        The old weights, moments and gradients of one part are freed before the new ones of the next part exist.
        Evaluated all at once, the peak would be 7.5 instead of 5 times the float32 weights.
        """
        weights = [array for _, array in tree_flatten(self._weights[""])]
        size = max(1, -(-len(weights) // STEP_PARTS))
        for first in range(0, len(weights), size):
            mx.eval(weights[first : first + size])
        mx.eval(self._model.parameters(), self.optimizer.state, self._weights)

    def _move(self, gradients: Any, factor: mx.array) -> None:
        """Take one optimizer step with `factor` · `gradients`."""
        scaled = tree_map(lambda g: g * factor, gradients)
        weights = self._weights[""]
        if self._config.weight_decay:
            weights = decayed(weights, self.optimizer.learning_rate * self._config.weight_decay)
        moved = dict(tree_flatten(self.optimizer.apply_gradients(scaled, weights)))
        # Restore the order: a compiled function identifies arrays by position, and MLX's MultiOptimizer puts those
        # of its first optimizer first.
        weights = tree_map_with_path(lambda name, _: moved[name], weights)
        self._weights[""] = weights
        before = self._own(self._model.trainable_parameters())
        self._model.update(tree_map(lambda new, old: new.astype(old.dtype), weights, before))

    def _own(self, tree: Any) -> Any:
        """Return the arrays of a tree that this process owns, at the same places."""
        if self._owned is None:
            return tree
        own = [(name, array) for name, array in tree_flatten(tree) if name in self._owned]
        return tree_unflatten(own) if own else {}


def learning_rate(config: LearnerConfig, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up ends at the peak; it never starts at 0 (a first step of rate 0 would waste a rollout). Then the
    rate stays constant, or falls along a line or half a cosine and reaches 0 just after the last step.
    """
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.lr_scheduler_type]
    return config.learning_rate * shape


def _sum_of_squares(tree: Any) -> mx.array:
    total: mx.array = tree_reduce(lambda total, array: total + array.square().sum(), tree, mx.array(0.0))
    return total


def _float32(tree: Any) -> Any:
    """Cast a tree of arrays to float32; arrays that are float32 already stay the same objects."""
    return tree_map(lambda array: array.astype(mx.float32), tree)


def _fill(tree: Any, arrays: Mapping[str, mx.array], prefix: str) -> None:
    """Replace the arrays in `tree` (nested dictionaries and lists) by those with the same dotted names."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, mx.array):
            tree[key] = arrays[f"{prefix}{key}"]
        else:
            _fill(value, arrays, f"{prefix}{key}.")
