"""The modules of diffusers that our configs mean, with random weights."""

from typing import Any

from longlive_jax.config import TransformerConfig, VAEConfig


def transformer(config: TransformerConfig) -> Any:
    """`WanTransformer3DModel` of a config, ready to be run."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
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


def vae(config: VAEConfig) -> Any:
    """`AutoencoderKLWan` of a config, ready to be run."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
