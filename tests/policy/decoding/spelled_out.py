"""Reference versions of our kernels, written with MLX operations."""

import mlx.core as mx


def attend_joined(joined, past, heads, rotation, norms=None):
    """Compute the same as `slot_kernels.attend_joined`."""
    rows, size, cache, layer, lengths = len(joined), heads.size, past.cache, past.layer, past.lengths
    all_heads = joined.reshape(rows, -1, size)
    queries, keys, values = mx.split(all_heads, [heads.queries, heads.queries + heads.keys], axis=1)
    if norms:
        queries, keys = (
            mx.fast.rms_norm(x, w, heads.eps) for x, w in zip((queries, keys), norms, strict=True)
        )
    cos, sin = mx.split(rotation[:, None], 2, axis=-1)

    def rotated(x):
        first, second = mx.split(x, 2, axis=-1)
        return mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    for which, new in enumerate((rotated(keys), values)):
        cache[layer, which, mx.arange(rows), :, lengths] = new
    shared = heads.queries // heads.keys
    held = [mx.repeat(cache[layer, which], shared, axis=1) for which in range(2)]
    scores = heads.scale * (held[0] @ rotated(queries)[..., None])[..., 0]
    seen = mx.arange(cache.shape[4]) <= lengths[:, None, None]
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1)
    return (weights[..., None, :] @ held[1])[..., 0, :].reshape(rows, -1)


def attend_rows(queries, keys, values, past, scale):
    """Compute the same as `slot_kernels.attend_rows`."""
    rows, cache, layer, lengths = len(queries), past.cache, past.layer, past.lengths
    for which, new in enumerate((keys, values)):
        cache[layer, which, mx.arange(rows), :, lengths] = new[:, :, 0]
    seen = (mx.arange(cache.shape[4]) <= lengths[:, None])[:, None, None]
    return mx.fast.scaled_dot_product_attention(
        queries, cache[layer, 0], cache[layer, 1], scale=scale, mask=seen
    )


def place_prompts(prompts, chosen, cache, rows, width):
    """Do the same as `slot_kernels.place_prompts`."""
    for row, prompt in zip(rows.tolist(), chosen.tolist(), strict=True):
        cache[:, :, row, :, : width.item()] = prompts[:, :, prompt, :, : width.item()]
    return cache
