"""Names for compression targets, as the paper writes them, and their projectors."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

from experiments.errors import ConfigError

if TYPE_CHECKING:  # jax takes seconds to import, and names need none of it
    from cram_jax import Projector
    from cram_jax.leaves import Where
    from experiments.channels import CoupledChannels

Form = Literal[
    "dense",
    "global",
    "layer",
    "channels",
    "second order",
    "blocks",
    "n of m",
    "quantised",
]
Scope = Literal["global", "layer", "blocks", "channels"]

NUMBER = r"(\d{1,3}(?:\.\d{1,6})?)"
FORMS: dict[Form, str] = {
    "dense": "dense",
    "global": f"k{NUMBER}",
    "layer": f"u{NUMBER}",
    "channels": f"c{NUMBER}",
    "second order": f"o{NUMBER}",
    "blocks": rf"b{NUMBER}(?:@(\d{{1,4}})x(\d{{1,4}}))?",
    "n of m": r"(\d{1,4}):(\d{1,4})",
    "quantised": r"(\d{1,4})bit",
}
BLOCK = (4, 2)
"""Inputs and outputs of a block, the shape that the engine computes fastest."""

EXPECTED = (
    "expected dense, k90 (90 % zeros), u90 (in every layer), b90 (in blocks of 4 "
    "inputs x 2 outputs; b90@8x1 for others), c50 (50 % of the channels), 2:4 (n of "
    "m), 4bit, or several joined by +, such as k90+4bit; or o90 (second order, when "
    "evaluated)"
)


class LeafFilters(NamedTuple):
    """Which leaves of a network targets are about; see ``where`` of the projectors.

    Attributes:
      prunable: those that may be compressed at all; None: of two or more dimensions.
      uniform: those of them that are pruned layer by layer.
      channels: the channels that can be removed as a whole; None: unknown.
    """

    prunable: "Where | None" = None
    uniform: "Where | None" = None
    channels: "CoupledChannels | None" = None


class Part(NamedTuple):
    """One step of a target.

    Attributes:
      form: what it does.
      share: of zeros; 0 if it does not say.
      numbers: inputs and outputs of a block, n and m, or bits.
    """

    form: Form
    share: float = 0.0
    numbers: tuple[int, ...] = ()


def parse(target: str) -> tuple[Part, ...]:
    """Reads the name of a target.

    Args:
      target: ``dense``; ``k90`` (90 % of the weights are zero, global magnitude);
        ``u90`` (90 % of every layer; image networks keep the first and the last dense);
        ``b90`` (90 % of the blocks of every layer, blocks of 4 inputs and 2 outputs, or
        of another shape as in ``b90@8x1``); ``c50`` (50 % of the channels of all layers
        together; of a BERT, of the heads and of the hidden units); ``2:4`` (n of every
        m); ``4bit`` (fake quantisation); ``o90`` (second-order pruning); or several
        applied in order, such as ``k90+4bit``.

    Returns:
      Its parts, in order.

    Raises:
      ConfigError: the name is not of these forms, or its numbers are out of range.
    """
    return tuple(_part(part, target) for part in target.split("+"))


def check(target: str, *, training: bool = False) -> None:
    """Raises unless a target has such a name.

    Args:
      target: its name.
      training: whether to train for it; second-order pruning is for trained networks.

    Raises:
      ConfigError: see `parse`.
    """
    if is_second_order(target) and training:
        raise ConfigError(
            f"target {target!r} is second-order pruning, which applies only to trained "
            f"networks; train for k or u with the same number"
        )


def is_second_order(target: str) -> bool:
    """Whether a target looks at the loss, as ``o90`` and ``o90+4bit`` do."""
    return any(part.form == "second order" for part in parse(target))


def projector(
    target: str,
    *,
    masks_every: int = 1,
    filters: LeafFilters | None = None,
    second_order: "Callable[[float], Projector] | None" = None,
) -> "Projector":
    """Makes the projector of a target.

    Args:
      target: its name, see `parse`.
      masks_every: uses for which the masks of one projection serve.
      filters: the leaves; by default all of two or more dimensions.
      second_order: makes the projector of ``o90`` from the share of zeros.

    Returns:
      The projector.

    Raises:
      ConfigError: see `parse`; or the target needs ``second_order`` or the channels of
        ``filters``, and got None.
    """
    import cram_jax

    filters = filters or LeafFilters()
    made: list[Projector] = []
    pruner: Projector
    for part in parse(target):
        where, uniform, coupled = filters
        match part.form:
            case "dense":
                made.append(cram_jax.identity())
                continue
            case "quantised":
                made.append(cram_jax.fake_quant(*part.numbers, where=where))
                continue
            case "global":
                pruner = cram_jax.top_k(part.share, where=where)
            case "layer":
                pruner = cram_jax.top_k(part.share, scope="layer", where=uniform)
            case "blocks":
                pruner = cram_jax.top_k(
                    part.share, scope="layer", block=part.numbers, where=uniform
                )
            case "channels":
                if coupled is None:
                    raise ConfigError(
                        f"target {target!r} removes channels, and which of them belong "
                        f"together is not known of this network"
                    )
                pruner = coupled.projector(part.share)
            case "n of m":
                pruner = cram_jax.n_m(*part.numbers, where=where)
            case "second order":
                if second_order is None:
                    raise ConfigError(
                        f"target {target!r} is second-order pruning, which needs a "
                        f"trained network and its training data"
                    )
                made.append(second_order(part.share))
                continue
        made.append(
            cram_jax.cached(pruner, every=masks_every) if masks_every > 1 else pruner
        )
    return made[0] if len(made) == 1 else cram_jax.compose(*made)


def label(target: str) -> str:
    """The name of a target in tables: ``k90+4bit`` is ``90 % + 4-bit``."""
    words = []
    for name, part in zip(target.split("+"), parse(target), strict=True):
        percent = f"{name[1:].partition('@')[0]} %"
        match part.form:
            case "global":
                words.append(percent)
            case "layer":
                words.append(f"{percent} uniform")
            case "channels":
                words.append(f"{percent} of channels")
            case "second order":
                words.append(f"{percent} second order")
            case "blocks":
                words.append(f"{percent} in {part.numbers[0]}x{part.numbers[1]} blocks")
            case "quantised":
                words.append(f"{part.numbers[0]}-bit")
            case _:
                words.append(name)
    return " + ".join(words)


def sparsity(target: str, scope: Scope = "global") -> float | None:
    """The share of zeros if a target is nothing but sparsity, else None.

    Args:
      target: its name.
      scope: which targets count beside dense: ``k90``, with "layer" ``u90``, with
        "blocks" ``b90``, with "channels" ``c90``.
    """
    part, *others = parse(target)
    if not others and part.form == "dense":
        return 0.0
    return None if others or part.form != scope else part.share


def _part(part: str, target: str) -> Part:
    found = [(f, m) for f, p in FORMS.items() if (m := re.fullmatch(p, part))]
    if not found:
        raise ConfigError(f"target {target!r} is unknown; {EXPECTED}")
    form, match = found[0]
    share, numbers = 0.0, match.groups()
    if form in ("global", "layer", "channels", "second order", "blocks"):
        share, numbers = float(Decimal(numbers[0]) / 100), numbers[1:]
        if share >= 1:
            raise ConfigError(f"target {target!r}: sparsity must be below 100 %")
    sizes = tuple(int(number) for number in numbers if number is not None)
    if form == "blocks":
        sizes = sizes or BLOCK
        if min(sizes) < 1:
            raise ConfigError(f"target {target!r}: a block must be at least 1x1")
    if form == "n of m" and not 1 <= sizes[0] <= sizes[1]:
        raise ConfigError(f"target {target!r}: n must be between 1 and m={sizes[1]}")
    if form == "quantised" and not 2 <= sizes[0] <= 16:
        raise ConfigError(f"target {target!r}: bits must be between 2 and 16")
    return Part(form, share, sizes)
