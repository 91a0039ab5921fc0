"""A decoding step on CUDA that is recorded once, and then submitted as a whole by one call of the driver.

MLX takes about 12 µs of the host for each of a step's 200 kernels, and the GPU a third of that: a worker waited for its own
processor. So the step of `blocks` is submitted once, with cuBLAS's products and our own kernels, to a stream that records
it; each step then costs the host four calls. What changes from step to step (lengths, random numbers, tokens that are not
drawn) is copied to the device before it, and the drawn tokens are copied back after it.

The step works on MLX's arrays behind MLX's back, like the kernels of `slot_kernels`. Its stream does not wait for MLX's, so:

- All arrays exist before the step is recorded, and are kept until it is closed. None is ever read by the host, because MLX
  would move it.
- `rest` is called before MLX changes a cache, and `step` waits for MLX first if it has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from grpo_actors.policy import cublas
from grpo_actors.policy.cuda_driver import Array, Event, HostBuffer, Recording, Stream, function
from grpo_actors.policy.cuda_kernel import Constant, CudaKernel, cuda_kernel
from grpo_actors.policy.decoding import draw_kernel, slot_kernels, step_kernels
from grpo_actors.policy.decoding.blocks import Arrays, Blocks
from grpo_actors.policy.decoding.draw import SamplingParams
from grpo_actors.policy.decoding.slots import Slots

#: Warps of a block that reads a row of the model's width, and one of the vocabulary's.
NORM_WARPS, LARGEST_WARPS = 4, 16
#: Threads of a block of the gate.
GATE_THREADS = 128

_ADDRESS = "if (threadIdx.x == 0) address[0] = reinterpret_cast<long>(array);"


def fits(arrays: Arrays, params: SamplingParams) -> bool:
    """Return whether a step of these blocks and parameters can be recorded."""
    embedding = arrays["embedding"]
    widths = (embedding.shape[1], arrays["layers"][0]["gate_up"]["weight"].shape[0] // 2)
    greedy = params.temperature == 0 and params.repetition_penalty == 1
    return (
        params.compiled
        and embedding.dtype in cublas.TYPES
        and all(width % 8 == 0 for width in widths)
        and (greedy or draw_kernel.fits(params))
    )


@dataclass(frozen=True, slots=True)
class Region:
    """An array on the device, or a part of one: its address, and what a kernel is compiled for."""

    address: int
    dtype: mx.Dtype
    shape: tuple[int, ...] = (1,)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def after(self, count: int) -> "Region":
        """Return the region that begins `count` numbers later."""
        return Region(self.address + count * self.dtype.size, self.dtype, self.shape)


class Landing:
    """The tokens and log-probs of a step that was submitted."""

    def __init__(self, event: Event, buffer: HostBuffer, rows: int) -> None:
        self._event, self._buffer, self._rows = event, buffer, rows
        self._results: tuple[list[int], list[float]] | None = None

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for the step, and return the token and the log-prob of each row."""
        if self._results is None:
            self._event.wait()
            tokens, logprobs = self._buffer.array[: self._rows], self._buffer.array[self._rows :]
            self._results = tokens.tolist(), logprobs.view(np.float32).tolist()
        return self._results


