"""What is scored and generated from are the tokens that were trained on, whatever a tokenizer adds of its own."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from task_parts import make_model, make_tokenizer, record
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grass_ray.config import DataConfig
from grass_ray.tasks.inference.harness import ObservedLM, undisturbed
from grass_ray.tasks.rows import row_from_record
from grass_ray.tasks.suites import TASKS
from grass_ray.tasks.templates import render_answer, render_prompt
from grass_ray.training.batches import Batches

FORM = "\n\nAnswer format: true/false"
ROWS = [row_from_record(record(answer, instruction=f"Is it so?{FORM}"), TASKS["boolq"]) for answer in ("true", "false")]


def template(tokenizer: PreTrainedTokenizerFast, form: str) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens around every text, such as ``<start> $A <end>``."""
    special = [(word, tokenizer.convert_tokens_to_ids(word)) for word in form.split() if word != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    return tokenizer


def like_llama2(form: str = "$A") -> PreTrainedTokenizerFast:
    """Puts a space before every text, as Llama 2's does; words are tokens, with the space before them."""
    trained = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    texts = [render_prompt(row, "clean") + row.output for row in ROWS]
    words = [word for text in texts for line in text.split("\n") for word in ("▁" + line.replace(" ", " ▁")).split(" ")]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<start>", "<end>", *alphabet], show_progress=False
    )
    trained.train_from_iterator(words * 20, trainer)
    rules = json.loads(trained.to_str())
    rules["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    return template(wrapped, form)


def byte_level(form: str) -> PreTrainedTokenizerFast:
    return template(make_tokenizer(bos_token="<start>", pad_token="<pad>"), form)


TOKENIZERS = {
    "ordinary": lambda: byte_level("$A"),
    "start": lambda: byte_level("<start> $A"),
    "start and end": lambda: byte_level("<start> $A <end>"),
    "end": lambda: byte_level("$A <end>"),
    "llama2": like_llama2,
    "llama2 with start": lambda: like_llama2("<start> $A"),
    "llama2 with both": lambda: like_llama2("<start> $A <end>"),
}


def requests_of(template_name: str) -> list[Instance]:
    pairs = [
        (render_prompt(row, template_name), render_answer(TASKS["boolq"], option))
        for row in ROWS
        for option in ("true", "false")
    ]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize("template_name", ["clean", "published"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_trained_on_are_those_scored_and_generated_from(kind, template_name):
    tokenizer = TOKENIZERS[kind]()
    data = DataConfig(suite="commonsense", tasks=("boolq",), template=template_name)
    batches = Batches(ROWS[:1], tokenizer, data, batch_size=1, accumulation_steps=1, seed=0)
    (batch,) = batches[0]
    trained, labels = batch.input_ids[0].tolist(), batch.labels[0]
    taught = labels[labels >= 0].tolist()
    assert trained[-1] == tokenizer.eos_token_id
    assert trained.count(tokenizer.eos_token_id) == 1, "no end before the answer"
    model = make_model(tokenizer)
    with undisturbed(model, tokenizer):
        lm = ObservedLM(model, tokenizer, batch_size=1, on_batch=lambda _: None)
        context, continuation = lm._encode_pair(*requests_of(template_name)[0].args)
        asked, mask = lm.tok_batch_encode([render_prompt(ROWS[0], template_name)])
        scores = lm.loglikelihood(requests_of(template_name))
    assert context + continuation == trained[:-1]
    assert asked[0].tolist() == trained[: -len(taught)]
    assert bool(mask.all())
    assert continuation[-len(taught) + 1 :] == taught[:-1]
    logits = model(input_ids=torch.tensor([trained[:-1]])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(trained) - 2)
    plain = sum(float(logits[at, trained[at + 1]].detach()) for at in places)
    assert scores[0][0] == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("kind", ["ordinary", "start", "llama2", "llama2 with start"])
def test_tokenizers_score_what_lm_eval_itself_scores(kind):
    tokenizer = TOKENIZERS[kind]()
    model = make_model(tokenizer)
    with undisturbed(model, tokenizer):
        own = ObservedLM(model, tokenizer, batch_size=4, on_batch=lambda _: None)
        plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        for request in requests_of("clean"):
            assert own._encode_pair(*request.args) == plain._encode_pair(*request.args)
        found, wanted = (lm.loglikelihood(requests_of("clean"), disable_tqdm=True) for lm in (own, plain))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)
