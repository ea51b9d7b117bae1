"""`longlive generate`: prompts in, video files out, written while they are generated."""

import argparse
import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longlive_jax import video as video_lib
from longlive_jax.cli import options, outputs
from longlive_jax.cli.common import Interruption, note
from longlive_jax.cli.outputs import Target, Writers
from longlive_jax.cli.progress import GenerateProgress
from longlive_jax.config import PipelineConfig
from longlive_jax.errors import require
from longlive_jax.inference import story as stories_lib
from longlive_jax.inference.story import Story

if TYPE_CHECKING:
    import numpy as np

    from longlive_jax.cli.request import Request
    from longlive_jax.inference.pipeline import Pipeline

_DESCRIPTION = """\
Generate videos from text and write them while they are generated.

Length and prompt switches count in latent frames: the first one is one video frame, every later one
is four (at 16 frames per second 21 latent frames last 5 seconds). A switch takes effect at the
next block; blocks are 3 latent frames unless --block says otherwise.

Beside every video a JSON file records what reproduces it: `longlive generate --from x.json`.
"""
_EXAMPLES = """\
examples:
  one video of five seconds
    longlive generate --checkpoint checkpoints/longlive-1.3b --prompt "A red fox runs through snow."

  half a minute whose prompt changes twice
    longlive generate --checkpoint checkpoints/longlive-1.3b --seconds 30 --out fox.mp4 \\
        --prompt "A red fox runs through snow." \\
        --prompt "The fox stops and looks up." --switch-at 10s \\
        --prompt "It begins to snow heavily." --switch-at 20s

  one video per line of a file, two at a time
    longlive generate --checkpoint checkpoints/longlive-1.3b --prompt-file prompts.txt --batch 2

  the same video again
    longlive generate --from fox.json --out again.mp4

prompt files:
  .txt    a prompt per line
  .jsonl  {"prompts": ["...", "..."], "switch_frames": [40]} per line (or --switch-at for all lines), or
          {"segments": [{"prompt": "..."}, {"prompt": "...", "at_seconds": 10, "policy": "keep"},
                        {"prompt": "...", "at_seconds": 20, "blend_seconds": 2}]}
"""

_DEFAULT_FOLDER = "outputs"
# What may stand beside --from, which records everything else.
_BESIDE_FROM = frozenset(
    (
        *("sidecar", "checkpoint", "out", "latents", "sheet", "overwrite"),
        *("text_device", "compile_cache", "quiet", "devices", "decode_apart"),
    )
)


def add_command(commands: Any) -> None:
    """Adds the command; every option defaults to None, which means: as the checkpoint says."""
    parser = commands.add_parser(
        "generate", help="generate videos from text", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    _add_what(parser.add_argument_group("what to generate"))
    _add_where(parser.add_argument_group("where it goes"))
    options.add_how(parser.add_argument_group("how (defaults: as the checkpoint says)"))
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch", type=int, metavar="N", help="videos made side by side (default: 1)")
    machine.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices to spread over: the videos of a batch first, then each video (default: 1)",
    )
    machine.add_argument(
        "--decode-apart",
        action="store_true",
        default=None,
        help="one more device decodes a block while the others denoise the next",
    )
    options.add_machine(machine)
    parser.set_defaults(run=run, parser=parser)


def _add_what(group: Any) -> None:
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="directory made by `longlive setup` or `convert`, or toy, the small model in the package",
    )
    group.add_argument(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        help="what to show; give it again, with --switch-at, to go on to something else",
    )
    group.add_argument(
        "--switch-at",
        metavar="FRAME",
        action="append",
        help="when the next --prompt begins: a latent frame (40), or seconds (10s); once per further prompt",
    )
    group.add_argument(
        "--config",
        metavar="FILE.py",
        help="take what is not given here from a config file, e.g. configs/wan/inference.py",
    )
    group.add_argument("--prompt-file", metavar="FILE", help="one video per line, .txt or .jsonl, see below")
    group.add_argument("--frames", type=int, metavar="N", help="length in latent frames")
    group.add_argument("--seconds", type=float, metavar="S", help="length in seconds (default: 5)")
    group.add_argument("--height", type=int, metavar="PIXELS", help="rows (default: the checkpoint's)")
    group.add_argument("--width", type=int, metavar="PIXELS", help="columns (default: the checkpoint's)")
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the first video; the next ones count up (default: 0)"
    )
    group.add_argument(
        "--from", dest="sidecar", metavar="FILE.json", help="reproduce the video this file was written beside"
    )


