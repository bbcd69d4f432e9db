"""``export``: a model as others store it."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.run_directory import load_config
from experiments.verbs.common import start_jax


@dataclass(frozen=True)
class Export:
    """Write the model of a run on text as Hugging Face stores it."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    out: Path
    """The directory for config.json, model.safetensors and the vocabulary."""
    vocabulary: Path | None = None
    """vocab.txt or tokenizer.json, or a directory with one; by default the run's."""

    def check(self) -> None:
        """The run can be read."""
        load_config(self.run)

    def execute(self) -> None:
        """Writes the files."""
        start_jax()
        from experiments.commands.export import export

        export(self.run, self.out, self.vocabulary)
