"""The engine: a compiled network that is called like a function."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cram_jax.engine import tuning
from cram_jax.engine.arguments import Arguments
from cram_jax.engine.calibration import Calibration, as_calibration, find_ranges
from cram_jax.engine.executor import Program
from cram_jax.engine.fusion import fuse
from cram_jax.engine.graph import Graph, check_graph
from cram_jax.engine.kernels import SparseProduct
from cram_jax.engine.model import (
    Model,
    PackedProduct,
    choose_forms,
    pack,
    share_ranges,
    with_integer_attention,
)
from cram_jax.engine.plan import Tiles
from cram_jax.engine.profiling import NodeProfile, Profile, timed
from cram_jax.engine.session import Session
from cram_jax.engine.targets import Target, choose_target
from cram_jax.validation import check_choice, check_integer

_PLANS = 8  # batch sizes and lengths whose buffers are kept


def compile(
    graph: Graph,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    threads: int = 1,
    target: str | Target | None = None,
    attention: Literal["int8", "float32"] = "int8",
) -> "Engine":
    """Compiles a network whose zeros it then skips.

    Zero weights cost nothing: in float32, if no other output in the group of 1, 2 or 4
    needs the same input; in INT8, if four neighbouring inputs are zero together. Blocks
    of 4 inputs x 2 outputs are the fastest.

    Args:
      graph: the network; see `GraphBuilder`.
      calibration: examples that make it INT8: a `Calibration`, or batches for a
        "minmax" one. None: float32.
      threads: how many work on a call.
      target: the instruction set, a name in `TARGETS` or a `Target`; by default the
        best that this processor has.
      attention: with a calibration, whether the products of attention are INT8 too;
        its softmax is float32 in either case. Heads without a multiple of four
        features stay float32.

    Returns:
      The engine: called with NumPy arrays, it returns NumPy arrays.

    Raises:
      ValueError: the instruction set is missing, an argument is out of range, or the
        calibration is empty or gives numbers that are not finite.
      TypeError: ``graph`` is not a `Graph`, ``calibration`` is a single array, or
        ``threads`` is not an integer.
      ImportError: llvmlite is not installed.

    Example:
      >>> import numpy as np
      >>> from cram_jax import engine
      >>> network = engine.GraphBuilder()
      >>> x = network.add(engine.Input((3,)))
      >>> x = network.add(engine.Linear(np.eye(3)), x)
      >>> run = engine.compile(network.build(network.add(engine.Relu(), x)))
      >>> run(np.array([[1.0, -2.0, 3.0]], np.float32))
      array([[1., 0., 3.]], dtype=float32)
    """
    check_graph(graph)
    check_choice("attention", attention, ("int8", "float32"))
    chosen = choose_target(target)
    examples = as_calibration(calibration)
    fused = fuse(graph)
    model = pack(fused, chosen)
    if examples is None:
        return Engine(model, chosen, threads)
    observed = Engine(model, chosen, threads)
    packed = model.graph
    if attention == "int8":
        fused, packed = map(with_integer_attention, (fused, packed))
    forms = choose_forms(packed, int8=True)
    names = [name for name, form in forms.items() if "u8" in form]

    def observe(batch: Any) -> dict[str, np.ndarray]:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        return observed.tensors(*inputs, names=names)

    ranges = share_ranges(packed, forms, find_ranges(examples, observe))
    return Engine(pack(fused, chosen, ranges), chosen, threads)


class Engine:
    """A compiled network; made by `compile` or `load`.

    Calls from several threads are safe and run one after the other. After a fork, the
    engine works in the child, too.

    Attributes:
      model: what it runs.
      target: the instruction set.
      threads: how many work on a call.
    """

    def __init__(self, model: Model, target: Target, threads: int = 1):
        check_integer("threads", threads, minimum=1, maximum=256)
        self.model, self.target, self.threads = model, target, threads
        self._plans: OrderedDict[tuple[int, int], Session] = OrderedDict()
        self._tiles = tuning.TileTable()
        self._lock = threading.Lock()
        self._arguments = Arguments(model)
        _engines.add(self)

    @property
    def int8(self) -> bool:
        """Whether products multiply integers."""
        return self.model.int8

    def __call__(self, *inputs: Any) -> Any:
        """Runs the network.

        Args:
          *inputs: arrays with a leading batch axis, in the order in which the graph's
            inputs were added. Images are (batch, height, width, channels).

        Returns:
          A float32 array, or a tuple of them if the graph has several outputs.

        Raises:
          ValueError: a shape does not fit, or an id is not in its table.
          TypeError: the dtype does not fit.
        """
        arrays, batch, length = self._arguments.check(inputs)
        if batch == 0:
            results = [np.zeros((0, *s), np.float32) for s in self._shapes(length)]
        else:
            with self._lock:
                plan = self._plan(batch, length)
                plan.load(arrays)
                plan.program.run()
                results = plan.results()
        return results[0] if len(results) == 1 else tuple(results)

    def tensors(
        self, *inputs: Any, names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Runs the network and returns the results of nodes, for calibration and tests.

        Args:
          *inputs: as for a call.
          names: the nodes; by default all, except those fused into a later one.

        Returns:
          float32 arrays, by name; bytes are converted to the numbers they stand for.

        Raises:
          ValueError: as for a call; or the batch is empty.
          TypeError: as for a call.
          KeyError: there is no node of this name, or it is fused into a later one.

        Example:
          >>> from cram_jax import engine
          >>> network = engine.GraphBuilder()
          >>> hidden = network.add(engine.Relu(), network.add(engine.Input((2,))))
          >>> outputs = network.add(engine.Softmax(), hidden)
          >>> run = engine.compile(network.build(outputs))
          >>> run.tensors([[1.0, -2.0]], names=[hidden])
          {'relu1': array([[1., 0.]], dtype=float32)}
        """
        arrays, batch, length = self._arguments.some(inputs)
        plan = self._session(batch, length, self._tile, keep=True)
        plan.load(arrays)
        plan.program.run()
        every = [n.name for n in self.model.graph.nodes] if names is None else names
        return {name: plan.read(name) for name in every}

    def as_jax(self) -> Callable[..., Any]:
        """The engine as a function of JAX arrays, for use inside ``jit``.

        It is a single host call, without a gradient.

        Returns:
          ``(*inputs) -> outputs``, as for a call.

        Raises:
          ValueError: when it is called or traced, if a shape does not fit.
          TypeError: when it is called or traced, if a dtype does not fit.

        Example:
          >>> from cram_jax import engine
          >>> network = engine.GraphBuilder()
          >>> outputs = network.add(engine.Relu(), network.add(engine.Input((2,))))
          >>> run = engine.compile(network.build(outputs)).as_jax()
          >>> jax.jit(lambda x: 10 * run(x))(jnp.array([[1.0, -2.0]]))
          Array([[10.,  0.]], dtype=float32)
        """
        import jax

        def call(*inputs: Any) -> Any:
            # Shapes are known while tracing, values are not.
            batch, length = self._arguments.of_shapes(
                [(x.shape, x.dtype) for x in inputs]
            )
            results = [
                jax.ShapeDtypeStruct((batch, *shape), np.float32)
                for shape in self._shapes(length)
            ]
            shapes = results[0] if len(results) == 1 else tuple(results)
            return jax.pure_callback(
                lambda *arrays: self(*map(np.asarray, arrays)),
                shapes,
                *inputs,
                vmap_method="sequential",
            )

        return call

    def profile(self, *inputs: Any, repeats: int = 5) -> Profile:
        """Times every node on its own, on one thread.

        Args:
          *inputs: as for a call.
          repeats: how often each node runs; the least time counts.

        Returns:
          The costs by node; print it.

        Raises:
          ValueError: ``repeats`` is below 1, or as for `tensors`.
          TypeError: ``repeats`` is not an integer, or as for a call.

        Example:
          >>> import numpy as np
          >>> from cram_jax import engine
          >>> network = engine.GraphBuilder()
          >>> x = network.add(engine.Input((4,)))
          >>> x = network.add(engine.Linear(np.ones((4, 8))), x)
          >>> costs = engine.compile(network.build(x)).profile(np.ones((16, 4)))
          >>> [(node.name, node.multiply_adds) for node in costs]
          [('input0', 0), ('linear1', 512)]
        """
        check_integer("repeats", repeats, minimum=1)
        arrays, batch, length = self._arguments.some(inputs)
        plan = self._session(batch, length, self._tile, keep=True)
        plan.load(arrays)
        plan.program.run()
        entries = []
        for name, steps in plan.by_node().items():
            program = Program(steps, self.target, 1)
            seconds = min(timed(program) for _ in range(repeats))
            entries.append(
                NodeProfile(
                    name,
                    type(self.model.graph[name].operation).__name__,
                    seconds,
                    sum(step.multiply_adds for step in steps),
                    sum(step.nbytes for step in steps),
                )
            )
        return Profile(entries)

    def tune(self, *inputs: Any, repeats: int = 5) -> None:
        """Measures tiles for this batch size and length, and stores the best.

        They are stored in the user's cache for this processor; if it cannot be written,
        they serve this engine only.

        Args:
          *inputs: as for a call.
          repeats: how often each candidate runs; the least time counts.

        Raises:
          ValueError: ``repeats`` is below 1, or as for `tensors`.
          TypeError: ``repeats`` is not an integer, or as for a call.

        Example:
          Once on a machine, with inputs of the shape that will be used:

          >>> import numpy as np
          >>> from cram_jax import engine
          >>> run = engine.load("network.safetensors")  # doctest: +SKIP
          >>> run.tune(np.ones((1, 32, 32, 3), np.float32))  # doctest: +SKIP
        """
        check_integer("repeats", repeats, minimum=1)
        arrays, batch, length = self._arguments.some(inputs)
        times: dict[str, dict[int, float]] = {}
        for rank in range(tuning.CANDIDATES):
            plan = self._session(batch, length, _ranked(self.target, rank), keep=True)
            plan.load(arrays)
            plan.program.run()
            for name, steps in plan.by_node().items():
                product = self.model.graph[name].operation
                if not isinstance(product, PackedProduct):
                    continue
                steps = [s for s in steps if isinstance(s.spec, SparseProduct)]
                spec = steps[0].spec
                assert isinstance(spec, SparseProduct)
                vectors = steps[0].writes[0].grid.vectors
                key = tuning.tile_key(product, spec, self.target, vectors)
                program = Program(steps, self.target, 1)
                program.run()
                seconds = min(timed(program) for _ in range(repeats))
                tile = _ranked(self.target, rank)(name, spec, vectors)
                times.setdefault(key, {})[tile] = seconds
        best = {key: min(tried, key=lambda t: tried[t]) for key, tried in times.items()}
        with self._lock:
            self._tiles.update(best)
            self._plans.clear()

    def save(self, path: str | os.PathLike[str], *, bits: int = 8) -> None:
        """Writes the engine to a safetensors file, which `load` reads.

        Args:
          path: of the file.
          bits: 8, or 4: integers of half a byte, of which there are 15 (INT8 only; the
            weights are rounded once more).

        Raises:
          ValueError: ``bits`` is neither 4 nor 8, or 4 for a float32 engine.
          OSError: the file cannot be written.

        Example:
          >>> import os, tempfile
          >>> from cram_jax import engine
          >>> network = engine.GraphBuilder()
          >>> outputs = network.add(engine.Relu(), network.add(engine.Input((2,))))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     engine.compile(network.build(outputs)).save(f"{folder}/a.safetensors")
          ...     os.listdir(folder)
          ['a.safetensors']
        """
        from cram_jax.engine.files import save_model

        save_model(self.model, Path(path), bits)

    # ------------------------------------------------------------------------- private
    def _tile(self, name: str, spec: SparseProduct, vectors: int) -> int:
        product = self.model.graph[name].operation
        assert isinstance(product, PackedProduct)
        key = tuning.tile_key(product, spec, self.target, vectors)
        return self._tiles.get(key) or tuning.guess_tile(spec, self.target)

    def _session(self, batch: int, length: int, tiles: Tiles, *, keep: bool) -> Session:
        return Session(
            self.model, self.target, batch, length, self.threads, tiles, keep=keep
        )

    def _plan(self, batch: int, length: int) -> Session:
        key = batch, length
        if key not in self._plans:
            self._plans[key] = self._session(batch, length, self._tile, keep=False)
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _shapes(self, length: int) -> list[tuple[int, ...]]:
        graph = self.model.graph
        return [
            tuple(length if size is None else size for size in graph.types[name].shape)
            for name in graph.outputs
        ]


def _ranked(target: Target, rank: int) -> Tiles:
    """The candidate tile of this rank, the smallest first."""

    def tile(name: str, spec: SparseProduct, vectors: int) -> int:
        del name, vectors
        choices = tuning.candidates(spec, target)
        return choices[min(rank, len(choices) - 1)]

    return tile


_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _after_fork() -> None:
    """Another thread may have held a lock; a run that it began starts over."""
    for engine in list(_engines):
        engine._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
