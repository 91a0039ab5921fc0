"""Compute the gated delta rule of Qwen3-Next and Qwen 3.5 in chunks, for whole texts and their gradient (2412.06464).

mlx-lm computes it token by token where it has no kernel, and it has none with a gradient: a backward pass then keeps a
state [Dv, Dk] of every head for every token, 108 GB for one layer and 4,096 tokens. Here 64 tokens are one set of matrix
products, and a state is needed only between two chunks. MLX's own `mx.fast.gated_delta_update` does the same with a
kernel, on Metal and for heads of 128 only; elsewhere it is the loop over tokens. So it is used there.

Per token, with state S [Dv, Dk], decay g and rate β:

    S ← g S;   δ = β (v − S k);   S ← S + δ kᵀ;   y = S q

Within a chunk that begins with state S, with Gᵢ = g₁ … gᵢ and the ratios Dᵢⱼ = Gᵢ / Gⱼ for j ≤ i, the rows δᵢ solve
(I + A) δ = β (V − G K Sᵀ), where Aᵢⱼ = βᵢ Dᵢⱼ kᵢ·kⱼ for j < i. Then Y = G Q Sᵀ + (D ∘ Q Kᵀ) δ.

Depends on mlx-lm's function and its callers, not on models or batches.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import gated_delta

#: Tokens of a chunk. Twice as many double the matrices within the chunks; half as many double the states between them.
CHUNK = 64
#: Head sizes of MLX's kernel on Metal.
METAL_HEAD = 128

#: mlx-lm's function: the name under which the modules of its models hold it.
_NAME = "gated_delta_update"


@contextlib.contextmanager
def delta_by_chunks(model: Any) -> Iterator[None]:
    """Compute the gated delta rule of a model's layers in chunks within this block; without such layers, do nothing.

    Backward passes must lie within the block too. This patches mlx-lm's modules, for every thread.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    patched = [module for module in modules if getattr(module, _NAME, None) is gated_delta.gated_delta_update]
    for module in patched:
        setattr(module, _NAME, update)
    try:
        yield
    finally:
        for module in patched:
            setattr(module, _NAME, gated_delta.gated_delta_update)


def delta_layers(model: Any) -> set[Any]:
    """Return the classes of a model's layers that compute the gated delta rule.

    For its gradient each should be computed again as a whole (`recomputation.recomputed_layers`): it keeps three times as
    much as the layers around it, nearly all of it in float32.
    """
    return {kind for kind in {type(module) for module in model.modules()} if _computes_the_rule(kind)}


def _computes_the_rule(kind: Any) -> bool:
    code = getattr(kind.__call__, "__code__", None)  # a module without a forward pass has the one of classes
    return code is not None and _NAME in code.co_names


def update(  # noqa: PLR0917 - mlx-lm's arguments
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **settings: Any,
) -> tuple[mx.array, mx.array]:
    """Compute what mlx-lm's `gated_delta_update` computes; for the arguments see there.

    A single token, and a decay for each element of a key instead of each head (Kimi), are left to mlx-lm.
    """
    plain = not {"lower_bound", "allow_neg_eigval"} & {name for name, value in settings.items() if value}
    if q.shape[1] == 1 or a.ndim > 3 or not plain:
        y, state = gated_delta.gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask, **settings)
        return y, state
    rate = mx.sigmoid(b)
    if state is None:
        state = mx.zeros((len(q), v.shape[2], v.shape[3], q.shape[3]), mx.float32)
    if mask is None and mx.metal.is_available() and q.shape[3] == v.shape[3] == METAL_HEAD:
        y, state = mx.fast.gated_delta_update(q, k, v, gated_delta.compute_g(A_log, a, dt_bias), rate, state)
        return y, state
    # Not the logarithm of mlx-lm's decay, which may be 0.
    log_decay = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias)
    if mask is not None:  # a token that is left out changes nothing
        log_decay, rate = (mx.where(mask[..., None], x, 0) for x in (log_decay, rate))
    return by_chunks(q, k, v, log_decay, rate, state)