def _add_where(group: Any) -> None:
    group.add_argument(
        "--out",
        metavar="PATH",
        help=".mp4, .gif, a folder for PNG frames (ending in /), or .npy for latents only; several videos "
        "are numbered (default: outputs/<prompt>-<seed>.mp4)",
    )
    group.add_argument("--latents", metavar="PATH.npy", help="write the latents as well")
    group.add_argument("--sheet", metavar="PATH.png", help="write a contact sheet as well")
    group.add_argument("--overwrite", action="store_true", default=None, help="replace existing files")


# --- the run ----------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    """Checks everything that can be checked, then loads the model and generates."""
    settings = _apply_config(arguments)
    _check_arguments(arguments)
    from longlive_jax.cli import request as requests  # JAX comes with it; the checks above need none

    if arguments.sidecar:
        request, remarks = requests.read_sidecar(arguments.sidecar, checkpoint=arguments.checkpoint)
        for remark in remarks:
            note(f"warning: {remark}; the result will differ")
    else:
        request = _request(arguments, settings)
    targets = _targets(arguments, request)
    request.check_parts(needs_vae=any(not target.is_latents_only for target in targets))
    sharing = _sharing(request, arguments)
    if sharing and not arguments.quiet:
        note(sharing)
    options.enable_compile_cache(arguments.compile_cache)
    _generate(request, targets, arguments)


def _check_arguments(arguments: argparse.Namespace) -> None:
    """What is wrong whatever the checkpoint says."""
    given = {
        name
        for name, value in vars(arguments).items()
        if value is not None and value != [] and name not in ("run", "parser")
    }
    if arguments.sidecar:
        options = {"prompts": "prompt", "settings": "set"}
        extra = sorted(options.get(name, name.replace("_", "-")) for name in given - _BESIDE_FROM)
        require(not extra, f"--from says everything about the video; leave --{', --'.join(extra)} out")
    else:
        require(
            bool(arguments.checkpoint),
            "--checkpoint is missing; make one with `longlive setup`, or try the small model in the package "
            "with --checkpoint toy",
        )
        sources = [name for name in ("prompts", "prompt_file") if name in given]
        require(len(sources) == 1, "give either --prompt or --prompt-file")
    require(not {"frames", "seconds"} <= given, "give either --frames or --seconds, not both")
    for name in ("frames", "height", "width", "batch", "devices", "fps"):
        value = getattr(arguments, name)
        require(value is None or value > 0, f"--{name}={value} must be positive")
    if arguments.out and not arguments.out.endswith(outputs.LATENTS_SUFFIX):
        video_lib.video_suffix(arguments.out)
    for name, suffix in (("latents", outputs.LATENTS_SUFFIX), ("sheet", ".png")):
        value = getattr(arguments, name)
        require(value is None or value.endswith(suffix), f"--{name}={value} must end in {suffix}")


def _apply_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fills what the command line leaves open from --config; returns the config's settings."""
    if not arguments.config or arguments.sidecar:
        return {}
    from longlive_jax.inference.generation import load_generation

    config = load_generation(arguments.config)
    wanted: dict[str, Any] = {"checkpoint": config.checkpoint, "seed": config.seed, "weights": config.weights}
    if not arguments.prompts and not arguments.prompt_file:
        wanted["prompt_file"] = config.prompts
        wanted["switch_at"] = [str(frame) for frame in config.switch_frames] or None
    if arguments.seconds is None:
        wanted["frames"] = config.frames
    for name, value in wanted.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return dict(config.settings)


def _request(arguments: argparse.Namespace, settings: dict[str, Any]) -> "Request":
    from longlive_jax.cli import request as requests

    overrides = {**settings, **options.overrides(arguments)}
    checkpoint, config = requests.open_config(arguments.checkpoint, overrides, vae=arguments.vae)
    return requests.Request(
        checkpoint=checkpoint,
        config=config,
        overrides=overrides,
        stories=_stories(arguments, config),
        frames=requests.default_frames(config, frames=arguments.frames, seconds=arguments.seconds),
        seed=arguments.seed or 0,
        height=arguments.height or config.video.height,
        width=arguments.width or config.video.width,
        weights=arguments.weights or "auto",
        use_lora=arguments.lora is not False,
        vae=None if arguments.vae is None else requests.open_checkpoint(arguments.vae, field="--vae"),
    )


