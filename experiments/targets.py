"""Names for compression targets, as the paper writes them."""

import re
from decimal import Decimal
from typing import Literal

import cram_jax
from cram_jax import Projector
from experiments.errors import ConfigError

FIRST_AND_LAST = "^(stem|conv1_1|head)/"
"""Paths of the layers that uniform pruning leaves dense, as the paper's runs do."""


def projector(target: str, *, masks_every: int = 1) -> Projector:
    """Reads the name of a target.

    Args:
      target: ``dense``; ``k90`` (90 % of the weights are zero, global magnitude);
        ``u90`` (90 % of every layer but the first and the last); ``2:4`` (n of every
        m); ``4bit`` (fake quantisation); or several applied in order, such as
        ``k90+4bit``.
      masks_every: uses for which the masks of one projection serve.

    Returns:
      The projector.

    Raises:
      ConfigError: the name is not of these forms, or its numbers are out of range.
    """
    parts = [_part(part, target, masks_every) for part in target.split("+")]
    return parts[0] if len(parts) == 1 else cram_jax.compose(*parts)


def label(target: str) -> str:
    """The name of a target in tables: ``k90+4bit`` is ``90 % + 4-bit``."""
    words = []
    for part in target.split("+"):
        if part.startswith("k"):
            words.append(f"{part[1:]} %")
        elif part.startswith("u"):
            words.append(f"{part[1:]} % uniform")
        elif part.endswith("bit"):
            words.append(f"{part[:-3]}-bit")
        else:
            words.append(part)
    return " + ".join(words)


def sparsity(target: str, scope: Literal["global", "layer"] = "global") -> float | None:
    """The share of zeros where a target is nothing but sparsity, else None.

    Args:
      target: its name.
      scope: which targets count: ``k90``, or with "layer" ``u90``; dense is in both.
    """
    if target == "dense":
        return 0.0
    letter = "k" if scope == "global" else "u"
    return float(target[1:]) / 100 if re.fullmatch(rf"{letter}[\d.]+", target) else None


def _part(part: str, target: str, masks_every: int) -> Projector:
    if part == "dense":
        return cram_jax.identity()
    try:
        if match := re.fullmatch(r"(\d+)bit", part):
            return cram_jax.fake_quant(int(match[1]))
        pruner = _pruner(part)
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}") from error
    if pruner is None:
        raise ConfigError(
            f"target {target!r} is unknown; expected dense, k90 (sparsity in per "
            f"cent), u90 (the same in every layer), 2:4 (n of m), 4bit, or several "
            f"joined by +, such as k90+4bit"
        )
    return cram_jax.cached(pruner, every=masks_every) if masks_every > 1 else pruner


def _pruner(part: str) -> Projector | None:
    if match := re.fullmatch(r"([ku])(\d+(?:\.\d+)?)", part):
        share = float(Decimal(match[2]) / 100)
        if match[1] == "k":
            return cram_jax.top_k(share)
        where = cram_jax.all_but(FIRST_AND_LAST)
        return cram_jax.top_k(share, scope="layer", where=where)
    if match := re.fullmatch(r"(\d+):(\d+)", part):
        return cram_jax.n_m(int(match[1]), int(match[2]))
    return None
