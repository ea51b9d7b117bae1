"""Works out the config of a model from the shapes of its tensors and the config files beside them.

The config of a model that we exported comes along and is taken as it is, once the tensors agree.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from longlive_jax import config as configs
from longlive_jax import config_dict
from longlive_jax.config import PipelineConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.convert import keys_text_encoder, keys_transformer
from longlive_jax.convert.carried import Carried
from longlive_jax.convert.detect import Found
from longlive_jax.convert.table import Table
from longlive_jax.errors import UserError, require

PartConfig = TypeVar("PartConfig", TransformerConfig, TextEncoderConfig, VAEConfig)

# The release's head size; attention weights do not show where one head ends and the next begins.
_HEAD_DIM = 128

# Our setting -> its name in Wan's and in diffusers' config.json.
_TRANSFORMER_SETTINGS = {
    "dim": ("dim",),
    "ffn_dim": ("ffn_dim",),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers",),
    "freq_dim": ("freq_dim",),
    "text_dim": ("text_dim",),
    "text_len": ("text_len",),
    "latent_channels": ("in_dim", "in_channels"),
    "eps": ("eps",),
}
_TEXT_ENCODER_SETTINGS = {
    "max_distance": ("relative_attention_max_distance",),
    "pad_id": ("pad_token_id",),
    "eps": ("layer_norm_epsilon",),
}
_VAE_SETTINGS = {"latent_mean": ("latents_mean",), "latent_std": ("latents_std",)}

_LAYER = re.compile(r"^(?:encoder\.|base_model\.model\.)?blocks?\.(\d+)\.")
_VAE_LEVELS = {
    "wan": (re.compile(r"^encoder\.downsamples\.(\d+)\."), "encoder.downsamples.{}.residual.2.weight"),
    "diffusers": (re.compile(r"^encoder\.down_blocks\.(\d+)\."), "encoder.down_blocks.{}.conv1.weight"),
}


def pipeline_config(
    found: Mapping[str, Found],
    *,
    preset: str | None,
    overrides: Mapping[str, Any],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> PipelineConfig:
    """The config of the model whose parts were found.

    Args:
      found: the parts by name. What is not there takes the config that the others were exported with, else
        the preset's, or fits the rest.
      preset: name of the preset that decides what tensors do not show.
      overrides: dotted settings that win over everything else.
      settings: a transformer's config.json, for a model whose transformer is not there.

    Raises:
      UserError: a setting cannot be worked out, or the parts do not fit together.
    """
    named = configs.preset(preset or "wan_1_3b")
    carried = _carried(found)
    base = carried.config if carried else named
    known = base if preset or carried else None
    sections = {part: _section(overrides, part) for part in ("transformer", "text_encoder", "vae")}
    vae = base.vae
    if "vae" in found:
        vae = vae_config(found["vae"], preset=known.vae if known else None, overrides=sections["vae"])
    transformer = _transformer(found, known=known, overrides=sections["transformer"])
    text_encoder = base.text_encoder
    if "text_encoder" in found:
        text_len = transformer.text_len if transformer else settings.get("text_len", text_encoder.text_len)
        text_encoder = text_encoder_config(
            found["text_encoder"],
            text_len=text_len,
            preset=known.text_encoder if known else None,
            overrides=sections["text_encoder"],
        )
    if transformer is None:
        transformer = _fitting_transformer(found, base.transformer, text_encoder, vae)
        transformer = config_dict.override(transformer, sections["transformer"])
    if "text_encoder" not in found:
        text_encoder = _fitting_text_encoder(text_encoder, transformer)
    try:
        result = dataclasses.replace(
            base,
            name=base.name if carried else preset or _name(transformer),
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
        )
    except UserError as error:
        raise UserError(
            f"the parts do not fit together: {error}; convert them one by one (parts=...)"
        ) from error
    return config_dict.override(result, overrides)


def _transformer(
    found: Mapping[str, Found], *, known: PipelineConfig | None, overrides: Mapping[str, Any]
) -> TransformerConfig | None:
    for part in ("transformer", "transformer_ema", "critic"):
        if part in found:
            return transformer_config(
                found[part], preset=known.transformer if known else None, overrides=overrides
            )
    return None


def _carried(found: Mapping[str, Found]) -> Carried | None:
    """What decides about the model as a whole: the export of its transformer or LoRA, else of any part."""
    generating = [item for part, item in found.items() if part not in ("text_encoder", "vae")]
    return next((item.carried for item in generating or found.values() if item.carried is not None), None)


def check_names(overrides: Mapping[str, Any]) -> None:
    """Refuses overrides of settings that do not exist, before any file is opened.

    Raises:
      UserError: a dotted name leads nowhere.
    """
    for path in overrides:
        node: Any = configs.PRESETS["wan_1_3b"]
        for name in path.split("."):
            known = (
                [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
            )
            require(
                name in known,
                f"{path}: {name!r} is not a setting; choose one of {', '.join(known) or 'none'}",
            )
            node = getattr(node, name)


def transformer_config(
    found: Found,
    *,
    preset: TransformerConfig | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """The transformer's config: the exported one, else shapes, then config.json, preset and defaults."""
    tables = {"wan": keys_transformer.table, "diffusers": keys_transformer.diffusers_table}
    shapes = _Shapes(found, tables[found.layout](configs.WAN_1_3B))
    dim, channels, *patch = shapes["patch_embed/kernel", 5]
    settings = _settings(found, _TRANSFORMER_SETTINGS)
    seen = {
        "dim": dim,
        "ffn_dim": shapes["blocks/ffn/fc1/kernel", 2][0],
        "num_layers": _num_layers(found),
        "freq_dim": shapes["time_embed/fc1/kernel", 2][1],
        "text_dim": shapes["text_embed/fc1/kernel", 2][1],
        "latent_channels": channels,
        "patch": tuple(patch),
    }
    _agree(found, settings, seen)
    require(
        shapes["head/proj/kernel", 2][0] == math.prod(patch) * channels,
        f"{found.origin}: reads {channels} channels and writes others (an image-to-video model?); "
        "text-to-video models are supported",
    )
    if found.carried is not None:
        return _exported(found, found.carried.config.transformer, {**settings, **seen}, overrides)
    has_heads = preset is not None and preset.dim == dim
    defaults = _kept(preset, ("text_len", "eps", "prediction", *(("num_heads",) if has_heads else ())))
    values = {**defaults, **settings, **seen}
    if "num_heads" in overrides:
        values["num_heads"] = 1  # holds the place until the overrides are applied, checked, below
    elif "num_heads" not in values:
        require(
            dim % _HEAD_DIM == 0,
            f"{found.origin}: the number of heads is not in the tensors; set transformer.num_heads, "
            "or add the folder that holds the model's config.json",
        )
        values["num_heads"] = dim // _HEAD_DIM
    return config_dict.override(
        config_dict.from_dict(TransformerConfig, values, where=found.origin), overrides
    )


