"""From PyTorch files to a playable video, in one go: what `make demo` runs.

    python examples/demo.py outputs/demo

Writes a miniature of the published release (Wan2.1's folder, LongLive's .pt files) with random
weights, converts it and generates a video with a prompt switch. The weights are random, so the video
is coloured noise; every file and every step is of the real kind.
"""

import argparse
import dataclasses
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import torch

from longlive_jax.checkpoint import flatten
from longlive_jax.config import UMT5_XXL
from longlive_jax.convert import keys_text_encoder
from longlive_jax.models.text_encoder import TextEncoder, init_params
from longlive_jax.models.tokenizer import train_word_tokenizer

MINIATURE = pathlib.Path(__file__).parent.parent / "tests/fixtures/J_ckpt_layouts"
PROMPTS = ("a red fox runs through deep snow", "the fox stops and looks up at the stars")


def write_release(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the release's files in miniature; returns the three sources to convert.

    The transformer, LoRA and VAE are the test suite's. Their text encoder is one of width 32, while
    Wan's transformers always read 4096, so one that fits is made here.
    """
    wan = folder / "Wan2.1-T2V-1.3B"
    shutil.copytree(MINIATURE / "wan_models/Wan2.1-T2V-tiny", wan, dirs_exist_ok=True)
    for old in wan.glob("models_t5_*.pth"):
        old.unlink()
    config = dataclasses.replace(
        UMT5_XXL, vocab_size=64, attn_dim=64, ffn_dim=64, num_heads=4, num_layers=1, text_len=16
    )
    key, random, state = jax.random.key(0), np.random.default_rng(0), {}
    shapes = flatten(jax.eval_shape(lambda key: init_params(TextEncoder(config), key), key))
    for name, rule, layer in keys_text_encoder.table(config).sources():
        shape = shapes[rule.target].shape[0 if layer is None else 1 :]
        leaf = np.ones(shape) if rule.target.endswith("scale") else 0.05 * random.standard_normal(shape)
        state[name] = torch.tensor(np.ascontiguousarray(rule.to_source(leaf))).to(torch.bfloat16)
    torch.save(state, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = wan / "google/umt5-xxl/tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    train_word_tokenizer(PROMPTS, vocab_size=64, path=tokenizer)
    longlive = folder / "LongLive-1.3B"
    shutil.copytree(MINIATURE / "longlive_models/models", longlive, dirs_exist_ok=True)
    return [wan, longlive / "longlive_base.pt", longlive / "lora.pt"]


def run(*command: str) -> None:
    """Runs a command of the installed package and shows it."""
    print("\n$ longlive", " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
    subprocess.run([sys.executable, "-m", "longlive_jax.cli.main", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="where everything is written")
    folder = parser.parse_args().folder
    sources = write_release(folder / "release")
    checkpoint, video, sheet = folder / "checkpoint", folder / "demo.mp4", folder / "demo.png"
    run("convert", *map(str, sources), str(checkpoint), "--overwrite")
    run(
        *("generate", "--checkpoint", str(checkpoint), "--dtype", "float32", "--seconds", "5"),
        *("--height", "96", "--width", "160", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]),
        *("--switch-at", "9", "--out", str(video), "--sheet", str(sheet), "--overwrite"),
    )
    print(f"\nThe video is {video}, its contact sheet {sheet}.")
    print("The weights are random, so it shows noise. For the real model: longlive setup longlive-1.3b")


if __name__ == "__main__":
    main()