def _stories(arguments: argparse.Namespace, config: PipelineConfig) -> tuple[Story, ...]:
    vae, fps = config.vae, config.video.fps
    switches = [options.switch_frame(text, config) for text in arguments.switch_at or ()]
    if arguments.prompt_file:
        return stories_lib.read_stories(arguments.prompt_file, vae=vae, fps=fps, switch_frames=switches)
    return (stories_lib.story_from_prompts(arguments.prompts, switches),)


def _targets(arguments: argparse.Namespace, request: "Request") -> list[Target]:
    """Names every file, and refuses what exists already or cannot be written."""
    count = len(request.stories)
    targets = []
    for i, story in enumerate(request.stories):
        if arguments.out:
            out = outputs.numbered(arguments.out, i, count)
        else:
            out = f"{_DEFAULT_FOLDER}/{outputs.slug(story.prompt)}-{request.seed + i}.mp4"
        others = {
            name: outputs.numbered(getattr(arguments, name), i, count) if getattr(arguments, name) else None
            for name in ("latents", "sheet")
        }
        targets.append(Target(out, **others, sidecar=outputs.sidecar_path(out)))
    paths = [path for target in targets for path in target.paths]
    outputs.check_free(paths, overwrite=bool(arguments.overwrite))
    for path in paths:
        folder = pathlib.Path(path).parent
        is_made = folder == pathlib.Path(_DEFAULT_FOLDER) and not folder.exists()
        require(is_made or folder.is_dir(), f"{path}: the folder {folder} does not exist; create it first")
    return targets


def _sharing(request: "Request", arguments: argparse.Namespace) -> str | None:
    """How --devices share the work, and what they exchange; refuses what cannot be shared."""
    devices = arguments.devices or 1
    if devices == 1 and not arguments.decode_apart:
        return None
    from longlive_jax.inference import parallel

    found = parallel.available(devices, decodes_apart=bool(arguments.decode_apart))
    apart = f"device {found[-1].id} decodes" if arguments.decode_apart else None
    if devices == 1:
        return apart
    config, count, batch = request.config, len(request.stories), arguments.batch or 1
    size = config.latent_size(request.height, request.width)
    lines = []
    for rows in dict.fromkeys((min(batch, count), count % batch or batch)):  # the last batch may be smaller
        layout = parallel.layout_of(config, devices=devices, batch=rows, latent_size=size)
        lines.append(parallel.describe(config, layout, batch=rows, latent_size=size))
    return lines[0] if apart is None else f"{lines[0]}; {apart}"


def _generate(request: "Request", targets: Sequence[Target], arguments: argparse.Namespace) -> None:
    for target in targets:  # checked: every other folder is there
        pathlib.Path(target.out).parent.mkdir(exist_ok=True)
    batch, total = arguments.batch or 1, request.video_frames * len(targets)
    progress = GenerateProgress(total, is_quiet=bool(arguments.quiet))
    with Interruption() as interruption, progress, options.device_memory():
        pipe = None
        for first in range(0, len(targets), batch):
            group = range(first, min(first + batch, len(targets)))
            start = time.monotonic()
            with contextlib.ExitStack() as stack:
                # Before the model is loaded: a file that cannot be written is found out at once.
                writers = [stack.enter_context(targets[i].open(request)) for i in group]
                if pipe is None:
                    progress.stage(f"loading {request.checkpoint.path}")
                    pipe = _load(request, arguments)
                    progress.stage("encoding the prompt and compiling (slow the first time)")
                    # All at once, so that the text encoder is loaded once: its results are kept on disk.
                    pipe.encode_prompts([prompt for story in request.stories for prompt in story.prompts])
                try:
                    _stream(pipe, request, group, writers, interruption, progress)
                    is_complete = True
                except KeyboardInterrupt:
                    is_complete = False
            for i, writer in zip(group, writers, strict=True):
                with interruption.shield():
                    _finish(request, i, targets[i], writer, start, progress, is_complete)
            if not is_complete:
                raise KeyboardInterrupt


