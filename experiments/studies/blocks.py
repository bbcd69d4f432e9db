"""Which zeros lose least at equal speed: single weights, blocks, or by their cost.

    python -m experiments.studies.blocks --seeds 0 1 2
    python -m experiments.studies.blocks --recipe cifar10_small --init-from RUN \
        --epochs 2 --learning-rate 0.05 --seeds 0 1 2
    python -m experiments.studies.blocks --recipe sst2_small --init-from RUN \
        --epochs 2 --forms "single weights" "blocks 4x2, each layer" --seeds 0
    python -m experiments.studies.blocks --seeds 0 --held-out 300

CrAM+ trains one network for each form of zeros and seed, for four sparsities. Each is
compressed in one shot to all sparsities, its batch norm recalibrated, and compiled for
our engine in INT8. Each result is stored at once, and a stopped program continues where
it was; ``--table`` only prints the stored results.

"By cost" divides the square of a weight, or the mean square of a block, by its cost,
its layer's multiply-adds per weight, and compares over all layers: that keeps the most
of the weights' energy for a number of multiply-adds.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import cram_jax
from cram_jax import engine
from cram_jax.leaves import Where
from cram_jax.paths import named_leaves
from cram_jax.structure import multiply_adds
from experiments.batches import Batch
from experiments.config import RunConfig
from experiments.deployment.network import Network
from experiments.deployment.timing import measure
from experiments.evaluation.evaluation import make_evaluation
from experiments.kinds import kind_of, prepare
from experiments.recipes import IMAGE_RECIPES, sst2
from experiments.reports.display import markdown_table
from experiments.runs.directory import write_text
from experiments.studies.trainings import base_of, results_of, study_parser
from experiments.training.optimizers import make_optimizer
from experiments.training.step import total_steps
from experiments.training.warm_start import initial_model

TRAINED = (0.5, 0.7, 0.8, 0.9)
JUDGED = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
BATCH = 16
RECIPES = (*IMAGE_RECIPES, sst2.small.name)
Costs = dict[str, float]
"""Multiply-adds per weight, by the path of its leaf."""


Form = Callable[[float, Where | None, Costs], cram_jax.Projector]


def _plain(scope: Any, block: tuple[int, int] | None) -> Form:
    return lambda share, where, costs: cram_jax.top_k(
        share, scope=scope, block=block, where=where
    )


def _by_cost(block: tuple[int, int] | None) -> Form:
    return lambda share, where, costs: cram_jax.top_k(
        share,
        block=block,
        scale={path: cost**-0.5 for path, cost in costs.items()},
        where=where,
    )


FORMS: dict[str, Form] = {
    "single weights": _plain("global", None),
    "single weights, each layer": _plain("layer", None),
    "single weights by cost": _by_cost(None),
    "blocks 4x1, each layer": _plain("layer", (4, 1)),
    "blocks 4x2, each layer": _plain("layer", (4, 2)),
    "blocks 4x2": _plain("global", (4, 2)),
    "blocks 4x2 by cost": _by_cost((4, 2)),
}


class Setting:
    """A recipe with its data, and what all forms share."""

    def __init__(self, config: RunConfig, data_dir: Path | None):
        self.config = config
        self.data, self.task = prepare(config, data_dir)
        self.evaluation = make_evaluation(config, self.data, self.task)
        self.samples = kind_of(config).samples(config, self.data)
        params, shapes = jax.eval_shape(self.task.init, 0)
        statistics = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)

        def apply(params: Any, batch: Batch) -> Any:
            return self.task.evaluation_loss(params, statistics, batch)

        example = self.data.train.take([0])
        sizes = {path: leaf.size for path, leaf in named_leaves(params)}
        counted = multiply_adds(apply, params, example)
        self.counts = counted
        self.costs = {name: count / sizes[name] for name, count in counted.items()}

    def projector(self, form: Form, share: float) -> cram_jax.Projector:
        """A form of zeros at a sparsity, in the leaves that are pruned by layer."""
        return form(share, self.task.filters.uniform, self.costs)

    def train(self, form: Form, seed: int) -> tuple[Any, Any]:
        """Trains with CrAM+ for a form of zeros; returns parameters and statistics."""
        config, task = self.config, self.task
        steps = total_steps(config, self.data)
        projector = cram_jax.one_of(*(self.projector(form, s) for s in TRAINED))
        optimizer = make_optimizer(
            config.optimizer, task.loss_fn, steps, seed, task.filters, projector
        )

        @jax.jit
        def step(state: Any, batch: Batch, key: jax.Array) -> Any:
            params, statistics, rest = state
            batch = task.augment(key, batch)
            inputs = {"batch_stats": statistics, "batch": batch}
            inputs["dropout_key"] = jax.random.fold_in(key, 0)
            grads, statistics = jax.grad(task.loss_fn, has_aux=True)(params, **inputs)
            updates, rest = optimizer.update(grads, rest, params, **inputs)
            return optax.apply_updates(params, updates), statistics, rest

        params, statistics = initial_model(config, task) or task.init(seed)
        state = params, statistics, optimizer.init(params)
        size = config.data.batch_size
        batches = self.data.train.training_batches(size, seed, 0, steps)
        for index, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), index)
            state = step(state, batch, key)
        return state[0], state[1]

    def judge(self, form: Form, params: Any, statistics: Any) -> list[dict[str, float]]:
        """Accuracy, multiply-adds and time at every sparsity."""
        inputs = self.samples.inputs(BATCH)
        calibration = engine.Calibration(self.samples.calibration(1000))
        rows, runs = [], {}
        for share in JUDGED:
            network, kept = self._compressed(form, share, params, statistics)
            fast = engine.compile(network.graph, calibration=calibration)
            score = self.samples.score
            assert score is not None
            rows.append(
                {
                    "sparsity": share,
                    "float32": score(partial(_forward, network)),
                    "int8": score(partial(_call, fast)),
                    "multiply_adds": kept,
                }
            )
            runs[share] = partial(fast, *inputs)
        for row, (cpu, _) in zip(rows, measure(runs, 15).values(), strict=True):
            row["ms"] = cpu.median
        return rows

    def _compressed(
        self, form: Form, share: float, params: Any, statistics: Any
    ) -> tuple[Network, float]:
        """The network, and what is left of its multiply-adds, in %."""
        if share:
            chosen = self.projector(form, share)
            params = jax.jit(partial(cram_jax.compress, projector=chosen))(
                params
            ).params
            statistics = self.evaluation.recalibrate(params, statistics)
        kept = sum(
            self.costs.get(name, 0) * np.count_nonzero(leaf)
            for name, leaf in named_leaves(params)
        )
        network = kind_of(self.config).deploy(
            self.config, self.data, params, statistics
        )
        return network, 100 * kept / sum(self.counts.values())


def _forward(network: Network, inputs: Sequence[Any]) -> Any:
    return np.asarray(network.forward(*inputs))


def _call(fast: engine.Engine, inputs: Sequence[Any]) -> Any:
    return fast(*inputs)


def table(folder: Path, reference: str) -> str:
    """The stored results: means over seeds, and accuracy at the cost of one form."""
    stored: dict[str, list[list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        entry = json.loads(path.read_text())
        stored.setdefault(entry["form"], []).append(entry["rows"])
    forms = [name for name in FORMS if name in stored]
    lines = ["accuracy of INT8 (%), multiply-adds left (%), CPU ms at batch 16", ""]
    header = ["trained and pruned", "seeds", *(f"{100 * s:g} %" for s in JUDGED)]
    rows = []
    for name in forms:
        cells = [
            [np.mean([run[i][key] for run in stored[name]]) for i in range(len(JUDGED))]
            for key in ("int8", "multiply_adds", "ms")
        ]
        rows.append(
            [name, str(len(stored[name]))]
            + [f"{a:.1f}, {m:.0f}, {t:.3f}" for a, m, t in zip(*cells, strict=True)]
        )
    lines += markdown_table(header, rows)
    if reference in stored:
        for key, words in (("ms", "CPU time"), ("multiply_adds", "multiply-adds")):
            lines += ["", f"accuracy at the {words} of {reference}", ""]
            lines += _at_equal(stored, forms, reference, key)
    return "\n".join(lines)


def _at_equal(
    stored: dict[str, Any], forms: Sequence[str], reference: str, key: str
) -> list[str]:
    rows = []
    for name in forms:
        cells = []
        for place in range(1, len(JUDGED)):
            cost = np.mean([run[place][key] for run in stored[reference]])
            values = [_interpolated(run, key, float(cost)) for run in stored[name]]
            found = [value for value in values if value is not None]
            whole = len(found) == len(values)
            cells.append(f"{np.mean(found):.1f}" if whole else "")
        rows.append([name, *cells])
    return markdown_table(["form", *(f"{100 * s:g} %" for s in JUDGED[1:])], rows)


def _interpolated(
    run: Sequence[dict[str, float]], key: str, cost: float
) -> float | None:
    """Accuracy at a cost; None if no sparsity is as cheap."""
    ordered = sorted(run, key=lambda row: row[key])
    costs = [row[key] for row in ordered]
    if not costs[0] <= cost <= costs[-1]:
        return None
    return float(np.interp(cost, costs, [row["int8"] for row in ordered]))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, and prints the table."""
    assert __doc__
    parser = study_parser(__doc__, RECIPES, "digits", seeds=(0, 1, 2))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument(
        "--held-out", type=int, default=0, help="training examples to judge on instead"
    )
    parser.add_argument(
        "--reference", default="blocks 4x2, each layer", choices=list(FORMS)
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    config = base_of(options)
    held_out = options.held_out
    folder = results_of(options, "blocks")
    if held_out:
        folder /= f"held-out-{held_out}"
        config = replace(config, data=replace(config.data, validation=held_out))
    missing = [
        (seed, name, path)
        for seed in options.seeds
        for name in options.forms
        if not (path := folder / f"{_slug(name)}-{seed}.json").exists()
    ]
    if missing and not options.table:
        setting = Setting(config, options.data_dir)
        for seed, name, path in missing:
            model = setting.train(FORMS[name], seed)
            rows = setting.judge(FORMS[name], *model)
            entry = {"form": name, "seed": seed, "rows": rows}
            write_text(path, json.dumps(entry, indent=1) + "\n")
            print(f"{name}, seed {seed}: {[row['int8'] for row in rows]}", flush=True)
    print(table(folder, options.reference))


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


if __name__ == "__main__":
    main()
