"""Time jax-linear-attention's scan; `benchmarks/gpu.py --jax-python` runs this file.

Needs Python 3.12 with `pip install 'jax[cuda13]' jax-linear-attention==0.1.0` and nothing of this
project. Prints one JSON line per batch size with median seconds, without compilation. Inputs rotate
to miss the L2 cache. First checks a short problem against the recurrence in fp32, and exits if the
result is wrong.
"""

import argparse
import json
import statistics
import time

TOLERANCE = 2e-2  # relative error in norm of bf16 results and gradients


def main() -> None:
    """Check, measure and print."""
    import jax
    import jax.numpy as jnp
    from jla import ops

    args = parse_arguments()

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

    def forward_backward(u, *rest):
        y, vjp = jax.vjp(scan, u, *rest)
        # u serves as the output gradient: it has the right shape and is not constant
        return vjp(u)

    def recurrence(u, dt, A, B, C, D, z, bias):
        u, dt, B, C, z = (x.astype(jnp.float32) for x in (u, dt, B, C, z))
        dt = jax.nn.softplus(dt + bias)

        def step(h, inputs):
            u, dt, B, C = inputs
            h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None, :]
            return h, (h * C[:, None, :]).sum(-1) + D * u

        rows = [jnp.moveaxis(x, 1, 0) for x in (u, dt, B, C)]
        _, y = jax.lax.scan(step, jnp.zeros((u.shape[0], u.shape[2], A.shape[1])), rows)
        return jnp.moveaxis(y, 0, 1) * jax.nn.silu(z)

    def make_inputs(batch, length, seed):
        shape = (batch, length, args.channels)
        state_shape = (batch, length, args.states)
        keys = jax.random.split(jax.random.key(seed), 5)
        u, z = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        B, C = (jax.random.normal(key, state_shape, jnp.bfloat16) for key in keys[2:4])
        dt = jax.random.uniform(keys[4], shape, jnp.float32, -6.9, -2.3).astype(jnp.bfloat16)
        A = -jnp.tile(jnp.arange(1.0, args.states + 1), (args.channels, 1))
        return u, dt, A, B, C, jnp.ones(args.channels), z, jnp.zeros(args.channels)

    short = make_inputs(1, min(args.length, args.checked), 0)
    y, vjp = jax.vjp(recurrence, *short)
    expected = [y, *vjp(short[0].astype(jnp.float32))]
    results = [scan(*short), *forward_backward(*short)]
    for index, pair in enumerate(zip(results, expected, strict=True)):
        result, exact = (x.astype(jnp.float32) for x in pair)
        error = float(jnp.linalg.norm((result - exact).ravel()) / jnp.linalg.norm(exact.ravel()))
        if not error <= TOLERANCE:
            raise SystemExit(
                f"wrong: result {index} is off by {error:.1e}, more than {TOLERANCE:.0e}"
            )

    for batch in args.batches:
        copies = [make_inputs(batch, args.length, seed) for seed in range(args.copies)]
        row = {"batch": batch, "runs": args.runs}
        for name, call in (("forward", jax.jit(scan)), ("both", jax.jit(forward_backward))):
            row[name] = median_seconds(call, copies, args.runs, args.calls)
        print(json.dumps(row), flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("length", "channels", "states", "copies", "runs", "calls", "checked"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    return parser.parse_args()


def median_seconds(call, copies, runs, calls):
    """Median over runs of the mean seconds of consecutive calls, which hide the launch overhead."""
    import jax

    jax.block_until_ready(call(*copies[0]))  # compile
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        out = [call(*copies[i % len(copies)]) for i in range(calls)][-1]
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
