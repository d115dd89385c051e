"""A folder of lm-eval tasks that read local files: options, generated text, whole texts, and a group."""

from __future__ import annotations

import json
from pathlib import Path

_DATA = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.json
    train: rows.json
test_split: test
fewshot_split: train
doc_to_text: "Question: {{question}}\\nAnswer:"
"""
_CHOICE = """\
task: {name}
include: data.yml
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
process_docs: !function parts.{part}
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3
"""
FILES = {
    "data.yml": _DATA,
    "parts.py": "def odd(docs):\n    return docs.select(range(1, len(docs), 2))\n\n\n"
    "def even(docs):\n    return docs.select(range(0, len(docs), 2))\n",
    "odd.yaml": _CHOICE.format(name="sums_odd", part="odd"),
    "even.yaml": _CHOICE.format(name="sums_even", part="even"),
    "sums.yaml": "group: sums\ntask: [sums_odd, sums_even]\naggregate_metric_list:\n  - metric: acc\n"
    "    weight_by_size: true\nmetadata:\n  version: 1\n",
    "digits.yaml": """\
task: digits
include: data.yml
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    ignore_punctuation: true
""",
    "prose.yaml": """\
task: prose
include: data.yml
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


def write_harness_folder(folder: Path, *, rows: int = 14) -> Path:
    """Write the folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {
            "question": f"What is {n} + {n % 5}?",
            "choices": [str(n + n % 5 + shift) for shift in ((0, 1, 7) if n % 3 else (4, 0, 9))],
            "gold": 0 if n % 3 else 1,
            "answer": str(n + n % 5),
        }
        for n in range(rows)
    ]
    (folder / "rows.json").write_text(json.dumps(documents))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder
