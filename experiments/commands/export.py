"""Compresses a model, writes it as others store it, and runs what was written."""

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cram_jax.export import ParityError, check_parity
from cram_jax.writing import replacing
from experiments.compression import targets
from experiments.compression.options import PrunerOptions
from experiments.deployment.formats import EXAMPLES, WRITERS, Model
from experiments.errors import ConfigError, RunError, UserError, cannot_write
from experiments.evaluation.evaluation import check_targets, make_evaluation
from experiments.evaluation.open_run import open_run
from experiments.kinds import kind_of
from experiments.runs import checkpoints
from experiments.runs.directory import load_config
from experiments.runs.metrics import make_console
from experiments.verbs.export import LIBRARIES, Export


class Compressed(NamedTuple):
    """A run's model, compressed.

    Attributes:
      model: to be written.
      target: what it was compressed to.
      exact: whether integers in the file would hold its weights exactly.
      before: the metric of the dense network, in per cent.
      after: of the compressed one, with recalibrated batch norm.
    """

    model: Model
    target: str
    exact: bool
    before: float
    after: float


def export(options: Export) -> None:
    """Carries out the verb."""
    say = partial(make_console().print, soft_wrap=True)
    if options.format in LIBRARIES:
        _export_to_library(options, say)
        return
    found = _compress(options, say)
    model, width = found.model, options.width
    tolerance = options.tolerance or _tolerance(options, found)
    inputs = model.samples.inputs(EXAMPLES)
    say(f"writing {options.out} and comparing it with JAX ...")
    expected = model.network.forward(*inputs)
    try:
        with replacing(options.out) as beside:
            run = WRITERS[options.format](model, beside, width)
            if run is not None:
                name = f"{options.format} in {width} bits"
                share = check_parity(run(*inputs), expected, tolerance, name)
    except (ParityError, ImportError) as error:
        raise UserError(f"{error}; nothing was written") from error
    except OSError as error:
        raise cannot_write(options.out, error) from error
    size, metric = _size(options.out), model.samples.metric.capitalize()
    say(
        f"{options.out}: {size / 1e6:.3f} MB, {100 * size / model.network.nbytes:.1f} "
        f"% of {model.network.nbytes / 1e6:.3f} MB dense"
    )
    words = f"{metric} {found.before:.2f} % dense, {found.after:.2f} % compressed to "
    say(f"{words}{targets.label(found.target)}")
    if found.target != options.target:
        bits = targets.parse(options.target)[-1].numbers[0]
        say(f"It holds all 8 bits: load_packed(..., bits={bits}) reads the first ones")
    if run is None:
        say("It cannot be run on this machine: nothing was compared.")
        return
    say(
        f"Largest difference from JAX on {EXAMPLES} examples: {share:.2g} of the "
        f"largest output (tolerance {tolerance:.2g})"
    )
    if model.samples.score is not None:
        score = model.samples.score(lambda examples: run(*examples))
        say(f"{metric} of the file: {score:.2f} %")


def _compress(options: Export, say: Callable[..., Any]) -> Compressed:
    config, data, task, params, batch_stats = open_run(
        options.run, options.data_dir, say
    )
    check_targets((options.target,), config, task)
    pruners = PrunerOptions(options.second_order, options.layerwise)
    evaluation = make_evaluation(config, data, task, pruners)
    before = evaluation.accuracy(params, batch_stats)
    target = options.target
    if options.format == "packed" and options.width == 8:
        # Leading bits are taken when the file is read.
        target = re.sub(r"nested\d$", "nested8", target)
    params = evaluation.compress(params, target, batch_stats).params
    batch_stats = evaluation.recalibrate(params, batch_stats)
    after = evaluation.accuracy(params, batch_stats)
    kind = kind_of(config)
    samples = kind.samples(config, data)
    model = Model(
        params,
        batch_stats,
        partial(kind.deploy, config, data),
        kind.deploy(config, data, params, batch_stats),
        samples,
        samples.calibration(options.calibration)
        if options.format == "onnx" and options.width == 8
        else [],
        "2:4" in options.target.split("+"),
        options.in_blocks,
    )
    # A target rounds only what is prunable, a file all matrices.
    exact = task.filters.prunable is None and _is_rounded(options)
    return Compressed(model, target, exact, before, after)


def _export_to_library(options: Export, say: Callable[..., Any]) -> None:
    """Tensors by the names of a library of PyTorch."""
    run, out = options.run, options.out
    config = load_config(run)
    library = kind_of(config).LIBRARY
    if options.format != library:
        raise ConfigError(
            f"format must be {library} or one of an engine for a run on {config.kind}, "
            f"got {options.format}"
        )
    with contextlib.suppress(RunError):
        load_config(out)
        raise ConfigError(f"out must not be the directory of a run, got {out}")
    if options.target == "dense":
        params, batch_stats = checkpoints.read_model(run)
    else:
        found = _compress(options, say)
        params, batch_stats = found.model.params, found.model.batch_stats
        say(
            f"{found.model.samples.metric.capitalize()} {found.before:.2f} % dense, "
            f"{found.after:.2f} % compressed to {targets.label(options.target)}"
        )
    kind_of(config).export(config, (params, batch_stats), run, out, options.vocabulary)
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    say(f"{out}: {', '.join(names) or f'{_size(out) / 1e6:.3f} MB'}")


def _tolerance(options: Export, found: Compressed) -> float:
    """The difference from JAX that the numbers in the file explain."""
    if options.width == 32:
        return 1e-4
    if options.width == 16:
        return 0.01
    rounds_activations = bool(found.model.calibration) or options.format == "litert"
    return 1e-4 if found.exact and not rounds_activations else 0.25


def _is_rounded(options: Export) -> bool:
    """Whether the target leaves weights that the integers of the file hold exactly."""
    last = targets.parse(options.target)[-1]
    if options.format == "packed" and last.form == "nested":
        return options.width in (8, last.numbers[0])
    block = (32,) if options.format == "onnx" else ()
    return last.form == "quantised" and last.numbers == (options.width, *block)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
