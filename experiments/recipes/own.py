"""A network for your own images or texts, sized for two CPU cores.

    python -m experiments train own_images --data.folder PHOTOS
    python -m experiments train own_texts --weights BERT --train-file F --eval-file G

- `own_images`: CrAM+-Multi, 50 to 95 %, on the images of ``PHOTOS/train/CLASS/``,
  scaled to 32x32; ``PHOTOS/test/CLASS/`` is for evaluation. ``--data.side 0
  --model.name resnet18`` trains a larger network at 224x224.
- `own_texts`: the recipe `sst2_small` on CSV or JSONL files with the columns ``text``
  and ``label``. BERT is a directory as Hugging Face stores it.

The settings are those of `cifar10_small` and `sst2_small`; images have smaller batches
and more epochs, since data sets of your own tend to be small.
"""

import dataclasses

from experiments.config import variant
from experiments.images.config import DataConfig
from experiments.recipes import cifar10_small, sst2

images = dataclasses.replace(
    variant(cifar10_small.config, "own_images", epochs=20),
    data=DataConfig(name="folder", side=32, batch_size=64, shift=2, flip=True),
    eval_targets=("dense", "k50", "k70", "k80", "k90", "k95", "2:4", "4bit"),
    evaluate_every=5,
    log_every=20,
)

texts = dataclasses.replace(
    sst2.small,
    name="own_texts",
    data=dataclasses.replace(sst2.small.data, name="file", examples=0),
)

image_configs = (images,)
text_configs = (texts,)
