"""The benchmark of a VAE with a device of its own: what its result holds."""

import json

import pytest

from benchmarks import common, decode_apart
from longlive_jax import Pipeline


@pytest.mark.slow
def test_all_three_streams_are_timed_in_turn(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    decode_apart.measure(Pipeline.load(tiny_checkpoint), frames=3, repeats=1, name="apart")
    result = json.loads((tmp_path / "apart.json").read_text())
    for name in ("apart", "no_vae"):
        found = {key: values["median"] for key, values in result[name].items()}
        assert found["ratio"] == pytest.approx(found["seconds"] / found["one_device_seconds"], rel=0.05)
    assert "3 latent frames, 9 of video" in result["what"]


@pytest.mark.parametrize("words", [[], ["toy", "--preset", "toy"], ["toy", "--frames", "0"]])
def test_wrong_arguments_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decode_apart", *words])
    with pytest.raises(SystemExit):
        decode_apart.main()
    assert "error:" in capsys.readouterr().err
