"""cuBLAS's products, on a stream of our own; the library is the one that MLX has loaded.

A product is X Wᵀ + b + C with X [M, K], W [N, K], b [N] and C [M, N], all of one type of 16 bits and in rows. cuBLAS counts
in columns: there the result is W Xᵀ, [N, M].
"""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from grpo_actors.policy.cuda_driver import Stream
from grpo_actors.policy.shared_library import CudaError, check, open_loaded

#: Bytes of scratch memory, as cuBLAS's manual advises for this generation.
WORKSPACE_BYTES = 32 << 20
#: Types of numbers, in cuBLAS's numbering.
TYPES = {mx.bfloat16: 14, mx.float16: 2}
#: cuBLAS's numbers: sums and factors in float32; attributes of a product and of a search; the epilogue that adds b.
_SUMS_IN_FLOAT, _FLOAT = 68, 0
_TRANSPOSE_FIRST, _EPILOGUE, _BIAS_ADDRESS = 3, 7, 8
_MAX_WORKSPACE, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_WITH_BIAS = 4
#: Bytes: weights may be parts of a larger array.
_ALIGNMENT = 16


class _Choice(ctypes.Structure):
    """One of cuBLAS's ways to compute a product (cublasLtMatmulHeuristicResult_t)."""

    _fields_ = (
        ("way", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a product [M, K] × [K, N], its type, and whether a bias is added."""

    rows: int
    inner: int
    columns: int
    dtype: mx.Dtype
    biased: bool


class Product:
    """cuBLAS's way to compute products of one shape."""

    def __init__(self, shape: Shape) -> None:
        """Ask cuBLAS for its way.

        Raises:
            CudaError: cuBLAS is not there, or has none.
        """
        self._cublas, kind = _library(), TYPES[shape.dtype]
        self._handle, self._description = _handle(), ctypes.c_void_p()
        self._call("MatmulDescCreate", ctypes.byref(self._description), _SUMS_IN_FLOAT, _FLOAT)
        self._set(_TRANSPOSE_FIRST, ctypes.c_int32(1))
        if shape.biased:
            self._set(_EPILOGUE, ctypes.c_uint32(_WITH_BIAS))
        self._weight = self._layout(kind, shape.inner, shape.columns)
        self._x = self._layout(kind, shape.inner, shape.rows)
        self._out = self._layout(kind, shape.columns, shape.rows)
        self._choice = self._search()

    def submit(
        self, stream: Stream, x: int, weight: int, out: int, workspace: int, *, bias: int | None, add: bool
    ) -> None:
        """Submit out = X Wᵀ + b, plus what `out` holds if `add`; all are addresses on the device."""
        if bias is not None:
            self._set(_BIAS_ADDRESS, ctypes.c_void_p(bias))
        one, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
        first = ctypes.c_void_p(weight), self._weight, ctypes.c_void_p(x), self._x
        result = ctypes.c_void_p(out), self._out
        factors = ctypes.byref(one), ctypes.byref(beta)
        scratch = ctypes.c_void_p(workspace), ctypes.c_size_t(WORKSPACE_BYTES)
        way = ctypes.byref(self._choice.way)
        formula = self._description, factors[0], *first, factors[1], *result, *result
        self._call("Matmul", self._handle, *formula, way, *scratch, stream.handle)

    def _search(self) -> _Choice:
        preference, choice, found = ctypes.c_void_p(), _Choice(), ctypes.c_int()
        self._call("MatmulPreferenceCreate", ctypes.byref(preference))
        try:
            limits: list[tuple[int, Any]] = [(_MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE_BYTES))]
            limits += [(which, ctypes.c_uint32(_ALIGNMENT)) for which in _MIN_ALIGNMENTS]
            for attribute, value in limits:
                size = ctypes.c_size_t(ctypes.sizeof(value))
                self._call("MatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value), size)
            layouts = self._weight, self._x, self._out, self._out
            asked = self._handle, self._description, *layouts, preference, 1, ctypes.byref(choice)
            self._call("MatmulAlgoGetHeuristic", *asked, ctypes.byref(found))
        finally:
            self._call("MatmulPreferenceDestroy", preference)
        if not found.value:
            raise CudaError("cuBLAS knows no way to compute a product")
        return choice

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        self._call("MatrixLayoutCreate", ctypes.byref(layout), kind, *sizes)
        return layout

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call("MatmulDescSetAttribute", self._description, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        check(getattr(self._cublas, f"cublasLt{name}")(*arguments), f"cublasLt{name}", "cuBLAS")


@cache
def product(shape: Shape) -> Product:
    """Return the way for a shape; cuBLAS is asked once."""
    return Product(shape)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return open_loaded("libcublasLt.so")


@lru_cache(maxsize=1)
def _handle() -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    check(_library().cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate", "cuBLAS")
    return handle
