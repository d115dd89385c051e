"""Records of both schemas: every old one is read, and what happened at each step is the same by either name."""

from __future__ import annotations

import json

import pytest
from result_records import answers, make_history, make_record
from small import REPOSITORY

from grass_ray.results.record import RunRecord
from grass_ray.results.reproduction import compare_records

OLD_RECORDS = sorted((REPOSITORY / "benchmarks" / "results").glob("**/records/*.json"))
STEPS = range(1, 7)  # two probing, four of training; resumed after the fourth
TOKENS, SECONDS, STALLS = [64, 70, 81, 96, 33, 128], 0.5, [0.0, 0.0, 0.25, 0.5, 0.5, 0.25]
TOTALS = [0.0, 0.0, 0.25, 0.75, 0.5, 0.75]
RATES = [0.0, 0.0, 0.1, 0.05, 0.02, 0.0]  # the schedule ends at 0, too


def of_schema(version: int) -> RunRecord:
    common = {"train/lr": RATES, "time/step_s": [SECONDS] * 6}
    own = {
        1: {"throughput/tokens_per_second": [tokens / SECONDS for tokens in TOKENS], "offload/exposed_s": TOTALS},
        2: {
            "step/tokens": TOKENS,
            "step/phase": [0, 0, 1, 1, 1, 1],
            "step/train_step": [0, 0, 1, 2, 3, 4],
            "step/stall_s": STALLS,
        },
    }
    history = make_history(num_layers=4, steps=6)
    history.intervals = [(3, (0,)), (5, (1,))]
    series = {name: list(zip(STEPS, values, strict=True)) for name, values in (common | own[version]).items()}
    settings = ["method.sampler.probing_steps=2", "training.steps=4"]
    record = make_record(series=series, layers=history, overrides=settings, correct={"generated": answers(3, 8)})
    record.schema_version = version
    return RunRecord.model_validate_json(record.model_dump_json())


@pytest.mark.parametrize("version", [1, 2])
def test_what_happened_at_each_step_is_known_from_records_of_both_schemas(version: int) -> None:
    record = of_schema(version)
    assert record.step_tokens() == dict(zip(STEPS, TOKENS, strict=True))
    assert record.probing_steps() == {1, 2}
    assert [max(0, done) for done in record.train_steps(STEPS).values()] == [0, 0, 1, 2, 3, 4]
    assert record.step_stalls() == dict(zip(STEPS, STALLS, strict=True))


def test_a_run_resumed_under_the_new_schema_keeps_the_steps_before() -> None:
    record, new = of_schema(1), of_schema(2)
    record.schema_version = 2
    record.series |= {name: points[3:] for name, points in new.series.items() if name.startswith("step/")}
    for facts in ("step_tokens", "probing_steps", "step_stalls"):
        assert getattr(record, facts)() == getattr(new, facts)()


def test_nothing_is_known_of_steps_that_nobody_recorded() -> None:
    record = make_record()
    assert (record.step_tokens(), record.probing_steps(), record.step_stalls()) == ({}, set(), {})


@pytest.mark.parametrize("path", OLD_RECORDS, ids=lambda path: path.stem)
def test_every_record_of_schema_1_is_read_and_written_as_it_was(path: object) -> None:
    record = RunRecord.load(str(path))
    written = record.model_dump_json()
    assert json.loads(written)["schema_version"] == 1
    assert RunRecord.model_validate_json(written).model_dump_json() == written


def test_a_rerun_of_an_old_record_does_not_differ_in_what_old_records_lack() -> None:
    checks = compare_records(of_schema(1), of_schema(2))
    assert not [check for check in checks if "step/" in check.what and "time/" not in check.what]
    other = of_schema(2)
    other.series["step/tokens"][2] = (3, 82)
    differing = [check.what for check in compare_records(of_schema(2), other) if check.agrees is False]
    assert differing == ["step/tokens, every step"]
