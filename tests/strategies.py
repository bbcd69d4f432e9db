"""Random inputs for the property tests: small, odd, and full of ties."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = ("float32", "bfloat16", "float16")

# Few values, so that most draws hold ties; then any number at all.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0]),
    st.floats(-8, 8, width=16),
)


def arrays(shape, dtype="float32"):
    """Arrays of a shape or a strategy for shapes, exact in every dtype of ours."""
    return hnp.arrays(np.float32, shape, elements=VALUES).map(
        lambda array: jnp.asarray(array, jnp.dtype(dtype))
    )


# Few shapes, because each compiles; odd sides, single entries, two to four dimensions.
SHAPES = ((1, 1), (1, 7), (5, 3), (8, 2), (3, 1, 4), (2, 3, 8, 3))


# Few pairs, for the same reason: every layout once in float32.
LAYOUTS = (
    ("float32", SHAPES[:1]),
    ("float32", SHAPES[1:3]),
    ("float32", SHAPES[3:6]),
    ("bfloat16", SHAPES[3:6]),
    ("float16", SHAPES[1:3]),
)


# For large programs: one wide and one narrow.
FEW_LAYOUTS = (LAYOUTS[2], LAYOUTS[4])


def trees(layouts=LAYOUTS):
    """Parameter trees with one to three kernels of one dtype, and a bias."""

    def build(layout):
        dtype, shapes = layout
        return st.fixed_dictionaries(
            {
                "bias": arrays((3,), dtype),
                "layers": st.tuples(*(arrays(shape, dtype) for shape in shapes)),
            }
        )

    return st.sampled_from(layouts).flatmap(build)


def sparsities():
    """Sparsities from 0 to just below 1, the usual ones among them."""
    return st.one_of(
        st.sampled_from([0.0, 0.29, 0.5, 0.7, 0.9, 0.95, 0.999, 1 - 2**-53]),
        st.floats(0, 1, exclude_max=True),
    )
