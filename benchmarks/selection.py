"""The k largest of many magnitudes: ours against the alternatives.

    python -m benchmarks.selection
    python -m benchmarks.selection --sizes 1 --dtype bfloat16

Every contender does the whole job, from the array to the mask of the kept entries; the
last line of a size is one plain pass over the data, as a yardstick. torch takes part if
it is installed.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from cram_jax import keep_largest

# Sorting is so slow that a round of it would take most of the time.
SLOW = ("jnp.sort", "jax.lax.top_k")


def contenders(array: jax.Array, k: int) -> dict[str, Callable[[], Any]]:
    """From names to functions that give a mask; other libraries' only in float32."""
    threshold = jnp.sort(jnp.abs(array.ravel()[:100_000]))[
        -max(1, 100_000 * k // array.size)
    ]
    masked = jax.jit(lambda x, t: jnp.where(jnp.abs(x) >= t, x, 0))
    by_sort = jax.jit(lambda x: jnp.abs(x) >= jnp.sort(jnp.abs(x))[x.size - k])
    by_top_k = jax.jit(lambda x: jnp.abs(x) >= jax.lax.top_k(jnp.abs(x), k)[0][-1])
    host = np.asarray(array)

    def by_partition() -> np.ndarray:
        magnitudes = np.abs(host)
        return magnitudes >= np.partition(magnitudes, host.size - k)[host.size - k]

    functions: dict[str, Callable[[], Any]] = {
        "cram_jax.keep_largest": lambda: keep_largest([array], k)[0],
        "jnp.sort": lambda: by_sort(array),
        "jax.lax.top_k": lambda: by_top_k(array),
        "one masking pass": lambda: masked(array, threshold),
    }
    if array.dtype != jnp.float32:
        return functions
    functions["numpy.partition"] = by_partition
    try:
        import torch
    except ImportError:
        pass
    else:
        tensor = torch.from_numpy(host.copy())

        def by_torch_top_k() -> Any:
            magnitudes = tensor.abs()
            return magnitudes >= torch.topk(magnitudes, k, sorted=False).values.min()

        def by_kthvalue() -> Any:
            magnitudes = tensor.abs()
            return magnitudes >= torch.kthvalue(magnitudes, host.size - k + 1).values

        functions |= {"torch.topk": by_torch_top_k, "torch.kthvalue": by_kthvalue}
    return functions


def run(millions: float, sparsity: float, dtype: str, repeats: int) -> None:
    """Prints the table of one size."""
    size = round(millions * 1e6)
    values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    array = jnp.asarray(values, dtype)
    k = size - int(sparsity * size)
    functions = contenders(array, k)
    print(f"\n{millions:g} million {dtype}, {k:,} to keep")
    seconds = timing.interleaved(
        {n: f for n, f in functions.items() if n not in SLOW}, repeats
    )
    slow = timing.interleaved({n: functions[n] for n in SLOW}, 1)
    ours = seconds["cram_jax.keep_largest"]
    expected = np.asarray(functions["cram_jax.keep_largest"]())
    for name in functions:
        times = seconds.get(name)
        line = timing.row(
            name, *((slow[name], np.median(ours)) if times is None else (times, ours))
        )
        if name != "one masking pass":
            mask = np.asarray(functions[name]()) if name not in SLOW else None
            kept = "" if mask is None else f"  keeps {int(mask.sum()):,}"
            if mask is not None and name != "cram_jax.keep_largest":
                kept += f", {int((mask != expected).sum()):,} differ"
            line += kept
        print(line, flush=True)
    passes = np.median(ours / seconds["one masking pass"])
    print(f"ours takes {passes:.2f} masking passes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and runs every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1, 25, 85], help="in millions"
    )
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    print(timing.machine())
    for millions in options.sizes:
        run(millions, options.sparsity, options.dtype, options.repeats)


if __name__ == "__main__":
    main()
