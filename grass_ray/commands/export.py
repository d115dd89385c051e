"""``grass-ray export``: write a trained run as a model folder, a delta or an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from grass_ray.commands.flags import tracking_store
from grass_ray.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from grass_ray.export.card import Kind


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained run as a model folder that transformers loads, or only the layers that changed.

    For example:
      grass-ray export grass_ray_results/train/RUN --output my-model
      grass-ray export my-delta --output my-model
      grass-ray export MLFLOW_RUN_ID --delta --log --output my-delta
    """

    run_or_delta: Annotated[Positional[str], arg(metavar="RUN|DELTA")]
    """Folder or MLflow run id of a run, or a folder written with --delta."""
    output: Path
    """New or empty folder to write to."""
    delta: bool = False
    """Only write the tensors that differ from the base model."""
    adapter: bool = False
    """Only write the adapter, in the format of peft."""
    model: str | None = None
    """Base model of a delta. Defaults to the model that the delta names."""
    log: bool = False
    """Also log the written files to the MLflow run, which must be given by its id."""
    tracking_uri: str | None = None
    """MLflow store of the run id."""
    push_to_hub: str | None = None
    """Also upload the folder with its card to this repository of the Hugging Face Hub (OWNER/NAME)."""
    private: bool = False
    """Make the repository of --push-to-hub private if it is new."""

    def run(self) -> int:
        """Write the folder and return the exit code."""
        from grass_ray.export.card import write_delta_card
        from grass_ray.export.delta import export_delta, export_from_delta, is_delta
        from grass_ray.export.model import export_adapter, export_run

        if self.push_to_hub is not None:
            from grass_ray.export.hub import check_upload

            check_upload(self.push_to_hub)
        folder = self._find_folder()
        kind: Kind = "delta" if self.delta else "adapter" if self.adapter else "model"
        self._check_flags(is_delta(folder))
        if self.delta:
            said = export_delta(folder, self.output).describe()
            self._write_card(folder, kind, said)
            print(f"wrote {self.output}: {said}")
        elif is_delta(folder):
            delta = export_from_delta(folder, self.output, base_model=self.model)
            write_delta_card(folder, self.output)
            print(f"wrote {self.output}; reloaded with transformers, the same in every bit; {delta.describe()}")
        else:
            export = (export_adapter if self.adapter else export_run)(folder, self.output)
            self._write_card(folder, kind)
            print(
                f"wrote {export.folder}; reloaded with {'peft' if self.adapter else 'transformers'}, "
                f"largest logit difference {export.difference:.1e} (allowed: {export.tolerance:.0e})"
            )
        if self.log:
            from grass_ray.results.store import upload

            upload(tracking_store(self.tracking_uri), self.run_or_delta, self.output, kind)
            print(f"logged to the MLflow run {self.run_or_delta} as {kind}/")
        if self.push_to_hub is not None:
            from grass_ray.export.hub import upload_folder

            print(f"uploaded to {upload_folder(self.output, self.push_to_hub, private=self.private)}")
        return 0

    def _find_folder(self) -> Path:
        """Return the folder that was given, or the folder of the run with the given id."""
        from grass_ray.results.store import is_run_id, run_folder

        by_id = is_run_id(self.run_or_delta) and not Path(self.run_or_delta).exists()
        if self.log and not by_id:
            raise ConfigError(f"--log needs an MLflow run id to log to, not the folder {self.run_or_delta}")
        if not by_id:
            return Path(self.run_or_delta)
        found = run_folder(tracking_store(self.tracking_uri), self.run_or_delta)
        if not Path(found).is_dir():
            raise ConfigError(
                f"the files of the MLflow run {self.run_or_delta} are in {found}, which is no folder on this machine; "
                "copy it here and give the copy"
            )
        return Path(found)

    def _write_card(self, folder: Path, kind: Kind, said: str | None = None) -> None:
        from grass_ray.export.card import find_record, write_card

        write_card(self.output, kind, RunConfig.from_yaml(folder / "config.yaml"), find_record(folder), written=said)

    def _check_flags(self, of_delta: bool) -> None:
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private has no effect without --push-to-hub")
        if self.delta and self.adapter:
            raise ConfigError("--delta and --adapter exclude each other; give one of them, or none for the whole model")
        if of_delta and (self.delta or self.adapter):
            raise ConfigError(
                f"{self.run_or_delta} is a delta already; leave out --{'delta' if self.delta else 'adapter'}"
            )
        if self.model is not None and not of_delta:
            raise ConfigError(
                f"--model names the base model of a delta, and {self.run_or_delta} is no folder with a delta"
            )
