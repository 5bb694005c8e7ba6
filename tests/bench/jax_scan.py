"""The scan of jax-linear-attention, timed in a process of its own: tests/bench/gpu.py runs it with --jax-python.

It needs Python 3.12 with `pip install 'jax[cuda13]' jax-linear-attention==0.1.0` and nothing of this project. Prints
one JSON line per batch size with the medians in seconds; compiling is left out. Inputs rotate past the L2 cache.
"""

import argparse
import json
import statistics
import time

CALLS = 8


def main() -> None:
    """Measure and print."""
    import jax
    import jax.numpy as jnp
    from jla import ops

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("length", "channels", "states", "copies", "runs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    a = parser.parse_args()

    def scan(u, dt, A, B, C, D, z, bias):
        y, _ = ops.linear_attention(
            "mamba1", C, B, u, dt=dt, a=A, d=D, z=z, dt_bias=bias, dt_softplus=True, impl="mosaic_gpu"
        )
        return y

    def both(u, *rest):
        y, pull = jax.vjp(scan, u, *rest)
        return pull(u)  # any gradient will do that is not constant: the input itself has the output's shape

    for batch in a.batches:
        shape, small = (batch, a.length, a.channels), (batch, a.length, a.states)
        held = []
        for seed in range(a.copies):
            keys = jax.random.split(jax.random.key(seed), 5)
            u, z = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
            B, C = (jax.random.normal(key, small, jnp.bfloat16) for key in keys[2:4])
            dt = jax.random.uniform(keys[4], shape, jnp.float32, -6.9, -2.3).astype(jnp.bfloat16)
            A = -jnp.tile(jnp.arange(1.0, a.states + 1), (a.channels, 1))
            held.append((u, dt, A, B, C, jnp.ones(a.channels), z, jnp.zeros(a.channels)))
        row = {"batch": batch, "runs": a.runs}
        for name, call in (("forward", jax.jit(scan)), ("both", jax.jit(both))):
            jax.block_until_ready(call(*held[0]))
            seconds = []
            for _ in range(a.runs):  # several calls between waits, so that the host's part does not count
                begun = time.perf_counter()
                out = [call(*held[turn % len(held)]) for turn in range(CALLS)][-1]
                jax.block_until_ready(out)
                seconds.append((time.perf_counter() - begun) / CALLS)
            row[name] = statistics.median(seconds)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
