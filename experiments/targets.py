"""Names for compression targets, as the paper writes them."""

import re
from decimal import Decimal

import cram_jax
from cram_jax import Projector
from experiments.errors import ConfigError


def projector(target: str) -> Projector:
    """Reads the name of a target.

    Args:
      target: ``dense``; ``k90`` (90 % of the weights are zero, global magnitude);
        ``2:4`` (n of every m); ``4bit`` (fake quantisation); or several applied in
        order, such as ``k90+4bit``.

    Returns:
      The projector.

    Raises:
      ConfigError: the name is not of these forms, or its numbers are out of range.
    """
    parts = [_part(part, target) for part in target.split("+")]
    return parts[0] if len(parts) == 1 else cram_jax.compose(*parts)


def label(target: str) -> str:
    """The name of a target in tables: ``k90+4bit`` is ``90 % + 4-bit``."""
    words = []
    for part in target.split("+"):
        if part.startswith("k"):
            words.append(f"{part[1:]} %")
        elif part.endswith("bit"):
            words.append(f"{part[:-3]}-bit")
        else:
            words.append(part)
    return " + ".join(words)


def sparsity(target: str) -> float | None:
    """The share of zeros where a target is nothing but sparsity, else None."""
    if target == "dense":
        return 0.0
    return float(target[1:]) / 100 if re.fullmatch(r"k[\d.]+", target) else None


def _part(part: str, target: str) -> Projector:
    if part == "dense":
        return cram_jax.identity()
    try:
        if match := re.fullmatch(r"k(\d+(?:\.\d+)?)", part):
            return cram_jax.top_k(float(Decimal(match[1]) / 100))
        if match := re.fullmatch(r"(\d+):(\d+)", part):
            return cram_jax.n_m(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(\d+)bit", part):
            return cram_jax.fake_quant(int(match[1]))
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}") from error
    raise ConfigError(
        f"target {target!r} is unknown; expected dense, k90 (sparsity in per cent), "
        f"2:4 (n of m), 4bit, or several joined by +, such as k90+4bit"
    )
