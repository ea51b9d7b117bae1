"""One VAE decode against diffusers' AutoencoderKLWan with the same weights.

python -m benchmarks.vae_decode
"""

import argparse
import functools

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks import common
from longlive_jax.config import WAN_VAE, VAEConfig
from longlive_jax.convert import keys_vae
from longlive_jax.models.vae import WanVAE, init_params


def build_diffusers(config: VAEConfig, params: dict) -> torch.nn.Module:
    """diffusers' model holding the same weights, through the key table."""
    model = AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    ).eval()
    state = {}
    for name, rule, _ in keys_vae.diffusers_table(config).sources():
        leaf = np.asarray(functools.reduce(lambda tree, key: tree[key], rule.target.split("/"), params))
        state[name] = torch.tensor(np.ascontiguousarray(rule.to_source(leaf)))
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int, default=3, help="latent frames")
    parser.add_argument("--height", type=int, default=20, help="latent rows")
    parser.add_argument("--width", type=int, default=30, help="latent columns")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()

    vae = WanVAE(WAN_VAE)
    params = init_params(vae, jax.random.key(0))
    theirs = build_diffusers(WAN_VAE, params)
    shape = (1, arguments.frames, arguments.height, arguments.width, WAN_VAE.z_dim)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    decode = jax.jit(lambda params, x: vae.apply({"params": params}, x, method="decode"))
    # diffusers takes latents before normalisation.
    raw = latents * np.asarray(WAN_VAE.latent_std, np.float32) + np.asarray(WAN_VAE.latent_mean, np.float32)
    torch_latents = torch.tensor(raw.transpose(0, 4, 1, 2, 3).copy())

    def run_ours() -> np.ndarray:
        return np.asarray(decode(params, latents))

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs.decode(torch_latents).sample.numpy()

    error = np.abs(run_ours() - run_theirs().transpose(0, 2, 3, 4, 1)).max()
    result = {
        "what": "decode of one video with the full-size Wan VAE, float32, same weights",
        "latents": shape,
        "pixels": [1, WAN_VAE.video_frames(shape[1]), 8 * shape[2], 8 * shape[3], 3],
        "torch_threads": torch.get_num_threads(),
        "max_difference": float(error),
        "timing": common.side_by_side(run_ours, run_theirs, repeats=arguments.repeats),
    }
    if arguments.no_save:
        print(result)
    else:
        common.save("vae_decode", result)


if __name__ == "__main__":
    main()
