"""Which tokens of a conversation are learned, by marks of the template and by the rule of prefixes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from task_parts import make_tokenizer

from grass_ray.config import ConfigError, DataConfig, DatasetSource
from grass_ray.tasks.conversations import SIMPLE, encode_chat, find_template
from grass_ray.tasks.encoding import encode_rows
from grass_ray.tasks.rows import ChatRow, RowError, TextRow

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETFUL = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'][:2])")
SEVERAL = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": " And äöü €?\n"},
    {"role": "assistant", "content": "\nI do not know, 生.\n"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer(bos_token="<start>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def row(messages: list[dict[str, Any]], **more: Any) -> ChatRow:
    return ChatRow(messages=json.dumps(messages), where="row 1 of here", **more)


def learned_texts(tokenizer: Any, ids: list[int], learned: list[int]) -> list[str]:
    runs: list[list[int]] = [[]]
    for token, own in zip(ids, learned, strict=True):
        if own:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_turns_of_the_assistant_are_learned_with_their_end_tokens(tokenizer: Any, template: str) -> None:
    ids, learned = encode_chat(tokenizer, row(SEVERAL), template)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in SEVERAL)
    assert tokenizer.decode(ids) == whole
    assert learned_texts(tokenizer, ids, learned) == ["4<|im_end|>", "\nI do not know, 生.\n<|im_end|>"]


def test_marks_and_prefixes_agree_token_by_token(tokenizer: Any) -> None:
    assert encode_chat(tokenizer, row(SEVERAL), CHATML) == encode_chat(tokenizer, row(SEVERAL), MARKED)


def test_what_is_not_learned_is_what_generation_continues_from(tokenizer: Any) -> None:
    ids, learned = encode_chat(tokenizer, row(SEVERAL[:3]), CHATML)
    prompt = tokenizer.apply_chat_template(
        SEVERAL[:2], chat_template=CHATML, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids[: learned.index(1)] == prompt


def test_an_end_token_is_learned_if_the_template_has_none(tokenizer: Any) -> None:
    bare = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ids, learned = encode_chat(tokenizer, row(SEVERAL), bare)
    assert (ids[-1], learned[-1]) == (tokenizer.eos_token_id, 1)
    assert learned_texts(tokenizer, ids, learned)[0] == "4\n"


def test_a_greeting_that_opens_a_conversation_is_learned_only_where_it_is_marked(tokenizer: Any) -> None:
    found = {name: encode_chat(tokenizer, row(SEVERAL[2:]), name) for name in (CHATML, MARKED)}
    assert learned_texts(tokenizer, *found[CHATML]) == ["\nI do not know, 生.\n<|im_end|>"]
    assert learned_texts(tokenizer, *found[MARKED])[0] == "4<|im_end|>"
    assert found[CHATML][0] == found[MARKED][0]


def test_the_simple_template_is_for_every_tokenizer() -> None:
    tokenizer = make_tokenizer(bos_token="<start>")
    ids, learned = encode_chat(tokenizer, row(SEVERAL[:3]), SIMPLE)
    assert tokenizer.decode(ids) == (
        "<start>### System:\nBe short.\n\n### User:\nWhat is 2 + 2?\n\n### Assistant:\n4<end>\n\n"
    )
    assert learned_texts(tokenizer, ids, learned) == ["4<end>"]


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (SEVERAL, FORGETFUL, "renders message 3 differently when others follow"),
        (SEVERAL[2:4], CHATML, "its only message of the assistant is the first one, and this chat template marks no"),
        (SEVERAL, "{{ raise_exception('System role not supported') }}", "refuses it: System role not supported"),
        (SEVERAL, "{{ messages[0]['content'] + 1 }}", "the chat template refuses it: "),
        (SEVERAL, CHATML.replace("message['content']", "''"), "renders nothing of what the assistant says"),
        (SEVERAL, MARKED.replace("message['role'] == 'assistant'", "false"), "renders nothing of what the assistant"),
    ],
)
def test_what_a_template_does_not_tell_is_refused(
    tokenizer: Any, messages: list[dict[str, Any]], template: str, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        encode_chat(tokenizer, row(messages), template)


def data(**settings: Any) -> DataConfig:
    more = {
        key: settings.pop(key) for key in ("broken_rows", "max_length_tokens", "train_on_inputs") if key in settings
    }
    source = DatasetSource(name="mine", path="mine.jsonl", **settings)
    return DataConfig(suite="mine", tasks=("mine",), source=source, **more)


def test_rows_that_the_template_refuses_are_named_or_counted(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    own = str(tmp_path / "own.jinja")
    rows = [row(SEVERAL), ChatRow(messages=json.dumps(SEVERAL[2:4]), where="row 2 of /chats.jsonl")]
    with pytest.raises(
        ConfigError, match=r"1 of 2 rows cannot be used: row 2 of /chats.jsonl: its only message of the"
    ):
        encode_rows(rows, tokenizer, data(chat_template=own))
    found = encode_rows(rows, tokenizer, data(chat_template=own, broken_rows="skip"))
    assert (len(found.rows), len(found.refused)) == (1, 1)


def test_a_missing_or_broken_template_is_said_in_one_sentence(tokenizer: Any, tmp_path: Path) -> None:
    bare = make_tokenizer()
    with pytest.raises(ConfigError, match="has no chat template, which conversations are rendered with; take a model"):
        encode_rows([row(SEVERAL)], bare, data())
    with pytest.raises(ConfigError, match=r"cannot read the chat template gone.jinja: No such file"):
        find_template(data(chat_template="gone.jinja").source, bare)  # type: ignore[arg-type]
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"broken.jinja is no Jinja template: .* \(line 1\)"):
        encode_rows([row(SEVERAL)], bare, data(chat_template=str(tmp_path / "broken.jinja")))


def test_pairs_are_chats_if_the_tokenizer_has_a_template() -> None:
    bare, chatting = make_tokenizer(), make_tokenizer()
    chatting.chat_template = SIMPLE
    pair = row([{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}], plain=("2+2=", "4"))
    plain, chat = "2+2=4<end>", "### User:\n2+2=\n\n### Assistant:\n4<end>\n\n"

    def text(tokenizer: Any, **settings: Any) -> str:
        (found,) = encode_rows([pair], tokenizer, data(**settings)).rows
        return str(tokenizer.decode(found.ids))

    assert (text(bare), text(chatting)) == (plain, chat)
    assert (text(bare, chat_template="simple"), text(chatting, chat=False)) == (chat, plain)
    with pytest.raises(ConfigError, match="has no chat template"):
        text(bare, chat=True)
    (found,) = encode_rows([pair], bare, data()).rows
    assert learned_texts(bare, found.ids, found.learned) == ["4<end>"]
    (whole,) = encode_rows([pair], bare, data(train_on_inputs=True)).rows
    assert learned_texts(bare, whole.ids, whole.learned) == [plain]


def test_rows_are_cut_and_empty_ones_counted() -> None:
    bare = make_tokenizer()
    rows = [TextRow(text="one two three four five six seven"), TextRow(text=" \n"), row(SEVERAL, plain=("a", " "))]
    found = encode_rows(rows, bare, data(max_length_tokens=8))
    assert found.empty == 2
    assert (len(found.rows[0].ids), found.rows[0].is_cut, found.rows[0].targets) == (8, True, 7)


# Templates of well-known models that trl keeps beside the same template with marks: by prefixes both must agree.
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # type: ignore[union-attr, arg-type]
PUBLISHED = ["qwen2_5", "llama3", "gemma", "phi3", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_teach_what_their_marked_twins_do(tokenizer: Any, name: str) -> None:
    messages = SEVERAL[1:]
    plain = encode_chat(tokenizer, row(messages), (TEMPLATES / f"{name}.jinja").read_text())
    marked = encode_chat(tokenizer, row(messages), (TEMPLATES / f"{name}_training.jinja").read_text())
    said = [text.split("<")[0].strip() for text in learned_texts(tokenizer, *plain)]
    assert said == ["4", "I do not know, 生."]
    assert [text.split("<")[0].strip() for text in learned_texts(tokenizer, *marked)] == said


def test_a_template_that_drops_earlier_reasoning_is_refused_and_its_marked_twin_is_not(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="renders message 2 differently when others follow"):
        encode_chat(tokenizer, row(SEVERAL[1:]), (TEMPLATES / "qwen3.jinja").read_text())
    marked = encode_chat(tokenizer, row(SEVERAL[1:]), (TEMPLATES / "qwen3_training.jinja").read_text())
    assert "4" in "".join(learned_texts(tokenizer, *marked))
