"""Breaks the library in one place at a time, and sees whether the tests notice.

    python -m tests.mutants            # all, about half an hour on one core
    python -m tests.mutants selection  # those of one module

Each mutant is made in a copy of the tree. A mutant that no test kills is printed as
SURVIVED, and the exit status is the number of those. Two survive, as all they change
is speed: `sam` without ``sparse_gradients=False`` applies masks that are all True, and
with ``counts[0]`` the selection does not see that it can stop early.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """Replaces ``old``, which is there once, by ``new``."""

    old: str
    new: str


# Module: the tests that are to kill its mutants, in the order of their speed; mutants.
MUTANTS = {
    "transforms": (
        ["derivations", "transforms", "transforms_refusals", "composition"],
        [
            Mutant("if sparse_gradients:", "if not sparse_gradients:"),
            Mutant("optax.tree.add(updates, gradient)", "gradient"),
            Mutant(
                "optax.tree.add(updates, gradient)",
                "optax.tree.scale(0.5, optax.tree.add(updates, gradient))",
            ),
            Mutant(
                "            radius = radius / nonzero(norm(updates))",
                "            radius = radius * nonzero(norm(updates))",
            ),
            Mutant(
                "keep(masks, gradient_at(compressed, extra_args)[1])",
                "gradient_at(compressed, extra_args)[1]",
            ),
            Mutant(
                "ascend(params, radius / nonzero(norm(ascent)), ascent)",
                "ascend(compressed, radius / nonzero(norm(ascent)), ascent)",
            ),
            Mutant("        sparse_gradients=False,\n", ""),
        ],
    ),
    "ascent": (
        ["derivations", "transforms", "transforms_refusals", "composition"],
        [
            Mutant("(p + radius * d)", "(p - radius * d)"),
            Mutant("(p + radius * d)", "(p + d)"),
            Mutant("jnp.where(norm == 0, 1, norm)", "norm"),
            Mutant("optax.safe_increment(state.count)", "state.count"),
            Mutant(
                "        key=key,\n        projector_state=projector_state,",
                "        key=state.key,\n        projector_state=projector_state,",
            ),
            Mutant(
                "projector_state=projector_state,",
                "projector_state=state.projector_state,",
            ),
            Mutant("jnp.promote_types(x.dtype, jnp.float32)", "x.dtype"),
            Mutant("return jax.random.clone(key)", "return key"),
            Mutant(".astype(jnp.result_type(p))", ""),
        ],
    ),
    "projector": (
        ["derivations", "transforms", "sparsity"],
        [
            Mutant(
                "jnp.where(mask, leaf, jnp.zeros_like(leaf))",
                "jnp.where(mask, jnp.zeros_like(leaf), leaf)",
            ),
            Mutant("jnp.where(mask, leaf, jnp.zeros_like(leaf))", "leaf"),
        ],
    ),
    "losses": (
        ["losses", "transforms"],
        [
            Mutant(
                "gradients = jax.lax.pmean(gradients, axis_name)",
                "gradients = gradients",
            ),
            Mutant(
                "gradients = jax.lax.pmean(gradients, axis_name)",
                "gradients = jax.lax.psum(gradients, axis_name)",
            ),
            Mutant("else jax.lax.pmean(loss, axis_name)", "else loss"),
            Mutant("if takes_all or n in named", "if takes_all"),
            Mutant("            loss, _ = loss", "            _, loss = loss"),
            Mutant(
                "split_axis(leaf, 0, every)[:, 0]", "split_axis(leaf, 0, every)[:, -1]"
            ),
            Mutant("return leaf[::every]", "return leaf[: size // every]"),
            Mutant("            if name in arguments", "            if name"),
        ],
    ),
    "selection": (
        ["selection"],
        [
            Mutant(
                "magnitude_key(stack) < candidate", "magnitude_key(stack) <= candidate"
            ),
            Mutant("(_places(array, -place) < 0)", "(_places(array, -place) <= 0)"),
            Mutant("(missing >= equal)", "(missing > equal)"),
            Mutant("(missing < equal)", "(missing <= equal)"),
            Mutant("& jnp.any(is_cut[np.array(group)])", ""),
            Mutant("[:, in_order]", ""),
            Mutant("& (cuts[index] > 0)", ""),
            Mutant("counts <= limit", "counts < limit"),
            Mutant("counts[fitting - 1]", "counts[0]"),
            Mutant("& jnp.iinfo(bits).max", ""),
            Mutant("jnp.clip(k, 0, total)", "k"),
            Mutant("width = 8 * dtype.itemsize - 1", "width = 8 * dtype.itemsize - 2"),
            Mutant("for array in arrays).bit_length()", "for array in arrays) // 2"),
            Mutant(
                "jnp.minimum(digits << bits.astype(zero.dtype), room)",
                "(digits << bits.astype(zero.dtype))",
            ),
            Mutant("jnp.maximum(bits - _DIGIT, 0)", "bits - _DIGIT"),
            Mutant(
                "for axis in reversed(range(array.ndim))",
                "for axis in range(array.ndim)",
            ),
            Mutant("(array.shape, explicit_sharding(array))", "array.shape"),
        ],
    ),
    "sparsity": (
        ["sparsity"],
        [
            Mutant("nearest if is_integer else int(exact)", "int(exact)"),
            Mutant("nearest if is_integer else int(exact)", "nearest"),
            Mutant(
                'if scope == "global" else [[leaf]', 'if scope != "global" else [[leaf]'
            ),
            Mutant("(other > own)", "(other >= own)"),
            Mutant("k=-1, dtype=bool", "k=0, dtype=bool"),
            Mutant("join_axes(ahead < n", "join_axes(ahead <= n"),
            Mutant("jnp.shape(leaf)[-2] % m == 0", "jnp.shape(leaf)[-1] % m == 0"),
            Mutant("3, 2 * 10**7) + 1) // 2", "3, 2 * 10**7)) // 2"),
        ],
    ),
    "blocks": (
        ["blocks"],
        [
            Mutant("inside == 0 or size % inside", "inside == 0"),
            Mutant("squares / math.prod(cut[1::2])", "squares"),
            Mutant("range(1, len(cut), 2)", "range(0, len(cut), 2)"),
            Mutant("shape[:before] if whole", "shape[:before] if not whole"),
        ],
    ),
    "quantization": (
        ["quantization"],
        [
            Mutant(
                "highest = 2 ** (bits - 1) - 1 if symmetric",
                "highest = 2 ** (bits - 1) if symmetric",
            ),
            Mutant("jnp.round(leaf / grid.scale)", "jnp.floor(leaf / grid.scale)"),
            Mutant(
                "return rounded + (leaf - jax.lax.stop_gradient(leaf))",
                "return rounded",
            ),
            Mutant(
                "jnp.maximum(-smallest, largest) / highest",
                "(largest - smallest) / highest",
            ),
            Mutant("2 * highest if symmetric else highest", "highest"),
            Mutant("low = jnp.round(smallest", "low = (smallest"),
            Mutant("challenger.error < best.error", "challenger.error > best.error"),
            Mutant("_REFINEMENTS = 3", "_REFINEMENTS = 0"),
            Mutant("range(leaf.ndim - 1)", "range(1, leaf.ndim)"),
        ],
    ),
    "combinators": (
        ["combinators", "derivations"],
        [
            Mutant("jax.tree.map(jnp.logical_and, masks, kept)", "kept"),
            Mutant(
                "projectors[index].project(params, states[index], key)",
                "projectors[0].project(params, states[0], key)",
            ),
            Mutant("states[index + 1 :]", "states[index:-1]"),
            Mutant("p=weights", "p=None"),
            Mutant("abs(weights.sum() - 1) > 1e-6", "False"),
        ],
    ),
    "caching": (
        ["caching", "derivations"],
        [
            Mutant("state.uses % every == 0", "state.uses % every == 1"),
            Mutant("state.uses + 1, bits, inner", "state.uses, bits, inner"),
            Mutant(
                "return state.bits, state.inner", "return _pack(params), state.inner"
            ),
            Mutant(
                "CachedState(state.uses + 1, bits, inner)",
                "CachedState(state.uses + 1, bits, state.inner)",
            ),
        ],
    ),
    "leaves": (
        ["leaves", "sparsity"],
        [
            Mutant(
                "chosen = [jnp.ndim(leaf) >= 2 for", "chosen = [jnp.ndim(leaf) >= 1 for"
            ),
            Mutant("search(path) is None", "match(path) is None"),
            Mutant("search(path) is not None", "match(path) is not None"),
        ],
    ),
    "compress": (
        ["compress"],
        [
            Mutant("jnp.where(mask, u, -p.astype(u.dtype))", "jnp.where(mask, u, 0)"),
            Mutant("jax.tree.map(jnp.array, masks)", "masks"),
        ],
    ),
    "batch_norm": (
        ["batch_norm"],
        [
            Mutant("(new / (count * part))", "(new / count)"),
            Mutant("count += 1", "count = 1"),
            Mutant(
                "lambda one, zero: 1 - (one - zero)", "lambda one, zero: one - zero"
            ),
        ],
    ),
    "fisher": (
        ["fisher", "second_order"],
        [
            Mutant("width = max(1, min(block_size, leaf.size))", "width = block_size"),
            Mutant("jnp.moveaxis(rows, 0, -1)", "rows"),
            Mutant("one / damping**0.5", "one / damping"),
            Mutant("jnp.sqrt(1 + jnp.sum(v**2", "jnp.sqrt(2 + jnp.sum(v**2"),
            Mutant("(c * (c + 1))", "(c * c)"),
            Mutant(
                "jnp.sqrt(2 * jnp.sum(root**2, axis=-1))", "jnp.sqrt(2 * root[..., 0])"
            ),
            Mutant("weights - along * weights", "weights + along * weights"),
            Mutant("root - along[:, :, None] * row[:, None, :]", "root"),
            Mutant("fori_loop(0, blocks // _PART", "fori_loop(1, blocks // _PART"),
            Mutant("wide(gradients[i]) / count**0.5", "wide(gradients[i])"),
            Mutant("jnp.where(kept[i], wide", "jnp.where(True, wide"),
            Mutant("jnp.minimum(micro_batch, count - start)", "micro_batch"),
            Mutant("* group + jnp.arange(group)", "* group"),
            Mutant("leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))", "leaf"),
        ],
    ),
    "second_order": (
        ["second_order", "second_order_refusals"],
        [
            Mutant("jnp.maximum(ranks, jnp.finfo(ranks.dtype).tiny)", "ranks"),
            Mutant("1 - (1 - sparsity) ** (step / steps)", "sparsity * step / steps"),
            Mutant("kept[i] = kept[i] & mask", "kept[i] = mask"),
            Mutant(
                "Projection(apply_masks(masks, params), masks)",
                "Projection(params, masks)",
            ),
            Mutant("moved.astype(leaves[i].dtype)", "moved"),
            Mutant("kept_count(size, share)", "kept_count(size, sparsity)"),
            Mutant("if size % examples_per_gradient:", "if False:"),
        ],
    ),
}


def survives(tree: Path, module: str, mutant: Mutant, tests: list[str]) -> bool:
    """Whether the tests pass with the mutant in place of the module."""
    path = tree / "cram_jax" / f"{module}.py"
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.old!r} is {source.count(mutant.old)} times in {path}"
        )
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        files = [f"tests/test_{name}.py" for name in tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--devices", "8", *files]
        quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile
        result = subprocess.run(command, cwd=tree, capture_output=True, env=quick)
        return result.returncode == 0
    finally:
        path.write_text(source)


def main(modules: list[str]) -> int:
    """Tries the mutants; returns how many survived."""
    survivors = tried = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("benchmarks", "cram_jax", "tests"):
            shutil.copytree(ROOT / name, tree / name)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree)
        for module in modules or MUTANTS:
            tests, mutants = MUTANTS[module]
            for mutant in mutants:
                alive = survives(tree, module, mutant, tests)
                verdict = "SURVIVED" if alive else "killed"
                print(f"{verdict:9}{module}: {mutant.old} -> {mutant.new}", flush=True)
                survivors += alive
                tried += 1
    print(f"{tried - survivors} of {tried} mutants killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
