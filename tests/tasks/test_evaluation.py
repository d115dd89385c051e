import logging
import re
import socket

import peft
import pytest
import torch
from task_parts import make_model, make_tokenizer, record, write
from transformers import GenerationConfig

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig, FolderSource, GeneratedSource
from grass_ray.tasks.evaluation import check_evaluation, evaluate
from grass_ray.tasks.extraction import extract_answer, is_correct
from grass_ray.tasks.generated import generate
from grass_ray.tasks.suites import TASKS
from grass_ray.tasks.templates import render_prompt

GENERATED = DataConfig(source=GeneratedSource(test_rows=12))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def choices(tmp_path) -> DataConfig:
    """Two label tasks of different lengths and numbers of options, and one repeated question."""
    form = "\n\nAnswer format: answer1/answer2/answer3"
    boolq = [record("true" if n % 3 else "false", instruction=f"question {'very ' * n}long?") for n in range(9)]
    arc = [record(f"answer{1 + n % 3}", instruction=f"Choose {n * n}:{form}") for n in range(7)]
    write(tmp_path / "dataset/boolq/test.json", boolq)
    write(tmp_path / "dataset/ARC-Easy/test.json", arc + arc[:1])
    return DataConfig(suite="commonsense", tasks=("boolq", "arc_easy"), source=FolderSource(path=str(tmp_path)))


def outputs(result) -> list[str]:
    return [example.output for example in result.examples]


def test_lm_eval_is_told_what_the_task_says(model, tokenizer, choices):
    outcomes = []
    for data, scoring in ((GENERATED, "generation"), (choices, "loglikelihood")):
        evaluate(model, tokenizer, data, EvaluationConfig(scoring=scoring), on_outcome=outcomes.append)
    configs = {task: config for outcome in outcomes for task, config in outcome["configs"].items()}
    assert configs["generated"]["output_type"] == "generate_until"
    assert configs["generated"]["generation_kwargs"] == {
        "do_sample": False,
        "max_gen_toks": TASKS["generated"].max_new_tokens,
        "num_beams": 1,
        "until": list(TASKS["generated"].stop),
    }
    assert {configs[task]["output_type"] for task in choices.tasks} == {"multiple_choice"}
    assert {version for outcome in outcomes for version in outcome["versions"].values()} == {1.0}


@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_do_not_depend_on_the_batch_size(model, tokenizer, beams):
    runs = [
        evaluate(model, tokenizer, GENERATED, EvaluationConfig(batch_size=size, num_beams=beams))["generated"]
        for size in (1, 4, 16)
    ]
    assert outputs(runs[0]) == outputs(runs[1]) == outputs(runs[2])
    assert len(set(outputs(runs[0]))) > 6, "the model must tell prompts apart, or this test shows nothing"
    lengths = {len(tokenizer(example.prompt).input_ids) for example in runs[0].examples}
    assert len(lengths) > 3, "prompts of one length need no padding"


