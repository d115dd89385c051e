"""The error of a user's mistake, and what no message may say."""

from __future__ import annotations

import os
import re

_SECRETS = re.compile(
    r"(?<=://)[^/\s?#]*:?[^/\s?#]*(?=@)"  # user:password@
    r"|(?<=[Bb]earer )\S+"
    r"|\b(?:hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}|sk-[A-Za-z0-9_-]{16,})"
    r"|(?<=[?&])((?:[\w-]+[_-])?(?:token|password|passwd|secret|signature|sig|key|credential)s?=)[^&\s#'\"]+",
    re.IGNORECASE,
)
_SECRET_NAMES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|API_?KEY|ACCESS_KEY)$")
MASK = "***"
_SHORTEST = 8  # characters of a secret that is looked for: a shorter one stands in ordinary words, too


class ConfigError(ValueError):
    """A user's mistake: what was given, the rule, what is available. Command lines exit with 2 on it."""


def redact(text: str) -> str:
    """Replace what is secret with ``***``.

    These are passwords and tokens in URLs, tokens of well-known services, and the values of environment variables whose
    names end with ``TOKEN``, ``PASSWORD``, ``SECRET``, ``KEY`` and the like.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAMES.search(name.upper()):
            text = text.replace(value, MASK)
    return _SECRETS.sub(lambda found: f"{found[1] or ''}{MASK}", text)