def _load(request: "Request", arguments: argparse.Namespace) -> "Pipeline":
    from longlive_jax.inference.pipeline import Pipeline

    pipe = Pipeline.load(
        request.checkpoint.path,
        overrides=request.overrides,
        weights=request.weights,  # type: ignore[arg-type]
        use_lora=request.use_lora,
        text_device=arguments.text_device or "default",
        vae=None if request.vae is None else request.vae.path,
    )
    devices, decodes_apart = arguments.devices or 1, bool(arguments.decode_apart)
    return pipe.over(devices, decodes_apart=decodes_apart) if devices > 1 or decodes_apart else pipe


def _stream(
    pipe: "Pipeline",
    request: "Request",
    group: range,
    writers: Sequence[Writers],
    interruption: Interruption,
    progress: GenerateProgress,
) -> None:
    """Generates the videos of `group` side by side and writes each block as it comes."""
    stories = [request.stories[i] for i in group]
    for frame, latents, frames in _blocks(pipe, request, group, writers):
        with interruption.shield():
            for row, writer in enumerate(writers):
                writer.write(None if frames is None else frames[row], latents[row])
        done = [request.config.vae.video_frames(n) for n in (frame, frame + latents.shape[1])]
        prompt = stories[0].prompt_at(frame, block_frames=request.config.window.block_frames)
        progress.advance((done[1] - done[0]) * len(group), prompt=prompt)
    with interruption.shield():
        for writer in writers:
            writer.close()


def _blocks(
    pipe: "Pipeline", request: "Request", group: range, writers: Sequence[Writers]
) -> "Iterator[tuple[int, np.ndarray, np.ndarray | None]]":
    """Yields (first latent frame, latents [B, n, h, w, C], frames uint8 [B, v, Y, X, 3] or None)."""
    import numpy as np

    stories = [request.stories[i] for i in group]
    arguments: dict[str, Any] = {
        "frames": request.frames,
        "seed": [request.seed + i for i in group],
        "height": request.height,
        "width": request.width,
    }
    if all(writer.frames is None for writer in writers):
        for frame, latents in pipe.stream_latents(stories, **arguments):
            yield frame, np.asarray(latents)[:, : request.frames - frame], None
        return
    for chunk in pipe.stream(stories, **arguments):
        yield chunk.frame, chunk.latents, chunk.video


def _finish(
    request: "Request",
    index: int,
    target: Target,
    writer: Writers,
    start: float,
    progress: GenerateProgress,
    is_complete: bool,
) -> None:
    """Writes the sidecar and the contact sheet of a video and says where it is."""
    from longlive_jax.cli import request as requests

    count = (writer.frames or writer.latents).count  # type: ignore[union-attr]
    if count == 0:
        note(f"interrupted before the first block was finished; {target.out} was not written")
        return
    fps = request.config.video.fps
    facts: dict[str, Any] = {"file": os.path.basename(target.out.rstrip("/")), "complete": is_complete}
    if writer.frames is not None:
        facts |= {"frames": count, "seconds": count / fps, "fps": fps}
    if writer.latents is not None:
        facts["latent_frames"] = writer.latents.count
    timings = {"seconds": time.monotonic() - start, "frames_per_second": progress.fps}
    requests.write_sidecar(target.sidecar, request, index, video=facts, timings=timings)
    if target.sheet is not None:
        _write_sheet(request, index, target)
    size = f"{request.width}x{request.height}"
    length = f"{count} frames, {count / fps:.2f} s" if writer.frames else f"{count} latent frames"
    rate = f", {progress.fps:.1f} frames/s" if progress.fps else ""
    print(f"{target.out}  ({length}, {size}{rate}{'' if is_complete else ', interrupted'})", flush=True)


def _write_sheet(request: "Request", index: int, target: Target) -> None:
    from longlive_jax.contact_sheet import contact_sheet

    config, story = request.config, request.stories[index]
    starts = [stories_lib.effective_frame(s.frame, config.window.block_frames) for s in story.switches]
    labels = [(config.vae.video_frames(f), p) for f, p in zip([0, *starts], story.prompts, strict=True)]
    assert target.sheet is not None
    contact_sheet(target.out, path=target.sheet, fps=config.video.fps, labels=labels)
