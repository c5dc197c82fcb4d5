"""Hold a kernel of your own against Gemma 3's attention, and see the bench catch three bugs.

    python examples/check_my_kernel.py

The kernel here is `jax.nn.dot_product_attention` with a mask; put yours in its place. Arguments are
those of `gemma_cot.model.kernels.reference.prefill_attention`, the last one (window) static. About
10 seconds on 2 CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gemma_cot.testing import check_kernel, report


def my_attention(q_BTNH, k_BSKH, v_BSKH, start_B, window, *, off_by=0, scale=1.0, padding=True):
    """Attend with JAX's own function; the keywords plant bugs."""
    T = q_BTNH.shape[1]
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < (window or T) + off_by)
    real_BS = jnp.arange(T)[None, :] >= (start_B if padding else jnp.zeros_like(start_B))[:, None]
    mask_B1TS = near_TS[None, None] & real_BS[:, None, None, :]
    # A query of padding sees itself, so that its softmax is finite; its mix is not compared.
    mask_B1TS |= jnp.eye(T, dtype=bool)[None, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, scale=scale)


def main() -> None:
    """Print four tables: the kernel as it is, then with each bug."""
    variants = {
        "as it is": {},
        "window off by one": {"off_by": 1},
        "the query scaled a second time": {"scale": 0.25},
        "padding attended to": {"padding": False},
    }
    for name, bug in variants.items():
        kernel = partial(my_attention, **bug)
        outcomes = check_kernel("prefill_attention", kernel, gradients=not bug)
        print(f"\n== {name}\n{report(outcomes)}")


if __name__ == "__main__":
    main()
