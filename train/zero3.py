"""Which weights DeepSpeed's stage 3 gathers in a micro-batch, from the config alone. Torch-free.

It gathers a module's weights where the module begins and lets go of them where it ends, unless their next use is near;
small ones stay whole. Modules begin in the model's order, and in the backward the other way round, where those that are
computed again begin once more. tests/train/test_traffic.py counts what real ranks gather.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

from model.config import Recompute
from train.config import RunConfig

# DeepSpeed's own settings for buckets of 1e8 elements, in proportion to the bucket so that small models are cut as well
PERSISTENT_PARTS = 1000  # up to this part of a bucket a parameter stays whole on every rank
REUSE_BUCKETS = 10  # of elements of modules that begin before a weight's next use, from which on it is not near


def persistent(config: RunConfig, elements: int) -> bool:
    """Whether a parameter of so many elements stays whole on every rank, and is gathered after an update alone."""
    return elements <= config.parallel.bucket_elements // PERSISTENT_PARTS


def gathered(config: RunConfig, elements: dict[str, int], replicas: int) -> int:
    """Elements gathered in a micro-batch, from a run's third on: in the first two DeepSpeed learns the order.

    `elements` are a tensor-parallel rank's of every parameter, by name; what is gathered is filled up to equal parts.
    """
    sizes: dict[str, int] = defaultdict(int)  # of modules
    costs: dict[str, int] = defaultdict(int)  # when gathered
    for name, count in elements.items():
        module = name.rpartition(".")[0].replace("lm_head", "")  # the model itself reads the head's weight, in its loss
        sizes[module] += count
        costs[module] += 0 if persistent(config, count) else -(-count // replicas) * replicas
    events = list(order(config.model.n_layer, config.parallel.recompute))
    passed, begins = [0], defaultdict(list)  # elements of the modules that began before; where a module begins
    for module, starts in events:
        if starts:
            begins[module].append(len(passed) - 1)
            passed.append(passed[-1] + sizes[module])
    near = REUSE_BUCKETS * config.parallel.bucket_elements
    whole: set[str] = set()
    total = at = 0
    for module, starts in events:
        if starts:
            at += 1
            total += 0 if module in whole else costs[module]
            whole.add(module)
            continue
        later = begins[module][bisect_left(begins[module], at) :]
        if not later or passed[later[0]] - passed[at] >= near:
            whole.discard(module)
    return total


def order(layers: int, recompute: Recompute) -> Iterator[tuple[str, bool]]:
    """Modules as they begin (True) and end through a forward and a backward, by name; the model's is empty."""
    yield "", True
    yield from through("embedding")
    for layer in range(layers):
        norm, mixer, (first, *between, last) = parts(layer)
        yield from through(norm)
        yield mixer, True
        yield from through(first, *between, last)
        yield mixer, False
    yield from through("final_norm")
    yield from (("", False), ("", True))
    yield from through("final_norm")
    for layer in reversed(range(layers)):
        norm, mixer, (first, *between, last) = parts(layer)
        yield from ((mixer, True), (last, True))
        if recompute is Recompute.full:  # it stops within the last, as soon as the backward has what it needs
            yield from through(norm)
            yield mixer, True
            yield from through(first, *between)
            yield last, True
        yield last, False
        if recompute is Recompute.selective:
            yield from through(*between)
        yield from through(*reversed(between), first)
        yield mixer, False
        yield from through(norm)
    yield from through("embedding")
    yield "", False


def parts(layer: int) -> tuple[str, str, list[str]]:
    """A layer's norm, its mixer, and the products within, in the forward's order."""
    mixer = f"layers.{layer}.mixer"
    return f"layers.{layer}.norm", mixer, [f"{mixer}.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]


def through(*modules: str) -> Iterator[tuple[str, bool]]:
    """One after another, each begins and ends."""
    for module in modules:
        yield module, True
        yield module, False
