"""Names for compression targets, as the paper writes them."""

import re
from decimal import Decimal
from typing import Literal, NamedTuple

import cram_jax
from cram_jax import Projector
from cram_jax.leaves import Where
from experiments.errors import ConfigError


class Layers(NamedTuple):
    """Which leaves of a network targets are about.

    Attributes:
      prunable: those that may be compressed at all; None: of two or more dimensions.
      uniform: those of them that uniform pruning prunes.
    """

    prunable: Where | None
    uniform: Where | None


IMAGES = Layers(None, cram_jax.all_but("^(stem|conv1_1|head)/"))
"""Uniform pruning leaves the first and the last layer dense, as the paper's runs do."""

ENGINE_BLOCK = (4, 2)
"""Inputs and outputs of the blocks that sparse engines run fast."""

ENCODER = Layers(*[cram_jax.matching(r"^bert/layer\d+/.*/kernel$")] * 2)
"""The dense layers of a BERT; its embeddings, pooler and task head stay dense."""


def projector(
    target: str, *, masks_every: int = 1, layers: Layers = IMAGES
) -> Projector:
    """Reads the name of a target.

    Args:
      target: ``dense``; ``k90`` (90 % of the weights are zero, global magnitude);
        ``u90`` (90 % of every layer, of images of every one but the first and the
        last); ``b90`` (the same in blocks of 4 inputs and 2 outputs); ``2:4`` (n of
        every m); ``4bit`` (fake quantisation); or several applied in order, such as
        ``k90+4bit``.
      masks_every: uses for which the masks of one projection serve.
      layers: of the network.

    Returns:
      The projector.

    Raises:
      ConfigError: the name is not of these forms, or its numbers are out of range.
    """
    parts = [_part(part, target, masks_every, layers) for part in target.split("+")]
    return parts[0] if len(parts) == 1 else cram_jax.compose(*parts)


def check(target: str, *, training: bool = False) -> None:
    """Raises where a target has no such name.

    Args:
      target: its name; beside those of `projector`, ``o90`` is 90 % by second-order
        pruning.
      training: whether to train for it: second-order pruning is of trained networks.

    Raises:
      ConfigError: see `projector`.
    """
    share = sparsity(target, "second order")
    if share is None:
        projector(target)
    elif share >= 1:
        raise ConfigError(f"target {target!r}: sparsity must be below 100 %")
    elif training:
        raise ConfigError(
            f"target {target!r} is second-order pruning, of a trained network alone; "
            f"train for k{target[1:]} or u{target[1:]}"
        )


def label(target: str) -> str:
    """The name of a target in tables: ``k90+4bit`` is ``90 % + 4-bit``."""
    words = []
    for part in target.split("+"):
        if part.startswith("k"):
            words.append(f"{part[1:]} %")
        elif part.startswith("u"):
            words.append(f"{part[1:]} % uniform")
        elif part.startswith("b"):
            words.append(f"{part[1:]} % in blocks")
        elif part.startswith("o"):
            words.append(f"{part[1:]} % second order")
        elif part.endswith("bit"):
            words.append(f"{part[:-3]}-bit")
        else:
            words.append(part)
    return " + ".join(words)


def sparsity(
    target: str, scope: Literal["global", "layer", "second order"] = "global"
) -> float | None:
    """The share of zeros where a target is nothing but sparsity, else None.

    Args:
      target: its name.
      scope: which targets count: ``k90``, with "layer" ``u90``, with "second order"
        ``o90``; dense is in the first two.
    """
    if target == "dense":
        return None if scope == "second order" else 0.0
    letter = {"global": "k", "layer": "u", "second order": "o"}[scope]
    match = re.fullmatch(rf"{letter}(\d+(?:\.\d+)?)", target)
    return float(Decimal(match[1]) / 100) if match else None


def _part(part: str, target: str, masks_every: int, layers: Layers) -> Projector:
    if part == "dense":
        return cram_jax.identity()
    try:
        if match := re.fullmatch(r"(\d+)bit", part):
            return cram_jax.fake_quant(int(match[1]), where=layers.prunable)
        pruner = _pruner(part, layers)
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}") from error
    if pruner is None:
        raise ConfigError(
            f"target {target!r} is unknown; expected dense, k90 (sparsity in per "
            f"cent), u90 (the same in every layer), b90 (the same in blocks of 4 "
            f"inputs and 2 outputs), 2:4 (n of m), 4bit, or several "
            f"joined by +, such as k90+4bit; or o90 (second order, when evaluated)"
        )
    return cram_jax.cached(pruner, every=masks_every) if masks_every > 1 else pruner


def _pruner(part: str, layers: Layers) -> Projector | None:
    if match := re.fullmatch(r"([ku])(\d+(?:\.\d+)?)", part):
        share = float(Decimal(match[2]) / 100)
        if match[1] == "k":
            return cram_jax.top_k(share, where=layers.prunable)
        return cram_jax.top_k(share, scope="layer", where=layers.uniform)
    if match := re.fullmatch(r"b(\d+(?:\.\d+)?)", part):
        share = float(Decimal(match[1]) / 100)
        return cram_jax.top_k(
            share, scope="layer", block=ENGINE_BLOCK, where=layers.uniform
        )
    if match := re.fullmatch(r"(\d+):(\d+)", part):
        return cram_jax.n_m(int(match[1]), int(match[2]), where=layers.prunable)
    return None
