"""One transformer forward against diffusers' WanTransformer3DModel on the same tokens and weights.

python -m benchmarks.transformer_forward
"""

import argparse

import jax
import numpy as np
import torch

from benchmarks import common, peers
from longlive_jax.config import TransformerConfig
from longlive_jax.models.transformer import Transformer, init_params

CONFIG = TransformerConfig(
    dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512, text_len=64
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--height", type=int, default=40, help="latent rows")
    parser.add_argument("--width", type=int, default=60, help="latent columns")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()

    model = Transformer(CONFIG)
    params = init_params(model, jax.random.key(0))
    shape = (1, arguments.frames, arguments.height, arguments.width, CONFIG.latent_channels)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    text = np.random.default_rng(1).standard_normal((1, CONFIG.text_len, CONFIG.text_dim), np.float32)
    run_ours = peers.our_pass(model, params, latents, text)
    run_theirs = peers.their_pass(peers.build_diffusers(CONFIG, params), latents, text)

    error = np.abs(np.asarray(run_ours()) - peers.channels_last(run_theirs())).max()
    result = {
        "what": "one bidirectional forward, text keys and values included, float32, same weights",
        "tokens": arguments.frames * CONFIG.frame_len(arguments.height, arguments.width),
        "model": {"dim": CONFIG.dim, "layers": CONFIG.num_layers, "ffn": CONFIG.ffn_dim},
        "torch_threads": torch.get_num_threads(),
        "max_difference": float(error),
        "timing": common.side_by_side(run_ours, run_theirs, repeats=arguments.repeats),
    }
    if arguments.no_save:
        print(result)
    else:
        common.save("transformer_forward", result)


if __name__ == "__main__":
    main()
