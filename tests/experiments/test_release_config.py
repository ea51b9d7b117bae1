"""The release's configs in our terms: our files say the same, and what does not fit is named."""

import pathlib
import re

import pytest

from longlive_jax import config_module
from longlive_jax.cli.main import main
from longlive_jax.config_dict import to_dict
from longlive_jax.convert import release_config
from longlive_jax.errors import UserError
from longlive_jax.experiments.report import settings_table
from longlive_jax.inference.generation import Generation, load_generation
from longlive_jax.training import paper
from longlive_jax.training.config_file import load_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs/wan"

# The values of the release's files (v1.0), those of inference in full.
_MODEL = {"local_attn_size": 12, "timestep_shift": 5.0, "sink_size": 3}
_ADAPTER = {"type": "lora", "rank": 256, "alpha": 256, "dropout": 0.0, "dtype": "bfloat16", "verbose": False}
INFERENCE = {
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "model_name": "Wan2.1-T2V-1.3B",
    "model_kwargs": _MODEL,
    "data_path": "prompts/vidprom_filtered_extended.txt",
    "output_folder": "videos/long",
    "inference_iter": -1,
    "num_output_frames": 120,
    "use_ema": False,
    "seed": 0,
    "num_samples": 1,
    "save_with_index": True,
    "global_sink": True,
    "context_noise": 0,
    "generator_ckpt": "longlive_models/models/longlive_base.pt",
    "lora_ckpt": "longlive_models/models/lora.pt",
    "adapter": _ADAPTER,
}
INTERACTIVE = INFERENCE | {
    "data_path": "prompts/interactive_example.jsonl",
    "num_output_frames": 240,
    "seed": 1,
    "switch_frame_indices": "40, 80, 120, 160, 200",
}
INFINITY = INFERENCE | {"model_kwargs": {**_MODEL, "use_infinite_attention": True}, "num_output_frames": 1050}
DEFAULT = {
    "independent_first_frame": False,
    "warp_denoising_step": False,
    "weight_decay": 0.01,
    "same_step_across_blocks": True,
    "discriminator_lr_multiplier": 1.0,
    "last_step_only": False,
    "i2v": False,
    "num_training_frames": 21,
    "gc_interval": 100,
    "context_noise": 0,
    "causal": True,
    "ckpt_step": 0,
    "prompt_name": "MovieGenVideoBench",
    "prompt_path": "prompts/MovieGenVideoBench.txt",
    "eval_first_n": 64,
    "num_samples": 1,
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "max_iters": 10000,
}
INIT = {
    "generator_ckpt": "checkpoints/ode_init.pt",
    "generator_fsdp_wrap_strategy": "size",
    "real_name": "Wan2.1-T2V-14B",
    "fake_name": "Wan2.1-T2V-1.3B",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "ts_schedule": False,
    "num_train_timestep": 1000,
    "timestep_shift": 5.0,
    "guidance_scale": 3.0,
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 0,
    "wandb_key": "KEY",
    "sharding_strategy": "hybrid_full",
    "lr": 2.0e-06,
    "lr_critic": 4.0e-07,
    "beta1": 0.0,
    "beta2": 0.999,
    "beta1_critic": 0.0,
    "beta2_critic": 0.999,
    "data_path": "prompts/vidprom_filtered_extended.txt",
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "ema_weight": 0.99,
    "ema_start_step": 200,
    "total_batch_size": 64,
    "log_iters": 100,
    "max_checkpoints": 5,
    "max_iters": 700,
    "negative_prompt": paper.NEGATIVE_PROMPT,
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "distribution_loss": "dmd",
    "trainer": "score_distillation",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "load_raw_video": False,
    "model_kwargs": _MODEL,
    "vis_interval": 200,
    "vis_ema": False,
    "vis_video_lengths": [21],
    "val_batch_size": 1,
    "val_data_path": "prompts/vidprom_filtered_extended.txt",
    "min_num_training_frames": 21,
    "num_training_frames": 21,
    "slice_last_frames": 21,
}
LONG = {k: v for k, v in INIT.items() if k not in ("min_num_training_frames", "num_training_frames")} | {
    "generator_ckpt": "checkpoints/longlive_init.pt",
    "lr": 1.0e-05,
    "lr_critic": 2.0e-06,
    "switch_prompt_path": "prompts/vidprom_filtered_extended_switch.txt",
    "log_iters": 50,
    "max_checkpoints": 3,
    "max_iters": 3000,
    "image_or_video_shape": [1, 240, 16, 60, 104],
    "distribution_loss": "dmd_switch",
    "global_sink": False,
    "vis_interval": 500,
    "vis_video_lengths": [240],
    "switch_mode": "random_choice",
    "switch_choices": [21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201],
    "streaming_training": True,
    "streaming_chunk_size": 21,
    "streaming_max_length": 240,
    "streaming_min_new_frame": 18,
    "train_first_chunk": True,
    "last_step_only": False,
    "adapter": {**_ADAPTER, "apply_to_critic": True, "verbose": True},
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("inference", INFERENCE),
        ("interactive", INTERACTIVE),
        ("infinity", INFINITY),
        ("defaults", DEFAULT),
    ],
)
def test_our_generation_configs_are_the_releases(name, values):
    found = release_config.translate(values)
    assert found.problems == ()
    ours = load_generation(CONFIGS / f"{name}.py")
    differing = {line[0] for line in settings_table({"a": to_dict(found.config), "b": to_dict(ours)})[1:]}
    # Ours says the policy as well; the release has one.
    assert differing <= {"settings.switch.policy"}
    assert f"longlive generate --config configs/wan/{name}.py" in (CONFIGS / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("name", "values", "ours_alone"),
    [
        ("init", INIT, {"run.keep"}),
        # Ours begins with our own first stage, and evaluates short clips at a rarer pace of checkpoints.
        ("long", LONG, {"run.keep", "base", "evaluation.frames", "run.checkpoint_every"}),
    ],
)
def test_our_training_configs_are_the_releases(name, values, ours_alone):
    found = release_config.translate(values)
    assert found.problems == ()
    ours = load_config(CONFIGS / f"{name}.py")
    lines = settings_table({"release": to_dict(found.config), "ours": to_dict(ours)})
    assert {line[0] for line in lines[1:]} == ours_alone, lines


