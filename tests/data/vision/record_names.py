"""Names and shapes of torchvision's tensors, for tests of what we write for it.

    python -m tests.data.vision.record_names

It writes names.json beside this file: for resnet18 and resnet50 the shape of every
tensor of ``state_dict()`` by its name. Run by hand, where torchvision is installed;
names.json was made with torchvision 0.28.0.
"""

import json
from pathlib import Path

import torchvision

FILE = Path(__file__).with_name("names.json")


def main():
    shapes = {
        name: {
            key: list(tensor.shape)
            for key, tensor in getattr(torchvision.models, name)().state_dict().items()
        }
        for name in ("resnet18", "resnet50")
    }
    FILE.write_text(json.dumps(shapes, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
