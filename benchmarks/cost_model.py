"""What CrAM+ costs on machines that we do not have: a calculation, not a measurement.

    python -m benchmarks.cost_model

A training step takes the longer of its arithmetic and its communication, which overlap
at best, and the shares below are of that. Counted, by the tests and by
`benchmarks.scaling`: CrAM+ computes and exchanges what SGD does twice, and a global
top_k reads the weights up to eleven times, reads them once more to write them and
their masks, and exchanges a few integers in each of the eleven passes.
Taken from data sheets: the peak arithmetic, memory and link rates. Assumed: 40 % of the
peak arithmetic, 80 % of the others, and 20 microseconds for an exchange of a few bytes.
"""

from typing import NamedTuple


class Machine(NamedTuple):
    """Rates of one chip from its data sheet.

    Attributes:
      chips: how many work together.
      flops: bfloat16 operations per second.
      memory: bytes per second.
      link: bytes per second that a chip can send to the others.
    """

    name: str
    chips: int
    flops: float
    memory: float
    link: float


class Model(NamedTuple):
    """A transformer and its batch.

    Attributes:
      parameters: all of them.
      prunable: those that top_k selects from.
      tokens: in the batch, over all chips.
    """

    name: str
    parameters: float
    prunable: float
    tokens: float


# H100 SXM: 989 TFLOP/s, 3.35 TB/s, 900 GB/s of NVLink in both directions together, and
# 400 Gb/s of InfiniBand a GPU between hosts. TPU v5p: 459 TFLOP/s, 2,765 GB/s, 4,800
# Gb/s between chips.
H100 = Machine("8 x H100, NVLink", 8, 989e12, 3.35e12, 450e9)
HOSTS = Machine("64 x H100, InfiniBand", 64, 989e12, 3.35e12, 50e9)
TPU = Machine("64 x TPU v5p", 64, 459e12, 2.765e12, 600e9)

MODELS = (
    Model("BERT-large", 335e6, 302e6, 256 * 384),
    Model("7 billion", 6.7e9, 6.5e9, 2**21),
    Model("70 billion", 69e9, 68e9, 2**22),
)

ARITHMETIC, RATES, LATENCY = 0.4, 0.8, 20e-6
PASSES = 11
FLOAT, BFLOAT, MASK = 4, 2, 1


class Cost(NamedTuple):
    """Seconds of one step.

    Attributes:
      sgd: of plain training.
      projection: of the selection, beside it.
      cram_plus: of the whole step.
    """

    sgd: float
    projection: float
    cram_plus: float


def gradient(machine: Machine, model: Model) -> float:
    """Seconds of a gradient under FSDP: the longer of arithmetic and communication.

    Forward and backward take 6 operations a parameter and token. Parameters in bfloat16
    are gathered twice and gradients in float32 scattered once.
    """
    arithmetic = 6 * model.parameters * model.tokens / machine.chips
    share = (machine.chips - 1) / machine.chips
    moved = share * model.parameters * (2 * BFLOAT + FLOAT)
    return max(
        arithmetic / (ARITHMETIC * machine.flops), moved / (RATES * machine.link)
    )


def projection(machine: Machine, model: Model) -> float:
    """Seconds of a global top_k over float32 shards."""
    read = PASSES * FLOAT + FLOAT + FLOAT + MASK
    local = model.prunable / machine.chips * read / (RATES * machine.memory)
    return local + PASSES * LATENCY


def cost(machine: Machine, model: Model) -> Cost:
    """The parts of a step."""
    update = model.parameters / machine.chips * 5 * FLOAT / (RATES * machine.memory)
    once = gradient(machine, model)
    selection = projection(machine, model)
    return Cost(once + update, selection, 2 * once + update + selection)


def main() -> None:
    """Prints the table."""
    print(
        "| machine | model | tokens a step | SGD, s | projection, s | share | CrAM+ |"
    )
    print("| --- " * 7 + "|")
    for machine in (H100, HOSTS, TPU):
        for model in MODELS:
            if model.parameters * 16 / machine.chips > 80e9:
                continue  # weights, gradients and two moments do not fit
            sgd, selection, plus = cost(machine, model)
            cells = [
                machine.name,
                model.name,
                f"{model.tokens:,.0f}",
                f"{sgd:.3f}",
                f"{selection:.4f}",
                f"{selection / plus:.2%}",
                f"{plus / sgd:.2f} x",
            ]
            print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
