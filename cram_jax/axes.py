"""What the axes of parameters are for: the model decides, not the projector."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from cram_jax.paths import by_path, named_leaves
from cram_jax.projector import Params
from cram_jax.validation import check_integer
from cram_jax.values import Value

ROLES = ("input", "window", "output", "lookup", "stack", "other")

# Leaves that Flax, Haiku and Equinox add to or multiply with activations.
_ELEMENTWISE = ("bias", "offset", "scale")

_ATTENTION = ("query", "key", "value", "out")


@dataclass(frozen=True, init=False)
class Axes:
    """The role of each axis of a parameter.

    - "input": contracted with the incoming activations;
    - "window": a position in the window of a convolution, also summed over;
    - "output": one entry for each outgoing activation;
    - "lookup": one row is looked up, as in an embedding table, tied or not;
    - "stack": one slice for each of several layers or models, as `flax.linen.scan`,
      `flax.nnx.vmap` and `jax.lax.scan` stack them;
    - "other": anything else, such as the axes of a bias, a norm's scale or a position
      embedding, which are added to or multiplied with activations;
    - None: not given; `axes_of` fills it in by the conventions of Flax, Haiku and
      Equinox, for the shape without the axes that are given.

    Several axes may have one role: they count as one axis, the last of them varying
    fastest.

    Attributes:
      roles: one for each axis.
      assumed: whether the roles are a guess. Not compared.

    Raises:
      ValueError: a role is unknown.

    Example:
      >>> query = Axes("input", "output", "output")  # (inputs, heads, units)
      >>> query.inputs, query.outputs
      ((0,), (1, 2))
    """

    roles: tuple[str | None, ...]
    assumed: bool = field(default=False, compare=False)

    def __init__(self, *roles: str | None, assumed: bool = False) -> None:
        for role in roles:
            if role is not None and role not in ROLES:
                raise ValueError(f"roles must be of {ROLES} or None, got {role!r}")
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "assumed", assumed)

    def __repr__(self) -> str:
        return f"Axes({', '.join(map(repr, self.roles))})"

    @property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the input axes, without windows."""
        return self._of("input")

    @property
    def windows(self) -> tuple[int, ...]:
        """Numbers of the window axes."""
        return self._of("window")

    @property
    def outputs(self) -> tuple[int, ...]:
        """Numbers of the output axes."""
        return self._of("output")

    @property
    def lookup(self) -> tuple[int, ...]:
        """Numbers of the axes that are looked up."""
        return self._of("lookup")

    @property
    def stack(self) -> tuple[int, ...]:
        """Numbers of the axes along which layers are stacked."""
        return self._of("stack")

    @property
    def is_matrix(self) -> bool:
        """Whether two axes or more are inputs, windows, outputs or lookup."""
        return sum(role not in ("stack", "other", None) for role in self.roles) >= 2

    def _of(self, role: str) -> tuple[int, ...]:
        return tuple(axis for axis, own in enumerate(self.roles) if own == role)


AxesLike: TypeAlias = Callable[[str, jax.Array], Axes | None] | Any
"""``(path, leaf) -> Axes | None``, or a pytree of those like the parameters."""


