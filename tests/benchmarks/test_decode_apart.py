"""The benchmark of a VAE with a device of its own: what its result holds."""

import pytest

from benchmarks import decode_apart
from longlive_jax import Pipeline


@pytest.mark.slow
def test_all_three_streams_are_timed(tiny_checkpoint):
    result = decode_apart.measure(Pipeline.load(tiny_checkpoint), frames=3, repeats=1)
    assert (result["latent_frames"], result["size"]) == (3, [32, 48])
    for name in ("apart", "no_vae"):
        ours, theirs, ratio = (
            result[name][key]["median"] for key in ("ours_seconds", "theirs_seconds", "ratio")
        )
        assert ratio == pytest.approx(ours / theirs, rel=0.05)
    assert result["no_vae"]["ratio"]["median"] < 1


@pytest.mark.parametrize("words", [[], ["toy", "--preset", "toy"], ["toy", "--frames", "0"]])
def test_wrong_arguments_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decode_apart", *words])
    with pytest.raises(SystemExit):
        decode_apart.main()
    assert "error:" in capsys.readouterr().err
