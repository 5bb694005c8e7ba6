"""The scan of jax-linear-attention, timed in a process of its own: benchmarks/gpu.py runs it with
--jax-python.

It needs Python 3.12 with `pip install 'jax[cuda13]' jax-linear-attention==0.1.0` and nothing of
this project. Prints one JSON line per batch size with the medians in seconds; compiling is left
out. Inputs rotate past the L2 cache. Before that a short problem must give what the formula gives,
one token at a time in fp32; else it fails and times nothing.
"""

import argparse
import json
import statistics
import time

TOLERANCE = 2e-2  # of bf16 results and gradients, relative in norm


def main() -> None:
    """Measure and print."""
    import jax
    import jax.numpy as jnp
    from jla import ops

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("length", "channels", "states", "copies", "runs", "calls", "checked"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    a = parser.parse_args()

    def scan(u, dt, A, B, C, D, z, bias):
        y, _ = ops.linear_attention(
            "mamba1",
            C,
            B,
            u,
            dt=dt,
            a=A,
            d=D,
            z=z,
            dt_bias=bias,
            dt_softplus=True,
            impl="mosaic_gpu",
        )
        return y

    def both(u, *rest):
        y, pull = jax.vjp(scan, u, *rest)
        # any gradient will do that is not constant: the input itself has the output's shape
        return pull(u)

    def formula(u, dt, A, B, C, D, z, bias):
        u, dt, B, C, z = (x.astype(jnp.float32) for x in (u, dt, B, C, z))
        dt = jax.nn.softplus(dt + bias)

        def step(h, now):
            u, dt, B, C = now
            h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None, :]
            return h, (h * C[:, None, :]).sum(-1) + D * u

        rows = [jnp.moveaxis(x, 1, 0) for x in (u, dt, B, C)]
        _, y = jax.lax.scan(step, jnp.zeros((u.shape[0], u.shape[2], A.shape[1])), rows)
        return jnp.moveaxis(y, 0, 1) * jax.nn.silu(z)

    def inputs(batch, length, seed):
        shape, small = (batch, length, a.channels), (batch, length, a.states)
        keys = jax.random.split(jax.random.key(seed), 5)
        u, z = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        B, C = (jax.random.normal(key, small, jnp.bfloat16) for key in keys[2:4])
        dt = jax.random.uniform(keys[4], shape, jnp.float32, -6.9, -2.3).astype(jnp.bfloat16)
        A = -jnp.tile(jnp.arange(1.0, a.states + 1), (a.channels, 1))
        return u, dt, A, B, C, jnp.ones(a.channels), z, jnp.zeros(a.channels)

    short = inputs(1, min(a.length, a.checked), 0)
    expected, pull = jax.vjp(formula, *short)
    pairs = [
        (scan(*short), expected),
        *zip(both(*short), pull(short[0].astype(jnp.float32)), strict=True),
    ]
    for index, pair in enumerate(pairs):
        ours, theirs = (x.astype(jnp.float32) for x in pair)
        error = float(jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel()))
        if not error <= TOLERANCE:
            raise SystemExit(
                f"wrong: result {index} is off by {error:.1e}, more than {TOLERANCE:.0e}"
            )

    for batch in a.batches:
        held = [inputs(batch, a.length, seed) for seed in range(a.copies)]
        row = {"batch": batch, "runs": a.runs}
        for name, call in (("forward", jax.jit(scan)), ("both", jax.jit(both))):
            jax.block_until_ready(call(*held[0]))
            seconds = []
            # several calls between waits, so that the host's part does not count
            for _ in range(a.runs):
                begun = time.perf_counter()
                out = [call(*held[turn % len(held)]) for turn in range(a.calls)][-1]
                jax.block_until_ready(out)
                seconds.append((time.perf_counter() - begun) / a.calls)
            row[name] = statistics.median(seconds)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
