"""The Pallas kernels as machine code for an H200: nothing spills. Opt-in: `pytest -m cuda_compiler`."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.cuda_compiler
def test_no_kernel_spills():
    assert shutil.which("ptxas"), (
        "ptxas is missing: install CUDA 13 or the wheel nvidia-cuda-nvcc, and put it on PATH"
    )
    toolkit = pathlib.Path(shutil.which("ptxas")).resolve().parents[1]
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={os.environ.get('CUDA_HOME', toolkit)}",
    }
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops._cuda_compiler"],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert process.returncode == 0, said[-3000:]
    kernels = re.findall(r"entry function '(\w+)'", said)
    assert {name.removesuffix("_mosaic_gpu_kernel") for name in kernels} == {
        "windowed_attention", "windowed_attention_query_gradient", "windowed_attention_key_gradients",
    }  # fmt: skip
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    assert len(spills) >= 2 * len(kernels)
    assert not any(spills), said
