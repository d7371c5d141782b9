"""A training run's own files: resolved configuration, metrics, checkpoint. Running the same command again goes on."""

import io
import json
import pickle
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.records.errors import CheckpointError, ExistsError
from kdcache.records.manifest import recipe_differences
from kdcache.store.files import write_atomically

Config = dict[str, str | int | float | bool | list[str]]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """Where a run keeps its state."""

    config: Path
    """TOML; `--config` accepts it."""
    metrics: Path
    """One JSON object a line: epoch, student, losses, accuracy, seconds."""
    checkpoint: Path
    """Everything needed to go on; removed when the run is done."""

    @classmethod
    def in_folder(cls, folder: Path) -> "RunFiles":
        """For a run that owns a folder."""
        return cls(config=folder / "config.toml", metrics=folder / "metrics.jsonl", checkpoint=folder / "checkpoint.pt")

    @classmethod
    def beside(cls, file: Path) -> "RunFiles":
        """For a run that makes one file."""
        return cls(
            config=file.with_suffix(".config.toml"),
            metrics=file.with_suffix(".metrics.jsonl"),
            checkpoint=file.with_suffix(".checkpoint.pt"),
        )

    def begin(self, config: Config) -> None:
        """Records the configuration, or checks that it is the one that began here.

        Raises:
            ExistsError: Another configuration's run is here; the differing settings are listed.
        """
        if self.config.exists():
            found = tomllib.loads(self.config.read_text("utf-8"))
            differences = recipe_differences(found, json.loads(json.dumps(config)))
            if differences:
                listed = "\n  ".join(differences)
                raise ExistsError(f"{self.config.parent} holds another run; choose another --out or remove it. Differing:\n  {listed}")
        write_atomically(self.config, "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()).encode())

    def save(self, state: dict[str, Any], rows: list[Row]) -> None:
        """Writes the checkpoint, then the metrics so far."""
        buffer = io.BytesIO()
        torch.save({**state, "rows": json.dumps(rows)}, buffer)
        write_atomically(self.checkpoint, buffer.getbuffer())
        self.write_metrics(rows)

    def load(self) -> tuple[dict[str, Any], list[Row]] | None:
        """The checkpoint's state and metrics, or None when there is none.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            return state, json.loads(state.pop("rows"))
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.checkpoint} is damaged; remove it to train from the start ({error})") from error

    def write_metrics(self, rows: list[Row]) -> None:
        """Replaces the metrics file."""
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[Row]:
        """The rows of a finished run."""
        return [json.loads(line) for line in self.metrics.read_text("utf-8").splitlines()]

    def finish(self) -> None:
        """Removes what only an unfinished run needs."""
        self.checkpoint.unlink(missing_ok=True)
