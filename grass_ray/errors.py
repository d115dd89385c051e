"""The error of a user's mistake."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake: what was given, the rule, what is available. Command lines exit with 2 on it."""
