"""The kinds of runs: the one place that knows that there are several.

All that is particular to a kind lies in its folder, and `Kind` says what that has to
offer. A folder is imported when a run of its kind is at hand: jax, its networks and its
data take seconds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from experiments.config import RunConfig
from experiments.images.config import ImageConfig
from experiments.text.config import TextConfig

if TYPE_CHECKING:
    from experiments.deployment.network import Network, Samples
    from experiments.task import Model, Task

CONFIGS: dict[str, type[RunConfig]] = {
    cls.kind: cls for cls in (ImageConfig, TextConfig)
}
"""The configurations, by the word for their kind."""


class Kind(Protocol):
    """What ``experiments.images.kind`` and ``experiments.text.kind`` hold.

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
          The data, whose ``train`` and ``evaluation`` the task understands, and the
          task.
        """
        ...

    def network(self, config: Any, data: Any, params: Any, batch_stats: Any) -> Any:
        """The network of a run with its weights, as an NNX module."""
        ...

    def make_task(self, config: Any, data: Any) -> "Task":
        """The task of a configuration on data that were read before."""
        ...

    def smaller_model(self, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """The model configuration of a network whose parameters became smaller.

        Args:
          config: the run before.
          shapes: of the parameters, by path.

        Raises:
          ConfigError: the configuration cannot say it.
        """
        ...

    def resolve(self, config: Any) -> Any:
        """Completes a configuration by what its data say, such as their labels."""
        ...

    def check_weights(self, config: Any) -> None:
        """Raises if the published weights that a run starts from do not fit it."""
        ...

    def check_teacher(self, config: Any, theirs: Any, run: Path) -> None:
        """Raises if another run cannot teach one, such as with other tokens."""
        ...

    def load_weights(self, config: Any, file: Path, classes: int | None) -> "Model":
        """Reads published weights; ``classes`` leaves out their last layer."""
        ...

    def keep_sources(self, config: Any, run: Path) -> None:
        """Copies into a run the small files that it needs later."""
        ...

    def kept_sources(self, config: Any, run: Path) -> Any:
        """The configuration with those files instead of the original ones."""
        ...

    def export(
        self, config: Any, model: "Model", run: Path, out: Path, vocabulary: Path | None
    ) -> None:
        """Writes a model as `LIBRARY` does, with the vocabulary of the run or this."""
        ...

    def deploy(
        self, config: Any, data: Any, params: Any, batch_stats: Any
    ) -> "Network":
        """The network of a run, with these parameters, as engines take it."""
        ...

    def samples(self, config: Any, data: Any) -> "Samples":
        """The examples of a run, as engines take them."""
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
