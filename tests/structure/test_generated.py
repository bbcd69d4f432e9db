"""Random networks: whatever is removed, nothing is silently wrong."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy_programs import evaluate
from structure.comparing import abstract, cut, masked, relative_difference, some_kept
from structure.generated import BATCH, INPUTS, Network

from cram_jax.structure import check_apply, group_masks, trace_structure

BATCHES = 5


def pytest_generate_tests(metafunc):
    count = metafunc.config.getoption("generated_networks") // BATCHES
    starts = [batch * count for batch in range(BATCHES)]
    metafunc.parametrize("seeds", [range(s, s + count) for s in starts], ids=str)


def test_masked_smaller_and_own_functions_of_random_networks_agree(seeds):
    removable = 0
    for seed in seeds:
        network = Network(seed)
        shape = jax.ShapeDtypeStruct((BATCH, INPUTS), jnp.float32)
        structure = trace_structure(network, network.shapes, shape)
        removable += structure.size > 0
        kept = some_kept(structure, seed, share=network.rng.uniform(0.1, 0.9))
        values, x = network.values(), network.rng.normal(size=(BATCH, INPUTS))
        assert relative_difference(structure, kept, values, (x,)) < 1e-12, seed
        if check_apply(structure, kept) is None:
            assert own_difference(structure, kept, values, x) < 1e-12, seed
    assert removable > 0.9 * len(seeds)


def own_difference(structure, kept, values, x):
    masks = group_masks(structure, kept)
    model = structure.model
    wanted = evaluate(
        model.analysis.program, [*jax.tree.leaves(masked(masks, values)), x]
    )[0]
    small = cut(structure, masks, values)
    own = jax.make_jaxpr(model.apply)(abstract(small, model.variables), *model.inputs)
    got = evaluate(own, [*jax.tree.leaves(small), x])[0]
    return np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max())
