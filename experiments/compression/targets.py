"""Names for compression targets, as the paper writes them, and their projectors."""

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

from experiments.errors import ConfigError

if TYPE_CHECKING:  # jax takes seconds to import, and names need none of it
    from cram_jax import Projector
    from cram_jax.leaves import Where
    from experiments.compression.channels import CoupledChannels
    from experiments.compression.pruners import Pruners

Form = Literal[
    "dense",
    "global",
    "by cost",
    "layer",
    "channels",
    "second order",
    "blocks",
    "n of m",
    "wanda",
    "sparse gpt",
    "quantised",
    "nested",
    "mxfp4",
    "nvfp4",
]
Scope = Literal["global", "layer", "blocks", "channels"]

NUMBER = r"(\d{1,3}(?:\.\d{1,6})?)"
GROUP = r"(\d{1,4}):(\d{1,4})"
FORMS: dict[Form, str] = {
    "dense": "dense",
    "global": f"k{NUMBER}",
    "by cost": f"k{NUMBER}@cost",
    "layer": f"u{NUMBER}",
    "channels": f"c{NUMBER}",
    "second order": f"o{NUMBER}",
    "blocks": rf"b{NUMBER}(?:@(\d{{1,4}})x(\d{{1,4}}))?",
    "n of m": GROUP,
    "wanda": f"w(?:{NUMBER}|{GROUP})",
    "sparse gpt": rf"g(?:{NUMBER}|{GROUP})(?:@(\d{{1,4}})bit)?",
    "quantised": r"(\d{1,4})bit(?:@(\d{1,4})(bf16)?)?",
    "nested": r"nested(\d)",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
TRAINED: tuple[Form, ...] = ("second order", "wanda", "sparse gpt")
"""Forms that look at a trained network and its training data."""
ROUNDING: tuple[Form, ...] = ("quantised", "nested", "mxfp4", "nvfp4")
"""Forms that remove nothing."""
BLOCK = (4, 2)
"""Inputs and outputs of a block, the shape that the engine computes fastest."""

EXPECTED = (
    "expected dense, k90 (90 % zeros; k90@cost by what weights cost), u90 (in every "
    "layer), b90 (in blocks of 4 inputs x 2 outputs; b90@8x1 for others), c50 (50 % of "
    "the channels), 2:4 (n of m), 4bit (4bit@32 in blocks of 32 inputs; 4bit@32bf16 "
    "with bfloat16 scales), nested4 (leading bits of 8), mxfp4, nvfp4, or several "
    "joined by +, such as k90+4bit; or, of trained networks, o90 (second order), w90 "
    "or w2:4 (Wanda), g90, g2:4 or g90@4bit (SparseGPT), and with r before, as rk90, "
    "what is kept refitted"
)


class LeafFilters(NamedTuple):
    """Which leaves of a network targets compress; see ``where`` of the projectors.

    Attributes:
      prunable: those that may be compressed at all; None: of two or more dimensions.
      uniform: those of them that are pruned layer by layer.
      channels: which channels can be removed as a whole, and what a weight costs;
        None: unknown.
    """

    prunable: "Where | None" = None
    uniform: "Where | None" = None
    channels: "CoupledChannels | None" = None


class Part(NamedTuple):
    """One step of a target.

    Attributes:
      form: what it does.
      share: of zeros; 0 if there is none.
      numbers: inputs and outputs of a block, n and m, or bits.
      bits: width that kept weights are rounded to while pruning; None: not rounded.
      scale: dtype of the scales of blocks that are rounded together.
      refitted: whether kept weights are refitted by least squares.
    """

    form: Form
    share: float = 0.0
    numbers: tuple[int, ...] = ()
    bits: int | None = None
    scale: Literal["float16", "bfloat16"] = "float16"
    refitted: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether it looks at a trained network and its training data."""
        return self.refitted or self.form in TRAINED


def parse(target: str) -> tuple[Part, ...]:
    """Reads the name of a target.

    Args:
      target: ``dense``; ``k90`` (90 % of the weights are zero, global magnitude);
        ``k90@cost`` (the same, of weights over the root of their multiply-adds);
        ``u90`` (90 % of every layer; image networks keep the first and the last dense);
        ``b90`` (90 % of the blocks of every layer, blocks of 4 inputs and 2 outputs, or
        of another shape as in ``b90@8x1``); ``c50`` (50 % of the channels of all layers
        together; of a BERT, of the heads and of the hidden units); ``2:4`` (n of every
        m); ``4bit`` (fake quantisation; ``4bit@32`` with a float16 scale for each 32
        inputs, as ``MatMulNBits`` has, ``4bit@32bf16`` with one in bfloat16, as LiteRT
        has); ``nested4`` (the leading 4 of 8 bits);
        ``mxfp4``; ``nvfp4``; ``o90`` (second-order pruning); ``w90``, ``w2:4`` (Wanda,
        the same share of every layer); ``g90``, ``g2:4`` (SparseGPT, likewise; with
        ``@4bit`` it rounds as it prunes); any of those that prune with ``r`` before, as
        ``rk90`` (refitted: least squares on what is kept); or several applied in order,
        such as ``k90+4bit``.

    Returns:
      Its parts, in order.

    Raises:
      ConfigError: the name is not of these forms, or its numbers are out of range.
    """
    return tuple(_part(part, target) for part in target.split("+"))


def check(target: str, *, training: bool = False) -> None:
    """Raises unless the name of a target is valid.

    Args:
      target: its name.
      training: whether to train for it, which targets of trained networks do not allow.

    Raises:
      ConfigError: see `parse`.
    """
    if needs_data(target) and training:
        raise ConfigError(
            f"target {target!r} looks at a trained network and applies only to one; "
            f"train for k or u with the same number"
        )


def needs_data(target: str) -> bool:
    """Whether a target looks at a trained network and its training data."""
    return any(part.needs_data for part in parse(target))


def projector(
    target: str,
    *,
    masks_every: int = 1,
    filters: LeafFilters | None = None,
    pruners: "Pruners | None" = None,
) -> "Projector":
    """Makes the projector of a target.

    Args:
      target: its name, see `parse`.
      masks_every: for how many uses the masks of one projection are kept.
      filters: the leaves; by default all of two or more dimensions.
      pruners: make the projectors that need a trained network and its data.

    Returns:
      The projector.

    Raises:
      ConfigError: see `parse`; or the target needs ``pruners`` or the channels of
        ``filters``, and got None.
    """
    import cram_jax

    filters = filters or LeafFilters()
    made: list[Projector] = []
    for part in parse(target):
        if pruners is not None:
            own = _with_data(part, filters, pruners)
        elif part.needs_data:
            raise ConfigError(
                f"target {target!r} needs a trained network and its training data"
            )
        else:
            own = without_data(part, filters)
        if masks_every > 1 and part.form != "dense" and own.only_masks:
            own = cram_jax.cached(own, every=masks_every)
        made.append(own)
    return made[0] if len(made) == 1 else cram_jax.compose(*made)


def without_data(part: Part, filters: LeafFilters) -> "Projector":
    """Makes the projector of a part that needs no trained network."""
    import cram_jax

    where, uniform, coupled = filters
    match part.form:
        case "quantised":
            bits, *block = part.numbers
            if not block:
                return cram_jax.fake_quant(bits, where=where)
            return cram_jax.fake_quant(
                bits, block=block[0], scale=part.scale, where=where
            )
        case "nested":
            return cram_jax.nested(*part.numbers, where=where)
        case "mxfp4":
            return cram_jax.mxfp4(where=where)
        case "nvfp4":
            return cram_jax.nvfp4(where=where)
        case "global":
            return cram_jax.top_k(part.share, where=where)
        case "by cost":
            scale = _known(coupled, "what a weight costs").scale
            return cram_jax.top_k(part.share, scale=scale, where=where)
        case "layer":
            return cram_jax.top_k(part.share, scope="layer", where=uniform)
        case "blocks":
            return cram_jax.top_k(
                part.share, scope="layer", block=part.numbers, where=uniform
            )
        case "channels":
            known = _known(coupled, "which channels belong together")
            return known.projector(part.share)
        case "n of m":
            return cram_jax.n_m(*part.numbers, where=where)
        case _:
            return cram_jax.identity()


def _known(coupled: "CoupledChannels | None", what: str) -> "CoupledChannels":
    if coupled is None:
        raise ConfigError(f"{what} is not known of this network")
    return coupled


def _with_data(part: Part, filters: LeafFilters, pruners: "Pruners") -> "Projector":
    pattern: float | tuple[int, int] = part.share
    where = filters.uniform
    if part.numbers:
        pattern, where = (part.numbers[0], part.numbers[-1]), filters.prunable
    match part.form:
        case "second order":
            own = pruners.second_order(part.share)
        case "wanda":
            own = pruners.wanda(pattern, where)
        case "sparse gpt":
            own = pruners.sparse_gpt(pattern, where, part.bits)
        case _:
            own = without_data(part, filters)
    return pruners.refit(own, filters.prunable) if part.refitted else own


def label(target: str) -> str:
    """The name of a target in tables: ``k90+4bit`` is ``90 % + 4-bit``."""
    words = []
    for name, part in zip(target.split("+"), parse(target), strict=True):
        shown = name.removeprefix("r") if part.refitted else name
        amount = shown[1:].partition("@")[0]
        percent = f"{amount} %"
        most = amount if part.numbers else percent
        match part.form:
            case "global":
                word = percent
            case "by cost":
                word = f"{percent} by cost"
            case "layer":
                word = f"{percent} uniform"
            case "channels":
                word = f"{percent} of channels"
            case "second order":
                word = f"{percent} second order"
            case "blocks":
                word = f"{percent} in {part.numbers[0]}x{part.numbers[1]} blocks"
            case "wanda":
                word = f"{most} Wanda"
            case "sparse gpt":
                word = f"{most} SparseGPT"
            case "quantised":
                bits, *block = part.numbers
                word = f"{bits}-bit" + "".join(f" by {size}" for size in block)
                word += " bfloat16" * (part.scale == "bfloat16")
            case "nested":
                word = f"{part.numbers[0]} of 8 bits"
            case "mxfp4" | "nvfp4":
                word = shown.upper()
            case _:
                word = shown
        rounded = f" in {part.bits}-bit" if part.bits else ""
        words.append(word + rounded + " refitted" * part.refitted)
    return " + ".join(words)


def sparsity(target: str, scope: Scope = "global") -> float | None:
    """The share of zeros if a target is only a sparsity, else None.

    Args:
      target: its name.
      scope: which targets count, besides dense: ``k90``; with "layer" ``u90``; with
        "blocks" ``b90``; with "channels" ``c90``.
    """
    part, *others = parse(target)
    if not others and part.form == "dense":
        return 0.0
    is_other = others or part.form != scope or part.refitted
    return None if is_other else part.share


def _part(part: str, target: str) -> Part:
    refitted = part.startswith("r")
    own = part.removeprefix("r")
    found = [(f, m) for f, p in FORMS.items() if (m := re.fullmatch(p, own))]
    if not found or (refitted and found[0][0] in ("dense", *ROUNDING)):
        raise ConfigError(f"target {target!r} is unknown; {EXPECTED}")
    form, match = found[0]
    share, numbers = 0.0, list(match.groups())
    bits: int | None = None
    scale: Literal["float16", "bfloat16"] = "float16"
    if form == "quantised":
        *numbers, wide = numbers
        scale = "bfloat16" if wide else scale
    if form == "sparse gpt" and numbers[3] is not None:
        bits = int(numbers[3])
    if form not in ("dense", "n of m", *ROUNDING):
        if numbers[0] is not None:
            share = float(Decimal(numbers[0]) / 100)
        numbers = numbers[1:3]
        if share >= 1:
            raise ConfigError(f"target {target!r}: sparsity must be below 100 %")
    sizes = tuple(int(number) for number in numbers if number is not None)
    if form == "blocks":
        sizes = sizes or BLOCK
        if min(sizes) < 1:
            raise ConfigError(f"target {target!r}: a block must be at least 1x1")
    elif form not in ROUNDING and sizes and not 1 <= sizes[0] <= sizes[1]:
        raise ConfigError(f"target {target!r}: n must be between 1 and m={sizes[1]}")
    width = sizes[0] if form == "quantised" else bits
    if width is not None and not 2 <= width <= 16:
        raise ConfigError(f"target {target!r}: bits must be between 2 and 16")
    if form == "quantised" and 0 in sizes:
        raise ConfigError(f"target {target!r}: a block must be at least 1")
    if form == "nested" and not 2 <= sizes[0] <= 8:
        raise ConfigError(f"target {target!r}: bits must be between 2 and 8")
    return Part(form, share, sizes, bits, scale, refitted)
