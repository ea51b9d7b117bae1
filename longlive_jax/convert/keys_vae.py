"""Key tables of the video VAE: the original Wan2.1 file and the Diffusers layout.

Both name the same tensors in the same shapes; a `_Layout` holds what differs, and one walk over the levels
of the config writes either table.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from longlive_jax.config import VAEConfig
from longlive_jax.convert.table import Rule, Table, Transform
from longlive_jax.models.vae import Level, decoder_levels, encoder_levels


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where one PyTorch implementation keeps its tensors.

    Attributes:
      conv_in, norm_out, conv_out: the ends of the encoder and of the decoder.
      mid_blocks: the two residual blocks in the middle.
      mid_attention: the attention between them.
      block: our names within a residual block to theirs.
      down: blocks and resamplers of the encoder; `{flat}` counts both together through all levels.
      up_block: residual block `{i}` of decoder level `{level}`, or `{flat}` as above.
      upsampler: the resampler of decoder level `{level}`, or `{flat}` as above.
      quant, post_quant: the linear maps on either side of the latents.
    """

    conv_in: str
    norm_out: str
    conv_out: str
    mid_blocks: tuple[str, str]
    mid_attention: str
    block: Mapping[str, str]
    down: str
    up_block: str
    upsampler: str
    quant: str
    post_quant: str


_ORIGINAL = _Layout(
    conv_in="conv1",
    norm_out="head.0",
    conv_out="head.2",
    mid_blocks=("middle.0", "middle.2"),
    mid_attention="middle.1",
    block={
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "shortcut": "shortcut",
    },
    down="downsamples.{flat}",
    up_block="upsamples.{flat}",
    upsampler="upsamples.{flat}",
    quant="conv1",
    post_quant="conv2",
)

_DIFFUSERS = _Layout(
    conv_in="conv_in",
    norm_out="norm_out",
    conv_out="conv_out",
    mid_blocks=("mid_block.resnets.0", "mid_block.resnets.1"),
    mid_attention="mid_block.attentions.0",
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "conv_shortcut",
    },
    down="down_blocks.{flat}",
    up_block="up_blocks.{level}.resnets.{i}",
    upsampler="up_blocks.{level}.upsamplers.0",
    quant="quant_conv",
    post_quant="post_quant_conv",
)


def table(config: VAEConfig) -> Table:
    """The layout of `Wan2.1_VAE.pth` (a flat state dict)."""
    return _table(config, _ORIGINAL)


def diffusers_table(config: VAEConfig) -> Table:
    """The layout of Diffusers' `AutoencoderKLWan`."""
    return _table(config, _DIFFUSERS)


def _table(config: VAEConfig, layout: _Layout) -> Table:
    return Table(
        (
            *_coder("encoder", encoder_levels(config), layout),
            *_conv(layout.quant, "quant", Transform.POINTWISE, ones=3),
            *_conv(layout.post_quant, "post_quant", Transform.POINTWISE, ones=3),
            *_coder("decoder", decoder_levels(config), layout),
        )
    )


def _coder(side: Literal["encoder", "decoder"], levels: tuple[Level, ...], layout: _Layout) -> list[Rule]:
    rules = _conv(f"{side}.{layout.conv_in}", f"{side}/conv_in", Transform.CONV3D)
    for block, source in enumerate(layout.mid_blocks):
        rules += _block(f"{side}.{source}", f"{side}/mid/res_{block}", layout)
    rules += _attention(f"{side}.{layout.mid_attention}", f"{side}/mid/attention")
    flat = 0
    for index, level in enumerate(levels):
        target = f"{side}/{'down' if side == 'encoder' else 'up'}_{index}"
        for i, (in_features, features) in enumerate(level.widths()):
            name = layout.down if side == "encoder" else layout.up_block
            source = f"{side}.{name.format(flat=flat, level=index, i=i)}"
            rules += _block(source, f"{target}/res_{i}", layout, has_shortcut=in_features != features)
            flat += 1
        if level.resamples:
            name = layout.down if side == "encoder" else layout.upsampler
            source = f"{side}.{name.format(flat=flat, level=index)}"
            rules += _conv(f"{source}.resample.1", f"{target}/resample/conv", Transform.CONV2D)
            if level.temporal:
                rules += _conv(f"{source}.time_conv", f"{target}/resample/time_conv", Transform.CONV3D)
            flat += 1
    rules.append(_norm(f"{side}.{layout.norm_out}", f"{side}/norm_out", ones=3))
    return rules + _conv(f"{side}.{layout.conv_out}", f"{side}/conv_out", Transform.CONV3D)


def _block(source: str, target: str, layout: _Layout, *, has_shortcut: bool = False) -> list[Rule]:
    rules = []
    for index in (1, 2):
        norm, conv = f"norm{index}", f"conv{index}"
        rules.append(_norm(f"{source}.{layout.block[norm]}", f"{target}/{norm}", ones=3))
        rules += _conv(f"{source}.{layout.block[conv]}", f"{target}/{conv}", Transform.CONV3D)
    if has_shortcut:
        shortcut = f"{source}.{layout.block['shortcut']}"
        rules += _conv(shortcut, f"{target}/shortcut", Transform.POINTWISE, ones=3)
    return rules


def _attention(source: str, target: str) -> list[Rule]:
    # The attention works on single images: its gain and its 1x1 convolutions have one axis less.
    return [
        _norm(f"{source}.norm", f"{target}/norm", ones=2),
        *_conv(f"{source}.to_qkv", f"{target}/qkv", Transform.POINTWISE, ones=2),
        *_conv(f"{source}.proj", f"{target}/proj", Transform.POINTWISE, ones=2),
    ]


def _norm(source: str, target: str, *, ones: int) -> Rule:
    return Rule(f"{source}.gamma", f"{target}/scale", Transform.VECTOR, ones=ones)


def _conv(source: str, target: str, transform: Transform, *, ones: int = 0) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/kernel", transform, ones=ones),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]