class RecordedStep:
    """The step of one model's weights, on the slots of one batch."""

    def __init__(self, blocks: Blocks, arrays: Arrays, params: SamplingParams) -> None:
        """Prepare to record; the slots are known at the first step.

        Raises:
            OSError: CUDA refuses something.
        """
        self._blocks, self._params = blocks, params
        self._arrays: Arrays = tree_map(mx.contiguous, arrays)
        mx.eval(self._arrays)
        self._stream = Stream()
        self._cache: mx.array | None = None
        self._recording: Recording | None = None
        self._turn = 0
        #: Two of each: a step is submitted before the results of the one before it are read.
        self._events = Event(), Event()
        self._uploads: Sequence[HostBuffer] = ()
        self._downloads: Sequence[HostBuffer] = ()
        self._landing: Landing | None = None
        #: [R, V], of the last step; for comparisons.
        self.logits: mx.array | None = None

    def step(self, slots: Slots, uniforms: Array, given: Mapping[int, int]) -> Landing:
        """Submit a step of every row.

        Args:
            slots: The rows; the same object at each call.
            uniforms: [R] float32 in [0, 1).
            given: Tokens that rows are fed instead of those that were drawn in the step before.

        Raises:
            OSError: CUDA refuses something.
        """
        if slots.cache is not self._cache:
            self._record(slots)
        if slots.changed:
            mx.synchronize()
            slots.changed = False
        assert self._recording is not None
        turn, self._turn = self._turn, 1 - self._turn
        upload, download, event = self._uploads[turn], self._downloads[turn], self._events[turn]
        rows = len(uniforms)
        inputs = upload.array
        inputs[:rows] = slots.lengths
        inputs[rows : 2 * rows] = -1
        inputs[rows : 2 * rows][list(given)] = list(given.values())
        inputs[2 * rows :] = uniforms.view(np.int32)
        self._stream.upload(upload, self._inputs.address)
        self._recording.run()
        self._stream.download(self._drawn.address, download)
        event.mark(self._stream)
        self._landing = Landing(event, download, rows)
        return self._landing

    def rest(self) -> None:
        """Wait until the device has ended what was submitted."""
        self._stream.wait()

    def close(self) -> None:
        """Drop the recording and the weights; the last landing can still be read."""
        if self._landing is not None:
            self._landing.read()
        self._forget()
        for owned in (*self._events, self._stream):
            owned.close()
        self._arrays, self.logits = {}, None

    def _forget(self) -> None:
        self._stream.wait()
        if self._recording is not None:
            self._recording.close()
        for buffer in (*self._uploads, *self._downloads):
            buffer.close()
        self._recording, self._uploads, self._downloads = None, (), ()

    # --- recording --------------------------------------------------------------------------------

    def _record(self, slots: Slots) -> None:
        """Make the arrays of a step over `slots`, and record it."""
        if self._landing is not None:
            self._landing.read()
        self._forget()
        rows = len(slots.lengths)
        self._uploads = tuple(HostBuffer(3 * rows, np.int32) for _ in range(2))
        self._downloads = tuple(HostBuffer(2 * rows, np.uint32) for _ in range(2))
        self._make_arrays(slots)
        self._cache = slots.cache
        self._recording = Recording(self._stream, self._submit)

    def _make_arrays(self, slots: Slots) -> None:
        cache, arrays, heads = slots.cache, self._arrays, self._blocks.heads
        assert cache is not None
        rows, columns, dtype = cache.shape[2], cache.shape[4], cache.dtype
        first = arrays["layers"][0]
        width, joined = arrays["embedding"].shape[1], first["queries_keys_values"]["weight"].shape[0]
        gate_up, vocabulary = first["gate_up"]["weight"].shape[0], arrays["head"]["weight"].shape[0]
        self.logits = mx.zeros((rows, vocabulary), dtype)
        temperature = self._params.temperature or 1.0
        made = {
            "cache": cache,
            "drawn": slots.drawn,
            "inputs": mx.zeros(3 * rows, mx.int32),
            "x": mx.zeros((rows, width), dtype),
            "normed": mx.zeros((rows, width), dtype),
            "joined": mx.zeros((rows, joined), dtype),
            "mixed": mx.zeros((rows, heads.queries * heads.size), dtype),
            "gate_up": mx.zeros((rows, gate_up), dtype),
            "gated": mx.zeros((rows, gate_up // 2), dtype),
            "logits": self.logits,
            "rotation": mx.zeros((rows, heads.size), mx.float32),
            "table": self._blocks.rotation(mx.arange(columns)),
            "layers": mx.arange(len(cache)).astype(mx.int32),
            "numbers": mx.array([heads.scale, heads.eps, self._blocks.eps, temperature]),
            "workspace": mx.zeros(cublas.WORKSPACE_BYTES, mx.uint8),
        }
        self._kept = made
        regions = dict(zip(made, _regions(made.values()), strict=True))
        self._inputs, self._drawn = regions["inputs"], regions["drawn"]
        self._at = regions
        self._weights = _regions_of(arrays)

    def _submit(self) -> None:
        """Submit the step: as `Blocks.logits`, then a draw."""
        at, weights, rows = self._at, self._weights, self._at["x"].shape[0]
        scale, head_eps, eps, temperature = (at["numbers"].after(i) for i in range(4))
        x, normed, joined = at["x"], at["normed"], at["joined"]
        dtype, width, size = x.dtype, x.shape[1], self._blocks.heads.size
        tokens, logprobs = at["drawn"], Region(at["drawn"].address + 4 * rows, mx.float32)
        uniforms = Region(at["inputs"].address + 8 * rows, mx.float32)

        begin = cuda_kernel(
            "step_begin", step_kernels.BEGIN_INPUTS, step_kernels.BEGIN_OUTPUTS, step_kernels.BEGIN
        )
        self._launch(
            begin,
            [tokens, at["inputs"], weights["embedding"], at["table"]],
            [x, at["rotation"]],
            [("WIDTH", width), ("D", size)],
            ((rows, 1, 1), 128),
        )
        norms = [layer.get("head_norms") for layer in weights["layers"]]
        attention = slot_kernels.attention_of(
            self._blocks.heads, dtype, rows, joined=True, normed=norms[0] is not None
        )
        for i, layer in enumerate(weights["layers"]):
            self._norm(x, layer["attention_norm"], eps, normed)
            self._product(normed, layer["queries_keys_values"], joined)
            self._launch(
                attention.kernel,
                [
                    *(joined, joined, joined, at["cache"], at["layers"].after(i), at["inputs"]),
                    *(scale, at["rotation"], *(norms[i] or (joined, joined)), head_eps),
                ],
                [at["mixed"]],
                attention.constants,
                ((attention.blocks, rows, 1), attention.threads),
            )
            self._product(at["mixed"], layer["out"], x, add=True)
            self._norm(x, layer["mlp_norm"], eps, normed)
            self._product(normed, layer["gate_up"], at["gate_up"])
            self._gate(at["gate_up"], at["gated"])
            self._product(at["gated"], layer["down"], x, add=True)
        self._norm(x, weights["norm"], eps, normed)
        self._product(normed, weights["head"], at["logits"])
        self._draw(at["logits"], uniforms, temperature, [tokens, logprobs])

    def _norm(self, x: Region, weight: Region, eps: Region, out: Region) -> None:
        rows, width = x.shape
        kernel = cuda_kernel("step_norm", step_kernels.RMS_NORM_INPUTS, ("out",), step_kernels.RMS_NORM)
        constants: list[Constant] = [("T", x.dtype), ("WIDTH", width), ("W", NORM_WARPS)]
        self._launch(kernel, [x, weight, eps], [out], constants, ((rows, 1, 1), 32 * NORM_WARPS))

    def _gate(self, gate_up: Region, out: Region) -> None:
        rows, width = out.shape
        kernel = cuda_kernel("step_gate", ("gate_up",), ("out",), step_kernels.GATED)
        blocks = -(-width // (8 * GATE_THREADS))
        constants: list[Constant] = [("T", out.dtype), ("WIDTH", width)]
        self._launch(kernel, [gate_up], [out], constants, ((blocks, rows, 1), GATE_THREADS))

    def _product(self, x: Region, linear: Mapping[str, Region], out: Region, *, add: bool = False) -> None:
        bias = linear.get("bias")
        shape = cublas.Shape(x.shape[0], x.shape[1], out.shape[1], x.dtype, biased=bias is not None)
        submit = partial(cublas.product(shape).submit, self._stream, x.address, linear["weight"].address)
        address = None if bias is None else bias.address
        submit(out.address, self._at["workspace"].address, bias=address, add=add)

    def _draw(self, logits: Region, uniforms: Region, temperature: Region, out: Sequence[Region]) -> None:
        rows, vocabulary = logits.shape
        if self._params.temperature > 0:
            constants = draw_kernel.constants(logits.dtype, vocabulary)
            inputs, threads = [logits, uniforms, temperature], 32 * draw_kernel.WARPS
            self._launch(draw_kernel.kernel(), inputs, out, constants, ((rows, 1, 1), threads))
        else:
            largest = cuda_kernel("step_largest", ("logits",), ("token", "logprob"), step_kernels.LARGEST)
            constants = [("T", logits.dtype), ("W", LARGEST_WARPS)]
            self._launch(largest, [logits], out, constants, ((rows, 1, 1), 32 * LARGEST_WARPS))

    def _launch(
        self,
        kernel: CudaKernel,
        inputs: Sequence[Region],
        outputs: Sequence[Region],
        constants: Sequence[Constant],
        grid: tuple[tuple[int, int, int], int],
    ) -> None:
        """Submit a kernel; `grid` has its blocks and the threads of each."""
        symbol, code = kernel.compiled(inputs, [region.dtype for region in outputs], constants)
        addresses = [region.address for region in (*inputs, *outputs)]
        self._stream.launch(function(symbol, code), *grid, addresses, kernel.sizes(inputs))


def _regions(arrays: Iterable[mx.array]) -> list[Region]:
    """Return where evaluated, contiguous arrays are on the device."""
    kernel, arrays = cuda_kernel("address", ("array",), ("address",), _ADDRESS), list(arrays)
    addresses: list[mx.array] = []
    for array in arrays:
        addresses += kernel(
            inputs=[array.reshape(-1)],
            output_shapes=[(1,)],
            output_dtypes=[mx.int64],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    found: list[int] = np.array(mx.concatenate(addresses)).tolist()
    return [Region(address, array.dtype, array.shape) for address, array in zip(found, arrays, strict=True)]


def _regions_of(arrays: Arrays) -> Any:
    """Return the same tree with the region of each array."""
    found = iter(_regions(array for _, array in tree_flatten(arrays)))
    return tree_map(lambda _: next(found), arrays)
