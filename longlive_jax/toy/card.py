"""The bundled model's card as Markdown: from measurements and reports, every number with its interval."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longlive_jax.errors import UserError, require
from longlive_jax.toy import grammar
from longlive_jax.toy.world import VALUES, Attributes, combinations

_TRAINS = {
    "vae": "the video autoencoder",
    "text": "the text encoder and its tokenizer",
    "teacher": "the bidirectional teacher, by flow matching",
    "causal_init": "the causal student, from the teacher's weights",
    "init": "the student in four steps, by distribution matching on its own rollouts",
    "long": "the student on its own long rollouts with prompt switches",
    "reader": "what reads attributes from latents",
    "reward": "the student, by what the reader sees in its own rollouts",
}
"""What every stage trains."""

_CLIP_ROWS = (
    ("all", "frames that show all four attributes asked for"),
    ("shape", "shape"),
    *((f"shape.{name}", f"... of those that should be a {name}") for name in VALUES["shape"]),
    ("colour", "colour"),
    ("motion", "motion"),
    ("background", "background"),
    ("present", "frames that show a sprite"),
    ("iou", "overlap of the sprite with a clean one"),
    ("identity.size", "size kept, against the first window"),
    ("identity.shade", "shade kept"),
    ("identity.gradient", "background gradient kept"),
    ("identity.lane", "lane kept"),
    ("flicker", "flicker: change between frames that motion does not explain"),
    ("drift.sprite", "drift of the sprite's colour by the last window"),
    ("drift.background", "drift of the background's colour by the last window"),
)
GATE = {"colour": 0.95, "shape": 0.85, "motion": 0.85, "iou": 0.65}
"""Means over clips from which on the model shows enough of what is asked for to compare settings by it."""

_LONG_ROWS = (
    ("first.all", "all four attributes, first 21 latent frames"),
    ("last.all", "all four attributes, last 21 latent frames"),
    ("fall.all", "the fall between them"),
    ("vanished", "clips whose sprite vanished on the way"),
    *_CLIP_ROWS[10:],
)
_WINDOW_ROWS = (
    ("windows.all", "all four attributes"),
    ("windows.motion", "motion"),
    ("windows.present", "sprite there"),
    ("windows.identity.size", "size kept"),
    ("windows.drift.sprite", "drift of the sprite's colour"),
)
_SWITCH_ROWS = (
    ("held", "switches whose new attributes hold within 2 blocks"),
    ("held.1", "... where one attribute changes"),
    ("held.2", "... where two change"),
    ("held.4", "... where all change"),
    *((f"held.{name}", f"... new {name} alone") for name in VALUES if name != "shape"),
    *((f"held.shape.{name}", f"... new {name} alone") for name in VALUES["shape"]),
    ("stays", "switches after which the unchanged attributes stay"),
    ("obeyed", "switches whose new attributes hold while the unchanged ones stay"),
    ("jump", "jump at the boundary over the typical change between frames"),
    ("jump.place", "jump of the place, in pixels"),
    ("jump.size", "jump of the size, as a share of the world's range"),
    ("jump.shade", "jump of the shade"),
    ("jump.gradient", "jump of the background gradient"),
)
_POLICIES = ("recache", "keep", "clear")

Report = Mapping[str, Any]
Run = Mapping[str, Any]
"""What is told of a run, as `training` gives it. `averaged` is of how many exports the mean went on, `note`
what else there is to know, `schedule` the updates that the learning rate's schedule would take, where that is
more than the run; all three may be missing."""


def training(
    reports: Mapping[str, Report],
    *,
    source: Mapping[str, Any],
    recorded: Callable[[str], Sequence[Run] | None],
) -> list[Run]:
    """The runs that made a checkpoint, first one first, found by following every run's base.

    A run that gave a reward stands before the one it was given to.

    Args:
      reports: report.json of every run, by the name of its folder.
      source: stage, steps and seed of the checkpoint.
      recorded: the runs that a checkpoint's own record names, given where it is; None if it has no record.

    Raises:
      UserError: not exactly one report is the checkpoint's, that of a base is missing, or a run is its own
        base.
    """
    last = [name for name, report in reports.items() if _is_of(report, source)]
    if not last:  # a checkpoint from before the end of its run
        last = [name for name, report in reports.items() if _is_of(report, source, early=True)]
    require(
        len(last) == 1,
        f"runs: {len(last)} reports (of {', '.join(reports) or 'none'}) are of the stage, steps and seed "
        f"{dict(source)}; name the folder that holds the checkpoint's run and its predecessors",
    )
    found: dict[str, Run] = {}

    def add(name: str, later: Sequence[str]) -> None:
        """Adds a run after everything that it began with; `later` runs began with it."""
        require(name not in later, f"runs: {name} is its own base")
        if name not in reports:
            raise UserError(f"runs: there is no {name}/report.json, and a later stage began with that run")
        settings, line = reports[name]["settings"], (*later, name)
        base = settings.get("base") or ""
        reader = _folder(name, settings.get("reward", {}).get("reader", ""))
        require(
            not reader or reader in reports,
            f"runs: there is no {reader}/report.json, and {name} was rewarded by it",
        )
        if base and (earlier := recorded(base)):
            found.update((run["run"], run) for run in earlier)
        elif base:
            add(_folder(name, base), line)
        own = set(line) & set(found)
        require(not own, f"runs: {', '.join(sorted(own))} is its own base")
        if reader:
            found.setdefault(reader, _run(reader, reports[reader]))
        found[name] = _run(name, reports[name])

    add(last[0], ())
    return list(found.values())


def _folder(name: str, checkpoint: str) -> str:
    """The folder's name of the run that made what the run `name` read, `<run>/export` or `<run>/mean`."""
    run = pathlib.PurePosixPath(checkpoint).parent.name
    require(
        bool(run) or not checkpoint,
        f"runs: {name} began with {checkpoint!r}, of whose runs there are no reports; name those of a whole "
        "recipe (`make toy`)",
    )
    return run


