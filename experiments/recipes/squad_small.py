"""The methods of the paper on a part of SQuAD, sized for two CPU cores.

    python -m experiments train squad_small --weights BERT --train-file F --eval-file G
    python -m experiments evaluate runs/squad_small-cram_plus-seed0
    python -m experiments compress runs/squad_small-cram_plus-seed0 --target o50
    python -m experiments train squad_small_sparse_finetune --vocabulary BERT \
        --init-from runs/squad_small-cram_plus-seed0/compressed/o50 \
        --train-file F --eval-file G

BERT is a directory with a BERT of 6 layers and 384 features, such as
nreimers/MiniLM-L6-H384-uncased, as Hugging Face stores it.

- `squad_small`: CrAM+-Multi for 50, 60, 70 and 80 %.
- `squad_small_blocks`, see `squad`.
- `squad_small_adam`, for twice as many epochs.
- `squad_small_sam`.
- `squad_small_sparse_finetune`, see `squad`.

The settings of `squad`, except for our choices: 3,000 questions and rows of 128 tokens
with a stride of 32, about two rows per question; 400 questions for evaluation; a
learning rate of 3e-4 for so few steps, with a tenth of them as warm-up, and 1e-4 for
fine-tuning after pruning. On one core of an AMD EPYC a run takes an hour and a half;
the results are in docs/guide/results.md. With a third of the questions and of the
learning rate, in half an hour, no method survives pruning by magnitude.

Second-order pruning with its usual 1,024 gradients is slow on such a machine: add
``--second-order.gradients 128 --second-order.recomputations 2``.
"""

import dataclasses

from experiments.config import variant
from experiments.recipes import squad
from experiments.text.config import BertModelConfig, TextDataConfig

MINILM = BertModelConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)

config = variant(
    dataclasses.replace(
        squad.config,
        data=TextDataConfig(
            name="squad",
            max_length=128,
            stride=32,
            question_limit=32,
            examples=3000,
            evaluation_examples=400,
        ),
        model=MINILM,
        log_every=20,
    ),
    "squad_small",
    learning_rate=3e-4,
    warmup=0.1,
)

configs = (
    config,
    squad.blocks(config),
    *squad.baselines(config),
    variant(
        squad.sparse_finetune(config),
        "squad_small_sparse_finetune",
        learning_rate=1e-4,
    ),
)
