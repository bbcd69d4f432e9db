"""BERT on SQuAD v1.1: table 4 and appendix D of the paper, sized for one GPU.

    python -m experiments train squad --weights BERT
    python -m experiments train squad --weights BERT --train-file F --eval-file G
    python -m experiments evaluate runs/squad-cram_plus-seed0

BERT is a directory with bert-base-uncased as Hugging Face stores it; F and G are the
official JSON, by default tensorflow-datasets' ``squad`` is read.

- `squad`: CrAM+-Multi for 50, 60, 70 and 80 %.
- `squad_k50`, `squad_k60`, `squad_k70`, `squad_k80`: CrAM+ for one sparsity.
- `squad_blocks`: for 50 to 90 % of every layer in blocks of 4 inputs and 2 outputs,
  which an engine on CPUs computes fastest.
- `squad_adam`, for twice as many epochs, and `squad_sam`.
- `squad_sparse_finetune`, with ``--init-from`` a compressed model: the remaining
  weights train on with Adam, for at most two epochs and as long as they improve.

From the paper, as far as its text was at hand: the methods; batches of 16, rows of 384
tokens with a stride of 128, frozen embeddings, label smoothing, one sparsity for every
layer of the encoder and dense embeddings and head, no statistics to recalibrate; rho
0.005, for SAM 0.01; Adam for twice as many epochs; sparse fine-tuning for at most two.
The authors' published configurations have no language runs.

Our choice: learning rate 5e-5, falling along a line without warm-up, no weight decay,
two epochs, label smoothing 0.1, the sparsities of Multi, float32 (``--model.dtype
bfloat16`` is faster), and all numbers of sparse fine-tuning but its two epochs. No
figures of ours are published for these runs yet.
"""

import dataclasses

from experiments.config import OptimizerConfig, variant
from experiments.text.config import BertModelConfig, TextConfig, TextDataConfig

SPARSITIES = ("u50", "u60", "u70", "u80")
BLOCKS = ("b50", "b70", "b80", "b90")

config = TextConfig(
    name="squad",
    data=TextDataConfig(name="squad", max_length=384, stride=128, batch_size=16),
    model=BertModelConfig(),
    weights="",
    optimizer=OptimizerConfig(
        rule="cram_plus",
        train_targets=SPARSITIES,
        rho=0.005,
        base="adam",
        learning_rate=5e-5,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.0,
        frozen="^bert/embeddings/",
    ),
    epochs=2,
    label_smoothing=0.1,
    eval_targets=("dense", *SPARSITIES),
    evaluate_every=1,
    checkpoint_every=1,
    log_every=100,
)


def baselines(config: TextConfig) -> tuple[TextConfig, ...]:
    """Adam, for twice as many epochs, and SAM."""
    return (
        variant(config, f"{config.name}_adam", epochs=2 * config.epochs, rule="none"),
        variant(config, f"{config.name}_sam", rule="sam", rho=0.01),
    )


def blocks(config: TextConfig) -> TextConfig:
    """Trains for blocks instead of single weights."""
    return variant(
        config,
        f"{config.name}_blocks",
        train_targets=BLOCKS,
        eval_targets=("dense", *BLOCKS),
    )


def sparse_finetune(config: TextConfig) -> TextConfig:
    """Trains the remaining weights of a compressed model."""
    return variant(
        dataclasses.replace(
            config, init_from="", weights=None, evaluate_every=0.25, patience=3
        ),
        f"{config.name}_sparse_finetune",
        epochs=2,
        eval_targets=("dense",),
        rule="none",
        keep_pruned=True,
    )


configs = (
    config,
    *(
        variant(config, f"squad_k{target[1:]}", train_targets=(target,))
        for target in SPARSITIES
    ),
    blocks(config),
    *baselines(config),
    sparse_finetune(config),
)
