"""Fifteen seconds of video with a prompt switch in the middle: what `make demo` runs.

    python examples/demo.py outputs/demo

The model is the small one that comes with the package, which knows the sentences of a toy world
(`longlive_jax/toy`). Any other checkpoint shows its own world:

    python examples/demo.py outputs/fox --checkpoint checkpoints/longlive-1.3b \\
        --prompt "A red fox runs through deep snow." --prompt "The fox stops and looks up."
"""

import argparse
import pathlib
import sys

from longlive_jax.cli.main import main as longlive

SECONDS = 15
PROMPTS = (
    "a red square moving left on a dark background",
    "a blue square moving up on a light background",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="where everything is written")
    parser.add_argument("--checkpoint", default="toy", help="default: the bundled model")
    parser.add_argument("--prompt", action="append", help="give it twice, before and after the switch")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    prompts = parsed.prompt or PROMPTS
    if len(prompts) != 2:
        parser.error("--prompt must be given twice")
    video, sheet = parsed.folder / "demo.mp4", parsed.folder / "demo.png"
    parsed.folder.mkdir(parents=True, exist_ok=True)
    words = [
        *(
            "generate",
            "--checkpoint",
            parsed.checkpoint,
            "--seconds",
            str(SECONDS),
            "--seed",
            str(parsed.seed),
        ),
        *("--prompt", prompts[0], "--prompt", prompts[1], "--switch-at", f"{SECONDS / 2:g}s"),
        *("--out", str(video), "--sheet", str(sheet), "--overwrite"),
    ]
    print("$ longlive", " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    status = longlive(words)
    if status == 0:
        print(f"\nThe video is {video}, its contact sheet {sheet}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
