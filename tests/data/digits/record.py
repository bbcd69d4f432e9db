"""A trained network for tests/experiments/deployment/test_deployment.py.

    python -m experiments train digits_blocks --run runs/digits_blocks
    python -m tests.data.digits.record runs/digits_blocks

It writes b90.npz beside this file: the model, compressed in one shot to 90 % zeros in
blocks, its batch norm recalibrated. Run by hand, from the root of the repository;
b90.npz was made with jax 0.10.2, flax 0.12.7, NumPy 2.4.6.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from experiments.evaluation.evaluation import make_evaluation
from experiments.evaluation.open_run import open_run

FILE = Path(__file__).with_name("b90.npz")


def main(run):
    config, data, task, params, batch_stats = open_run(Path(run), None, print)
    evaluation = make_evaluation(config, data, task)
    compressed = evaluation.compress(params, "b90", batch_stats).params
    statistics = evaluation.recalibrate(compressed, batch_stats)
    print(evaluation.metrics(compressed, statistics))
    leaves = jax.tree.leaves_with_path((compressed, statistics))
    np.savez_compressed(
        FILE,
        **{
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in leaves
        },
    )


if __name__ == "__main__":
    main(sys.argv[1])