@pytest.mark.parametrize("values", [INFERENCE, INTERACTIVE, INFINITY, DEFAULT, INIT, LONG])
def test_the_file_that_import_writes_is_the_config(values, tmp_path):
    config = release_config.translate(values).config
    file = tmp_path / "c.py"
    file.write_text(release_config.to_source(config, title="Title."))
    assert config_module.load(file, type(config), example="") == config
    modules = {line.split()[1] for line in file.read_text().splitlines() if line.startswith("from ")}
    assert not any(module.startswith("longlive_jax.training.config.") for module in modules), modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strange": 1}, "strange=1 is not a field we know"),
        ({"num_samples": 4}, "num_samples=4 must be 1 (one video per prompt"),
        ({"model_kwargs": {"local_attn_size": 4, "sink_size": 3}}, "window.window_frames=4 must be at least"),
        ({"denoising_step_list": [1000, 0]}, "sampler.steps=(1000, 0)"),
        ({"denoising_step_list": 5}, "denoising_step_list=5 cannot be read"),
    ],
)
def test_what_cannot_be_translated_is_named(change, message, place, capsys):
    import yaml

    pathlib.Path("r.yaml").write_text(yaml.safe_dump(INFERENCE | change))
    assert main(["config", "import", "r.yaml", "--out", "r.py"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not pathlib.Path("r.py").exists()


def test_import_writes_prints_and_names_what_it_leaves(place, capsys):
    import yaml

    pathlib.Path("r.yaml").write_text(yaml.safe_dump(INFERENCE | {"strange": 1}))
    assert main(["config", "import", "r.yaml", "--out", "r.py", "--partial"]) == 0
    out, err = capsys.readouterr()
    assert out == "r.py\n"
    assert "output_folder: the command's --out" in err
    assert "# Not translated: strange=1 is not a field we know" in pathlib.Path("r.py").read_text()
    assert load_generation("r.py") == load_generation(CONFIGS / "inference.py")
    assert main(["config", "import", "r.yaml", "--out", "r.py", "--partial"]) == 2
    assert "exists already" in capsys.readouterr().err
    pathlib.Path("t.yaml").write_text(yaml.safe_dump(LONG, allow_unicode=True))
    assert main(["config", "import", "t.yaml"]) == 0
    assert "LongTraining(" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [("- 1", "must hold a table"), ("a: [", "not a YAML file")])
def test_other_files_are_refused(place, text, message):
    pathlib.Path("r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        release_config.read_yaml("r.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        release_config.read_yaml("none.yaml")


def test_the_page_has_every_field():
    """docs/configs.md says of every field what it is here."""
    page = (ROOT / "docs/configs.md").read_text()
    generation, training = page.split("## Training")
    for text, fields in ((generation, release_config.GENERATION), (training, release_config.TRAINING)):
        for name, field in fields.items():
            line = re.search(rf"^\| `{re.escape(name)}` .*$", text, re.MULTILINE)
            assert line, name
            for target in field.targets:
                assert f"`{target}`" in line[0], (name, target)


def test_generate_takes_what_is_not_given_from_the_config(place, checkpoint_of):
    from longlive_jax.cli import generate
    from longlive_jax.cli.main import build_parser

    pathlib.Path("p.jsonl").write_text('{"prompts": ["a", "b"]}\n')
    pathlib.Path("c.py").write_text(
        "from longlive_jax.inference.generation import Generation\n\n\ndef get_config():\n"
        f"    return Generation({str(checkpoint_of(0))!r}, 'p.jsonl', 9, seed=4, switch_frames=(3,),\n"
        "        settings={'window.sink_frames': 0, 'sampler.shift': 4.0})\n"
    )

    def request(*words):
        arguments = build_parser().parse_args(["generate", "--config", "c.py", *words])
        settings = generate._apply_config(arguments)
        generate._check_arguments(arguments)
        return generate._request(arguments, settings)

    plain = request()
    assert (plain.frames, plain.seed, len(plain.stories)) == (9, 4, 1)
    assert [s.frame for s in plain.stories[0].switches] == [3]
    assert (plain.config.window.sink_frames, plain.config.sampler.shift) == (0, 4.0)
    given = request("--sink", "3", "--seed", "0", "--prompt", "x", "--seconds", "2")
    assert (given.config.window.sink_frames, given.config.sampler.shift, given.seed) == (3, 4.0, 0)
    assert given.stories[0].prompts == ("x",)
    assert given.frames == 17  # 33 video frames at a stride of 2


def test_a_wrong_generation_is_refused():
    with pytest.raises(UserError, match="windw"):
        Generation("c", "p.txt", 21, settings={"windw": 3})
    with pytest.raises(UserError, match="frames=0"):
        Generation("c", "p.txt", 0)
