"""What is benchmarked: the model of a run, or a network with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import cram_jax
from experiments.compression.options import PrunerOptions
from experiments.compression.targets import LeafFilters, projector
from experiments.config import RunConfig
from experiments.deployment.network import Inputs, Network, Samples, Subject
from experiments.errors import ConfigError
from experiments.evaluation.evaluation import Evaluation, check_targets, make_evaluation
from experiments.evaluation.open_run import open_run
from experiments.images import deployment as images
from experiments.images.config import ModelConfig
from experiments.images.models import CIFAR_RESNETS, IMAGENET_RESNETS, make_model
from experiments.images.task import FILTERS
from experiments.kinds import kind_of
from experiments.text import deployment as texts
from experiments.text.classification import make_network
from experiments.text.config import (
    BASE,
    SMALL,
    BertConfig,
    BertModelConfig,
    TextConfig,
    TextDataConfig,
)
from experiments.text.network import ENCODER

SIDES = dict.fromkeys((*CIFAR_RESNETS, "resnet18_cifar", "vgg16_bn_cifar"), 32)
SIDES |= dict.fromkeys(IMAGENET_RESNETS, 224)
BERTS = {"bert6x384": SMALL, "bert_base": BASE}
LENGTH = 128


def subject_of(
    what: str,
    targets: tuple[str, ...],
    data_dir: Path | None,
    pruning: PrunerOptions,
    say: Callable[[str], Any],
) -> Subject:
    """The subject of a word on the command line.

    Args:
      what: the directory of a run, or the name of a network.
      targets: what it will be compressed to.
      data_dir: where tensorflow-datasets keeps its data; None: where the run found it.
      pruning: settings of targets that look at the data.
      say: told what is noteworthy about a run.

    Raises:
      ConfigError: it is neither, or a target fits no layer of it.
      RunError: the run cannot be read.
    """
    if (Path(what) / "config.json").exists():
        config, data, task, *model = open_run(Path(what), data_dir, say)
        check_targets(targets, config, task)
        evaluation = make_evaluation(config, data, task, pruning)
        name = Path(what).name
        return subject_of_model(name, config, data, evaluation, *model)
    if what in SIDES:
        return _random_images(what)
    if what in BERTS:
        return _random_text(what, BERTS[what])
    names = ", ".join((*SIDES, *BERTS))
    raise ConfigError(f"{what} is neither the directory of a run nor one of {names}")


def subject_of_model(
    name: str,
    config: RunConfig,
    data: Any,
    evaluation: Evaluation,
    params: Any,
    batch_stats: Any,
) -> Subject:
    """The subject of a trained model; batch norm is recalibrated for every target."""
    kind = kind_of(config)

    def compress(target: str) -> Network:
        if target == "dense":
            return kind.deploy(config, data, params, batch_stats)
        compressed = evaluation.compress(params, target, batch_stats).params
        statistics = evaluation.recalibrate(compressed, batch_stats)
        return kind.deploy(config, data, compressed, statistics)

    return Subject(name, compress, kind.samples(config, data), config.eval_targets)


def _random_images(name: str) -> Subject:
    config: Any = ModelConfig(name=name)  # type: ignore[arg-type]
    side, classes = SIDES[name], 1000 if name in IMAGENET_RESNETS else 10

    @jax.jit
    def init() -> tuple[Any, Any]:
        model = make_model(config, 3, classes, nnx.Rngs(0))
        _, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
        params, batch_stats = map(nnx.to_pure_dict, states)
        return params, batch_stats

    params, batch_stats = init()

    def deploy(params: Any) -> Network:
        shape = (side, side, 3)
        return images.image_network(config, shape, classes, params, batch_stats)

    def inputs(count: int) -> Inputs:
        drawn = np.random.default_rng(0).standard_normal((count, side, side, 3))
        return (drawn.astype(np.float32),)

    return _random(name, params, FILTERS, deploy, inputs)


def _random_text(name: str, shape: BertConfig) -> Subject:
    data = TextDataConfig(name="sst2", max_length=LENGTH)
    fields = {key: getattr(shape, key) for key in shape.__dataclass_fields__}
    config = TextConfig(name=name, data=data, model=BertModelConfig(**fields))
    params, _ = make_network(config).init(0)

    def deploy(params: Any) -> Network:
        return texts.text_network(config, params)

    def inputs(count: int) -> Inputs:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, shape.vocab_size, (count, LENGTH), np.int32)
        return ids, np.ones_like(ids), np.zeros_like(ids)

    return _random(name, params, ENCODER, deploy, inputs)


def _random(
    name: str,
    params: Any,
    filters: LeafFilters,
    deploy: Callable[[Any], Network],
    inputs: Callable[[int], Inputs],
) -> Subject:
    prune = jax.jit(cram_jax.compress, static_argnames="projector")

    def compress(target: str) -> Network:
        chosen = projector(target, filters=filters)
        return deploy(prune(params, projector=chosen).params)

    # Random inputs all have one distribution: a few are enough to calibrate.
    samples = Samples(inputs, lambda count: [inputs(min(count, 4))], None)
    return Subject(name, compress, samples, ("dense", "b90"))
