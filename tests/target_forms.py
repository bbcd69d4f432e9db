"""Targets whose programs differ."""

import re


def of_each_form(targets):
    """The first of all that differ only in their sparsity, such as k50 and k90."""
    first = {}
    for target in targets:
        first.setdefault(re.sub(r"\b([a-z]+)\d+", r"\1", target), target)
    return list(first.values())
