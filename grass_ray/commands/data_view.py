"""Show a data set before training: rendered examples with what is learned, and lengths."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from grass_ray.config import DatasetSource, RunConfig
from grass_ray.training.survey import DataSurvey, RenderedExample

BAR = 30  # characters of the longest bar
MOST_CHARACTERS = 800  # of a segment; its middle is left out


def show_data(configs: Iterable[RunConfig], console: Console) -> None:
    """Show each different data set of the user's own once for each model."""
    from grass_ray.training.checks import tokenizer_to_check
    from grass_ray.training.survey import survey_data

    distinct = {(config.model, config.data): config for config in configs}
    for config in distinct.values():
        if isinstance(config.data.source, DatasetSource):
            print_survey(survey_data(config, tokenizer_to_check(config.model)), console)


def print_survey(survey: DataSurvey, console: Console) -> None:
    """Print a survey. Where there are no colours, learned text is marked as in a word diff: ``{+learned+}``."""

    def say(text: str | Text) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(f"data      {survey.description}")
    say(f"rendered  {survey.rendering}")
    learned = 100 * sum(survey.learned) / sum(min(length, survey.limit) for length in survey.lengths)
    say(
        f"tokens    {min(survey.lengths)} to {max(survey.lengths)} a row, median {survey.median_length:g}; "
        f"{learned:.0f} % of them are learned; data.max_length_tokens is {survey.limit}"
    )
    most = max(count for _, _, count in survey.histogram)
    for low, high, count in survey.histogram:
        bar = "█" * round(BAR * count / most) or ("▏" if count and console.encoding.startswith("utf") else "")
        beyond = "  beyond the maximum" if low > survey.limit and count else ""
        say(f"{f'{low}-{high}':>17} {bar} {count}{beyond}".rstrip())
    if survey.duplicates:
        say(f"twice     {survey.duplicates} rows are equal to an earlier one; they are kept")
    if survey.numbers:
        say(f"numbers   {survey.numbers} values are numbers; they are learned as text")
    for example in survey.examples:
        cut = f", cut at {survey.limit}" if example.tokens > survey.limit else ""
        say(f"example   {example.which}: {example.tokens} tokens{cut}, {example.learned} learned")
        say(_text(example, plain=not console.is_terminal or console.no_color))


def _text(example: RenderedExample, *, plain: bool) -> Text:
    text = Text()
    for segment, learned in example.segments:
        shown = _shorten(segment)
        if learned and plain:
            shown = f"{{+{shown}+}}"
        text.append(shown, style="bold green" if learned else "dim")
    text.rstrip()
    lines = text.split("\n", allow_blank=True)
    return Text("\n").join(Text("    ").append_text(line) for line in lines)


def _shorten(segment: str) -> str:
    if len(segment) <= MOST_CHARACTERS:
        return segment
    half = MOST_CHARACTERS // 2
    return f"{segment[:half]} ... ({len(segment) - 2 * half} characters) ... {segment[-half:]}"
