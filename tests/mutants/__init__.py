"""Breaks of the library, and the tests that are to notice each."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """Replaces ``old``, which is there once, by ``new``."""

    old: str
    new: str


# Module: the tests that are to kill its mutants, in the order of their speed; mutants.
MUTANTS = {
    "transforms": (
        [
            "derivations",
            "transforms",
            "transforms_contract",
            "transforms_refusals",
            "composition",
        ],
        [
            Mutant("if sparse_gradients:", "if not sparse_gradients:"),
            Mutant("optax.tree.add(updates, gradient)", "gradient"),
            Mutant(
                "optax.tree.add(updates, gradient)",
                "optax.tree.scale(0.5, optax.tree.add(updates, gradient))",
            ),
            Mutant(
                "radius = radius / safe_denominator(norm(updates))",
                "radius = radius * safe_denominator(norm(updates))",
            ),
            Mutant("or rho != 0", "or True"),
            Mutant("climbs = normalize or", "climbs ="),
            Mutant("(p + radius * d)", "(p - radius * d)"),
            Mutant("(p + radius * d)", "(p + d)"),
            Mutant("optax.safe_increment(state.count)", "state.count"),
            Mutant(
                "        key=key,\n        projector_state=projector_state,",
                "        key=state.key,\n        projector_state=projector_state,",
            ),
            Mutant(
                "projector_state=projector_state,",
                "projector_state=state.projector_state,",
            ),
            Mutant("jax.tree.map(widened, tree)", "tree"),
            Mutant(".astype(jnp.result_type(p))", ""),
            Mutant("jnp.array(jnp.finfo(loss_dtype).max, loss_dtype)", "jnp.inf"),
        ],
    ),
    "baselines": (
        ["derivations", "transforms", "transforms_contract"],
        [
            Mutant(
                "apply_masks(masks, gradient_at(compressed, extra_args)[1])",
                "gradient_at(compressed, extra_args)[1]",
            ),
            Mutant(
                "radius / safe_denominator(norm(ascent)), ascent)",
                "radius, ascent)",
            ),
            Mutant("        sparse_gradients=False,\n", ""),
        ],
    ),
    "keys": (
        ["transforms", "transforms_contract", "compress"],
        [
            Mutant("return jnp.array(jax", "return (jax"),
            Mutant("key_data(following), draw", "key_data(draw), following"),
            Mutant("if is_typed else None", "if False else None"),
        ],
    ),
    "projector": (
        ["derivations", "transforms", "transforms_contract", "sparsity", "blocks"],
        [
            Mutant(
                "jnp.where(mask, leaf, jnp.zeros_like(leaf))",
                "jnp.where(mask, jnp.zeros_like(leaf), leaf)",
            ),
            Mutant("jnp.where(mask, leaf, jnp.zeros_like(leaf))", "leaf"),
            Mutant("jnp.where(value == 0, 1, value)", "value"),
            Mutant("leaf if is_wide else leaf.astype(jnp.float32)", "leaf"),
        ],
    ),
    "gradients": (
        [
            "transforms",
            "transforms_contract",
            "transforms_devices",
            "transforms_refusals",
            "training_loops",
        ],
        [
            Mutant(
                "jax.lax.pmean(gradient, others) if others else gradient",
                "gradient",
            ),
            Mutant("jax.lax.pmean(gradient, others)", "jax.lax.psum(gradient, others)"),
            Mutant("jax.lax.psum(gradient, copied)", "jax.lax.pmean(gradient, copied)"),
            Mutant("else jax.lax.pmean(loss, axis_name)", "else loss"),
            Mutant("if takes_all or n in named", "if takes_all"),
            Mutant("        result, _ = result", "        _, result = result"),
            Mutant("        _check_axes(loss, params, axis_name)\n", ""),
            Mutant(
                "_names(axis_name), *map(_varying_axes, jax.tree.leaves(params))",
                "_names(axis_name)",
            ),
            Mutant("if not (is_called or is_asked):", "if True:"),
        ],
    ),
    "losses": (
        ["losses"],
        [
            Mutant(
                "split_axis(leaf, 0, every)[:, 0]", "split_axis(leaf, 0, every)[:, -1]"
            ),
            Mutant("(leaf, 0)[::every]", "(leaf, 0)[: size // every]"),
            Mutant("                if name in given:", "                if name:"),
            Mutant("_scale_gradient(leaf, 1 / wide)", "leaf"),
            Mutant("return _scale_gradient(result, wide)", "return result"),
            Mutant("(tangents[0] * scale)", "(tangents[0] / scale)"),
        ],
    ),
    "selection": (
        ["selection", "reparameterizations", "axes"],
        [
            Mutant("in_axes=axis, out_axes=axis", "in_axes=0, out_axes=0"),
            Mutant("key < bar", "key <= bar"),
            Mutant("-magnitude, magnitude)", "magnitude, magnitude)"),
            Mutant("infinity + 1, value", "magnitude, value"),
            Mutant("widened(array).dtype for", "array.dtype for"),
            Mutant(
                "is_tie & (places(array, -end) < 0)",
                "is_tie & (places(array, -end) <= 0)",
            ),
            Mutant(
                "(key == threshold) & (places(array, -end) < 0)",
                "(key == threshold) & (places(array, -end) <= 0)",
            ),
            Mutant("is_kept = equal <= missing", "is_kept = equal >= missing"),
            Mutant("initial=0, where=is_kept", "initial=0, where=~is_kept"),
            Mutant(
                "np.arange(len(groups)) == jnp.asarray(group_of)[searched]",
                "np.ones(len(groups), bool)",
            ),
            Mutant("jnp.asarray(place_of)[searched]", "searched"),
            Mutant("jnp.where(is_searched, place, 0)", "place"),
            Mutant("fits = totals <= limit", "fits = totals < limit"),
            Mutant("initial=found.all_below, where=fits", "initial=0, where=fits"),
            Mutant("jnp.minimum(found.not_above, not_above)", "found.not_above"),
            Mutant("jnp.maximum(found.below, below)", "found.below"),
            Mutant("& jnp.iinfo(bits).max", ""),
            Mutant("jnp.clip(k, 0, total)", "k"),
            Mutant('f"int{width}"), width - 1', 'f"int{width}"), width - 2'),
            Mutant("in arrays).bit_length()", "in arrays).bit_length() - 2"),
            Mutant("jnp.maximum(bits - digit, 0)", "bits - digit"),
            Mutant("jax.typeof(array), []", "array.shape, []"),
        ],
    ),
    "counting": (
        ["counting", "selection"],
        [
            Mutant("cuts[0].inner,", "range(cuts[0].array.ndim),"),
            Mutant("jnp.sum(mask, dtype=dtype)", "jnp.sum(mask[..., 1:], dtype=dtype)"),
            Mutant(
                "for axis in reversed(range(array.ndim)):\n        numbers",
                "for axis in range(array.ndim):\n        numbers",
            ),
            Mutant("start + jax.lax.iota", "jax.lax.iota"),
        ],
    ),
    "sparsity": (
        ["sparsity"],
        [
            Mutant("nearest if is_integer else int(exact)", "int(exact)"),
            Mutant("nearest if is_integer else int(exact)", "nearest"),
            Mutant("3, 2 * 10**7) + 1) // 2", "3, 2 * 10**7)) // 2"),
        ],
    ),
    "magnitude": (
        ["magnitude", "axes"],
        [
            Mutant('if self.scope == "global":', 'if self.scope != "global":'),
            Mutant("(other > own)", "(other >= own)"),
            Mutant("k=-1, dtype=bool", "k=0, dtype=bool"),
            Mutant("kept = ahead < self.n", "kept = ahead <= self.n"),
            Mutant("if inputs % span else", "if inputs % self.m else"),
            Mutant("self.m * self.stride)", "self.m)"),
            Mutant("x.axes.inputs[-1]", "x.axes.inputs[0]"),
        ],
    ),
    "blocks": (
        ["blocks", "axes"],
        [
            Mutant("if not pad and max(side, size) % inside:", "if False:"),
            Mutant("squares = squares / inside", "squares = squares + 0 * inside"),
            Mutant("size - side * np.arange", "size + side * np.arange"),
            Mutant("None if whole else 1", "1 if whole else None"),
            Mutant("side // size if side % size == 0 else 1", "1"),
        ],
    ),
    "quantization/rounding": (
        ["quantization", "formats"],
        [
            Mutant(" + (leaf - jax.lax.stop_gradient(leaf))", ""),
            Mutant("jnp.clip(rounded, -limit, limit)", "rounded"),
        ],
    ),
    "quantization/integers": (
        ["quantization", "formats", "axes"],
        [
            Mutant("highest = 2 ** (bits - 1) - 1", "highest = 2 ** (bits - 1)"),
            Mutant("jnp.round(leaf / self.scale)", "jnp.floor(leaf / self.scale)"),
            Mutant(
                "jnp.maximum(-smallest, largest) / highest",
                "(largest - smallest) / highest",
            ),
            Mutant("low + 2**bits - 1)", "low + 2**bits)"),
            Mutant("jnp.clip(low, -steps, 0)", "low"),
            Mutant("low = jnp.round(smallest", "low = (smallest"),
            Mutant("challenger.error < best.error", "challenger.error > best.error"),
            Mutant("_REFINEMENTS = 3", "_REFINEMENTS = 0"),
            Mutant(
                "(grid.rounded(leaf) - leaf) * (1 / unit)", "grid.rounded(leaf) - leaf"
            ),
            Mutant(
                "largest / steps - smallest / steps", "(largest - smallest) / steps"
            ),
            Mutant("axes.lookup or axes.outputs", "axes.outputs"),
            Mutant("return axes.stack + (", "return ("),
        ],
    ),
    "combinators": (
        ["combinators", "derivations"],
        [
            Mutant("jax.tree.map(jnp.logical_and, masks, kept)", "kept"),
            Mutant("member = self.projectors[first]", "member = self.projectors[0]"),
            Mutant("place[group] = range(len(group))", "place[group] = 0"),
            Mutant("states[first + 1 :]", "states[first:-1]"),
            Mutant("p=None if weights is None else", "p=None if True else"),
            Mutant("not abs(weights.sum() - 1) <= 1e-6", "False"),
        ],
    ),
    "caching": (
        ["caching", "derivations"],
        [
            Mutant("state.uses % self.every == 0", "state.uses % self.every == 1"),
            Mutant("state.uses + 1, bits, inner", "state.uses, bits, inner"),
            Mutant(
                "CachedState(state.uses + 1, bits, inner)",
                "CachedState(state.uses + 1, bits, state.inner)",
            ),
            Mutant("128 >> jnp.arange(8)", "64 >> jnp.arange(8)"),
        ],
    ),
    "axes": (
        ["axes"],
        [
            Mutant(
                'second = "input" if part == "out"',
                'second = "output" if part == "out"',
            ),
            Mutant("if shape[-many - 1 :] == bias:", "if False:"),
            Mutant("and beside in shapes", "and beside not in shapes"),
            Mutant(
                "own.assumed or (usual.assumed and None in own.roles)", "usual.assumed"
            ),
            Mutant("if layers >= 0 else None", "if layers == 0 else None"),
            Mutant('"transpose" in parent', '"transpose" not in parent'),
        ],
    ),
    "paths": (
        ["axes"],
        [
            Mutant("(*path, *inner[1:])", "(*path, *inner)"),
            Mutant('parent.__name__ == "Variable"', "True"),
        ],
    ),
    "leaves": (
        ["leaves", "axes"],
        [
            Mutant("if leaf.axes.is_matrix:", "if jnp.ndim(leaf.value) >= 2:"),
            Mutant(
                "search(self.pattern, path) is None",
                "match(self.pattern, path) is None",
            ),
            Mutant(
                "search(self.pattern, path) is not None",
                "match(self.pattern, path) is not None",
            ),
        ],
    ),
    "compress": (
        ["compress"],
        [
            Mutant("-param.astype(dtype))", "0)"),
            Mutant("map(jnp.result_type, (update, param))", "[update.dtype] * 2"),
            Mutant("[jnp.array(mask) for", "[mask for"),
            Mutant("leaf != 0 if is_chosen", "leaf == 0 if is_chosen"),
            Mutant("prunable(params, where), strict", "prunable(params), strict"),
        ],
    ),
    "batch_norm": (
        ["batch_norm", "batch_norm_refusals", "batch_norm_frameworks"],
        [
            Mutant("total[i] / count", "total[i]"),
            Mutant("enumerate(batches, start=1)", "enumerate(batches, start=2)"),
            Mutant("change[i] / momentum.weight[i], values", "change[i], values"),
            Mutant("_LARGE = 2.0**64", "_LARGE = 2.0**4"),
            Mutant("np.where(moves[i], 0, old[i])", "np.zeros(old[i].shape)"),
            Mutant("} | raised", "}"),
            Mutant("| momentum.counters", ""),
            Mutant("values = momentum.old", "values = momentum.zero"),
            Mutant("if separate:", "if True:"),
            Mutant("_raised(old[i], passes)", "old[i]"),
        ],
    ),
    "training_pass": (
        ["batch_norm", "batch_norm_refusals", "batch_norm_frameworks"],
        [
            Mutant("jnp.promote_types(dtypes[i], jnp.float32)", "dtypes[i]"),
            Mutant("np.array(leaf, np.float64 if", "np.asarray(leaf, np.float32 if"),
            Mutant("self._with(self.old | values", "self._with(values"),
            Mutant("return jax.device_put(value, leaf.sharding)", "pass"),
        ],
    ),
    "curvature/fisher": (
        ["fisher", "second_order", "second_order_refusals"],
        [
            Mutant("width = max(1, min(block_size, leaf.size))", "width = block_size"),
            Mutant("order.index(axis) for axis in", "axis for axis in"),
            Mutant("one[None] / damping**0.5", "one[None] / damping"),
            Mutant("jnp.sqrt(1 + jnp.sum(v**2", "jnp.sqrt(2 + jnp.sum(v**2"),
            Mutant("(c * (c + 1))", "(c * c)"),
            Mutant("jnp.sqrt(2 * diagonal)", "jnp.sqrt(2 * root[..., 0])"),
            Mutant("weights - along * weights", "weights + along * weights"),
            Mutant("root - along[:, :, None] * row[:, None, :]", "root"),
            Mutant("fori_loop(0, blocks // _PART", "fori_loop(1, blocks // _PART"),
            Mutant(
                "widened(gradients[place.leaf]) / count**0.5",
                "widened(gradients[place.leaf])",
            ),
            Mutant("jnp.isfinite(jnp.sum(g**2) / damping)", "jnp.isfinite(g).all()"),
            Mutant("jnp.where(kept[place.leaf], wide", "jnp.where(True, wide"),
            Mutant("jnp.minimum(micro_batch, count - start)", "micro_batch"),
            Mutant("* group + within", "* group"),
        ],
    ),
    "curvature/finite": (
        ["second_order_refusals"],
        [
            Mutant("jnp.isfinite(leaf).all()", "jnp.isfinite(leaf).any()"),
            Mutant("first = number * examples_per_gradient", "first = number"),
        ],
    ),
    "curvature/removal": (
        ["second_order", "second_order_refusals"],
        [
            Mutant("jnp.maximum(ranks, jnp.finfo(ranks.dtype).tiny)", "ranks"),
            Mutant("kept[i] = kept[i] & mask", "kept[i] = mask"),
            Mutant("moved.astype(leaves[i].dtype)", "moved"),
        ],
    ),
    "curvature/pruning": (
        ["second_order", "second_order_refusals"],
        [
            Mutant("1 - (1 - sparsity) ** (step / steps)", "sparsity * step / steps"),
            Mutant(
                "Projection(apply_masks(masks, params), masks)",
                "Projection(params, masks)",
            ),
            Mutant(
                "self._counts(leaves, share)", "self._counts(leaves, self.sparsity)"
            ),
            Mutant("if size % examples_per_gradient:", "if False:"),
            Mutant("self._check_concrete(params)", "pass"),
            Mutant("if chosen[i] and jnp.size(leaf.value)", "if chosen[i]"),
            Mutant("kept_count(size // n, share)", "kept_count(size, share)"),
            Mutant("(*axes.stack, *axes.outputs)", "(*axes.stack,)"),
        ],
    ),
}
