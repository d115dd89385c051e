"""Write results in the files of lm-eval, as ``lm_eval --output_path`` does.

::

    collected = HarnessResults()
    evaluate(model, tokenizer, config.data, config.evaluation, on_outcome=collected.add)
    collected.write(folder, model="smollm2-135m", evaluation=config.evaluation)
    # folder/smollm2-135m/results_<date>.json and samples_<task>_<date>.jsonl
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grass_ray.config import EvaluationConfig

# keys of lm-eval's results that map tasks to values
BY_TASK = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


class HarnessResults:
    """Collects the results of single tasks and writes them."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {name: {} for name in BY_TASK}
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._started = time.time()

    def add(self, outcome: Mapping[str, Any]) -> None:
        """Add the return value of ``lm_eval.evaluate`` for one or more tasks."""
        for name in BY_TASK:
            self._results[name] |= copy.deepcopy(outcome[name])
        for task, samples in outcome["samples"].items():
            self._samples[task] = sorted(copy.deepcopy(samples), key=lambda sample: sample["doc_id"])

    def write(self, folder: Path, *, model: str, evaluation: EvaluationConfig) -> list[Path]:
        """Write ``results_<date>.json``, and per task ``samples_<task>_<date>.jsonl``, into a folder for the model.

        Args:
            folder: parent folder, lm-eval's ``--output_path``.
            model: name of the model.
            evaluation: configuration of the evaluation.

        Returns:
            The files written.

        Raises:
            OSError: a file could not be written.
        """
        from lm_eval.loggers import EvaluationTracker

        tracker = EvaluationTracker(output_path=str(folder))
        model_args = {"pretrained": model}
        tracker.general_config_tracker.log_experiment_args("hf", model_args, None, None, False)
        results = self._results | {
            "config": {
                "model": "hf",
                "model_args": model_args,
                "batch_size": evaluation.batch_size,
                "limit": evaluation.limit,
                "gen_kwargs": {"num_beams": evaluation.num_beams} if evaluation.scoring == "generation" else None,
            },
            "date": self._started,
            "lm_eval_version": version("lm_eval"),
            "transformers_version": version("transformers"),
        }
        tracker.save_results_aggregated(results=results, samples=self._samples)
        for task, samples in self._samples.items():
            tracker.save_results_samples(task, samples)
        files = sorted(path for path in folder.rglob("*.json*") if path.name.startswith(("results_", "samples_")))
        if len(files) < 1 + len(self._samples):  # lm-eval's writer only warns
            raise OSError(f"lm-eval could not write its results into {folder}")
        return files
