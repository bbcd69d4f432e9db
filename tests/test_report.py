import jax
import jax.numpy as jnp
import pytest

from cram_jax import (
    Axes,
    all_but,
    cached,
    compose,
    compress,
    fake_quant,
    n_m,
    sparsity_report,
    top_k,
)
from cram_jax import report as report_module

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {
    "bias": jnp.zeros(4),
    "conv": jnp.arange(1.0, 73.0).reshape(3, 3, 2, 4),
    "dense": jnp.arange(1.0, 33.0, dtype=jnp.bfloat16).reshape(8, 4),
}


def test_counts_and_bytes():
    report = sparsity_report(*compress(PARAMS, top_k(0.75)))
    assert [leaf.path for leaf in report.leaves] == ["bias", "conv", "dense"]
    assert report.size == 108
    assert report.kept == 4 + 26
    assert report.sparsity == pytest.approx(1 - 30 / 108)
    assert report.bytes == 16 + 4 * 72 + 2 * 32
    bias, conv, dense = report.leaves
    assert conv.kept == 26
    assert conv.packed_bytes == 26 * 4 + 9
    assert dense.kept == 0
    assert dense.packed_bytes == 4
    assert bias.packed_bytes == 16
    assert report.packed_bytes == 16 + 26 * 4 + 9 + 4


def test_a_leaf_left_dense_is_listed_with_the_reason():
    projector = n_m(2, 4)
    report = sparsity_report(*compress(PARAMS, projector), projector)
    assert [leaf.note for leaf in report.leaves] == [
        "dense: fewer than 2 dimensions",
        "dense: 4 does not divide its 2 inputs",
        "assumed to be Axes('input', 'output')",
    ]
    assert report.leaves[2].sparsity == 0.5


def test_reasons_come_from_every_member_of_a_combination():
    where = all_but("conv")
    projector = compose(
        cached(n_m(2, 4, axes=flax_axes, where=where), every=2),
        fake_quant(4, axes=flax_axes, where=where),
    )
    report = sparsity_report(*compress(PARAMS, projector), projector)
    assert [leaf.note for leaf in report.leaves] == [
        "dense: fewer than 2 dimensions",
        "dense: not in `where`",
        "",
    ]


def flax_axes(path, leaf):
    windows = ["window"] * (leaf.ndim - 2)
    return Axes(*windows, "input", "output") if leaf.ndim > 1 else None


def test_zeros_of_a_bias_are_not_sparsity():
    params = {"bias": jnp.zeros(4), "kernel": jnp.eye(4), "scale": jnp.zeros((2, 4))}
    report = sparsity_report(params)
    assert [leaf.kept for leaf in report.leaves] == [4, 4, 8]
    assert report.leaves[2].note == "dense: added or multiplied, not contracted"


def test_what_is_not_a_number_is_dense():
    params = {
        "key": jax.random.key(0),
        "kernel": jnp.eye(4),
        "step": jnp.zeros([], int),
    }
    projector = top_k(0.5)
    for report in (
        sparsity_report(params),
        sparsity_report(*compress(params, projector), projector),
    ):
        assert [leaf.kept for leaf in report.leaves[1:]] == [1, 1]
        assert report.leaves[1].bytes == 8


def test_without_masks_zeros_are_counted():
    params = {"kernel": jnp.array([[0.0, 1.0], [0.0, -0.0]])}
    assert sparsity_report(params).kept == 1


def test_the_table_has_a_line_a_leaf_and_a_total():
    lines = str(sparsity_report(*compress(PARAMS, top_k(0.75)))).splitlines()
    assert [line.split()[0] for line in lines] == [
        "leaf",
        "bias",
        "conv",
        "dense",
        "total",
    ]
    assert "3x3x2x4" in lines[2]
    assert "63.89 %" in lines[2]
    assert lines[-1].split()[1:] == ["108", "30", "72.22", "%", "368", "133"]


def test_an_empty_leaf_has_no_sparsity():
    assert sparsity_report({"kernel": jnp.zeros((0, 3))}).sparsity == 0


def test_something_that_is_no_projector_is_refused():
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.5"):
        sparsity_report(PARAMS, None, 0.5)


def test_masks_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        sparsity_report(PARAMS, {"bias": PARAMS["bias"] == 0})


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"masks\['kernel'\] must have the shape"):
        sparsity_report(
            {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((4, 4), bool)}
        )


def test_a_python_number_is_a_leaf():
    params = {"kernel": jnp.ones((2, 2)), "scale": 0.5}
    report = sparsity_report(*compress(params, top_k(0.5)))
    assert [leaf.kept for leaf in report.leaves] == [2, 1]


def test_more_entries_are_counted_than_int32_holds():
    rows = jnp.full((4, 1), 2**30)  # as many rows of a mask that is too large for here
    assert report_module._total(rows) == 2**32


def test_masks_that_are_none_are_refused():
    pruned, masks = compress(PARAMS, top_k(0.75))
    with pytest.raises(TypeError, match=r"masks\['bias'\] must be bool, got float32"):
        sparsity_report(masks, pruned)
    with pytest.raises(TypeError, match=r"params must be .* got a Projection"):
        sparsity_report(compress(PARAMS, top_k(0.75)))
