"""The kinds of runs: the only place that knows that there are several.

Everything particular to a kind is in its folder, and `Kind` says what that has to
provide. A folder is imported when a run of its kind is opened: jax, its networks and
its data take seconds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from experiments.config import RunConfig
from experiments.images.config import ImageConfig
from experiments.text.config import TextConfig

if TYPE_CHECKING:
    from cram_jax.structure import Structure
    from experiments.deployment.network import Network, Samples
    from experiments.task import Model, Task

CONFIGS: dict[str, type[RunConfig]] = {
    cls.kind: cls for cls in (ImageConfig, TextConfig)
}
"""The configurations, by the word for their kind."""


class Kind(Protocol):
    """What ``experiments.images.kind`` and ``experiments.text.kind`` provide.

    Attributes:
      SOURCES: what ``init_from`` may name, in words.
      WEIGHT_FILES: the endings of files of published weights that it may name.
      LIBRARY: of PyTorch, in whose names `export` writes a model.
    """

    SOURCES: str
    WEIGHT_FILES: tuple[str, ...]
    LIBRARY: str

    def prepare(
        self, config: Any, data_dir: Path | None = None, *, workers: int = 0
    ) -> "tuple[Any, Task]":
        """Reads the data of a run and makes its task.

        Args:
          config: the run.
          data_dir: where tensorflow-datasets keeps its data; by default the user's
            cache.
          workers: processes that decode large images; 0: threads.

        Returns:
          The data, with ``train`` and ``evaluation`` for the task, and the task.
        """
        ...

    def network(self, config: Any, data: Any, params: Any, batch_stats: Any) -> Any:
        """The network of a run with its weights, as an NNX module."""
        ...

    def make_task(self, config: Any, data: Any) -> "Task":
        """The task of a configuration, for data that have been read."""
        ...

    def smaller_model(
        self, config: Any, data: Any, structure: "Structure", kept: Any
    ) -> Any:
        """The model configuration of a network that has lost channels.

        Args:
          config: the run before.
          data: its data.
          structure: of its parameters and batch statistics.
          kept: the groups that stay.
        """
        ...

    def resolve(self, config: Any) -> Any:
        """Completes a configuration from its data, such as with their labels."""
        ...

    def check_weights(self, config: Any) -> None:
        """Raises if the published weights that a run starts from do not fit it."""
        ...

    def check_teacher(self, config: Any, theirs: Any, run: Path) -> None:
        """Raises if a run cannot teach another, as with different tokens."""
        ...

    def load_weights(self, config: Any, file: Path, classes: int | None) -> "Model":
        """Reads published weights; ``classes`` replaces their last layer."""
        ...

    def keep_sources(self, config: Any, run: Path) -> None:
        """Copies into a run the small files that it needs later."""
        ...

    def kept_sources(self, config: Any, run: Path) -> Any:
        """The configuration, with those copies instead of the original files."""
        ...

    def export(
        self, config: Any, model: "Model", run: Path, out: Path, vocabulary: Path | None
    ) -> None:
        """Writes a model as `LIBRARY` does, with the vocabulary of the run or this."""
        ...

    def deploy(
        self, config: Any, data: Any, params: Any, batch_stats: Any
    ) -> "Network":
        """The network of a run with these parameters, in the form that engines take."""
        ...

    def samples(self, config: Any, data: Any) -> "Samples":
        """The examples of a run, in the form that engines take."""
        ...


def kind_of(config: RunConfig) -> Kind:
    """The kind of a run."""
    if isinstance(config, TextConfig):
        from experiments.text import kind as text

        return cast(Kind, text)
    from experiments.images import kind as images

    return cast(Kind, images)


def prepare(
    config: RunConfig, data_dir: Path | None = None, *, workers: int = 0
) -> "tuple[Any, Task]":
    """Reads the data of a run and makes its task, see `Kind.prepare`."""
    return kind_of(config).prepare(config, data_dir, workers=workers)