def axes_of(params: Params, axes: AxesLike | None = None) -> list[Axes]:
    """Returns the axes of each leaf, in the order of ``jax.tree.leaves``.

    What ``axes`` does not give is inferred from names and types:

    - Flax (Linen and NNX): a ``kernel`` is (windows, inputs, outputs). A bias of two
      axes beside it means two output axes, as in ``DenseGeneral``, or stacked layers;
      one as long as only the axis before the last, that this is the output, as in
      ``ConvTranspose(transpose_kernel=True)``. Without a bias, or if both axes are of
      one length, nothing shows that; nor that ``DenseGeneral`` has several input axes,
      of which all but the last count as windows. In attention, recognised by query,
      key, value and out side by side, kernels are (inputs, heads, units) and (heads,
      units, outputs). An ``embedding`` is (lookup, outputs).
    - Haiku: a ``w`` is (windows, inputs, outputs), in a transposed convolution
      (windows, outputs, inputs); ``embeddings`` are (lookup, outputs).
    - Equinox: the ``weight`` of a layer of `equinox.nn` is (outputs, inputs, windows),
      that of an ``Embedding`` (lookup, outputs), and that of a norm neither. Leading
      axes are stacked layers. Other leaves called ``weight`` are assumed to have this
      form.
    - Biases, scales and leaves of fewer than two axes are neither inputs nor outputs.

    Anything else is assumed to be (windows, inputs, outputs), and marked as assumed. No
    name reveals other stacked layers: see `stacked`.

    Args:
      params: a pytree of arrays, or of anything with a shape.
      axes: ``(path, leaf) -> Axes | None``, or a pytree of those like ``params``, such
        as those read from the traced model; paths are those of `prunable`.

    Returns:
      One `Axes` for each leaf, without None among its roles.

    Raises:
      TypeError: ``axes`` gives something that is not `Axes` or None.
      ValueError: ``axes`` gives a leaf the wrong number of axes, or is not structured
        like the parameters.

    Example:
      >>> params = {"conv": {"bias": jnp.ones(8), "kernel": jnp.ones((3, 3, 4, 8))}}
      >>> axes_of(params)
      [Axes('other'), Axes('window', 'window', 'input', 'output')]
    """
    named = named_leaves(params)
    told = _told(params, axes)
    # The shape of one layer, if axes of stacked layers are given.
    layers = [
        (path, tuple(jnp.shape(leaf)[i] for i, r in enumerate(own.roles) if r is None))
        for (path, leaf), own in zip(named, told, strict=True)
    ]
    shapes = dict(layers)
    found = []
    for (path, shape), own, owner in zip(layers, told, _owners(params), strict=True):
        usual = _of_equinox(path, shape, owner) or _of_name(path, shape, shapes)
        rest = iter(usual.roles)
        roles = [next(rest) if role is None else role for role in own.roles]
        assumed = own.assumed or (usual.assumed and None in own.roles)
        found.append(Axes(*roles, assumed=assumed))
    return found


def _told(params: Params, axes: AxesLike | None) -> list[Axes]:
    """What the user says about each leaf; None for each axis that is left open."""
    named = named_leaves(params)
    axes = axes_value(axes)
    if axes is None:
        told: list[Any] = [None] * len(named)
    elif callable(axes):
        told = [axes(path, leaf) for path, leaf in named]
    else:
        told = axes.like("axes", params)
    for index, (path, leaf) in enumerate(named):
        own = told[index]
        if own is None:
            told[index] = Axes(*[None] * jnp.ndim(leaf))
        elif not isinstance(own, Axes):
            raise TypeError(f"axes must tell Axes or None of {path!r}, got {own!r}")
        elif len(own.roles) != jnp.ndim(leaf):
            raise ValueError(
                f"axes tells {own!r} of {path!r}, which has the shape {jnp.shape(leaf)}"
            )
    return told


def axes_value(axes: AxesLike | None) -> Any:
    """What is known about axes, as a value that compares and hashes."""
    return by_path("axes", axes, (Axes, type(None)), "Axes and None")


@dataclass(frozen=True, repr=False)
class Stacked(Value):
    """See `stacked`."""

    pattern: str
    axis: int | tuple[int, ...] = field(default=0, kw_only=True)

    def __call__(self, path: str, leaf: jax.Array) -> Axes | None:
        """Along which axes the layers of a leaf are stacked, if its path matches."""
        if re.search(self.pattern, path) is None:
            return None
        roles: list[str | None] = [None] * jnp.ndim(leaf)
        for axis in self.axis if isinstance(self.axis, tuple) else (self.axis,):
            if not -len(roles) <= axis < len(roles):
                raise ValueError(
                    f"axis={self.axis} of {self!r} is none of {path!r}, which has the "
                    f"shape {jnp.shape(leaf)}"
                )
            roles[axis] = "stack"
        return Axes(*roles)


def stacked(pattern: str, *, axis: int | tuple[int, ...] = 0) -> Stacked:
    """Declares that leaves hold several layers each, for ``axes``.

    Use it for the leaves of `flax.linen.scan`, `flax.nnx.vmap`, `equinox.filter_vmap`
    and loops by `jax.lax.scan`. Each slice along the axis is then treated as a layer of
    its own, pruned to its own share with its own scales; and a stacked norm scale is
    not mistaken for a kernel.

    Args:
      pattern: a regular expression, found anywhere in the path, such as ``"^layers/"``;
        "" for all leaves.
      axis: along which the layers are stacked; several for stacks of stacks.

    Returns:
      A function ``(path, leaf) -> Axes | None``, a value that compares.

    Raises:
      TypeError: the axis is not an integer or a tuple of them.
      ValueError: the pattern is not a regular expression; later, if a leaf that matches
        does not have the axis.

    Example:
      >>> layers = {"kernel": jnp.ones((12, 4, 8)), "scale": jnp.ones((12, 4))}
      >>> axes_of({"layers": layers}, stacked("^layers/"))
      [Axes('stack', 'input', 'output'), Axes('stack', 'other')]
    """
    check_pattern(pattern)
    for entry in axis if isinstance(axis, tuple) else (axis,):
        check_integer("axis", entry)
    return Stacked(pattern, axis=axis)


