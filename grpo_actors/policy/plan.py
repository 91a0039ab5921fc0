"""The settings of a conversion: type and quantisation of the weights. Loads no MLX: the command line uses it too."""

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
#: Bits that MLX packs a weight into; each row is divided into groups that share a scale and an offset.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
#: mlx-lm's defaults.
DEFAULT_BITS, GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Plan:
    """How a conversion writes the weights."""

    #: Type of the weights; None keeps the stored type.
    dtype: str | None = None
    #: Bits of a quantised weight; None: not quantised.
    bits: int | None = None
    #: Weights that share a scale and an offset.
    group_size: int = GROUP_SIZE
    #: Whether Python code that comes with the model may run.
    trust_remote_code: bool = False

    @property
    def keeps_weights(self) -> bool:
        """Whether the written weights are exactly the source's: no source stores more than float32."""
        return self.bits is None and self.dtype in (None, "float32")
