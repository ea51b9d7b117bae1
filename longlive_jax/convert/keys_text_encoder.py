"""Key tables of the umT5 encoder: Wan's `.pth` and transformers' `UMT5EncoderModel`."""

from longlive_jax.config import TextEncoderConfig
from longlive_jax.convert.table import Rule, Table, Transform

TRANSFORMERS_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Other name -> the name in `transformers_table`. transformers ties the two: `state_dict()` lists both,
a saved file may hold either or both. A reader renames the left one, or drops it where both are there."""

_WAN_BLOCK = (
    ("norm1", "norm1"),
    ("attn.q", "attn/q"),
    ("attn.k", "attn/k"),
    ("attn.v", "attn/v"),
    ("attn.o", "attn/o"),
    ("pos_embedding.embedding", "attn/position"),
    ("norm2", "norm2"),
    ("ffn.gate.0", "ffn/gate"),
    ("ffn.fc1", "ffn/fc1"),
    ("ffn.fc2", "ffn/fc2"),
)

_TRANSFORMERS_BLOCK = (
    ("layer.0.layer_norm", "norm1"),
    ("layer.0.SelfAttention.q", "attn/q"),
    ("layer.0.SelfAttention.k", "attn/k"),
    ("layer.0.SelfAttention.v", "attn/v"),
    ("layer.0.SelfAttention.o", "attn/o"),
    ("layer.0.SelfAttention.relative_attention_bias", "attn/position"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn/gate"),  # wi_0 is the one that goes through the GELU
    ("layer.1.DenseReluDense.wi_1", "ffn/fc1"),
    ("layer.1.DenseReluDense.wo", "ffn/fc2"),
)


def table(config: TextEncoderConfig) -> Table:
    """Names of `models_t5_umt5-xxl-enc-bf16.pth` (Wan2.1)."""
    return Table(
        (
            Rule("token_embedding.weight", "token_embedding"),
            *_block_rules("blocks.{layer}", _WAN_BLOCK),
            Rule("norm.weight", "norm/scale"),
        ),
        num_layers=config.num_layers,
    )


def transformers_table(config: TextEncoderConfig) -> Table:
    """Names of transformers' `UMT5EncoderModel`; the tied embedding goes by `shared.weight`.

    The table covers a model's tensors once; see `TRANSFORMERS_ALIASES` for the second name.
    """
    return Table(
        (
            Rule("shared.weight", "token_embedding"),
            *_block_rules("encoder.block.{layer}", _TRANSFORMERS_BLOCK),
            Rule("encoder.final_layer_norm.weight", "norm/scale"),
        ),
        num_layers=config.num_layers,
    )


def _block_rules(prefix: str, names: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    return tuple(_block_rule(f"{prefix}.{source}.weight", f"blocks/{target}") for source, target in names)


def _block_rule(source: str, target: str) -> Rule:
    leaf = target.rsplit("/", maxsplit=1)[-1]
    if leaf == "position":
        return Rule(source, target)
    if leaf.startswith("norm"):
        return Rule(source, f"{target}/scale")
    return Rule(source, f"{target}/kernel", Transform.LINEAR)