def test_loglikelihood_does_not_depend_on_the_batch_size(model, tokenizer, choices):
    scored = EvaluationConfig(scoring="loglikelihood", batch_size=1)
    for task in choices.tasks:
        one, many = (
            evaluate(model, tokenizer, choices, scored.model_copy(update={"batch_size": size}))[task] for size in (1, 8)
        )
        assert [e.extracted for e in one.examples] == [e.extracted for e in many.examples]
        for a, b in zip(outputs(one), outputs(many), strict=True):
            numbers = [[float(x) for x in re.findall(r"-\d+\.\d+", text)] for text in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


def test_outputs_are_what_plain_greedy_decoding_gives(model, tokenizer):
    """Catches a lost attention mask, a wrong padding side, a prompt that lm-eval changed on its way."""
    examples = evaluate(model, tokenizer, GENERATED, EvaluationConfig(batch_size=8))["generated"].examples
    task = TASKS["generated"]
    rows = generate("test", rows=12, seed=0)
    assert [example.target for example in examples] == [row.answer for row in rows]
    for row, example in zip(rows, examples, strict=True):
        assert example.prompt == render_prompt(row, "clean")
        tokens = tokenizer(example.prompt, return_tensors="pt").input_ids
        start = tokens.shape[1]
        for _ in range(task.max_new_tokens):
            token = model(input_ids=tokens).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
        text = tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
        assert example.output == re.split("|".join(map(re.escape, task.stop)), text)[0]
        assert example.extracted == extract_answer(example.output, task, "published")
        assert example.correct == is_correct(example.extracted, row.answer, task)


def test_loglikelihood_is_what_a_plain_forward_pass_gives(model, tokenizer, choices):
    result = evaluate(model, tokenizer, choices, EvaluationConfig(scoring="loglikelihood"))["arc_easy"]
    for example in result.examples:
        scores = {}
        for option in ("answer1", "answer2", "answer3"):
            prompt = example.prompt.rstrip()
            whole = tokenizer(example.prompt + f"the correct answer is {option}", return_tensors="pt").input_ids
            start = len(tokenizer(prompt).input_ids)
            logp = model(input_ids=whole).logits.log_softmax(-1)[0, start - 1 : -1]
            scores[option] = logp.gather(1, whole[0, start:, None]).sum().item()
        given = {name: float(value) for name, value in (part.split() for part in example.output.split(", "))}
        assert given == pytest.approx(scores, abs=2e-3)
        assert example.extracted == max(scores, key=scores.__getitem__)
        assert example.correct == (example.extracted == example.target)
    assert result.protocol["options"] == "the correct answer is {option}"


def test_a_model_that_knows_the_answers_scores_all_of_them(tokenizer):
    """Trains the tiny model on the very test problems: accuracy must rise from nothing to nearly all."""
    from grass_ray.tasks.templates import render_response

    data = DataConfig(source=GeneratedSource(test_rows=4))
    learner = make_model(tokenizer, seed=1)
    before = evaluate(learner, tokenizer, data, EvaluationConfig())["generated"].accuracy
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    texts = [
        tokenizer(render_prompt(row, "clean") + render_response(row) + "<end>", return_tensors="pt").input_ids
        for row in generate("test", rows=4, seed=0)
    ]
    for step in range(320):
        learner(input_ids=texts[step % 4], labels=texts[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = evaluate(learner, tokenizer, data, EvaluationConfig(batch_size=4))["generated"]
    assert before < result.accuracy
    assert result.accuracy >= 0.75
    assert any(example.output.endswith(f"The answer is {example.target}.") for example in result.examples)


def test_model_and_tokenizer_are_left_as_they_were(tokenizer):
    model = make_model(tokenizer)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=1.5)
    model.train()
    model.model.layers[0].eval()
    settings, modes = model.generation_config, [module.training for module in model.modules()]
    weights = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    random_state = torch.get_rng_state()
    level = logging.getLogger("lm_eval").level
    evaluate(model, tokenizer, GENERATED, EvaluationConfig(limit=2))
    assert model.generation_config is settings
    assert [module.training for module in model.modules()] == modes
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert logging.getLogger("lm_eval").level == level
    for name, value in model.named_parameters():
        assert id(value) == weights[name][0]
        assert torch.equal(value, weights[name][1])


def test_a_models_own_sampling_settings_do_not_decide_the_result(model, tokenizer):
    plain = evaluate(model, tokenizer, GENERATED, EvaluationConfig(limit=6))["generated"]
    other = make_model(tokenizer)
    other.generation_config = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=3.0, max_length=5)
    assert outputs(evaluate(other, tokenizer, GENERATED, EvaluationConfig(limit=6))["generated"]) == outputs(plain)


@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"pad_token": "<pad>", "bos_token": "<start>"}])
def test_other_padding_tokens_change_nothing(model, tokenizer, special):
    plain = evaluate(model, tokenizer, GENERATED, EvaluationConfig(limit=6, batch_size=3))["generated"]
    other = evaluate(model, make_tokenizer(**special), GENERATED, EvaluationConfig(limit=6, batch_size=3))["generated"]
    assert outputs(other) == outputs(plain)


def test_peft_adapters_are_evaluated_and_kept(tokenizer):
    adapted = peft.get_peft_model(make_model(tokenizer), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    base = outputs(evaluate(adapted, tokenizer, GENERATED, EvaluationConfig(limit=6))["generated"])
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    settings = adapted.get_base_model().generation_config
    assert outputs(evaluate(adapted, tokenizer, GENERATED, EvaluationConfig(limit=6))["generated"]) != base
    assert adapted.get_base_model().generation_config is settings


def test_a_limit_keeps_the_same_random_examples_in_file_order(model, tokenizer):
    data = DataConfig(source=GeneratedSource(test_rows=60))
    ids = {}
    for limit in (6, 12):
        result = evaluate(model, tokenizer, data, EvaluationConfig(limit=limit))["generated"]
        ids[limit] = [example.id for example in result.examples]
        order = [row.instruction for row in generate("test", rows=60, seed=0)]
        places = [order.index(example.prompt.split("\n")[3]) for example in result.examples]
        assert places == sorted(places)
        assert places != list(range(limit))
        assert result.protocol["limit"] == limit
        assert result.protocol["test_rows"] == 60
    assert set(ids[6]) < set(ids[12])


def test_ids_are_hashes_and_repeated_questions_stay_apart(model, tokenizer, choices):
    examples = evaluate(model, tokenizer, choices, EvaluationConfig(batch_size=8))["arc_easy"].examples
    ids = [example.id for example in examples]
    assert len(set(ids)) == 8
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids)
    assert examples[0].prompt == examples[-1].prompt


