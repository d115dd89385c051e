"""What a delta says of itself: ``delta.json``, which names its base model and has the hashes of all its tensors.

::

    print(read_delta(Path("my-delta")).describe())
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from grass_ray.config import ConfigError, ConfigPart, check_ordinary
from grass_ray.reading import parse_json, read_file

FORMAT = 1
MANIFEST = "delta.json"
VALUES = "delta.safetensors"


class BaseTensor(ConfigPart):
    """A tensor of the base model."""

    shape: tuple[int, ...]
    dtype: str
    tied: tuple[str, ...]
    """Other names of the same tensor."""
    base_sha256: str
    """Hash of the tensor's raw bytes."""


class ChangedTensor(BaseTensor):
    """A tensor whose new values are in the delta."""

    sha256: str
    """Hash of the new values' raw bytes."""


class Delta(ConfigPart):
    """The contents of ``delta.json``."""

    format: int
    base_model: str
    """Built-in name, hub id or folder."""
    base_revision: str | None
    base_dtype: str
    layers: tuple[int, ...]
    """Decoder layers with a tensor that changed, counted from 0."""
    num_layers: int
    delta_bytes: int
    """Size of the changed tensors; a tensor with several names counts once."""
    model_bytes: int = Field(gt=0)
    """Size of all tensors; a tensor with several names counts once."""
    changed: dict[str, ChangedTensor]
    unchanged: dict[str, BaseTensor]
    others: tuple[str, ...]
    """Tensors that changed outside the decoder layers."""

    def describe(self) -> str:
        """Sizes, layers and base model in one sentence."""
        plural = "s" if len(self.layers) > 1 else ""
        parts = [f"decoder layer{plural} {', '.join(map(str, self.layers))} (of {self.num_layers}, counted from 0)"]
        if not self.layers:
            parts = [f"none of the {self.num_layers} decoder layers"]
        parts += self.others[:3]
        if len(self.others) > 3:
            parts.append(f"{len(self.others) - 3} more tensors")
        return (
            f"{self.delta_bytes / 1024**2:.2f} of {self.model_bytes / 1024**2:.2f} MiB "
            f"({100 * self.delta_bytes / self.model_bytes:.1f} %): {'; '.join(parts)}; base model {self.source}"
        )

    @property
    def source(self) -> str:
        """The base model's name, revision and dtype."""
        return f"{self.base_model} ({', '.join(filter(None, (self.base_revision, self.base_dtype)))})"


def read_delta(folder: Path) -> Delta:
    """Read ``delta.json`` of the delta in ``folder``.

    Raises:
        ConfigError: there is no ``delta.json`` of this format.
    """
    try:
        check_ordinary(folder / MANIFEST)
        values = parse_json(read_file(folder / MANIFEST, "its description"), MANIFEST)
    except ValueError as error:
        raise ConfigError(f"{folder} is not a readable delta: {error}") from None
    given = values.get("format") if isinstance(values, dict) else None
    if given != FORMAT:
        raise ConfigError(f"{folder} has delta format {given}; this version reads {FORMAT}")
    try:
        return Delta.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{folder} is not a readable delta: {MANIFEST}: {where}: {first['msg']}") from error
