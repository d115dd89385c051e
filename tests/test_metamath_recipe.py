"""The recipe with the settings of peft's method comparison, and how it asks and reads answers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from small import REPOSITORY

from grass_ray.commands.train import build_config
from grass_ray.config import LmEvalConfig, ModelConfig
from grass_ray.results.peft_comparison import _train_config
from grass_ray.tasks.encoding import encode_rows
from grass_ray.tasks.lm_eval_tasks import load_lm_eval
from grass_ray.tasks.sources import load_train_rows
from grass_ray.training.models import load_tokenizer

FOLDER = REPOSITORY / "examples" / "recipes" / "metamath"
ANSWERS: dict[str, Any] = runpy.run_path(str(FOLDER / "gsm8k" / "answers.py"))
# default_training_params.json of method_comparison/MetaMathQA
PUBLISHED = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "max_steps": 5000,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
}


@pytest.fixture
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def recipe(method: str, *assignments: str) -> Any:
    return build_config(
        method, base=FOLDER / "metamath.yaml", model=None, tasks=None, data_dir=None, assignments=list(assignments)
    )


@pytest.mark.usefixtures("_in_the_repository")
def test_the_settings_are_those_of_pefts_comparison() -> None:
    config = recipe("lora")
    assert _train_config(config) == PUBLISHED
    assert config.training.warmup_steps == 0.1 * config.training.steps
    assert config.data.train_on_inputs
    adapter = config.method.adapter
    assert adapter is not None
    settings = adapter.peft_settings()
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (32, 64, 0.0)
    assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"], "peft's own choice for Llama"


@pytest.mark.usefixtures("_in_the_repository")
def test_another_method_keeps_all_but_its_own_keys() -> None:
    lora, grass = recipe("lora"), recipe("grass", "method.optimizer.weight_decay=0.1")
    assert grass.method.name == "grass"
    assert (grass.data, grass.training, grass.evaluation) == (lora.data, lora.training, lora.evaluation)


@pytest.mark.usefixtures("_in_the_repository")
def test_a_row_is_asked_as_peft_asks_it_and_learned_whole(tmp_path: Path) -> None:
    row = {"type": "GSM_Rephrased", "query": "What is 2 + 3?", "response": "2 + 3 is 5.\nThe answer is: 5"}
    rows = [row | {"query": f"{row['query']} {number}"} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = recipe("lora", f"data.source.path={tmp_path / 'rows.jsonl'}").data
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    (encoded, *_) = encode_rows(load_train_rows(data).rows, tokenizer, data).rows
    text = tokenizer.decode(encoded.ids)
    question = text.partition("Question: ")[2].partition(" Think")[0]
    ends = f" Think step by step.\nAnswer:{row['response']}{tokenizer.eos_token}"
    assert question.startswith(row["query"])
    assert text.endswith(f"Question: {question}{ends}")
    assert all(encoded.learned)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 18", 18),
        ("so $4^2 = 16$.The answer is: 16.\n\nQuestion: more", 16),
        ("The answer is: 3\nThe answer is: 4", 4),
        ("#### 1", 1),
        ("#### 7 The answer is: 20/8", 2.5),
        ("The answer is 50%", 50),
        ("The answer is: $1.50", 1.5),
        ("The answer is: x + 1", "x + 1"),
        ("The answer is: 1/0", "1/0"),
        ("it is 7", None),
    ],
)
def test_answers_are_read_behind_the_words_of_both_data_sets(text: str, answer: float | str | None) -> None:
    assert ANSWERS["answer_of"](text) == answer


def test_the_task_of_lm_eval_asks_and_judges_so(tmp_path: Path) -> None:
    """With a local file of GSM8K's form in place of the one on the Hub."""
    name = "gsm8k_metamath.yaml"
    text = (FOLDER / "gsm8k" / name).read_text(encoding="utf-8")
    hub = "dataset_path: openai/gsm8k\ndataset_name: main\n"
    assert hub in text
    local = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.json\n"
    (tmp_path / name).write_text(text.replace(hub, local))
    (tmp_path / "answers.py").write_text((FOLDER / "gsm8k" / "answers.py").read_text(encoding="utf-8"))
    document = {"question": "How many?", "answer": "<<2+3=5>>5\n#### 5"}
    (tmp_path / "rows.json").write_text(json.dumps([document]))
    (task,) = load_lm_eval(LmEvalConfig(tasks=(f"{tmp_path}/",))).tasks
    assert task.doc_to_text(document) == "Question: How many? Think step by step.\nAnswer:"
    assert task.process_results(document, ["5.0. The answer is: 5.0"]) == {"exact_match": 1.0}
    assert task.process_results(document, ["5"]) == {"exact_match": 0.0}
    assert (task.config.num_fewshot or 0) == 0
    assert task.config.generation_kwargs["max_gen_toks"] == 300
    assert task.config.generation_kwargs["do_sample"] is False
