"""Whether remedies for outliers pay: smoothing, Hadamard rotation, centred keys; planted outliers.

    python -m benchmarks.quantize_remedies

Linear layers of wan_1_3b's shapes on 256 tokens, in the recipes int8 and fp8. Real activations are known to
hold a few channels that are many times larger than the others; here 1% of the input channels are larger by a
factor of 1 (none) to 100. Errors are relative, |found - exact| / |exact|.

  plain      a scale per token and per output channel: what `longlive_jax.quantize` does
  smoothing  input channels divided by s = max|x|^0.5 / max|w|^0.5 from 64 other tokens (SmoothQuant)
  rotation   input channels turned by Hadamard matrices of 128, the kernel by their transpose (QuaRot)

Keys: attention of 256 queries to 1024 keys with a mean per channel that is larger than the spread by a
factor of 0 to 10 in 1 channel of 16, kept in 8 bits with and without the frame's mean taken out.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from longlive_jax.ops.windowed_attention import CachedContext, windowed_attention
from longlive_jax.quantize import numerics

SHAPES = {"self_attn/q": (1536, 1536), "ffn/fc1": (1536, 8960), "ffn/fc2": (8960, 1536)}
OUTLIERS = (1, 10, 30, 100)
MEANS = (0, 3, 10)
TOKENS, CALIBRATION, ROTATED = 256, 64, 128


def rotate(x: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(numerics.rotate(jnp.asarray(x), axis=axis))


def smooth_scales(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """SmoothQuant's factors of the input channels, alpha 0.5."""
    return np.sqrt(np.abs(x).max(0) / np.abs(kernel).max(1)) + 1e-6


def linear_error(x: np.ndarray, kernel: np.ndarray, kind: Any, exact: np.ndarray) -> float:
    values, scale = numerics.quantize(jnp.asarray(kernel), kind, axis=-2)
    found = numerics.linear(jnp.asarray(x), values, scale, bias=None, quantizes_input=True, dtype=jnp.float32)
    return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))


def linears(kind: Any) -> list[dict[str, Any]]:
    """One row per shape and size of the outliers."""
    rows, random = [], np.random.default_rng(0)
    for name, (inputs, outputs) in SHAPES.items():
        kernel = random.standard_normal((inputs, outputs), np.float32) / inputs**0.5
        for factor in OUTLIERS:
            x = random.standard_normal((TOKENS + CALIBRATION, inputs), np.float32)
            if name == "ffn/fc2":  # what comes out of GELU
                x = np.array(jax.nn.gelu(x, approximate=True))
            x[:, random.choice(inputs, inputs // 100, replace=False)] *= factor
            smooth = smooth_scales(x[TOKENS:], kernel)
            x = x[:TOKENS]
            exact = x @ kernel
            rows.append(
                {
                    "layer": name,
                    "outliers": factor,
                    "plain": linear_error(x, kernel, kind, exact),
                    "smoothing": linear_error(x / smooth, kernel * smooth[:, None], kind, exact),
                    "rotation": linear_error(rotate(x, 1), rotate(kernel, 0), kind, exact),
                }
            )
    return rows


def keys(kind: Any) -> list[dict[str, Any]]:
    """One row per size of the keys' mean."""
    rows, random = [], np.random.default_rng(1)
    query, value, own = (
        jnp.asarray(random.standard_normal((1, n, 12, 128), np.float32)) for n in (256, 1024, 256)
    )
    for mean in MEANS:
        key = random.standard_normal((1, 4, 256, 12, 128), np.float32)
        key[..., ::16] += mean * random.standard_normal((12, 8))
        row: dict[str, Any] = {"mean": mean}
        length = jnp.asarray([1024])
        tokens = jnp.asarray(key.reshape(1, 1024, 12, 128))
        exact = windowed_attention(query, own, own, context=CachedContext(tokens, value, length))
        for name, centred in (("plain", False), ("centred", True)):
            small = numerics.quantize_tokens(jnp.asarray(key), kind, centred=centred)
            dense = small.dense(jnp.float32).reshape(tokens.shape)
            found = windowed_attention(query, own, own, context=CachedContext(dense, value, length))
            row[name] = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    result = {kind: {"linears": linears(kind), "keys": keys(kind)} for kind in ("int8", "fp8")}
    extra = {name: round(2 * ROTATED / (2 * outputs), 3) for name, (_, outputs) in SHAPES.items()}
    common.save(
        "quantize_remedies",
        {"what": __doc__.splitlines()[0], **result, "rotation_adds_this_share_of_the_product": extra},
    )


if __name__ == "__main__":
    main()
