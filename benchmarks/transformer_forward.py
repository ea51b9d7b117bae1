"""One transformer forward against diffusers' WanTransformer3DModel on the same tokens and weights.

python -m benchmarks.transformer_forward
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel

from benchmarks import common
from longlive_jax.config import TransformerConfig
from longlive_jax.convert import keys_transformer
from longlive_jax.models.transformer import Transformer, init_params

CONFIG = TransformerConfig(
    dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512, text_len=64
)  # fmt: skip


def build_diffusers(config: TransformerConfig, params: dict) -> torch.nn.Module:
    """diffusers' model holding the same weights, through the key table."""
    model = WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    state = {}
    for name, rule, layer in keys_transformer.diffusers_table(config).sources():
        leaf = params
        for key in rule.target.split("/"):
            leaf = leaf[key]
        leaf = np.asarray(leaf if layer is None else leaf[layer])
        state[name] = torch.tensor(np.ascontiguousarray(rule.to_source(leaf)))
    model.load_state_dict(state)
    return model


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
    theirs = build_diffusers(CONFIG, params)
    shape = (1, arguments.frames, arguments.height, arguments.width, CONFIG.latent_channels)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    text = np.random.default_rng(1).standard_normal((1, CONFIG.text_len, CONFIG.text_dim), np.float32)
    timestep = 500.0

    @jax.jit
    def forward(params: dict, latents: jax.Array, text: jax.Array) -> jax.Array:
        context = model.apply({"params": params}, text, method="text_context")
        return model.apply({"params": params}, latents, jnp.full((1, 1), timestep), context)[0]

    torch_latents = torch.tensor(latents.transpose(0, 4, 1, 2, 3).copy())
    torch_text = torch.tensor(text)

    def run_ours() -> np.ndarray:
        return np.asarray(forward(params, latents, text))

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs(torch_latents, torch.tensor([timestep]), torch_text).sample.numpy()

    error = np.abs(run_ours() - run_theirs().transpose(0, 2, 3, 4, 1)).max()
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
