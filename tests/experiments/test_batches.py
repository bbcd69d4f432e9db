import itertools

import numpy as np
import pytest

from experiments.batches import Examples
from experiments.errors import ConfigError


def numbered(count):
    tokens = np.arange(6 * count, dtype=np.int32).reshape(count, 3, 2)
    return Examples({"label": np.arange(count, dtype=np.int32), "tokens": tokens})


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


def test_rows_stay_together():
    data = numbered(11)
    for batch in data.training_batches(3, seed=1, start=0, stop=5):
        assert list(batch) == ["label", "tokens"]
        assert np.array_equal(batch["tokens"], data.arrays["tokens"][batch["label"]])


def test_an_epoch_is_a_permutation_without_its_last_partial_batch():
    epochs = labels(numbered(11).training_batches(3, seed=0, start=0, stop=6))
    first, second = (list(itertools.chain(*epochs[i : i + 3])) for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_the_order_is_a_function_of_seed_and_step():
    whole = labels(numbered(11).training_batches(3, seed=5, start=0, stop=9))
    for start in range(9):
        rest = numbered(11).training_batches(3, seed=5, start=start, stop=9)
        assert labels(rest) == whole[start:]
    other = labels(numbered(11).training_batches(3, seed=6, start=0, stop=9))
    assert other != whole


def test_a_process_takes_its_rows():
    whole = labels(numbered(9).training_batches(4, seed=0, start=0, stop=3))
    own = np.array([1, 3])
    ours = numbered(9).training_batches(4, seed=0, start=0, stop=3, positions=own)
    assert labels(ours) == [[batch[1], batch[3]] for batch in whole]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size=4 is more than the 3 examples"):
        next(numbered(3).training_batches(4, seed=0, start=0, stop=1))
    with pytest.raises(ConfigError, match="batch_size=4 is more than the 3 examples"):
        next(numbered(3).training_batches(4, seed=0, start=0, stop=0))


@pytest.mark.parametrize("count", [1, 5, 6, 7])
def test_evaluation_sees_every_example_once(count):
    batches = list(numbered(count).evaluation_batches(3))
    assert all(batch["tokens"].shape == (3, 3, 2) for batch in batches)
    seen = np.concatenate([batch["label"] for batch in batches])
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert weights.dtype == np.float32
    assert seen[weights == 1].tolist() == list(range(count))
    assert weights.sum() == count
