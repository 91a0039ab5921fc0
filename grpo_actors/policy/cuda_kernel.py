"""Our own CUDA kernels: compiled at their first call, and kept in the folder of MLX's kernels.

`mx.fast.cuda_kernel` compiles a kernel in every process, for 2.5 s (H200): MLX puts its own headers before it, and does not
keep the result. Ours need no header. So they are compiled here, once for each GPU, and MLX runs the machine code.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from grpo_actors.backend import KERNELS
from grpo_actors.policy.nvrtc import compile_source

#: Type in MLX -> type in a kernel.
_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "unsigned char",
    mx.uint16: "unsigned short",
    mx.uint32: "unsigned int",
    mx.int32: "int",
    mx.int64: "long",
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
    mx.float32: "float",
}

# Numbers of 16 bits as a kernel computes with them: it reads and writes them as float. Rounds to nearest even.
_HALF_TYPES = """
struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ explicit bfloat16(float x) {
    const unsigned int all = __float_as_uint(x);
    bits = x == x ? (all + 0x7fff + (all >> 16 & 1)) >> 16 : 0x7fc0;
  }
  __device__ operator float() const { return __uint_as_float((unsigned int)bits << 16); }
};
struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ explicit float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
"""

#: A constant of a kernel: a type or a value; and with its name.
Value = mx.Dtype | int | bool
Constant = tuple[str, Value]


class Typed(Protocol):
    """An array, or what stands for one."""

    @property
    def dtype(self) -> mx.Dtype:
        """The type of its numbers."""

    @property
    def ndim(self) -> int:
        """The number of its axes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


class CudaKernel:
    """One kernel: the names of its arrays, and its body."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], body: str) -> None:
        """Describe a kernel; nothing is compiled yet.

        Args:
            name: Its name in messages.
            inputs: The input arrays. The body may read the sizes of ``x`` as ``x_shape``.
            outputs: The output arrays.
            body: CUDA C++ without headers. Numbers of 16 bits are structs that convert to float, and explicitly from it.
        """
        self._name, self._inputs, self._outputs, self._body = name, inputs, outputs, body
        self._shaped = [f"{input_}_shape" in body for input_ in inputs]
        self._compiled: dict[tuple[Any, ...], tuple[str, bytes]] = {}

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[Constant] = (),
    ) -> list[mx.array]:
        """Return the outputs; the kernel runs when they are evaluated.

        Args:
            inputs: One array for each name; copied first if it is not contiguous.
            output_shapes: The shapes of the outputs.
            output_dtypes: Their types.
            grid: Threads in each dimension.
            threadgroup: Threads of a block in each dimension.
            template: Constants, declared before the body.

        Raises:
            OSError: The kernel cannot be compiled.
        """
        symbol, code = self.compiled(inputs, output_dtypes, template)
        return mx.fast.precompiled_cuda_kernel(
            name=symbol,
            compiled_source=code,
            inputs=list(inputs),
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
            scalars=self.sizes(inputs),
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    def compiled(
        self, inputs: Sequence[Typed], output_dtypes: Sequence[mx.Dtype], template: Sequence[Constant] = ()
    ) -> tuple[str, bytes]:
        """Return the kernel's symbol and its machine code, whose parameters are: inputs, outputs, and the `sizes`.

        Raises:
            OSError: The kernel cannot be compiled.
        """
        key = (
            *(array.dtype for array in inputs),
            *(array.ndim for array in inputs),
            *(*output_dtypes, *template),
        )
        if key not in self._compiled:
            self._compiled[key] = self._compile(inputs, output_dtypes, template)
        return self._compiled[key]

    def sizes(self, inputs: Sequence[Typed]) -> list[int]:
        """Return the sizes of the inputs whose ``x_shape`` the body reads."""
        return [
            size
            for array, shaped in zip(inputs, self._shaped, strict=True)
            for size in (array.shape if shaped else ())
        ]

    def _compile(
        self, inputs: Sequence[Typed], output_dtypes: Sequence[mx.Dtype], template: Sequence[Constant]
    ) -> tuple[str, bytes]:
        """Return the kernel's symbol and its machine code."""
        source = self._source(inputs, output_dtypes, template)
        # MLX knows a kernel by its symbol alone, in memory and on disk.
        digest = hashlib.sha256(f"{_architecture()}\n{source}".encode()).hexdigest()
        symbol = f"{self._name}_{digest[:16]}"
        kept = _code_file(symbol)
        if kept is not None and kept.exists():
            return symbol, kept.read_bytes()
        source = source.replace("KERNEL(", f"{symbol}(")
        code = compile_source(source, self._name, _architecture())
        if kept is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk: the next process compiles again
                _keep(kept, symbol, source, code)
        return symbol, code

    def _source(
        self, inputs: Sequence[Typed], output_dtypes: Sequence[mx.Dtype], template: Sequence[Constant]
    ) -> str:
        """Return the whole source of a kernel with the symbol KERNEL."""
        arrays = list(zip(self._inputs, inputs, self._shaped, strict=True))
        sizes = {
            f"{name}_shape": [f"{name}_size_{axis}" for axis in range(array.ndim)]
            for name, array, shaped in arrays
            if shaped
        }
        parameters = [
            *(f"const {_TYPES[array.dtype]}* {name}" for name, array, _ in arrays),
            *(f"{_TYPES[dtype]}* {name}" for name, dtype in zip(self._outputs, output_dtypes, strict=True)),
            *(f"int {size}" for names in sizes.values() for size in names),
        ]
        declarations = [
            *(f"const int {name}[] = {{{', '.join(names)}}};" for name, names in sizes.items()),
            *(_declared(name, value) for name, value in template),
        ]
        signature = f'extern "C" __global__ void KERNEL({", ".join(parameters)}) {{'
        return "\n".join((_HALF_TYPES, signature, *declarations, self._body, "}"))


@lru_cache(maxsize=16)
def cuda_kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str) -> CudaKernel:
    """Return the one `CudaKernel` with these arguments, so that it is compiled once in a process."""
    return CudaKernel(name, inputs, outputs, body)


@lru_cache(maxsize=512, typed=True)
def constant(value: float) -> mx.array:
    """Return an array [1] of the type of `value`; cached, because a step needs many."""
    return mx.array([value])


@lru_cache(maxsize=1)
def _architecture() -> str:
    return str(mx.device_info(mx.gpu)["architecture"])


def _code_file(symbol: str) -> Path | None:
    """Return where the machine code of a kernel is kept; None without a folder for kernels."""
    folder = os.environ.get(KERNELS)
    return Path(folder, f"{symbol}.ptx") if folder else None


def _keep(path: Path, symbol: str, source: str, code: bytes) -> None:
    """Keep a kernel as MLX does: its symbol, its source, and last its code, which must be whole when others see it."""
    path.with_suffix(".txt").write_text(f"{symbol}\t{symbol}\n")
    path.with_suffix(".cu").write_text(source)
    draft = path.with_suffix(f".{os.getpid()}.tmp")  # another process may be keeping the same kernel
    draft.write_bytes(code)
    draft.replace(path)


def _declared(name: str, value: Value) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};"
    return f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};"