def test_the_protocol_says_how(model, tokenizer, choices):
    data = choices.model_copy(update={"template": "published", "tasks": ("boolq",)})
    result = evaluate(model, tokenizer, data, EvaluationConfig(extraction="strict", num_beams=2, limit=3))["boolq"]
    assert (result.scoring, result.extraction, result.task) == ("generation", "strict", "boolq")
    expected = {
        "template": "published",
        "num_beams": 2,
        "max_new_tokens": 32,
        "batch_size": "auto",
        "lm_eval": "0.4.13",
    }
    assert expected.items() <= result.protocol.items()
    assert result.protocol["test_file"] == "dataset/boolq/test.json"
    assert len(result.protocol["test_sha256"]) == 64
    assert result.examples[0].prompt.endswith("### Response:\n" + " " * 16)


def test_progress_counts_up_to_the_end(model, tokenizer, choices):
    for scoring, totals in (
        ("generation", {"boolq": 9 + 18, "arc_easy": 8 + 24}),
        ("loglikelihood", {"boolq": 18, "arc_easy": 24}),
        ("loss", {"boolq": 18, "arc_easy": 24}),
    ):
        seen = []
        config = EvaluationConfig(scoring=scoring, batch_size=4)
        evaluate(model, tokenizer, choices, config, on_progress=lambda *call: seen.append(call))  # noqa: B023
        for task, total in totals.items():
            counts = [done for name, done, of in seen if name == task and of == total]
            assert counts == sorted(counts)
            assert counts[-1] == total


def test_evaluation_is_quiet_and_touches_no_network(model, tokenizer, choices, capfd, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("evaluation tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for scoring in ("generation", "loglikelihood"):
        evaluate(model, tokenizer, choices, EvaluationConfig(scoring=scoring, batch_size=4))
    assert capfd.readouterr() == ("", "")


def test_the_temporary_folder_may_have_any_name(model, tokenizer, tmp_path, monkeypatch):
    strange = tmp_path / "t[1]?#x *{a}"
    strange.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(strange))
    assert len(evaluate(model, tokenizer, GENERATED, EvaluationConfig(limit=2))["generated"].examples) == 2


def test_a_short_context_leaves_room_for_the_question(tokenizer):
    short = make_model(tokenizer, positions=64)
    result = evaluate(short, tokenizer, GENERATED, EvaluationConfig(limit=2))["generated"]
    assert result.protocol["max_new_tokens"] == 32


def test_numbers_cannot_be_scored_by_loglikelihood(tmp_path):
    scored = EvaluationConfig(scoring="loglikelihood", num_beams=4)
    with pytest.raises(ConfigError) as error:
        check_evaluation(DataConfig(suite="arithmetic", tasks=("gsm8k", "aqua", "svamp")), scored)
    assert "gsm8k, svamp ask for numbers" in str(error.value)
    assert "num_beams: 4 has no effect" in str(error.value)
    check_evaluation(DataConfig(suite="arithmetic", tasks=("aqua",)), EvaluationConfig(scoring="loglikelihood"))


def test_real_rows_go_through(model, tokenizer, real_data):
    source = FolderSource(path=str(real_data / "llm-adapters"))
    data = DataConfig(suite="commonsense", tasks=("boolq", "piqa", "openbookqa"), source=source)
    results = evaluate(model, tokenizer, data, EvaluationConfig(limit=4))
    assert {key: len(result.examples) for key, result in results.items()} == dict.fromkeys(data.tasks, 4)
    aqua = DataConfig(suite="arithmetic", tasks=("aqua",), source=source)
    result = evaluate(model, tokenizer, aqua, EvaluationConfig(scoring="loglikelihood", limit=4))["aqua"]
    assert {example.extracted for example in result.examples} <= set("ABCDE")


@pytest.mark.parametrize("scoring", ["generation", "loglikelihood"])
def test_every_forward_pass_is_given_its_attention_mask(model, tokenizer, choices, scoring):
    masks = []

    def note(_: object, args: tuple[object, ...], given: dict[str, torch.Tensor]) -> None:
        masks.append((given["input_ids"], given["attention_mask"]))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    result = evaluate(model, tokenizer, choices, EvaluationConfig(scoring=scoring, batch_size=4))["boolq"]
    hook.remove()
    # questions hold no end token: where it stands, it is padding; transformers drops masks of nothing but ones
    padded = [(ids, mask) for ids, mask in masks if ids.shape[1] > 1 and (ids == tokenizer.eos_token_id).any()]
    assert padded, "questions of one length need no mask"
    for ids, mask in padded:
        own = mask[:, -ids.shape[1] :].bool()
        assert torch.equal(own, ids != tokenizer.eos_token_id)
    assert result.workload.tokens > 0
    assert result.workload.padding_tokens > 0
    assert 0 < result.workload.padding_share < 1