def _run(name: str, report: Report) -> Run:
    """What the card tells of a run."""
    settings, metric = report["settings"], report["settings"]["evaluation"]["metric"]
    schedule = settings["optimizer"].get("schedule_steps", 0)
    return {
        "run": name,
        "stage": report["stage"],
        "steps": report["steps"],
        "planned": settings["run"]["steps"],
        "batch": settings["data"]["batch_size"],
        "frames": _clip_frames(settings),
        "learning_rate": settings["optimizer"]["learning_rate"],
        "seed": settings["run"]["seed"],
        "hours": report["steps"] * (report["seconds_per_step"] or 0) / 3600,
        "metric": metric,
        "score": report["scores"].get(metric),
        "devices": str(report["environment"]["devices"]),
        **({"schedule": schedule} if schedule > settings["run"]["steps"] else {}),
    }


def _is_of(report: Report, source: Mapping[str, Any], *, early: bool = False) -> bool:
    """Whether a checkpoint is of a run: of its end, or of an earlier step."""
    run, steps = report["settings"]["run"], source.get("steps") or 0
    same = (report["stage"], run["seed"]) == (source.get("stage"), source.get("seed"))
    return same and (0 < steps < report["steps"] if early else steps in (report["steps"], run["steps"]))


def render(
    measured: Mapping[str, Any],
    runs: Sequence[Run],
    *,
    parameters: Mapping[str, int],
    size: int,
) -> str:
    """Writes the card.

    Args:
      measured: what `benchmarks/toy_model.py` wrote.
      runs: what was trained, first one first; see `training`.
      parameters: number of parameters of every part.
      size: bytes of the weights.
    """
    sections = [
        _introduction(measured, parameters, size),
        _data(),
        _recipe(runs),
        _measurements(measured),
        _differences(measured),
        _limits(),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(measured: Mapping[str, Any], parameters: Mapping[str, int], size: int) -> str:
    video, window = (measured["generation"][name] for name in ("video", "window"))
    steps = len(measured["generation"]["sampler"]["steps"])
    counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in parameters.items())
    held_out = Attributes.from_codes(combinations("held_out")[0])
    return f"""\
# Model card: the bundled toy model

A text-to-video model of a procedural world, with the classes, the cache and the recipe of the 1.3B model at
less than a hundredth of its size. It exists to show and to test the method on a laptop: streaming, the sink
and the window, prompt switches, training. `Pipeline.load("toy")` opens it.

- {video["height"]} x {video["width"]} pixels at {video["fps"]} frames per second; {steps} denoising steps;
  window {window["window_frames"]}, sink {window["sink_frames"]}, blocks of {window["block_frames"]}
  latent frames, {window["rope"]} frame positions.
- Parameters: {counts}. Stored in bfloat16 ({size / 1e6:.1f} MB), computed with in {measured["dtype"]}.
- Licence: Apache-2.0, as the code. The data is generated by the code; nobody's pictures are in it.

```
longlive generate --checkpoint toy --prompt "{grammar.describe(held_out)}" --out toy.mp4
```"""


