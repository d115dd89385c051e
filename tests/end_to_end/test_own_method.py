"""Methods of a user's own on the command line: trained, resumed, checked, reproduced, and what they may not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from own_methods import ROW, TOP_HEAVY, write_methods

from grass_ray.cli import main
from grass_ray.config import code
from grass_ray.results.record import RunRecord

pytestmark = pytest.mark.long
SMALL = ("--model", "tiny", "--task", "generated", "--steps", "6", "--limit", "4", "--quiet")


class Commands:
    """Commands as if each were a process of its own: none has code of the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(code._FINDER, "installed", {})
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, " ".join(said.err.split())


@pytest.fixture
def grass_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return Commands(monkeypatch, capsys)


def test_a_method_is_trained_recorded_and_reproduced(grass_ray: Commands, tmp_path: Path) -> None:
    methods = write_methods(tmp_path / "own")
    assert grass_ray("train", "top-heavy", *SMALL, "--output", "run")[2].startswith("error: unknown method 'top-heavy'")
    flags = ("--method-file", methods, "--sampler.args.period", 3)
    result, out, err = grass_ray("train", "top-heavy", *SMALL, *flags, "--output", "run")
    assert (result, "top-heavy" in out) == (0, True), err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    assert record.config["method"]["sampler"]["args"] == {"num_active_layers": 2, "period": 3}
    assert record.code == {"top_heavy.py": TOP_HEAVY}

    result, _, err = grass_ray("reproduce", "run")
    assert result == 2
    assert "ran with code of a user's own: top_heavy.py is not here. Give the method file" in err
    edited = write_methods(tmp_path / "edited", code=TOP_HEAVY + "# later\n")
    result, _, err = grass_ray("reproduce", "run", "--method-file", edited)
    assert (result, "top_heavy.py differs from the record's" in err) == (2, True)
    result, out, _ = grass_ray("reproduce", "run", "--write-code", "written")
    assert (result, "read them before you run them" in out) == (0, True)
    result, out, _ = grass_ray("reproduce", "run", "--method-file", "written/methods.yaml")
    assert (result, "in every bit" in out) == (0, True)

    # what does not sample needs no code
    assert grass_ray("eval", "--model", "run", "--limit", 2, "--quiet")[0] == 0
    assert grass_ray("export", "run", "--output", "exported")[0] == 0


def test_a_record_cannot_write_outside_of_the_folder(grass_ray: Commands, tmp_path: Path) -> None:
    methods = write_methods(tmp_path / "own")
    assert grass_ray("train", "top-heavy", *SMALL, "--method-file", methods, "--output", "run")[0] == 0
    record = RunRecord.load(tmp_path / "run" / "record.json")
    record.code = {"../outside.py": "print('ran')"}
    record.save(tmp_path / "run" / "record.json")
    result, _, err = grass_ray("reproduce", "run", "--write-code", "written")
    assert (result, "which is not inside of written" in err) == (2, True)
    assert not (tmp_path / "outside.py").exists()


def test_the_settings_of_a_method_are_flags_and_it_is_planned_and_listed(grass_ray: Commands, tmp_path: Path) -> None:
    methods = write_methods(tmp_path / "own")
    assert "--sampler.args.num-active-layers" in grass_ray("train", "top-heavy", "--method-file", methods, "--help")[1]
    shape = ("--model", "tiny", "--seq-len", 16, "--method-file", methods)
    result, out, _ = grass_ray("plan", *shape, "--methods", "top-heavy")
    assert (result, "top-heavy  resident" in out) == (0, True)
    assert "top-heavy" in grass_ray("ls", "methods", "--method-file", methods)[1]


FORGETS = (
    TOP_HEAVY
    + """
    _seen = 0
    def observe(self, norms):
        super().observe(norms)
        self._seen += 1
    def pick(self):
        log_p = torch.tensor(self.probabilities(), dtype=torch.float64).log()
        return draw_without_replacement(log_p, self.now_active, self.seed + self._seen, self._draws)
"""
)


def test_the_contract_holds_for_a_sound_sampler_and_not_for_one_that_forgets(
    grass_ray: Commands, tmp_path: Path
) -> None:
    result, out, _ = grass_ray("check-method", write_methods(tmp_path / "sound"))
    assert (result, out.splitlines()[-1]) == (0, "14 of 14 checks hold"), out
    result, out, _ = grass_ray("check-method", write_methods(tmp_path / "unsound", code=FORGETS))
    assert result == 1
    broken = [line for line in out.splitlines() if "BROKEN" in line]
    assert "resumed after step 1 it goes on differently" in broken[0]
    assert "BROKEN resumes bit for bit at every step, in a new process: resumed after step" in broken[-1]
    assert len(broken) == 3, out  # and start does not begin anew


def test_code_that_raises_breaks_a_check_and_the_others_are_made(grass_ray: Commands, tmp_path: Path) -> None:
    raises = TOP_HEAVY + "    def state_dict(self):\n        raise KeyError('nothing here')\n"
    result, out, _ = grass_ray("check-method", write_methods(tmp_path / "own", code=raises), "--steps", 3)
    assert result == 1
    assert "BROKEN the sampler resumes from its state at any step: KeyError: 'nothing here'" in out
    assert "holds  learns in twenty steps" in out


def test_wrong_flags(grass_ray: Commands, tmp_path: Path) -> None:
    methods = write_methods(tmp_path / "own")
    for words, message in {
        ("check-method", methods, "--steps", 2): "--steps 2: give 3 or more",
        ("check-method", methods, "--methods", "grass"): "unknown method 'grass'; available: top-heavy",
        ("check-method", tmp_path / "absent.yaml"): "cannot read the method file",
        ("check-method", methods, "--set", "method.sampler.args.perod=2"): "has no key 'perod'",
        ("check-method", methods, "--set", "method.sampler.args.num_active_layers=9"): "the model has 4 decoder layers",
        ("train", "grass", "--method-file", "absent.yaml"): "cannot read the method file absent.yaml",
        ("plan", "--model", "tiny", "--methods", "top"): None,
        ("plan", "--model", "tiny", "--methods", "top-heavy"): "unknown method 'top-heavy'",
    }.items():
        result, _, err = grass_ray(*words)
        assert result == (0 if message is None else 2), words
        assert message is None or message in err, err


def test_a_sampler_for_more_layers_than_the_small_model_has(grass_ray: Commands, tmp_path: Path) -> None:
    row = ROW | {"sampler": ROW["sampler"] | {"args": {"num_active_layers": 12}}}  # type: ignore[operator]
    methods = write_methods(tmp_path / "own", row)
    result, _, err = grass_ray("check-method", methods)
    assert (result, "num_active_layers (gamma) is 12, but the model has 4" in err) == (2, True)
    (tmp_path / "own" / "methods.yaml").write_text(yaml.safe_dump([ROW]), encoding="utf-8")
    assert grass_ray("check-method", methods, "--set", "method.sampler.args.period=3")[0] == 0
