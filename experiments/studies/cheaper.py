"""How to make CrAM+ cheaper: the candidates, side by side.

    python -m experiments.studies.cheaper --seeds 3

Full CrAM+ costs two gradient evaluations a step. The candidates spend less on the
compressed one: they compute it on a part of the batch, or at some of the steps, with
nothing, its last value, or that value's component orthogonal to the dense gradient in
between (Liu et al., LookSAM, CVPR 2022). `cram_jax.subsampled` won; the others live on
here only. On digits; the numbers and the network are those of the demo.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cram_jax
from experiments.configs.digits import config as digits
from experiments.data.images import load, training_batches
from experiments.evaluation import evaluate_targets, make_evaluation
from experiments.optimizers import learning_rate
from experiments.targets import projector
from experiments.tasks.classification import classification
from experiments.training import total_steps

Rule = Callable[[Callable[..., Any]], optax.GradientTransformationExtraArgs]


class SometimesState(NamedTuple):
    """State of `sometimes`: of the rule inside, and the last compressed gradient."""

    count: jax.Array
    inner: Any
    along: jax.Array  # share of the compressed gradient along the dense one
    last: Any  # the compressed gradient, or its orthogonal component
    norm: jax.Array  # of the dense gradient when `last` was computed


def full(loss_fn: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """Full CrAM+ as the demo has it."""
    targets = [projector(target) for target in digits.optimizer.targets]
    return cram_jax.cram_plus(
        loss_fn, cram_jax.one_of(*targets), digits.optimizer.rho, has_aux=True
    )


def part_of_the_batch(every: int) -> Rule:
    """The compressed gradient on every so-manieth image."""
    return lambda loss_fn: full(cram_jax.subsampled(loss_fn, "batch", every=every))


def sometimes(
    loss_fn: Callable[..., Any], *, every: int, between: str
) -> optax.GradientTransformationExtraArgs:
    """The compressed gradient at every so-manieth step.

    Args:
      loss_fn: the loss.
      every: steps; with ``between="random"`` the inverse of a probability.
      between: what the other steps add to the dense gradient: "nothing" (also for
        "random"), the "last" compressed gradient, or its "orthogonal" component beside
        the share along today's dense gradient.
    """
    rule = full(loss_fn)

    def init(params: Any) -> SometimesState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros([])
        return SometimesState(
            jnp.zeros([], jnp.int32), rule.init(params), zero, zeros, zero + 1
        )

    def update(
        grads: Any, state: SometimesState, params: Any, **inputs: Any
    ) -> tuple[Any, SometimesState]:
        def compute() -> tuple[Any, Any, jax.Array, Any, jax.Array]:
            updates, inner = rule.update(grads, state.inner, params, **inputs)
            compressed = optax.tree.sub(updates, grads)
            norm = optax.tree.norm(grads)
            along = optax.tree.vdot(compressed, grads) / norm**2
            last = compressed
            if between == "orthogonal":
                last = jax.tree.map(lambda c, g: c - along * g, compressed, grads)
            return updates, inner, along, last, norm

        def reuse() -> tuple[Any, Any, jax.Array, Any, jax.Array]:
            updates = grads
            if between == "last":
                updates = optax.tree.add(grads, state.last)
            elif between == "orthogonal":
                scale = optax.tree.norm(grads) / state.norm
                updates = jax.tree.map(
                    lambda g, v: (1 + state.along) * g + scale * v, grads, state.last
                )
            return updates, state.inner, state.along, state.last, state.norm

        due = state.count % every == 0
        if between == "random":
            key = jax.random.fold_in(jax.random.key(7), state.count)
            due = jax.random.bernoulli(key, 1 / every)
        updates, inner, along, last, norm = jax.lax.cond(due, compute, reuse)
        return updates, SometimesState(state.count + 1, inner, along, last, norm)

    return optax.GradientTransformationExtraArgs(init, update)


CANDIDATES: dict[str, tuple[float, Rule]] = {
    # cost in gradient evaluations a step; the rule
    "SGD": (1, lambda loss_fn: optax.with_extra_args_support(optax.identity())),
    "CrAM+": (2, full),
    "half of the batch": (1.5, part_of_the_batch(2)),
    "a quarter of the batch": (1.25, part_of_the_batch(4)),
    "an eighth of the batch": (1.125, part_of_the_batch(8)),
} | {
    name: (1.25, partial(sometimes, every=4, between=between))
    for name, between in {
        "every 4th step": "nothing",
        "a random quarter of the steps": "random",
        "every 4th step, last one reused": "last",
        "every 4th step, orthogonal part reused": "orthogonal",
    }.items()
}


def run(rule: Rule, seeds: int, data_dir: Path | None) -> np.ndarray:
    """Trains with a rule, and gives recalibrated accuracies, (seeds, targets)."""
    data = load(digits.data, data_dir)
    task = classification(digits, data)
    evaluation = make_evaluation(digits, data, task)
    steps = total_steps(digits, data)
    optimizer = optax.chain(
        rule(task.loss_fn),
        optax.add_decayed_weights(digits.optimizer.weight_decay),
        optax.sgd(learning_rate(digits.optimizer, steps), digits.optimizer.momentum),
    )

    @jax.jit
    def step(params: Any, batch_stats: Any, state: Any, batch: Any, key: Any) -> Any:
        inputs = {"batch_stats": batch_stats, "batch": task.augment(key, batch)}
        (_, batch_stats), grads = jax.value_and_grad(task.loss_fn, has_aux=True)(
            params, **inputs
        )
        updates, state = optimizer.update(grads, state, params, **inputs)
        return optax.apply_updates(params, updates), batch_stats, state

    accuracies = []
    for seed in range(seeds):
        params, batch_stats = task.init(seed)
        state = optimizer.init(params)
        batches = training_batches(data.train, digits.data.batch_size, seed, 0, steps)
        for index, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), index)
            params, batch_stats, state = step(params, batch_stats, state, batch, key)
        results = evaluate_targets(evaluation, params, batch_stats, digits.targets)
        accuracies.append([result.recalibrated for result in results])
    return np.array(accuracies)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every candidate, and prints a line for each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    print("| | cost |", " | ".join(digits.targets), "| seconds |")
    print("| --- " * (len(digits.targets) + 3) + "|")
    for name, (cost, rule) in CANDIDATES.items():
        start = time.perf_counter()
        accuracies = run(rule, options.seeds, options.data_dir)
        mean, spread = accuracies.mean(0), accuracies.std(0, ddof=options.seeds > 1)
        cells = [f"{m:.1f} ({s:.1f})" for m, s in zip(mean, spread, strict=True)]
        seconds = time.perf_counter() - start
        print(f"| {name} | {cost:g} |", " | ".join(cells), f"| {seconds:.0f} |")


if __name__ == "__main__":
    main()
