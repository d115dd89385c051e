"""The columns of text without a right answer, and of what a model forgot."""

from __future__ import annotations

from grass_ray.results.column import DETAILS, Column
from grass_ray.results.formats import nats, nats_more, number

TEXT_COLUMNS = (
    Column(
        "forgetting",
        "forgot",
        form=nats_more,
        meaning="rise of the loss, in nats a token, on a text that has nothing to do with the task; a mean over seeds",
        place=DETAILS + 10,
        small_first=True,
        mlflow="",
    ),
    Column("forgetting_std", small_first=True),
    Column(
        "bits_per_byte",
        "bits/byte",
        form=nats,
        meaning="loss on held-out text in bits per byte of it, which does not depend on the tokenizer",
        place=DETAILS + 10,
        small_first=True,
        mlflow="",
    ),
    Column(
        "perplexity",
        "perpl.",
        form=lambda value: number(value, 2),
        meaning="perplexity of held-out text: the exponential of its loss per token",
        place=DETAILS + 10,
        small_first=True,
        mlflow="",
    ),
)
