"""benchmarks/verdict: made-up experiments with a known effect, and what the analysis says of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from result_records import make_history, make_record
from small import REPOSITORY

from grass_ray.config import ConfigError, as_text
from grass_ray.results.record import RunRecord

sys.path.insert(0, str(REPOSITORY / "benchmarks" / "verdict"))
analysis, experiment, report = (importlib.import_module(name) for name in ("analysis", "experiment", "report"))

QUESTIONS, ITEM, LUCK, TRAINING = 300, 0.6, 0.15, 0.004  # how many; spreads in nats


def made_up(levels: Mapping[str, float], *, seed: int = 0, luck: float = TRAINING) -> list[RunRecord]:
    """Records of every planned run; ``levels`` are the true mean losses of rows, those of the others 1."""
    chance = np.random.default_rng(seed)
    records = []
    for data in experiment.DATA:
        hard = chance.normal(0, ITEM, QUESTIONS)
        for row, planned in experiment.ROWS.items():
            level = levels.get(row, 2.0 if row == "base" else 1.0)
            for number in range(1, planned.seeds + 1):
                own = level + hard + chance.normal(0, luck) + chance.normal(0, LUCK, QUESTIONS)
                records.append(
                    make_record(
                        row,
                        seed=number,
                        correct={"generated": [True] * QUESTIONS},
                        losses={"generated": own.tolist()},
                        sweep_id=f"verdict-{data}",
                        layers=make_history() if row in ("grass", "inverse") else None,
                        overrides=["training.steps=0"] if row == "base" else [],
                    )
                )
    return records


@pytest.mark.parametrize(
    ("grass", "said"), [(0.95, "yes"), (1.05, "uniform is better"), (1.0, "no difference that matters")]
)
def test_an_effect_is_found_where_there_is_one(grass: float, said: str) -> None:
    assert analysis.answer(analysis.group(made_up({"grass": grass}))) == said


def test_too_much_luck_leaves_it_undecided() -> None:
    assert analysis.answer(analysis.group(made_up({"grass": 0.95}, luck=0.3))) == "undecided"


def test_a_null_effect_is_called_different_no_more_often_than_the_level_says() -> None:
    """Three data sets at .05 together: about 1 of 20 experiments, at most 4 with a probability of 0.997."""
    called = sum(
        any(finding.comparison.told_apart for finding in analysis.ask(analysis.group(made_up({}, seed=seed)), "Q1"))
        for seed in range(20)
    )
    assert called <= 4


def test_p_values_are_adjusted_as_planned() -> None:
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    runs = analysis.group(made_up({"grass": 0.95}))
    pairs = [(finding.first, finding.second) for finding in analysis.ask(runs, "Q2")]
    assert len(pairs) == 4 * 3
    assert set(pairs) == set(analysis.QUESTIONS["Q2"])


def test_how_layers_were_drawn() -> None:
    found = analysis.sampling(analysis.group(made_up({}))["mixture"]["grass"])
    assert 1 <= found.effective <= 30
    assert 0 < found.distinct <= 30
    assert 0 <= found.kept <= 1
    assert len(found.favourites) == 5
    assert analysis.sampling(analysis.group(made_up({}))["mixture"]["full"]) is None


def test_every_planned_run_can_be_configured() -> None:
    names = set()
    for data in experiment.DATA:
        for row in experiment.ROWS:
            config = experiment.configure(data, row, 1e-3, seed=1, steps=100, test=True)
            names.add(config.fingerprint)
            assert config.method.name == row
            assert config.data.validation_rows == 48
    assert len(names) == len(experiment.DATA) * len(experiment.ROWS)
    grass, uniform = (
        experiment.configure("mixture", row, 1e-3, seed=1, steps=100, test=True) for row in ("grass", "uniform")
    )
    differing = {key for key, value in grass.flatten().items() if uniform.flatten().get(key) != value}
    assert differing == {"method.name", "method.sampler.exploration"}


@pytest.mark.parametrize("folder", ["search", "records"])
def test_what_was_run_is_what_was_planned(folder: str) -> None:
    """Keys that came after the runs are in no record."""
    paths = sorted((REPOSITORY / "benchmarks" / "verdict" / "runs" / folder).glob("*.json.gz"))
    assert paths
    for path in paths:
        record, tested = RunRecord.load(path), folder == "records"
        data, row = path.name.removesuffix(".json.gz").split("-", 1)
        row = row.rpartition("-s" if tested else "-lr")[0]
        lr, seed = record.config["method"]["optimizer"]["lr"], record.config["seed"]
        steps = experiment.STEPS if tested else experiment.SEARCH_STEPS
        planned = experiment.configure(data, row, lr, seed=seed, steps=steps, test=tested)
        assert as_text(record.config).items() <= planned.flatten().items(), path.name
        assert seed in (range(1, experiment.ROWS[row].seeds + 1) if tested else [experiment.SEARCH_SEED])


def test_the_report_tells_every_question_and_can_be_made_again(tmp_path: Path) -> None:
    for folder, records in (("records", made_up({"grass": 0.95})), ("search", made_up({}, seed=1)[:1])):
        (tmp_path / folder).mkdir()
        for number, record in enumerate(records):
            record.run_id = f"{number}"
            record.save(tmp_path / folder / f"{number}.json")
    kept, again = tmp_path / "kept", tmp_path / "again"
    assert report.report(report.Options(work=tmp_path, output=kept)) == 0
    text = (kept / "README.md").read_text(encoding="utf-8")
    assert report.ANSWERS["yes"] in text
    assert all(f"## {question}:" in text for question in analysis.QUESTIONS)
    assert "Not all of its runs are done" not in text
    assert report.report(report.Options(work=kept, output=again)) == 0
    for name in ("README.md", "verdict.json", "learning_rates.yaml"):
        assert (again / name).read_bytes() == (kept / name).read_bytes()


def test_what_is_recorded_follows_from_its_records(tmp_path: Path) -> None:
    recorded = REPOSITORY / "benchmarks" / "results" / "verdict"
    if not recorded.is_dir():
        pytest.skip("the verdict's runs are not recorded yet")
    assert report.report(report.Options(work=recorded, output=tmp_path)) == 0
    for name in ("README.md", "verdict.json", "learning_rates.yaml"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (recorded / name).read_text(encoding="utf-8")


def test_the_report_needs_records(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no records"):
        report.load(tmp_path)
