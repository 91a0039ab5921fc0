"""What a conversion makes of the weights. Loads no MLX: the command line asks too."""

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
#: What MLX packs weights into; rows are cut into groups that share a scale and an offset.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
#: mlx-lm's defaults.
DEFAULT_BITS, GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Plan:
    """`dtype` None: as the weights are stored; `bits` None: not quantised."""

    dtype: str | None = None
    bits: int | None = None
    group_size: int = GROUP_SIZE
    #: Whether Python code that lies beside the weights may run.
    trust_remote_code: bool = False

    @property
    def keeps_weights(self) -> bool:
        """Whether what is written is the source's own values: no source stores more than float32."""
        return self.bits is None and self.dtype in (None, "float32")
