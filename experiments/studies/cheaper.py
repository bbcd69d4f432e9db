"""How to make CrAM+ cheaper: the candidates, side by side.

    python -m experiments.studies.cheaper --seeds 0 1 2

Full CrAM+ costs two gradient evaluations per step. The candidates spend less on the
compressed one: they compute it on part of the batch, at some of the steps, or late.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import cram_jax
from experiments.compression.targets import projector
from experiments.evaluation.evaluation import evaluate_target, make_evaluation
from experiments.images.config import ImageConfig
from experiments.images.data import load
from experiments.images.task import classification
from experiments.recipes import IMAGE_RECIPES
from experiments.studies.trainings import spread
from experiments.training.optimizers import learning_rate
from experiments.training.step import total_steps


class Candidate(NamedTuple):
    """A way to spend less on the compressed gradient.

    Attributes:
      dense: share of the batch for the dense gradient, its first images.
      compressed: share for the compressed one, its last images.
      subsample: on every n-th image of those.
      every: at every n-th step.
      start: from this share of the steps on.
      weight: of the compressed gradient in the sum.
      between: what the steps without one add: "nothing", the "last" one, or its
        "orthogonal" component plus the share along the current dense gradient (Liu et
        al., LookSAM, CVPR 2022).
    """

    dense: float = 1.0
    compressed: float = 1.0
    subsample: int = 1
    every: int = 1
    start: float = 0.0
    weight: float = 1.0
    between: str = "nothing"

    def cost(self) -> float:
        """Gradient evaluations per step."""
        steps = (1 - self.start) / self.every
        return self.dense + self.compressed * steps / self.subsample


CANDIDATES = {
    "SGD": Candidate(start=1.0),
    "CrAM+": Candidate(),
    "half of the batch": Candidate(subsample=2),
    "a quarter of the batch": Candidate(subsample=4),
    "an eighth of the batch": Candidate(subsample=8),
    "every 4th step": Candidate(every=4),
    "every 4th step, twice the weight": Candidate(every=4, weight=2),
    "every 4th step, four times the weight": Candidate(every=4, weight=4),
    "every 4th step, last one reused": Candidate(every=4, between="last"),
    "every 4th step, orthogonal part reused": Candidate(every=4, between="orthogonal"),
    "every 2nd step, half of the batch": Candidate(every=2, subsample=2),
    "every 2nd step, half of the batch, twice the weight": Candidate(
        every=2, subsample=2, weight=2
    ),
    "the last half, every 2nd step": Candidate(start=0.5, every=2),
    "the last half, half of the batch": Candidate(start=0.5, subsample=2),
    "the last third": Candidate(start=2 / 3),
    "the last third, half of the batch": Candidate(start=2 / 3, subsample=2),
    "the last quarter": Candidate(start=0.75),
    "half of the batch for each": Candidate(dense=1 / 2, compressed=1 / 2),
    "5/8 of the batch for each": Candidate(dense=5 / 8, compressed=5 / 8),
    "half for the dense, 3/4": Candidate(dense=1 / 2, compressed=3 / 4),
    "a quarter for the dense, all": Candidate(dense=1 / 4),
}


def run(
    config: ImageConfig,
    candidate: Candidate,
    seeds: Sequence[int],
    data_dir: Path | None,
) -> Iterator[dict[str, float]]:
    """Trains once per seed; yields the recalibrated accuracy at every target."""
    data = load(config.data, data_dir)
    task = classification(config, data)
    steps = total_steps(config, data)
    loss_fn = task.loss_fn
    if candidate.subsample > 1:
        loss_fn = cram_jax.subsampled(loss_fn, "batch", every=candidate.subsample)
    targets = [projector(target) for target in config.optimizer.train_targets]

    def make_rule(seed: int) -> optax.GradientTransformationExtraArgs:
        multi = cram_jax.one_of(*targets)
        rho = config.optimizer.rho
        return cram_jax.cram(loss_fn, multi, rho, has_aux=True, key=seed)

    rule = make_rule(0)  # its update serves every seed: the key is in the state
    rest = optax.chain(
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(learning_rate(config.optimizer, steps), config.optimizer.momentum),
    )

    # Two compilations: convolutions inside lax.cond are slow on CPU.
    @partial(jax.jit, static_argnames="compressed")
    def step(state: Any, batch: Any, key: jax.Array, compressed: bool) -> Any:
        params, batch_stats, rule_state, rest_state, last = state
        batch = task.augment(key, batch)
        size = len(batch["label"])
        first = round(candidate.dense * size)
        others = round(candidate.compressed * size)
        inputs = {
            "batch_stats": batch_stats,
            "batch": jax.tree.map(lambda x: x[:first], batch),
        }
        (_, batch_stats), grads = jax.value_and_grad(task.loss_fn, has_aux=True)(
            params, **inputs
        )
        updates = grads
        if compressed:
            inputs["batch"] = jax.tree.map(lambda x: x[-others:], batch)
            extra, rule_state = rule.update(grads, rule_state, params, **inputs)
            extra = optax.tree.scale(candidate.weight, extra)
            updates = optax.tree.add(grads, extra)
            last = _remember(extra, grads, candidate.between)
        elif candidate.between != "nothing":
            updates = optax.tree.add(grads, _recall(last, grads, candidate.between))
        updates, rest_state = rest.update(updates, rest_state, params)
        params = optax.apply_updates(params, updates)
        return params, batch_stats, rule_state, rest_state, last

    evaluation = make_evaluation(config, data, task)
    for seed in seeds:
        params, batch_stats = task.init(seed)
        nothing = optax.tree.zeros_like(params)
        last = _remember(nothing, params, candidate.between)
        rule_state = make_rule(seed).init(params)
        state = params, batch_stats, rule_state, rest.init(params), last
        begin = candidate.start * steps
        batches = data.train.training_batches(config.data.batch_size, seed, 0, steps)
        for index, batch in enumerate(batches):
            compressed = index >= begin and index % candidate.every == 0
            key = jax.random.fold_in(jax.random.key(seed), index)
            state = step(state, batch, key, compressed)
        accuracies = {}
        for target in config.eval_targets:
            accuracies[target] = evaluate_target(evaluation, *state[:2], target).judged
        yield accuracies


def _remember(extra: Any, grads: Any, between: str) -> Any:
    """What later steps need from a compressed gradient."""
    if between == "nothing":
        return ()
    if between == "last":
        return extra
    norm = optax.tree.norm(grads)
    along = optax.tree.vdot(extra, grads) / norm**2
    return along, norm, jax.tree.map(lambda e, g: e - along * g, extra, grads)


def _recall(last: Any, grads: Any, between: str) -> Any:
    if between == "last":
        return last
    along, norm, orthogonal = last
    scale = optax.tree.norm(grads) / norm
    return jax.tree.map(lambda g, o: along * g + scale * o, grads, orthogonal)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the candidates, and prints a line for each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="digits", choices=IMAGE_RECIPES)
    parser.add_argument("--candidates", nargs="+", default=[*CANDIDATES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="by default those of the recipe")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    config = IMAGE_RECIPES[options.recipe]
    if options.epochs is not None:
        config = dataclasses.replace(config, epochs=options.epochs)
    print("| | cost |", " | ".join(config.eval_targets), "| seconds |")
    print("| --- " * (len(config.eval_targets) + 3) + "|")
    for name in options.candidates:
        candidate = CANDIDATES[name]
        start = time.perf_counter()
        runs = list(run(config, candidate, options.seeds, options.data_dir))
        cells = []
        for target in config.eval_targets:
            cells.append(spread([run[target] for run in runs]))
        seconds = time.perf_counter() - start
        row = f"| {name} | {candidate.cost():.3g} |"
        print(row, " | ".join(cells), f"| {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
