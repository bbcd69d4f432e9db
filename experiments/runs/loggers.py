"""Where the metrics of a run go in addition to ``metrics.jsonl``."""

import contextlib
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.runs.stored_config import to_dict

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class Logger(Protocol):
    """Takes the metrics of a run; write one of your own and pass it to ``train``."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values under the number of steps taken so far."""
        ...

    def close(self) -> None:
        """Called at the end of the run, however it ends."""
        ...


class TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, run: Path, config: RunConfig, step: int):
        del config
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(run), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        # Errors in its own thread would be lost.
        self._events.flush()

    def close(self) -> None:
        """See `Logger`; ``write`` has already reported what cannot be written."""
        with contextlib.suppress(OSError):
            self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed run continues under the same id."""

    def __init__(self, run: Path, config: RunConfig, step: int):
        del step
        wandb = _installed("wandb")
        self._run = wandb.init(
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run.parent),
            config=to_dict(config),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Logger`."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in the experiment named by its environment variables."""

    def __init__(self, run: Path, config: RunConfig, step: int):
        del step
        self._mlflow = _installed("mlflow")
        self._mlflow.start_run(run_name=run.name)
        self._mlflow.log_dict(to_dict(config), "config.json")

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Logger`."""
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._mlflow.end_run()


LOGGERS: dict[LoggerName, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_loggers(names: tuple[LoggerName, ...]) -> None:
    """Raises unless the packages of the loggers are installed.

    Raises:
      ConfigError: one is not.
    """
    for name in names:
        if name != "tensorboard":
            _installed(name)


def _installed(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"logger {package} needs its package: pip install {package}"
        ) from error
