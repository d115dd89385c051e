"""One trial as data: its configuration, and the key that equal configurations share. Imports neither ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass

from grass_ray.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: its configuration, and the key that equal configurations share."""

    config: RunConfig

    @property
    def key(self) -> str:
        """The configuration's fingerprint."""
        return self.config.fingerprint

    @property
    def folder(self) -> str:
        """The trial's folder name inside the sweep's folder."""
        return f"{self.config.name}-{self.key}"
