"""Extract the answer from generated text, and compare it with the correct one. Pure functions.

``published`` is the rule of the LLM-Adapters evaluation, with its weaknesses: the last number of the text, the first
capital A-E (so "Answer: D" gives "A"), the first label. ``strict`` takes what is stated as the answer: after "answer
is", "Answer:", "The correct option is", GSM8K's "####" or in a box, or a text that consists of the answer. The first
statement counts, unless it is corrected in the same paragraph ("..., but the correct answer is 4"). It parses
fractions, sums and LaTeX. Both ignore everything from the first stop text on::

    extract_answer("The answer is (D).", TASKS["aqua"], "strict")     # "D"
    is_correct("D", "D", TASKS["aqua"])                               # True
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from grass_ray.tasks.rows import parse_number
from grass_ray.tasks.suites import STOP, TASKS, Task

ExtractionName = Literal["published", "strict"]

TOLERANCE = 0.001
ANSWER_RULES = 2  # version of the rules; results of different versions are not ranked together

_NUMBER = r"-?\d+\.?\d*"
_STRICT_NUMBER = (
    r"[-+]?[$€£¥₹]?[-+]?"
    r"(?:(?:\d{1,15}\s+)?\d{1,15}(?:\.\d{1,15})?\s*/\s*\d{1,15}(?:\.\d{1,15})?(?![\d/])"  # before it a whole number
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
)
_QUALITY = r"(?:\b(?P<quality>correct|right|final|actual|real|best|wrong|incorrect)[ \t]+)?"
_VERB = r"[\"'*]*\s*(?:is|was|(?:must|should|would|will)\s+be|:|=)\s*[:=]?\s*"
_ABOUT = r"(?:(?:approximately|about|exactly|equal to|therefore|thus|simply)\s*)?"
_NOT_BUT = (
    r"(?:n[o']t\s+(?:[^\n.]|\.\d){1,60}?(?:\bbut\b|[,;]\s*(?=it\b|rather\b))\s*(?:rather\s+)?(?:it(?:\s+is|'s)\s+)?)?"
)
_QUOTES = r"[\"'(*$]*\s*"
_VARIABLE = r"(?:[A-Za-z]\s*=\s*)?"
_MARK = r"(?:####|\\(?:boxed|fbox)\{)\s*"
_OPERATION = r"(?:\s*[+*]\s*|\s+[-/x]\s+)"  # "10-15" may be a range, "3x5" a size
_WRONG = ("wrong", "incorrect")
_CORRECTION = re.compile(r"\b(?:wait|actually|sorry|instead|correction)\b", re.IGNORECASE)
_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{FULLWIDTH HYPHEN-MINUS}": "-",
    "\N{MULTIPLICATION SIGN}": "*",
    "\N{DIVISION SIGN}": "/",
    "\N{FRACTION SLASH}": "/",
}
_OPERATORS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "x": operator.mul,
    "/": operator.truediv,
}


def extract_answer(output: str, task: Task, extraction: ExtractionName) -> str | None:
    """Extract the answer from ``output``; None if there is none."""
    ended = re.split("|".join(map(re.escape, STOP)), output, maxsplit=1)[0]
    text = unicodedata.normalize("NFC", ended)
    if extraction == "published":
        return _published(text, task)
    return _strict(text, task)


def is_correct(extracted: str | None, answer: str, task: Task) -> bool:
    """Return whether an extracted answer equals the correct one; numbers within 0.001."""
    if extracted is None:
        return False
    if task.answer != "number":
        return extracted == answer
    given, wanted = parse_number(extracted), parse_number(answer)
    return given is not None and wanted is not None and abs(given - wanted) <= TOLERANCE


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one generated text; called by lm-eval."""
    task = TASKS.get(doc["task"]) or Task.custom(doc["task"], doc["kind"], doc["labels"] or (), max_new_tokens=1)
    return {"acc": float(is_correct(extract_answer(results[0], task, doc["extraction"]), doc["answer"], task))}


