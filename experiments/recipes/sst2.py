"""BERT on SST-2 of GLUE: the language recipe of the paper on another task.

    python -m experiments train sst2 --weights BERT
    python -m experiments train sst2 --weights BERT --data.name mrpc --run runs/mrpc
    python -m experiments train sst2_small --weights SMALL_BERT

BERT is a directory with bert-base-uncased as Hugging Face stores it, SMALL_BERT one
with a BERT of 6 layers and 384 features; the data are tensorflow-datasets' ``glue``.

- `sst2`: CrAM+-Multi for 50, 60, 70 and 80 %.
- `sst2_blocks`: for 50 to 90 % of every layer in blocks, see `squad`.
- `sst2_adam`, for twice as many epochs, and `sst2_sam`.
- `sst2_small_gradual`: gradual magnitude pruning to 80 % of every layer.
- `sst2_small`, `sst2_small_blocks`, `sst2_small_adam`, `sst2_small_sam`,
  `sst2_small_sparse_finetune`: the same, sized for two CPU cores: rows of 64 tokens,
  4,500 texts, learning rate 1e-4.

The paper has no GLUE tasks: the numbers are those of `squad`, without label smoothing
and with rows of 128 tokens, GLUE's usual length.
"""

import dataclasses

from experiments.config import variant
from experiments.recipes import squad, squad_small
from experiments.text.config import TextDataConfig

config = dataclasses.replace(
    squad.config,
    name="sst2",
    data=TextDataConfig(name="sst2", max_length=128),
    label_smoothing=0.0,
)

small = variant(
    dataclasses.replace(
        config,
        data=TextDataConfig(name="sst2", max_length=64, examples=4500),
        model=squad_small.MINILM,
        log_every=20,
    ),
    "sst2_small",
    learning_rate=1e-4,
    warmup=0.1,
)

configs = (
    config,
    squad.blocks(config),
    *squad.baselines(config),
    small,
    squad.blocks(small),
    *squad.baselines(small),
    squad.sparse_finetune(small),
    variant(
        small,
        "sst2_small_gradual",
        epochs=2 * small.epochs,
        rule="gradual",
        train_targets=("u80",),
    ),
)