def text_encoder_config(
    found: Found,
    *,
    text_len: int,
    preset: TextEncoderConfig | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> TextEncoderConfig:
    """The text encoder's config; `text_len` is the transformer's."""
    tables = {"wan": keys_text_encoder.table, "transformers": keys_text_encoder.transformers_table}
    shapes = _Shapes(found, tables[found.layout](configs.UMT5_XXL))
    vocab_size, dim = shapes["token_embedding", 2]
    num_buckets, num_heads = shapes["blocks/attn/position", 2]
    seen = {
        "vocab_size": vocab_size,
        "dim": dim,
        "attn_dim": shapes["blocks/attn/q/kernel", 2][0],
        "ffn_dim": shapes["blocks/ffn/fc1/kernel", 2][0],
        "num_heads": num_heads,
        "num_layers": _num_layers(found),
        "num_buckets": num_buckets,
    }
    if found.carried is not None:
        return _exported(found, found.carried.config.text_encoder, seen, overrides)
    # In Wan's layout the config.json beside this file is the transformer's.
    settings = _settings(found, _TEXT_ENCODER_SETTINGS) if found.layout == "transformers" else {}
    defaults = {"text_len": text_len, **_kept(preset, ("max_distance", "pad_id", "eps"))}
    values = {**defaults, **settings, **seen}
    return config_dict.override(
        config_dict.from_dict(TextEncoderConfig, values, where=found.origin), overrides
    )


def vae_config(
    found: Found, *, preset: VAEConfig | None = None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> VAEConfig:
    """The VAE's config: the walk over the encoder's levels gives their widths and strides."""
    if found.layout == "taehv":
        tiny = _tiny_vae_config(found)
        if found.carried is not None:
            seen = {name: value for name, value in vars(tiny).items() if name not in _VAE_SETTINGS}
            return _exported(found, found.carried.config.vae, seen, overrides)
        return config_dict.override(tiny, overrides)
    pattern, block_name = _VAE_LEVELS[found.layout]
    names = ("encoder.conv1", "conv2") if found.layout == "wan" else ("encoder.conv_in", "post_quant_conv")
    dim, z_dim = (_shape(found, f"{name}.weight", 5)[0] for name in names)
    require(dim > 0, f"{found.origin}: {names[0]}.weight has no output channels")
    widths: list[int] = []
    blocks: list[int] = [0]
    temporal: list[bool] = []
    for index in sorted({int(match.group(1)) for match in map(pattern.match, found.tensors) if match}):
        prefix = block_name.split("{}")[0] + str(index)
        if block_name.format(index) in found.tensors:
            widths[len(temporal) :] = [_shape(found, block_name.format(index), 5)[0]]
            blocks[-1] += 1
        elif f"{prefix}.resample.1.weight" in found.tensors:
            temporal.append(f"{prefix}.time_conv.weight" in found.tensors)
            blocks.append(0)
        else:
            raise UserError(f"{found.origin}: {block_name.format(index)} is missing; download it again")
    require(
        len(set(blocks)) == 1 and len(widths) == len(temporal) + 1 and all(w % dim == 0 for w in widths),
        f"{found.origin}: levels of widths {widths} with {blocks} blocks; only a regular VAE is read",
    )
    seen = {
        "dim": dim,
        "z_dim": z_dim,
        "dim_mult": tuple(width // dim for width in widths),
        "num_res_blocks": blocks[0],
        "temporal_downsample": tuple(temporal),
    }
    if found.carried is not None:
        return _exported(found, found.carried.config.vae, {**seen, "family": "wan"}, overrides)
    settings = _settings(found, _VAE_SETTINGS) if found.layout == "diffusers" else {}
    # TAEHV's are those of no other VAE.
    has_statistics = preset is not None and preset.family == "wan"
    statistics = _kept(preset, ("latent_mean", "latent_std")) if has_statistics else {}
    values = {**statistics, **settings, **seen}
    inferred = config_dict.from_dict(VAEConfig, values, where=found.origin)
    return config_dict.override(inferred, overrides)


def _tiny_vae_config(found: Found) -> VAEConfig:
    """TAEHV's config: the memory blocks of the decoder stand in runs, one per level, see `keys_tiny_vae`."""
    memory = re.compile(r"^decoder\.(\d+)\.conv\.0\.weight$")
    indices = sorted(int(match.group(1)) for match in map(memory.match, found.tensors) if match)
    require(len(indices) > 0, f"{found.origin}: has no memory blocks of the kind that is read; give taew2_1")
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    require(
        len({len(run) for run in runs}) == 1,
        f"{found.origin}: levels of {[len(run) for run in runs]} blocks; only a regular TAEHV is read",
    )
    dim, colours, *_ = _shape(found, "encoder.0.weight", 4)
    z_dim = _shape(found, "decoder.1.weight", 4)[1]
    grown = [_shape(found, f"decoder.{run[-1] + 2}.conv.weight", 4) for run in runs]
    widths = [inputs for _, inputs, *_ in grown]
    widths.append(_shape(found, f"decoder.{runs[-1][-1] + 3}.weight", 4)[0])
    require(
        colours == 3 and dim > 0 and all(width % dim == 0 for width in widths),
        f"{found.origin}: reads {colours} colours with {dim} channels and has levels of widths {widths}; the "
        "TAEHV that is read is taew2_1",
    )
    return VAEConfig(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(width // dim for width in reversed(widths)),
        num_res_blocks=len(runs[0]),
        temporal_downsample=tuple(outputs == 2 * inputs for outputs, inputs, *_ in reversed(grown)),
        latent_mean=(0.0,) * z_dim,
        latent_std=(1.0,) * z_dim,
        family="taehv",
    )


class _Shapes:
    """Shapes of a part's tensors on the source's side, by our path (of layer 0 for stacked ones)."""

    def __init__(self, found: Found, table: Table):
        self._found = found
        self._names = {rule.target: rule.source_name(0) for rule in table.rules}

    def __getitem__(self, key: tuple[str, int]) -> tuple[int, ...]:
        return _shape(self._found, self._names[key[0]], key[1])


def _num_layers(found: Found) -> int:
    """One more than the highest layer there is a tensor of."""
    layers = [int(match.group(1)) for match in map(_LAYER.match, found.tensors) if match]
    count = max(layers, default=-1) + 1
    require(
        0 < count <= len(found.tensors),
        f"{found.origin}: its layers are numbered up to {count - 1}, with fewer tensors than layers",
    )
    return count


def _shape(found: Found, name: str, rank: int) -> tuple[int, ...]:
    require(name in found.tensors, f"{found.origin}: {name} is missing; download it again")
    shape = found.tensors[name].spec.shape
    require(len(shape) == rank, f"{found.origin}: {name} has shape {shape}; {rank} axes are expected")
    return shape


def _settings(found: Found, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The settings of a config.json that we know, by our names."""
    return {
        ours: tuple(value) if isinstance(value := found.settings[theirs], list) else value
        for ours, alternatives in names.items()
        for theirs in alternatives
        if theirs in found.settings
    }


def _agree(found: Found, settings: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    for name, value in seen.items():
        require(
            settings.get(name, value) == value,
            f"{found.origin}: tensors have {name}={value}, the model's config.json says {settings.get(name)}",
        )


def _exported(
    found: Found, config: PartConfig, seen: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PartConfig:
    """The config a part was exported with; the files must not contradict it."""
    assert found.carried is not None, found
    for name, value in seen.items():
        require(
            getattr(config, name) == value,
            f"{found.origin}: has {name}={value}, {found.carried.where} says {getattr(config, name)}; remove "
            "that, if it is about another model",
        )
    return config_dict.override(config, overrides)


def _section(overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The overrides of one part, e.g. `transformer.num_heads` as `num_heads`."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}


def _kept(preset: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(preset, name) for name in names} if preset is not None else {}


def _name(transformer: TransformerConfig) -> str:
    for name, config in configs.PRESETS.items():
        if config.transformer == transformer:
            return name
    return "custom"


def _fitting_transformer(
    found: Mapping[str, Found], base: TransformerConfig, text_encoder: TextEncoderConfig, vae: VAEConfig
) -> TransformerConfig:
    """A stand-in for a transformer that the checkpoint does not have; a LoRA shows its size."""
    shapes: dict[str, Any] = {}
    lora = found.get("lora") or found.get("critic_lora")
    if lora is not None and lora.carried is None:
        inputs = {name: t.spec.shape[-1] for name, t in lora.tensors.items() if ".lora_A." in name}
        dims = [size for name, size in inputs.items() if ".ffn.2." not in name]
        hidden = [size for name, size in inputs.items() if ".ffn.2." in name]
        dim = dims[0] if dims else base.dim
        heads = dim // _HEAD_DIM if dim % _HEAD_DIM == 0 else 1
        shapes = {"dim": dim, "num_heads": heads, "num_layers": _num_layers(lora)}
        shapes |= {"ffn_dim": hidden[0]} if hidden else {}
    return dataclasses.replace(
        base,
        text_dim=text_encoder.dim,
        text_len=text_encoder.text_len,
        latent_channels=vae.z_dim,
        **shapes,
    )


def _fitting_text_encoder(base: TextEncoderConfig, transformer: TransformerConfig) -> TextEncoderConfig:
    """A stand-in for a text encoder that the checkpoint does not have."""
    dim = transformer.text_dim
    if dim == base.dim:
        return dataclasses.replace(base, text_len=transformer.text_len)
    heads = math.gcd(dim, base.num_heads)
    return dataclasses.replace(base, dim=dim, attn_dim=dim, num_heads=heads, text_len=transformer.text_len)
