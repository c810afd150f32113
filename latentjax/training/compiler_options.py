"""What the XLA compiler is told beyond the program, per platform; a name that a compiler does not know is its error.

Options are handed over with each program, not through the environment: they hold for latentjax alone, and a run has
them however it was started.
"""

# The TPU compiler chooses by itself, for each generation, how collectives run beside compute. Two families of its
# options are left out for that: continuation fusion of gathers (an error on v5p, on by itself on v5e) and the
# optimisation of data-parallel all-reduces (a program for two slices of v5p is the same with and without it).
TPU: dict[str, str | bool] = {
    # Starts a collective as early and waits for it as late as the data allow, with compute in between. Without it, the
    # gathers of fsdp are not fused with compute on v5e. The default, named so that fsdp does not depend on that.
    "xla_tpu_enable_latency_hiding_scheduler": True,
}

GPU: dict[str, str | bool] = {
    # Off by default. Without it the gathers of fsdp run in the order of the program, and compute waits for each.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}

# A CPU shows that a program is right; its numbers are what every other setting is compared with.
CPU: dict[str, str | bool] = {}

_PLATFORMS = {"tpu": TPU, "gpu": GPU, "cpu": CPU}


def options_for(platform: str) -> dict[str, str | bool]:
    """Options for programs that run on a platform (tpu, gpu, cpu, as `jax.Device.platform` has it); others: none."""
    return dict(_PLATFORMS.get(platform, {}))