def _data() -> str:
    values = "\n".join(f"- {field}: {', '.join(names)}" for field, names in VALUES.items())
    held_out, every = len(combinations("held_out")), len(combinations("all"))
    return f"""\
## Data

One sprite on a torus, rendered analytically while training runs. The caption names four attributes:

{values}

Size, shade, background gradient and place are not named and persist through a clip. {held_out} of the {every}
combinations are held out: no stage trains on them, and all numbers below are measured on them. (A prompt
switch goes to a held-out combination too, unless none differs in just the attributes that are to change.)"""


def _recipe(runs: Sequence[Run]) -> str:
    lines = [
        "| Run | Trains | Steps | Batch | Latent frames | Learning rate | Seed | Hours | Held-out score |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    notes: dict[str, list[str]] = {}
    for run in runs:
        steps = str(run["steps"])
        score = "" if run["score"] is None else f"{run['metric']} {run['score']:.3f}"
        if run["steps"] != run["planned"]:
            steps += f" of {run['planned']}"
        if "schedule" in run:
            steps += f" (schedule: {run['schedule']})"
        if run.get("averaged", 1) > 1:
            steps += f", mean of {run['averaged']} exports"
        lines.append(
            f"| `{run['run']}` | {_TRAINS.get(run['stage'], run['stage'])} | {steps} | {run['batch']} "
            f"| {run['frames']} | {run['learning_rate']:g} | {run['seed']} | {run['hours']:.2f} "
            f"| {score} |"
        )
        if "note" in run:
            notes.setdefault(run["note"], []).append(f"`{run['run']}`")
    if notes:
        lines += ["", *(f"- {', '.join(names)}: {note}" for note, names in notes.items())]
    total, devices = sum(run["hours"] for run in runs), sorted({run["devices"] for run in runs})
    return f"""\
## Training

{total:.1f} hours of steps in all, on {" and ".join(devices)}.
Hours are steps times the mean seconds per step. The settings of every run are in `configs/toy`;
`make toy` repeats them{_more(runs)}.

{chr(10).join(lines)}"""


def _more(runs: Sequence[Run]) -> str:
    """What a repetition does otherwise: runs that were stopped early are made to their end."""
    early = [f"`{run['run']}`" for run in runs if run["steps"] < run["planned"]]
    return f", with all planned steps of {', '.join(early)}" if early else ""


def _clip_frames(settings: Mapping[str, Any]) -> int:
    """Latent frames of what a run trains on: whole sequences, rollouts or clips."""
    for section, name in (("streaming", "sequence_frames"), ("rollout", "clip_frames")):
        if section in settings:
            return settings[section][name]
    return settings["data"].get("frames", 0)


def _measurements(measured: Mapping[str, Any]) -> str:
    cells, settings = measured["cells"], measured["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    blocks = [
        f"""\
## Measured

From the pixels of videos of held-out combinations (`python -m benchmarks.toy_model toy`):
means and 95% intervals over clips of the seeds {seeds}. Shares are in [0, 1].
For flicker, drift and jumps low is good."""
    ]
    if "clip" in cells:
        title = f"{cells['clip']['all']['clips']} clips of {settings['frames']} latent frames"
        blocks.append(_estimates(title, ["share"], [cells["clip"]], _CLIP_ROWS))
        blocks.append(_gate(cells["clip"]))
    if "long" in cells:
        title = f"{cells['long']['all']['clips']} clips of {settings['long_frames']} latent frames"
        blocks.append(_estimates(title, ["share"], [cells["long"]], _LONG_ROWS))
        blocks.append(_windows(cells["long"]))
    policies = [policy for policy in _POLICIES if f"switch, {policy}" in cells]
    if policies:
        found = [cells[f"switch, {policy}"] for policy in policies]
        title = f"{found[0]['held']['clips']} prompt switches, by what happens to the cache"
        blocks.append(_estimates(title, policies, found, _SWITCH_ROWS))
        blocks.append(_blocks(policies, found))
    return "\n\n".join(blocks)


def _gate(cell: Mapping[str, Any]) -> str:
    """Whether comparisons of settings mean much with these weights."""
    asked = ", ".join(f"{name} {least:g}" for name, least in GATE.items())
    missed = [
        f"{name} {cell[name]['mean']:.2f}" for name, least in GATE.items() if cell[name]["mean"] < least
    ]
    if not missed:
        return f"The recipe's gate ({asked}) is reached."
    return (
        f"**Below the recipe's gate** ({asked}): {', '.join(missed)}. Differences between settings are then "
        "as likely to be this model's mistakes as anything else."
    )


def _estimates(
    title: str,
    columns: Sequence[str],
    cells: Sequence[Mapping[str, Any]],
    rows: Sequence[tuple[str, str]],
) -> str:
    lines = [f"### {title}", "", f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, label in rows:
        lines.append(f"| {label} | {' | '.join(_interval(cell[name]) for cell in cells)} |")
    return "\n".join(lines)


def _interval(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "none"
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _windows(cell: Mapping[str, Any]) -> str:
    count = len(cell["windows.all"]["mean"])
    chosen = sorted({round(i * (count - 1) / 4) for i in range(5)})
    lines = [
        f"| window of 12 latent frames | {' | '.join(str(i + 1) for i in chosen)} |",
        f"| --- |{' --- |' * len(chosen)}",
    ]
    for name, label in _WINDOW_ROWS:
        lines.append(f"| {label} | {' | '.join(_number(cell[name]['mean'][i]) for i in chosen)} |")
    return "\n".join(lines)


def _blocks(policies: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> str:
    count = len(cells[0]["blocks.new"]["mean"])
    lines = [
        f"| new attributes by block | {' | '.join(str(i + 1) for i in range(count))} |",
        f"| --- |{' --- |' * count}",
    ]
    for policy, cell in zip(policies, cells, strict=True):
        lines.append(f"| {policy} | {' | '.join(_number(x) for x in cell['blocks.new']['mean'])} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _differences(measured: Mapping[str, Any]) -> str:
    rows = [row for row in measured["differences"] if row["difference"] is not None]
    lines = [
        "| First | Second | Measure | First | Second | Difference | Pairs |",
        "| --- | --- | --- | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        if row["differs"]:
            lines.append(
                f"| {row['first_cell']} | {row['second_cell']} | {row['measure']} | {row['first']:.3f} "
                f"| {row['second']:.3f} | {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) "
                f"| {row['clips']} |"
            )
    same = [row for row in rows if not row["differs"]]
    conditions = sorted({(row["first_cell"], row["second_cell"]) for row in rows})
    alike = [
        f"- {first} and {second}: "
        + ", ".join(
            row["measure"] for row in same if (row["first_cell"], row["second_cell"]) == (first, second)
        )
        for first, second in conditions
        if any((row["first_cell"], row["second_cell"]) == (first, second) for row in same)
    ]
    return f"""\
## What differs

Pairs of clips with the same prompt and the same noise. {measured["about_differences"]}.

{chr(10).join(lines)}

Not told apart (the interval includes 0):

{chr(10).join(alike) or "- nothing"}"""


def _limits() -> str:
    words = ", ".join(grammar.vocabulary())
    return f"""\
## Limits

- It knows the sentences of its grammar and these words: {words}. Any other word is read as unknown.
- One sprite and one frame size. What it shows of the method holds for this world; the numbers above say which
  effects could be told apart here, and nothing about the 1.3B model.
- Where attributes are wrong it does not say so: `longlive_jax.toy` reads them back from the pixels."""