def _published(output: str, task: Task) -> str | None:
    if task.answer == "number":
        numbers = re.findall(_NUMBER, output.replace(",", ""))
        return numbers[-1].rstrip(".") if numbers else None
    found = re.search("|".join(re.escape(label) for label in sorted(task.labels, key=len, reverse=True)), output)
    return found.group() if found else None


def _strict(text: str, task: Task) -> str | None:
    plain = _plain_text(text)
    if task.answer == "number":
        return _strict_number(plain)
    if task.answer == "letter":
        return _strict_letter(plain, task.labels)
    return _strict_label(text, task.labels) or _strict_label(plain, task.labels)  # a label may hold such signs


def _plain_text(text: str) -> str:
    """The text with signs and LaTeX as one would type them."""
    text = re.sub(r"\s*([¼-¾⅐-⅞])", lambda found: f" {unicodedata.normalize('NFKC', found[1])}", text)
    for sign, typed in _SIGNS.items():
        text = text.replace(sign, typed)
    text = re.sub(r"(?<![^\s(:=$*\"'])[\N{EN DASH}\N{EM DASH}](?=[$€£]?[\d.])", "-", text)
    if "\\" in text:
        text = re.sub(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
        text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"\\(?:left|right|displaystyle|[,;:!()\[\]])", "", text)
        text = re.sub(r"\\(?:times|cdot)", "*", text).replace("\\div", "/").replace("{,}", ",")
        text = re.sub(r"\\([$%&#])", r"\1", text)
        text = re.sub(r"(?<=\{)\s+|(?<=-)\s+(?=\d+/)", "", text)  # what stood before a fraction
    return re.sub(r"(?<=\d)\s*[x*]\s*10\s*\^\s*\{?([-+]?\d+)\}?", r"e\1", text)


def _find_stated(text: str, noun: str, value: str) -> re.Match[str] | None:
    """The place that says what the answer is: ``value`` behind "the ``noun`` is", or the correction of such a place."""
    pattern = rf"{_QUALITY}(?<![A-Za-z])(?:{noun}){_VERB}{_NOT_BUT}{_QUOTES}{value}"
    places = re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE)
    chosen: re.Match[str] | None = None
    for place in places:
        quality = (place["quality"] or "").lower()
        if quality in _WRONG:
            continue
        if chosen is not None:
            between = text[chosen.end() : place.start()]
            if "\n\n" in between:
                break  # another text
            if not ((quality and not chosen["quality"]) or _CORRECTION.search(between)):
                continue
        chosen = place
    return chosen


def _strict_number(text: str) -> str | None:
    """The stated number, or that of a text which is a number and at most three words of unit, or ends in ``x = 4``."""
    value = rf"{_ABOUT}{_QUOTES}{_VARIABLE}(?P<number>{_STRICT_NUMBER})(?=(?P<rest>[^\n]*))"
    found = re.search(rf"{_MARK}{value}", text, re.IGNORECASE) or _find_stated(text, "answer", value)
    if found:
        return _result(found["number"], found["rest"])
    unit = r"\s*%?(?:[A-Za-z]+(?:\s+[A-Za-z]+){0,2})?[\s\"').*$]*"
    alone = re.fullmatch(rf"[\s\"'(*=$]*({_STRICT_NUMBER}){unit}", text) or re.fullmatch(
        rf"[\s\"'(*$]*[A-Za-z]+\s*=\s*({_STRICT_NUMBER}){unit}", text.strip().rpartition("\n")[2]
    )
    return _plain(alone[1]) if alone else None


