"""Stages `init` and `long`: their steps, what they carry from one to the next, and the runs they make."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, lora, sharding
from longlive_jax.config import preset
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.training import checkpoint as checkpoints
from longlive_jax.training import distill, losses, metrics, stages
from longlive_jax.training import distill_setup as setups
from longlive_jax.training.distill import CRITIC, GENERATOR
from tests.training._runs import compilations, smoke

pytestmark = pytest.mark.usefixtures("fast_programs", "one_device")

LONG_RUN = {
    "run__steps": 11,
    "run__checkpoint_every": 4,
    "run__keep": 3,
    "run__export_every": 9,
    "run__keep_exports": True,
}
"""Two sequences and the beginning of a third."""

TIMED = ("compilations", "seconds_per_step", "frames_per_second", "total_seconds")


def config_of(name, base, folder, **changes):
    return smoke(name, base, folder, scores__teacher=str(base), **changes)


def logged(folder):
    """Every number of every step, but for those that depend on the machine's speed."""
    lines = map(json.loads, (folder / metrics.METRICS_FILE).read_text().splitlines())
    lines = [line for line in lines if "loss" in line]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def prepared(config, mesh=None):
    setup = setups.load(config, mesh or sharding.make_mesh(data=1, fsdp=1))
    return setup, setups.init_state(setup)