def check_pattern(pattern: str) -> None:
    """Raises a ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern must be a regular expression, got {pattern!r}: {error}"
        ) from error


def _of_name(
    path: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Axes:
    """The axes of a leaf, by its name and those of its siblings."""
    parent, _, name = path.rpartition("/")
    beside = f"{parent}/w".lstrip("/")
    if len(shape) < 2 or name in _ELEMENTWISE or (name == "b" and beside in shapes):
        return Axes(*["other"] * len(shape))
    if name in ("embedding", "embeddings") and len(shape) == 2:
        return Axes("lookup", "output")
    if name == "weight":
        return _outputs_first(len(shape), assumed=True)
    if name == "w" and "transpose" in parent.rpartition("/")[2]:
        return Axes(*["window"] * (len(shape) - 2), "output", "input")
    if name == "kernel" and len(shape) == 3:
        attention, _, part = parent.rpartition("/")
        sides = [f"{attention}/{side}/kernel".lstrip("/") for side in _ATTENTION]
        if part in _ATTENTION and all(len(shapes.get(s, ())) == 3 for s in sides):
            second = "input" if part == "out" else "output"
            return Axes("input", second, "output")
    bias = shapes.get(f"{parent}/bias".lstrip("/"), ())
    many = len(bias) - 1
    layers = 0
    if name == "kernel" and 0 < many < len(shape) - 1:
        if (*shape[:many], shape[-1]) == bias:
            layers = many
        if shape[-many - 1 :] == bias:
            inputs = ["input"] * (len(shape) - many - 1)
            return Axes(*inputs, *["output"] * (many + 1), assumed=layers > 0)
    windows = ["window"] * (len(shape) - layers - 2)
    added = {"kernel": bias, "w": shapes.get(f"{parent}/b".lstrip("/"), ())}
    if added.get(name) == shape[-2:-1] and 1 != shape[-2] != shape[-1]:
        return Axes(*windows, "output", "input", assumed=True)
    known = name in ("kernel", "w") and layers == max(many, 0)
    return Axes(*["stack"] * layers, *windows, "input", "output", assumed=not known)


def _outputs_first(ndim: int, *, assumed: bool = False) -> Axes:
    return Axes("output", "input", *["window"] * (ndim - 2), assumed=assumed)


def _of_equinox(path: str, shape: tuple[int, ...], owner: Any) -> Axes | None:
    """The axes of a weight that belongs to a layer of `equinox.nn`, else None.

    The layer determines how many axes its weight has; those before are stacked layers.
    """
    if owner is None or not path.rpartition("/")[2].startswith("weight"):
        return None
    kinds = _equinox_classes(owner)
    if any("Norm" in kind for kind in kinds):
        return Axes(*["other"] * len(shape))
    if "Embedding" in kinds:
        axes = Axes("lookup", "output")
    else:
        axes = _outputs_first(2 + getattr(owner, "num_spatial_dims", 0))
    layers = len(shape) - len(axes.roles)
    return Axes(*["stack"] * layers, *axes.roles) if layers >= 0 else None


def _owners(params: Params) -> list[Any]:
    """For each leaf, the layer of `equinox.nn` that holds it, or None."""
    owners = []
    for path, _ in jax.tree.leaves_with_path(params):
        node = (
            params if path and isinstance(path[-1], jax.tree_util.GetAttrKey) else None
        )
        for key in path[:-1]:
            node = _child(node, key)
        owners.append(node if _equinox_classes(node) else None)
    return owners


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name, None)
    if not isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey):
        return None  # a node registered without keys, whose children are only numbered
    place = key.key if isinstance(key, jax.tree_util.DictKey) else key.idx
    return node[place] if hasattr(node, "__getitem__") else None


def _equinox_classes(node: Any) -> set[str]:
    # By name, because this package does not depend on Equinox.
    return {
        parent.__name__
        for parent in type(node).__mro__
        if parent.__module__.startswith("equinox.nn.")
    }
