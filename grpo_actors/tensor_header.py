"""The header of a safetensors file, which lists its arrays. Loads no MLX."""

from pathlib import Path


def header_of(path: Path) -> bytes | None:
    """Return the header, an object of JSON; None if the file is of another kind, or cut off before the header's end."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(size) if 8 + size <= path.stat().st_size else None
