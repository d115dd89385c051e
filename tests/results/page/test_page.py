"""The page: one file, well-formed, escaped, readable aloud; also with many rows, only failures, and odd names."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from result_records import answers, make_history, make_record, make_series
from synthetic import synthetic_records

from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render

VOID = {"meta", "br", "link", "input", "img", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.mistakes: list[str] = []
        self.feed(text)
        self.close()
        self.mistakes += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [found for _, attributes in self.attributes if (found := attributes.get(name)) is not None]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(records: list[RunRecord]) -> tuple[str, Page]:
    text = render(build_leaderboard(records), "html", records=records)
    return text, Page(text)


@pytest.fixture(scope="module")
def sweep() -> list[RunRecord]:
    records = synthetic_records(24)
    for record in records:
        record.versions = {"torch": "2.13.0"}
        record.threads = 4
    return records


@pytest.fixture(scope="module")
def page(sweep: list[RunRecord]) -> tuple[str, Page]:
    return page_of(sweep)


def test_it_is_well_formed_and_loads_nothing(page: tuple[str, Page]) -> None:
    text, read = page
    assert read.mistakes == []
    assert "http" not in text.lower().replace("http-equiv", "")
    assert "//" not in re.sub(r"base64,\s*[A-Za-z0-9+/=\s]+", "", text).replace("</", ""), "no address without a scheme"
    assert "url(" not in re.sub(r"url\(#f\d+-[\w-]+\)", "", text), "figures refer to themselves alone"
    assert not {"link", "iframe", "object"} & set(read.tags)
    for address in [*read.values("href"), *read.values("src")]:
        assert address.startswith(("#", "data:"))


def test_addresses_within_the_page_lead_somewhere(page: tuple[str, Page]) -> None:
    _, read = page
    ids = Counter(read.values("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    for address in read.values("href"):
        if address.startswith("#"):
            assert address[1:] in ids
    for name in (*read.values("aria-labelledby"), *read.values("for")):
        assert name in ids


def test_it_holds_every_part(page: tuple[str, Page], sweep: list[RunRecord]) -> None:
    _, read = page
    for heading in (
        *("Accuracy by task", "Accuracy and memory", "Tasks", "Loss", "Step time", "Environment", "Run it again"),
        "Layers drawn, and what was measured of them",
        *("same budget", "numbers as CSV", "torch 2.13.0", "git checkout 0123456789abcdef"),
        "grass-ray train grass --task boolq piqa arc_easy --lr 1e-05 --steps 200",
    ):
        assert heading in read.text, heading
    figures = read.tags["figure"]
    assert figures >= 8
    labels = [attributes.get("aria-label") for tag, attributes in read.attributes if tag == "svg"]
    assert len(labels) == figures
    assert all(label and len(label) > 30 for label in labels), "every figure is told in words"


def test_hyperparameters_are_drawn_when_they_differ() -> None:
    records = [
        make_record(correct={"generated": answers(right, 20)}, overrides=[f"method.optimizer.lr={lr}"])
        for lr, right in ((1e-4, 8), (1e-3, 12), (1e-2, 3))
    ]
    assert "Hyperparameters" in page_of(records)[1].text
    assert "Hyperparameters" not in page_of(records[:1])[1].text


def test_tables_read_aloud_and_work_with_a_keyboard(page: tuple[str, Page]) -> None:
    _, read = page
    assert read.tags["caption"] == read.tags["table"] == 2
    heads = [attributes for tag, attributes in read.attributes if tag == "th"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in heads)
    assert any(attributes.get("class") == "skip" for tag, attributes in read.attributes if tag == "a")
    boxes = [attributes for _, attributes in read.attributes if (attributes.get("class") or "").startswith("box")]
    assert all("tabindex" in attributes and "aria-label" in attributes for attributes in boxes)
    assert ("html", {"lang": "en"}) in read.attributes
    assert any(attributes.get("name") == "viewport" for tag, attributes in read.attributes if tag == "meta")


def test_the_numbers_behind_a_figure_come_along(page: tuple[str, Page], sweep: list[RunRecord]) -> None:
    _, read = page
    files = {
        attributes["download"]: attributes["href"]
        for tag, attributes in read.attributes
        if tag == "a" and attributes.get("download")
    }
    pareto = next(href for name, href in files.items() if name and name.startswith("pareto"))
    assert pareto is not None
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(pareto.partition(",")[2]).decode())))
    (table,) = build_leaderboard(sweep)
    assert [row["method"] for row in rows] == [row.method for row in table.rows]
    assert float(rows[0]["accuracy"]) == pytest.approx(table.rows[0].accuracy, rel=1e-5)


def test_colours_follow_the_page(page: tuple[str, Page]) -> None:
    text, _ = page
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "#000000" not in figures
    assert "#d55e00" not in figures
    assert "var(--cd55e00)" in figures
    assert text.count("--cd55e00:") == 2, "once for light, once for dark"


def test_figures_are_as_wide_as_a_phone(page: tuple[str, Page]) -> None:
    """A CSS pixel of a phone is about a point of the figure, so that letters keep their size."""
    _, read = page
    widths = [float(attributes["width"] or 0) for tag, attributes in read.attributes if tag == "svg"]
    assert len(widths) >= 8
    assert max(widths) < 358, "what a phone of 390 pixels leaves between margins"


def test_only_failures(page: tuple[str, Page]) -> None:
    records = synthetic_records(20, only_failures=True)
    text, read = page_of(records)
    assert read.mistakes == []
    assert f"{len(records)} of them not ranked" in read.text
    assert "out of memory - seed 0: step 3: CUDA out of memory" in read.text
    assert read.tags["figure"] == 0
    assert read.tags["tr"] == len(records) + 1
    assert "git checkout" in text


def test_two_hundred_rows() -> None:
    records = [
        make_record(
            "grass", correct={"generated": answers(number % 40, 40)}, overrides=[f"training.steps={number + 1}"]
        )
        for number in range(200)
    ]
    text, read = page_of(records)
    assert read.mistakes == []
    assert read.tags["tr"] == 201
    assert 'class="box long"' in text, "a long table scrolls in its own box"
    assert "Commands of 200 rows" in read.text


ODD = "<script>alert('1')</script> & \"$x$\" \\alpha {0} %s ü 模型 $"


@pytest.mark.filterwarnings("ignore:Glyph")  # the font that measures text has no Chinese; the page's fonts have
def test_odd_names_stay_text() -> None:
    records = []
    for number, method in enumerate(("full", "grass")):
        record = make_record(
            method,
            correct={"boolq": answers(5 + number, 10), "piqa": answers(4, 10)},
            suite="commonsense",
            metrics={"memory/peak_allocated_gib": 1.0 + number},
            layers=make_history(),
            series=make_series(number, 1.0, steps=30),
            hardware=ODD,
        )
        record.config["model"]["name"] = ODD
        record.name, record.sweep, record.versions = ODD, ODD, {ODD: ODD}
        record.data["train"] = {"description": ODD, "files": [], "rows": 3, "rows_sha256": ODD}
        records.append(record)
    twin = make_record("grass", correct={"boolq": answers(3, 10), "piqa": answers(4, 10)}, suite="commonsense")
    twin.hardware, twin.config["model"]["name"], twin.config["data"]["template"] = ODD, ODD, ODD  # in the row's name
    records.append(twin)
    failed = make_record("lisa", status="failed", failure=ODD, suite="commonsense", hardware=ODD)
    failed.config["model"]["name"], failed.config["data"]["tasks"] = ODD, ["boolq", "piqa"]
    _, read = page_of([*records, failed])
    assert read.mistakes == []
    assert read.tags["script"] == 1
    told = [attributes.get("aria-label") or "" for tag, attributes in read.attributes if tag == "svg"]
    assert any(ODD in label for label in told)
    assert read.text.count(ODD) > 5, "as text, not as markup and not as a formula"


def test_without_records_there_are_tables_and_no_figures(sweep: list[RunRecord]) -> None:
    read = Page(render(build_leaderboard(sweep), "html"))
    assert read.mistakes == []
    assert (read.tags["table"], read.tags["figure"]) == (2, 0)


def test_nothing_is_a_page_too() -> None:
    _, read = page_of([])
    assert read.mistakes == []
    assert "no runs yet" in read.text
