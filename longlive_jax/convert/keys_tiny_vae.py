"""Key table of the tiny autoencoder: the layout of `taew2_1.pth` and `taew2_1.safetensors` (TAEHV).

Both halves are flat sequences, numbered with everything in them that has no tensors: an activation, a clamp
or an upsampler counts.
"""

from longlive_jax.config import VAEConfig
from longlive_jax.convert.table import Rule, Table, Transform


def table(config: VAEConfig) -> Table:
    """The layout of the released files (a flat state dict)."""
    return Table((*_encoder(config), *_decoder(config)))


def _encoder(config: VAEConfig) -> list[Rule]:
    rules = _conv("encoder.0", "encoder/conv_in")
    index = 2  # after the convolution and its activation
    for level in range(len(config.temporal_downsample)):
        target = f"encoder/down_{level}"
        rules += [
            _pointwise(f"encoder.{index}.conv", f"{target}_pool"),
            _kernel(f"encoder.{index + 1}", f"{target}_conv"),
        ]
        index += 2
        rules += _memory_blocks(config, "encoder", index, target)
        index += config.num_res_blocks
    return rules + _conv(f"encoder.{index}", "encoder/conv_out")


def _decoder(config: VAEConfig) -> list[Rule]:
    rules = _conv("decoder.1", "decoder/conv_in")
    index = 3  # after the clamp, the convolution and its activation
    for level in range(len(config.temporal_downsample)):
        target = f"decoder/up_{level}"
        rules += _memory_blocks(config, "decoder", index, target)
        index += config.num_res_blocks + 1  # and the upsampler
        rules += [
            _pointwise(f"decoder.{index}.conv", f"{target}_grow/time"),
            _kernel(f"decoder.{index + 1}", f"{target}_grow/conv"),
        ]
        index += 2
    return rules + _conv(f"decoder.{index + 1}", "decoder/conv_out")  # after an activation


def _memory_blocks(config: VAEConfig, side: str, index: int, target: str) -> list[Rule]:
    return [
        rule
        for block in range(config.num_res_blocks)
        for conv in range(3)
        for rule in _conv(f"{side}.{index + block}.conv.{2 * conv}", f"{target}_memory_{block}/conv_{conv}")
    ]


def _conv(source: str, target: str) -> list[Rule]:
    return [_kernel(source, target), Rule(f"{source}.bias", f"{target}/bias")]


def _kernel(source: str, target: str) -> Rule:
    return Rule(f"{source}.weight", f"{target}/kernel", Transform.CONV2D)


def _pointwise(source: str, target: str) -> Rule:
    return Rule(f"{source}.weight", f"{target}/kernel", Transform.POINTWISE, ones=2)
