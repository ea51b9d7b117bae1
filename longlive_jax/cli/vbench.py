"""`longlive vbench prompts | sample | collect`: videos for VBench, and its scores back."""

import argparse
import collections
import pathlib
from typing import Any

from longlive_jax.cli import options
from longlive_jax.cli.common import note, setting
from longlive_jax.errors import require

_DESCRIPTION = """\
Sample videos for VBench under the names its scorer expects, and read its result files back. The scorer is
installed and run apart: docs/experiments.md.
"""
_EXAMPLES = """\
examples:
  longlive vbench prompts VBench_full_info.json
  longlive vbench sample VBench_full_info.json --checkpoint checkpoints/longlive-1.3b --out outputs/vbench
  longlive vbench sample VBench_full_info.json ... --shard 0/8         one of eight processes
  longlive vbench collect evaluation_results
  longlive vbench collect evaluation_results --long
"""


def add_command(commands: Any) -> None:
    """Adds the command with its three actions."""
    parser = commands.add_parser(
        "vbench", help="sample for VBench, and read its scores", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, help="what to do")
    listing = actions.add_parser("prompts", help="what there is to sample", epilog=_EXAMPLES)
    _add_list(listing)
    listing.set_defaults(run=run_prompts, parser=listing)
    sampler = actions.add_parser("sample", help="make the videos", epilog=_EXAMPLES)
    _add_list(sampler)
    sampler.add_argument("--checkpoint", metavar="DIR", required=True, help="weights, or toy")
    sampler.add_argument("--out", metavar="DIR", required=True, help="where the folders of videos go")
    sampler.add_argument(
        "--frames", type=int, metavar="N", default=21, help="latent frames (default: 21; VBench-Long: 120)"
    )
    sampler.add_argument("--batch", type=int, metavar="N", default=1, help="videos side by side (default: 1)")
    sampler.add_argument("--shard", metavar="I/N", default="0/1", help="make this share")
    sampler.add_argument(
        "--set", dest="settings", metavar="NAME=VALUE", type=setting, action="append", default=[],
        help="change a setting of the config by its dotted name (repeatable)",
    )  # fmt: skip
    sampler.add_argument("--quiet", action="store_true", help="no progress on standard error")
    sampler.set_defaults(run=run_sample, parser=sampler)
    collector = actions.add_parser("collect", help="quality, semantic and total", epilog=_EXAMPLES)
    collector.add_argument(
        "results", metavar="PATH", nargs="+", help="*_eval_results.json of the scorer, or folders of them"
    )
    collector.add_argument("--long", action="store_true", help="beside the paper's VBench-Long table")
    collector.add_argument("--name", default="this model", help="what the row is called")
    collector.set_defaults(run=run_collect, parser=collector)


def _add_list(parser: Any) -> None:
    parser.add_argument("prompts", metavar="VBench_full_info.json", help="the list in the vbench package")
    parser.add_argument("--dimensions", metavar="A,B,...", help="of VBench (default: all 16)")
    parser.add_argument(
        "--augmented", metavar="FILE.txt", help="what the model is given, a line per entry of the list"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the first video (default: 0)")
    parser.add_argument(
        "--flickering", type=int, metavar="N", default=25,
        help="videos per prompt of temporal flickering, before the static filter (default: 25; 0: no filter)",
    )  # fmt: skip


def run_prompts(arguments: argparse.Namespace) -> None:
    """Prints what there is to sample."""
    every = _samples(arguments)
    by_dimension = collections.Counter(
        name for prompt in {one.prompt for one in every} for name in prompt.dimensions
    )
    print(f"{len({one.prompt.text for one in every})} prompts, {len(every)} videos")
    for folder, count in sorted(collections.Counter(one.folder for one in every).items()):
        print(f"  {count:>5}  {folder}/")
    for name, count in by_dimension.items():
        print(f"{name:<24}{count:>4} prompts")


def run_sample(arguments: argparse.Namespace) -> None:
    """Makes the missing videos."""
    from longlive_jax.experiments.parallel import Shard
    from longlive_jax.experiments.vbench import sampling

    every = _samples(arguments)
    request = sampling.Request(
        arguments.checkpoint, dict(arguments.settings), arguments.frames, arguments.batch
    )
    shard, out = Shard.parse(arguments.shard), pathlib.Path(arguments.out)
    options.enable_compile_cache()
    with options.device_memory():
        made, left = sampling.sample(every, request, out, shard=shard, is_quiet=arguments.quiet)
    print(f"{made} videos made, {left} of {len(every)} still missing")
    if left == 0:
        note(f"score {out}/videos; docs/experiments.md has the commands")


def run_collect(arguments: argparse.Namespace) -> None:
    """Prints our row beside the paper's."""
    from longlive_jax.experiments.vbench import scores

    raw = scores.read_results(arguments.results)
    print(scores.as_text(raw, name=arguments.name, is_long=arguments.long))


def _samples(arguments: argparse.Namespace) -> Any:
    from longlive_jax.experiments.vbench import prompts

    require(arguments.seed >= 0, f"--seed={arguments.seed} must be 0 or more")
    require(arguments.flickering >= 0, f"--flickering={arguments.flickering} must be 0 or more")
    dimensions = arguments.dimensions.split(",") if arguments.dimensions else prompts.DIMENSIONS
    found = prompts.read_prompts(arguments.prompts, dimensions=dimensions, augmented=arguments.augmented)
    return prompts.samples(found, seed=arguments.seed, flickering_count=arguments.flickering)