def by_chunks(  # noqa: PLR0917 - mlx-lm's order
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, rate: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute the gated delta rule of a text, `CHUNK` tokens at a time, in float32.

    Args:
        q: Queries [B, T, Hk, Dk].
        k: Keys [B, T, Hk, Dk], of length 1 at most.
        v: Values [B, T, Hv, Dv]; Hv is a multiple of Hk.
        log_decay: log g, [B, T, Hv], at most 0.
        rate: β, [B, T, Hv].
        state: S before the first token, [B, Hv, Dv, Dk].

    Returns:
        Outputs [B, T, Hv, Dv] in the type of q, and S after the last token, float32.
    """
    length, repeats = q.shape[1], v.shape[2] // q.shape[2]
    keys, queries = (_chunks(mx.repeat(x, repeats, axis=2) if repeats > 1 else x) for x in (k, q))
    values, rates = _chunks(v), _chunks(rate[..., None])
    at = mx.arange(CHUNK)
    lower, strictly_lower = at[:, None] >= at, at[:, None] > at
    # Padding: log g = 0 and β = 0 leave the state as it is.
    logs = _chunks(log_decay[..., None])
    total = mx.cumsum(logs, axis=-2)  # log G
    # The sum of each stretch by itself: the difference of two long sums has the rounding of both.
    stretches = mx.cumsum(mx.where(strictly_lower, logs, 0), axis=-2)
    ratios = mx.exp(mx.where(lower, stretches, -mx.inf))  # D
    strict = mx.where(strictly_lower, rates * ratios * (keys @ keys.swapaxes(-1, -2)), 0)  # A
    given = mx.concatenate([rates * values, rates * mx.exp(total) * keys], axis=-1)
    inverse: mx.array = _inverse_of_unit(strict)  # type: ignore[assignment]
    of_values, of_keys = mx.split(inverse @ given, [v.shape[3]], axis=-1)
    end, to_end = total[..., -1:, :], ratios[..., -1:, :].swapaxes(-1, -2)
    # Split and not indexed: the gradient of each index would be an array of the whole text.
    steps = zip(
        *(
            mx.split(x, x.shape[2], axis=2)
            for x in (
                *(of_values, of_keys, mx.exp(total) * queries, ratios * (queries @ keys.swapaxes(-1, -2))),
                *(to_end * keys, mx.exp(end)),
            )
        ),
        strict=True,
    )
    state, outputs = state.astype(mx.float32)[:, :, None], []
    for of_value, of_key, query, within, key, kept in steps:
        deltas = of_value - of_key @ state.swapaxes(-1, -2)
        outputs.append(query @ state.swapaxes(-1, -2) + within @ deltas)
        state = kept * state + deltas.swapaxes(-1, -2) @ key
    y = mx.concatenate(outputs, axis=2).flatten(2, 3)[:, :, :length]
    return y.swapaxes(1, 2).astype(q.dtype), state[:, :, 0]


def _chunks(x: mx.array) -> mx.array:
    """Divide [B, T, H, D] into chunks [B, H, N, CHUNK, D] in float32, padded with zeros."""
    rows, length, heads, size = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % CHUNK), (0, 0), (0, 0)])
    return x.reshape(rows, -1, CHUNK, heads, size).transpose(0, 3, 1, 2, 4)


@mx.custom_function
def _inverse_of_unit(strict: mx.array) -> mx.array:
    """Return (I + A)⁻¹ of strictly lower triangular matrices A [.., n, n], with n a power of two.

    From the inverses of two diagonal blocks follows that of the block of both:
    [[P, 0], [C, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ C P⁻¹, Q⁻¹]]. The powers of A would be fewer products, but their
    entries grow like binomial coefficients.
    """
    n = strict.shape[-1]
    inverse, index, size = mx.eye(n), mx.arange(n), 1
    while size < n:
        block, half = index // (2 * size), index // size
        joins = (block[:, None] == block) & (half[:, None] > half)
        inverse = inverse - inverse @ mx.where(joins, strict, 0) @ inverse
        size *= 2
    return inverse


@_inverse_of_unit.vjp
def _gradient_of_inverse(strict: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    del strict
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)
