import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_has_at_most_900_words():
    assert len(README.read_text().split()) <= 900


def test_the_example_of_the_readme_trains_and_compresses(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, names)
    assert "total" in capsys.readouterr().out  # the report
    assert int(names["masks"]["hidden"].sum() + names["masks"]["output"].sum()) == 15

    key = jax.random.key(1)
    params = {
        name: 0.1 * jax.random.normal(key, leaf.shape)
        for name, leaf in names["params"].items()
    }
    batch = jax.random.normal(jax.random.key(0), (32, 8)), jnp.ones((32, 1))
    state = names["optimizer"].init(params)
    before = names["loss_fn"](params, batch)
    for _ in range(20):
        params, state = names["step"](params, state, batch)
    assert names["loss_fn"](params, batch) < before