def _result(number: str, rest: str) -> str | None:
    """What an equation or a calculation that begins with ``number`` comes to; the number where there is none."""
    equation = re.match(rf"(?!\.\s|,\s)(?:[\s\d.,()+*/x$%^-]*=\s*({_STRICT_NUMBER}))+", rest)
    if equation:
        return _plain(equation[1])
    terms = re.match(rf"(?:{_OPERATION}{_STRICT_NUMBER})*", rest)
    assert terms is not None
    if re.match(r"\s*\^|\)?\s*[*/+](?=\s*[\d(])|\)\s*x\s*\d", rest[terms.end() :]):
        return None  # more than is understood
    if not terms.group():
        return _plain(number)
    signs = [re.sub(r"\s", "", sign) for sign in re.findall(rf"({_OPERATION}){_STRICT_NUMBER}", terms.group())]
    values = [float(_plain(part)) for part in re.split(rf"{_OPERATION}(?={_STRICT_NUMBER})", number + terms.group())]
    for kinds in ("*x/", "+-"):
        while (place := next((at for at, sign in enumerate(signs) if sign in kinds), None)) is not None:
            if signs[place] == "/" and not values[place + 1]:
                return None
            values[place : place + 2] = [_OPERATORS[signs.pop(place)](values[place], values[place + 1])]
    return f"{values[0]:.10g}"


def _strict_letter(text: str, letters: Sequence[str]) -> str | None:
    """The stated option; small letters count where nothing else can be meant: in brackets or at the end."""
    capitals = "".join(letters)
    option = (
        rf"(?:option|choice)?\s*[\"'(*]*(?:(?-i:(?P<capital>[{capitals}]))\b"
        rf"|(?P<either>[{capitals}{capitals.lower()}])(?=\)|[.*\"']*\s*$))"
    )
    listed = re.findall(rf"(?:(?<!\w)\(?[{capitals}]\)|(?:^|\s)[{capitals}]\.\s)", text)
    found = (
        re.search(_MARK + option.replace(r"\s*$", r"\s*\}"), text)
        or _find_stated(text, "answer|option|choice", option)
        or re.fullmatch(rf"[\s\"'*]*{option}[\s\"').*]*", text, re.IGNORECASE)
        or (re.match(rf"\s*\(?(?P<capital>[{capitals}])(?:\)|\.\s)", text) if len(listed) == 1 else None)
        or re.search(
            rf"(?<!\w)(?:option|choice)?\s*\(?(?-i:(?P<capital>[{capitals}]))\)? is (?:the )?(?:correct|right|best)\b",
            text,
            re.IGNORECASE,
        )
    )
    return (found["capital"] or found.groupdict().get("either") or "").upper() or None if found else None


def _strict_label(text: str, labels: Sequence[str]) -> str | None:
    """The stated label, or that of a text which is one or says it is the right one; case and "solution 2" are free."""
    forms = {
        label: re.sub(r"(?<=[a-z])(?=\d)", r"\\s?", re.escape(label)) for label in sorted(labels, key=len, reverse=True)
    }
    option = rf"(?P<label>{'|'.join(forms.values())})(?!\w)"
    found = (
        re.search(_MARK + option, text, re.IGNORECASE)
        or _find_stated(text, "answer|option|choice|solution|ending|label", option)
        or re.fullmatch(rf"[\s\"'(*]*{option}[\s\"').*]*", text, re.IGNORECASE)
        or re.search(rf"(?<!\w){option} is (?:the )?(?:correct|right|best)\b", text, re.IGNORECASE)
    )
    if found is None or found["label"] in labels:
        return found["label"] if found else None
    return next(label for label, form in forms.items() if re.fullmatch(form, found["label"], re.IGNORECASE))


def _plain(number: str) -> str:
    """A number as Python reads it; a fraction as a decimal number."""
    text = re.sub(r"[,$€£¥₹]", "", number).lstrip("+").replace("--", "-")
    parts = re.fullmatch(r"(?:(-?\d+)\s+)?(-?[\d.]+)\s*/\s*([\d.]+)", text)
    if parts is None:
        return re.sub(r"\s", "", text)
    whole, numerator, denominator = parts.groups(default="0")
    if not float(denominator):
        return numerator
    share = float(numerator) / float(denominator)
    return f"{int(whole) + (-share if whole.startswith('-') else share):.10g}"
