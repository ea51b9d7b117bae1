"""Key tables of the diffusion transformer and of its LoRA."""

from collections.abc import Iterable

from longlive_jax.config import TransformerConfig
from longlive_jax.convert.table import Rule, Table, Transform

# Our path -> Wan's name, both below one block.
_ATTENTIONS = ("self_attn", "cross_attn")
_LORA_LAYERS = {
    **{f"{attention}/{name}": f"{attention}.{name}" for attention in _ATTENTIONS for name in "qkvo"},
    "ffn/fc1": "ffn.0",
    "ffn/fc2": "ffn.2",
}


def table(config: TransformerConfig) -> Table:
    """Names of the original Wan2.1 release; LongLive's are the same behind `model.`.

    Source: Wan2.1 wan/modules/model.py, class WanModel.
    """
    block = "blocks.{layer}."
    attention_names = {name: name for name in (*"qkvo", "norm_q", "norm_k")}
    return _table(
        config,
        top={
            "patch_embed": "patch_embedding",
            "text_embed/fc1": "text_embedding.0",
            "text_embed/fc2": "text_embedding.2",
            "time_embed/fc1": "time_embedding.0",
            "time_embed/fc2": "time_embedding.2",
            "time_proj": "time_projection.1",
        },
        head=("head.modulation", "head.head"),
        block_modulation=block + "modulation",
        attentions={name: (block + name, attention_names) for name in _ATTENTIONS},
        cross_norm=block + "norm3",
        ffn={"fc1": block + "ffn.0", "fc2": block + "ffn.2"},
    )


def diffusers_table(config: TransformerConfig) -> Table:
    """Names of diffusers' WanTransformer3DModel.

    The norm before cross attention, Wan's norm3, is diffusers' norm2; the other two have no weights.
    """
    block = "blocks.{layer}."
    attention_names = {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    }  # fmt: skip
    embedder = "condition_embedder."
    return _table(
        config,
        top={
            "patch_embed": "patch_embedding",
            "text_embed/fc1": embedder + "text_embedder.linear_1",
            "text_embed/fc2": embedder + "text_embedder.linear_2",
            "time_embed/fc1": embedder + "time_embedder.linear_1",
            "time_embed/fc2": embedder + "time_embedder.linear_2",
            "time_proj": embedder + "time_proj",
        },
        head=("scale_shift_table", "proj_out"),
        block_modulation=block + "scale_shift_table",
        attentions={
            "self_attn": (block + "attn1", attention_names),
            "cross_attn": (block + "attn2", attention_names),
        },
        cross_norm=block + "norm2",
        ffn={"fc1": block + "ffn.net.0.proj", "fc2": block + "ffn.net.2"},
    )


def lora_table(num_layers: int, targets: Iterable[str]) -> Table:
    """Names of a LoRA as PEFT saves it for the original model.

    Args:
      num_layers: blocks.
      targets: paths of the adapted layers, see `longlive_jax.lora.ALL_TARGETS`.
    """
    rules = []
    for target in targets:
        name = "base_model.model.blocks.{layer}." + _LORA_LAYERS[target.removeprefix("blocks/")]
        rules.append(Rule(f"{name}.lora_A.weight", f"{target}/a", Transform.LINEAR))
        rules.append(Rule(f"{name}.lora_B.weight", f"{target}/b", Transform.LINEAR))
    return Table(tuple(rules), num_layers)


def _table(
    config: TransformerConfig,
    *,
    top: dict[str, str],
    head: tuple[str, str],
    block_modulation: str,
    attentions: dict[str, tuple[str, dict[str, str]]],
    cross_norm: str,
    ffn: dict[str, str],
) -> Table:
    """Builds a table in the order of the original file from the names that differ.

    `attentions` maps ours to the module's prefix and the names inside it; `head` is the name of the
    modulation and of the projection.
    """
    rules = []
    for target, source in top.items():
        transform = Transform.PATCH if target == "patch_embed" else Transform.LINEAR
        patch = config.patch[1:] if transform is Transform.PATCH else (1, 1)
        rules += [
            Rule(f"{source}.weight", f"{target}/kernel", transform, patch=patch),
            Rule(f"{source}.bias", f"{target}/bias"),
        ]
    rules.append(Rule(block_modulation, "blocks/modulation", Transform.DROP_FIRST))
    for target, (source, names) in attentions.items():
        for ours, theirs in names.items():
            if ours.startswith("norm"):
                rules.append(Rule(f"{source}.{theirs}.weight", f"blocks/{target}/{ours}/scale"))
            else:
                rules += _linear(f"{source}.{theirs}", f"blocks/{target}/{ours}")
    rules.append(Rule(f"{cross_norm}.weight", "blocks/cross_norm/scale"))
    rules.append(Rule(f"{cross_norm}.bias", "blocks/cross_norm/bias"))
    for target, source in ffn.items():
        rules += _linear(source, f"blocks/ffn/{target}")
    rules.append(Rule(head[0], "head/modulation", Transform.DROP_FIRST))
    rules += _linear(head[1], "head/proj")
    return Table(tuple(rules), config.num_layers)


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/kernel", Transform.LINEAR),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]
