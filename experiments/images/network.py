"""The trained network of a run on images, to use in a program of one's own."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import checkpoints
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.images.data import Dataset, load
from experiments.images.models import make_model
from experiments.run_directory import data_dir_of, load_config


def load_network(
    run: Path | str, *, data_dir: Path | None = None, module: str = ""
) -> tuple[nnx.Module, Dataset]:
    """Reads the network of a run, or of a compressed model, and opens its data.

    Args:
      run: the directory.
      data_dir: where tensorflow-datasets keeps the data; by default where the run found
        them.
      module: the run's ``model.module`` if its network is your own, to allow its
        import.

    Returns:
      The network with its trained weights, to be called with normalised images and
      ``training=False``; and the data, of which `Dataset.normalize` normalises images.

    Raises:
      RunError: the directory holds no such run, or its model is damaged.
      ConfigError: the run is not one on images, or of a network of your own that
        ``module`` does not name.
    """
    run = Path(run)
    config = load_config(run)
    if not isinstance(config, ImageConfig):
        raise ConfigError(f"{run} is a run on {config.kind}, not one on images")
    if config.model.module and module != config.model.module:
        raise ConfigError(
            f"{run} is of the network {config.model.module}, whose code is run only if "
            f"you name it too, as module"
        )
    data = load(config.data, data_dir or data_dir_of(run))
    params, batch_stats = jax.tree.map(jnp.asarray, checkpoints.read_model(run))
    model = nnx.eval_shape(
        lambda: make_model(
            config.model,
            channels=data.shape[-1],
            classes=data.classes,
            rngs=nnx.Rngs(0),
        )
    )
    return nnx.merge(nnx.graphdef(model), params, batch_stats), data
