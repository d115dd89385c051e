"""A method of a user's own, as tests write it to a folder."""

from __future__ import annotations

from pathlib import Path

import yaml

TOP_HEAVY = '''
import torch
from grass_ray import UniformSampler
from grass_ray.layerwise.drawing import draw_without_replacement


class TopHeavySampler(UniformSampler):
    """Later layers are drawn more often: p grows linearly with depth."""

    def probabilities(self):
        total = self._num_units * (self._num_units + 1) / 2
        return tuple((layer + 1) / total for layer in range(self._num_units))

    def pick(self):
        log_p = torch.tensor(self.probabilities(), dtype=torch.float64).log()
        return draw_without_replacement(log_p, self.now_active, self.seed, self._draws)
'''
ROW = {
    "name": "top-heavy",
    "summary": "later layers are drawn more often",
    "sampler": {"kind": "import", "target": "top_heavy:TopHeavySampler", "args": {"num_active_layers": 2, "period": 2}},
    "optimizer": {"lr": 3e-4},
    "offload": "resident",
}


def write_methods(folder: Path, *rows: object, code: str = TOP_HEAVY, module: str = "top_heavy") -> Path:
    """A method file, and the module beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    path = folder / "methods.yaml"
    path.write_text(yaml.safe_dump(list(rows) or [ROW]), encoding="utf-8")
    return path
