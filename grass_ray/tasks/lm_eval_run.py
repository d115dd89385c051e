"""Evaluate a model on lm-eval's own tasks, by lm-eval itself. Importing this module loads no torch.

::

    results = evaluate_lm_eval(model, tokenizer, config.evaluation)
    results["mmlu"].value, results["mmlu"].stderr, results["mmlu"].metrics["acc_norm"]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from grass_ray.config import EvaluationConfig
from grass_ray.tasks.evaluation import OnOutcome
from grass_ray.tasks.held_out import OnProgress, Progress
from grass_ray.tasks.lm_eval_scores import LmEvalResult, read_results
from grass_ray.tasks.lm_eval_tasks import load_lm_eval

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# resamples for standard errors that have no formula; lm-eval's own default takes minutes
RESAMPLES = 1000


def evaluate_lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationConfig,
    *,
    shard: tuple[int, int] | None = None,
    on_progress: OnProgress | None = None,
    on_outcome: OnOutcome | None = None,
) -> dict[str, LmEvalResult] | None:
    """Evaluate a model on ``evaluation.lm_eval.tasks``. The model and the tokenizer are left unchanged.

    Args:
        model: causal language model of transformers, possibly with peft adapters, on one device.
        tokenizer: its tokenizer.
        evaluation: tasks, few-shot examples, limit (the first examples of each task, as of lm-eval) and batch size.
        shard: (index, count) if several workers share the examples; each calls this function.
        on_progress: called with (``lm-eval``, finished requests, all requests) after each batch.
        on_outcome: called with the results of lm-eval.

    Returns:
        One result per task or group, in the order in which they were named; None on workers other than the first.
    """
    config = evaluation.lm_eval
    if not config.tasks:
        return {}
    from lm_eval import simple_evaluate

    from grass_ray.tasks.inference.harness import quiet, undisturbed
    from grass_ray.tasks.inference.harness_lm import HarnessLM

    loaded = load_lm_eval(config)
    with undisturbed(model, tokenizer), quiet(), _without_environment():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that is not a task's own
        progress = Progress(on_progress)
        lm = HarnessLM(
            model,
            tokenizer,
            batch_size=evaluation.batch_size,
            on_batch=progress.advance,
            on_requests=lambda number: progress.start("lm-eval", number),
            shard=shard,
        )
        outcome: dict[str, Any] | None = simple_evaluate(
            lm,
            tasks=loaded.tasks,
            task_manager=loaded.manager,
            num_fewshot=config.num_fewshot,
            limit=evaluation.limit,
            apply_chat_template=config.apply_chat_template,
            bootstrap_iters=RESAMPLES,
        )
        progress.finish()
    if outcome is None:
        return None
    if on_outcome is not None:
        on_outcome(outcome)
    chats = config.apply_chat_template
    protocol = {"lm_eval": version("lm_eval"), "limit": evaluation.limit, "apply_chat_template": chats}
    return read_results(outcome, loaded.parts, protocol)


@contextmanager
def _without_environment() -> Iterator[None]:
    """In the block lm-eval does not describe the machine, for which it starts git and other programs; records do."""
    from lm_eval import evaluator

    kept = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info, evaluator.get_git_commit_hash = lambda storage: None, lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = kept