def text_of(config, seed=0):
    encoder = config.model.text_encoder
    shape = (config.data.batch_size, encoder.text_len, encoder.dim)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def changed(before, after):
    """Whether any leaf of two trees differs."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_init_trains_both_networks_on_their_schedule_and_exports_them(base, tmp_path):
    config = config_of("init", base, tmp_path / "run", run__steps=8)
    report = stages.train(config, is_quiet=True)
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "generator_loss" in line] == [1, 4, 7]
    counts = compilations(tmp_path / "run")
    assert counts[1] > 0
    assert counts[2] == counts[7]  # both networks' programs are those of the first two steps
    assert set(report["scores"]) >= {"shape", "all"}
    exported, start = checkpoint.open_checkpoint(report["export"]), checkpoint.open_checkpoint(base)
    assert set(exported.parts) == {"transformer", "critic", "text_encoder", "vae"}
    assert changed(start.load("transformer"), exported.load("transformer"))
    assert changed(start.load("transformer"), exported.load("critic"))
    assert not changed(start.load("vae"), exported.load("vae"))
    Pipeline.load(report["export"])


@pytest.fixture(scope="module")
def whole_long_run(base, tmp_path_factory, fast_programs):
    """Eleven steps over two sequences and the beginning of a third, uninterrupted."""
    folder = tmp_path_factory.mktemp("long") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        report = stages.train(config_of("long", base, folder, **LONG_RUN), is_quiet=True)
    return folder, report


def test_long_exports_loras_beside_what_they_adapt(base, whole_long_run):
    _, report = whole_long_run
    exported, start = checkpoint.open_checkpoint(report["export"]), checkpoint.open_checkpoint(base)
    assert set(exported.parts) == {"transformer", "critic", "lora", "critic_lora", "text_encoder", "vae"}
    assert not changed(start.load("transformer"), exported.load("transformer"))
    assert (exported.parts["lora"].rank, exported.parts["lora"].alpha) == (4, 4)
    assert changed(Pipeline.load(report["export"]).params, Pipeline.load(base).params)


def test_a_base_with_loras_apart_is_trained_on_with_them_merged(whole_long_run, tmp_path):
    base = whole_long_run[0] / "export"
    opened = checkpoint.open_checkpoint(base)
    pairs = {GENERATOR: ("transformer", "lora"), CRITIC: ("critic", "critic_lora")}
    whole = {
        name: lora.merge_stored(opened, opened.load(part), name=adapter)
        for name, (part, adapter) in pairs.items()
    }
    for stage, holder in (("init", "starts"), ("long", "bases")):
        config = config_of(stage, base, tmp_path / stage)
        setup, state = prepared(config)
        found = setup.starts if holder == "starts" else setup.given.bases
        for name, (part, _) in pairs.items():
            assert changed(opened.load(part), whole[name])
            jax.tree.map(np.testing.assert_array_equal, found[name], whole[name])
        # Nothing is trained yet, so what is exported generates as the base does.
        exported = checkpoint.open_checkpoint(setups.export(setup, state))
        assert set(exported.parts) >= {"transformer", "critic"}
        assert ("lora" in exported.parts) == (stage == "long")
        again = lora.merge_stored(exported, exported.load("transformer"))
        jax.tree.map(np.testing.assert_array_equal, again, whole[GENERATOR])


def test_every_export_is_kept_where_asked_for(whole_long_run):
    folder, report = whole_long_run
    kept = {path.name: checkpoint.open_checkpoint(path) for path in (folder / "exports").iterdir()}
    assert kept.keys() == {"000009", "000011"}
    assert kept["000011"].parts == checkpoint.open_checkpoint(report["export"]).parts
    assert {name: opened.source["steps"] for name, opened in kept.items()} == {"000009": 9, "000011": 11}
    assert kept["000009"].fingerprint("lora") != kept["000011"].fingerprint("lora")
    Pipeline.load(folder / "exports" / "000009")


@pytest.mark.slow
def test_a_lora_of_rank_1_beside_a_critic_whose_weights_all_train(base, tmp_path):
    changes = {"lora__rank": 1, "lora__is_critic_adapted": False, "run__steps": 2}
    report = stages.train(config_of("long", base, tmp_path / "run", **changes), is_quiet=True)
    exported, start = checkpoint.open_checkpoint(report["export"]), checkpoint.open_checkpoint(base)
    assert set(exported.parts) == {"transformer", "critic", "lora", "text_encoder", "vae"}
    assert exported.parts["lora"].rank == 1
    assert not changed(start.load("transformer"), exported.load("transformer"))
    assert changed(start.load("transformer"), exported.load("critic"))
    assert changed(Pipeline.load(report["export"]).params, Pipeline.load(base).params)


def test_programs_are_compiled_once_wherever_the_sequence_stands(whole_long_run):
    """By step 7 both networks have opened a sequence and gone on with one; positions are no programs."""
    folder, _ = whole_long_run
    counts = compilations(folder)
    assert counts[7] > counts[1] > 0
    assert counts[7] == counts[10]


def test_a_sequence_in_flight_is_resumed_bit_for_bit(base, whole_long_run, tmp_path):
    """From the checkpoint within the first sequence, what came later being lost."""
    folder = shutil.copytree(whole_long_run[0], tmp_path / "run")
    for step in (8, 11):
        shutil.rmtree(folder / checkpoints.FOLDER / str(step))
    shutil.rmtree(folder / "export")
    (folder / "report.json").unlink()
    report = stages.train(config_of("long", base, folder, **LONG_RUN), resume="auto", is_quiet=True)
    assert report["resumed_at"] == 4
    assert logged(folder) == logged(whole_long_run[0])


@pytest.mark.slow  # flow matching on eight devices is in the default run
@pytest.mark.parametrize("name", ["init", "long"])
def test_eight_devices_train_like_one(name, base, tmp_path):
    """Losses agree to 1e-4 relative, the rollout's blocks feeding on each other's rounding.

    Both networks are updated from the same weights: Adam's first update is the gradient's sign, which
    rounding decides where the gradient is nothing else.
    """
    config = config_of(name, base, tmp_path / "run")

    def run(mesh):
        setup, state = prepared(config, mesh)
        text, seen = sharding.place_batch({"prompt": text_of(config)}, mesh)["prompt"], []
        if name == "long":
            begin = jax.jit(distill.begin_long, static_argnums=0, static_argnames="name")
            sequences = begin(setup.distillation, state, text, text, name=GENERATOR)
            state = dataclasses.replace(state, extra=sequences)
        for network, new_frames in ((GENERATOR, config.rollout.clip_frames), (CRITIC, 3)):
            if name == "long":
                step = functools.partial(
                    distill.train_long, setup.distillation, network, new_frames=new_frames
                )
                after, values = jax.jit(step)(state, setup.given)
            else:
                step = functools.partial(distill.train, setup.distillation, network)
                after, values = jax.jit(step)(state, setup.given, text)
            state = dataclasses.replace(state, extra=after.extra)
            seen.append(metrics.as_floats(values))
        return seen

    one = run(sharding.make_mesh(data=1, fsdp=1))
    eight = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), sharding.AXES)
    for a, b in zip(one, run(eight), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_a_critic_that_is_the_teacher_leaves_the_generator_alone(base, tmp_path):
    """The gradient is the difference of their estimates; with guidance they differ again."""
    for guidance, moved in ((0.0, False), (1.0, True)):
        config = config_of("init", base, tmp_path / "run", dmd__guidance=guidance)
        setup, state = prepared(config)
        step = jax.jit(functools.partial(distill.train, setup.distillation, GENERATOR))
        _, values = step(state, setup.given, text_of(config))
        assert (float(values["generator_dmd_gradient"]) > 1e-4) is moved


def test_micro_batches_are_sequences_of_their_own(base, tmp_path):
    config = config_of("long", base, tmp_path / "run", run__micro_batches=2, data__batch_size=8)
    setup, state = prepared(config)
    text = text_of(config)
    begin = jax.jit(distill.begin_long, static_argnums=0, static_argnames="name")
    sequences = begin(setup.distillation, state, text, -text, name=CRITIC)
    assert sequences.history.shape[:2] == (2, 4)
    np.testing.assert_array_equal(sequences.text[1], text[1::2])
    np.testing.assert_array_equal(sequences.switch.text[0], -text[::2])
    assert len(np.unique(sequences.seeds)) == 8
    step = functools.partial(distill.train_long, setup.distillation, CRITIC, new_frames=6)
    after, values = jax.jit(step)(dataclasses.replace(state, extra=sequences), setup.given)
    np.testing.assert_array_equal(after.extra.frame, [6, 6])
    assert np.isfinite(values["loss"])
    assert changed(state.networks[CRITIC].params, after.networks[CRITIC].params)
    assert not changed(state.networks[GENERATOR].params, after.networks[GENERATOR].params)


def test_computing_in_bfloat16_keeps_float32_weights(base, tmp_path):
    config = config_of("init", base, tmp_path / "run", model__dtype="bfloat16", remat="full")
    setup, state = prepared(config)
    assert setup.given.teacher["head"]["proj"]["kernel"].dtype == jnp.float32  # scores.dtype of the toy
    step, text = functools.partial(distill.train, setup.distillation, CRITIC), text_of(config)
    after, values = jax.jit(step)(state, setup.given, text)
    assert np.isfinite(values["loss"])
    # It does compute in bfloat16: the sequence's cache is, and so are its matrix products.
    assert distill.begin(setup.distillation, text, jax.random.key(0)).cache.key.dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(step)(state, setup.given, text)).splitlines()
    products = [line for line in program if "dot_general" in line]
    assert sum(":bf16[" in line for line in products) > len(products) / 2
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.networks[CRITIC].params)} == {"float32"}


def test_operations_of_a_forward_pass_are_those_the_compiler_counts():
    model = dataclasses.replace(preset("tiny"), attention="reference").transformer
    module, tokens = Transformer(model), 2 * 4 * 6
    params = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 2, 8, 12, 16), (1, 1), (1, model.text_len, model.text_dim))
    ]

    def forward(params, latents, timesteps, text):
        context = module.apply({"params": params}, text, method="text_context")
        return module.apply({"params": params}, latents, timesteps, context)

    def dots(jaxpr, times=1):
        """Operations of the matrix products, those of a scan's body as often as it runs."""
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                ((summed, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
                sums = np.prod([left.shape[axis] for axis in summed])
                total += 2 * times * np.prod(equation.outvars[0].aval.shape) * sums
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += dots(inner, times * equation.params.get("length", 1))
        return total

    counted = dots(jax.make_jaxpr(forward)(params, *shapes).jaxpr)
    text = 2 * model.text_len * model.dim * (model.dim + model.text_dim + 2 * model.num_layers * model.dim)
    assert distill.forward_flops(model, tokens) + text == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("new_frames", [None, 6])
def test_opening_blocks_count_for_more_where_asked_for(new_frames, base, tmp_path, monkeypatch):
    """What the loss is given: the weight on the first block of the frames that a clip adds (traced alone)."""
    given = {}

    def dmd_loss(dmd, clip, *_, weight=None, **__):
        given[dmd.opening_weight] = weight
        return jnp.sum(clip), losses.DMDReport(clip, clip)

    monkeypatch.setattr(losses, "dmd_loss", dmd_loss)
    stage = "init" if new_frames is None else "long"
    setup, state = prepared(config_of(stage, base, tmp_path / "run"))
    for weight in (1.0, 6.0):
        config = config_of(stage, base, tmp_path / "run", dmd__opening_weight=weight)
        distillation = dataclasses.replace(setup.distillation, config=config)
        if new_frames is None:
            step, rest = functools.partial(distill.train, distillation, GENERATOR), (text_of(config),)
        else:
            step, rest = functools.partial(distill.train_long, distillation, GENERATOR), ()
            step = functools.partial(step, new_frames=new_frames)
        jax.eval_shape(step, state, setup.given, *rest)
    assert given[1.0] is None
    assert given[6.0].shape == (config.rollout.clip_frames,)
    rollout = types.SimpleNamespace(opens=jnp.array([True, True, False, False]))
    weights = distill._frame_weights(config.dmd, rollout, frames=6)
    np.testing.assert_array_equal(weights, [1, 1, 6, 6, 1, 1])


def test_what_does_not_fit_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"rollout.clip_frames=7 must be a multiple"):
        config_of("init", base, tmp_path, rollout__clip_frames=7)
    with pytest.raises(UserError, match=r"dmd.opening_weight=0.0 must be positive"):
        config_of("init", base, tmp_path, dmd__opening_weight=0.0)
    with pytest.raises(UserError, match=r"streaming.switch_frames=\(30,\) must lie within"):
        config_of("long", base, tmp_path, streaming__switch_frames=(30,))
    with pytest.raises(UserError, match=r"evaluation.metric='all' is read from videos of the toy world's"):
        config_of("init", base, tmp_path, data__prompts="prompts.txt")
    with pytest.raises(UserError, match=r"evaluation.metric='al' must be one of loss, shape, "):
        config_of("init", base, tmp_path, evaluation__metric="al")
    with pytest.raises(UserError, match=r"data.switch_prompts is empty"):
        config_of("long", base, tmp_path, data__prompts="prompts.txt", evaluation__metric="loss")
    with pytest.raises(UserError, match=r"scores.critic is empty and the teacher is of another shape"):
        setups.load(
            smoke("init", base, tmp_path, scores__teacher_preset="tiny"),
            sharding.make_mesh(data=1, fsdp=1),
        )
