"""Compiles the Pallas kernels to machine code for an H200 and prints what the assembler says of each.

No GPU and no driver is needed: the CUDA plugin of JAX (`pip install jax-cuda13-plugin jax-cuda13-pjrt`, about
130 MB, in the version of jaxlib) compiles for the device described here. The assembler is `ptxas` of a CUDA
13 toolkit or of the wheel `nvidia-cuda-nvcc`.

    MOSAIC_GPU_DUMP_PTXAS=1 JAX_PLATFORMS=cpu python -m tests.ops._cuda_compiler
"""

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from longlive_jax.ops.windowed_attention import pallas_mosaic_gpu
from longlive_jax.ops.windowed_attention.tiling import Tiling

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
TILINGS = (Tiling(), Tiling(splits=2), Tiling(stages=3), Tiling(block_kv=64, stages=4))


def main() -> None:
    topology = topologies.get_topology_desc("h200", "cuda", target_config=H200, topology="1x1x1")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    query, cache = shape(1, 4680, 12, 128), shape(1, 14040, 12, 128)
    length = shape(1, dtype=jnp.int32)

    def attend(query, key, value, cached_key, cached_value, length, tiling):
        cached = {"cached_key": cached_key, "cached_value": cached_value, "cached_len": length}
        return pallas_mosaic_gpu.attend_lse(query, key, value, **cached, tiling=tiling)

    def loss(*arguments):
        out, lse = attend(*arguments, Tiling())
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    arguments = (query, query, query, cache, cache, length)
    for tiling in TILINGS:
        jax.jit(attend, static_argnums=6).lower(*arguments, tiling).compile()
    jax.jit(jax.grad(loss, argnums=range(5))).lower(*arguments).compile()


if __name__ == "__main__":
    main()
