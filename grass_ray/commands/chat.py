"""``grass-ray chat``: talk to a run's trained model, or to any model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from grass_ray.config import ConfigError, DatasetSource, ModelConfig, RunConfig
from grass_ray.paths import find_model

Turn = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to the trained model of a run, or to any model, in the form that it was trained on. Ctrl-D ends it.

    For example:
      grass-ray chat grass_ray_results/train/RUN
      grass-ray chat my-model --temperature 0.7
      echo "What is 2 + 3?" | grass-ray chat smollm2-135m
    """

    run_or_model: Annotated[Positional[str], arg(metavar="RUN|MODEL")]
    """Folder of a run with a checkpoint, a model folder, a hub id or a built-in model."""
    system: Annotated[str | None, arg(metavar="TEXT")] = None
    """System prompt, if the chat template takes one."""
    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token; larger values draw more freely."""

    def run(self) -> int:
        """Answer line by line until the end of input, and return the exit code."""
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ConfigError("--max-new-tokens must be at least 1, and --temperature at least 0")
        config, model, tokenizer = self._load()
        prompt = prompt_for(config, tokenizer)
        turns: list[Turn] = [] if self.system is None else [{"role": "system", "content": self.system}]
        begin = len(turns)
        asked = sys.stdin.isatty()
        if asked:
            print("/new forgets the conversation; Ctrl-D ends it")
        while (line := _read(asked)) is not None:
            if line.strip() == "/new":
                del turns[begin:]
            elif line.strip():
                turns.append({"role": "user", "content": line.strip()})
                turns.append({"role": "assistant", "content": self._answer(model, tokenizer, prompt(turns))})
        return 0

    def _load(self) -> tuple[RunConfig | None, Any, Any]:
        from grass_ray.export.model import load_trained_model
        from grass_ray.training.metrics import default_device
        from grass_ray.training.models import check_model, load_model

        folder = Path(self.run_or_model)
        if (folder / "config.yaml").is_file():
            loaded = load_trained_model(folder)
            return RunConfig.from_yaml(folder / "config.yaml"), loaded.model, loaded.tokenizer
        named = ModelConfig(name=find_model(self.run_or_model))
        check_model(named)
        loaded = load_model(named)
        return None, loaded.model.to(default_device()).eval(), loaded.tokenizer

    def _answer(self, model: Any, tokenizer: Any, text: str) -> str:
        """Generate and print an answer as it comes; what does not fit before it is cut at its beginning."""
        import torch
        from transformers import TextStreamer

        positions = getattr(model.config, "max_position_embeddings", None)
        room = None if positions is None else max(1, positions - self.max_new_tokens)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        inputs = torch.tensor([ids if room is None else ids[-room:]], device=next(model.parameters()).device)
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **drawn,
            )
        return str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)).strip()


def _read(asked: bool) -> str | None:
    try:
        return input("> " if asked else "")
    except EOFError:
        return None


def prompt_for(config: RunConfig | None, tokenizer: Any) -> Callable[[list[Turn]], str]:
    """How a conversation becomes the text before the answer: as in training, else by the chat template.

    A model that was trained on single questions, or has no chat template, is asked the last question alone.
    """
    from grass_ray.tasks.encoding import encode_prompt
    from grass_ray.tasks.rows import Row
    from grass_ray.tasks.templates import render_prompt

    chats = config is None or (isinstance(config.data.source, DatasetSource) and config.data.source.chat is not False)

    def by_template(turns: list[Turn]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def alone(turns: list[Turn]) -> str:
        text = turns[-1]["content"]
        if config is not None:
            text = render_prompt(Row(instruction=text, input="", output="", answer=""), config.data.template)
        return str(tokenizer.decode(encode_prompt(tokenizer, text)))  # with the special tokens before it

    return by_template if chats and tokenizer.chat_template else alone
