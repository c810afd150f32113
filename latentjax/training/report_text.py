"""Reports on compiled programs as lines of text (docs/scaling.md explains them)."""

from latentjax.training.program_report import GIB, ProgramReport
from latentjax.training.roofline import Roofline
from latentjax.training.search import SearchResult


def report_lines(report: ProgramReport) -> list[str]:
    """One program, in full."""
    chips = f"{report.num_devices} devices ({report.device_kind})"
    slices = f"{report.num_slices} slices of {report.topology}" if report.num_slices > 1 else report.topology
    lines = [
        f"{slices}, {chips}; mesh {_mesh(report)}; attention {report.attention}",
        f"R = {report.num_jacobi_iterations}, remat {report.remat}, {report.gradient_accumulation_steps} microbatches, "
        f"{report.tokens:,} tokens a step; traced and compiled in {report.compile_seconds:,.1f} s",
        "",
        "memory of a chip",
    ]
    memory = report.memory
    if report.roofline:
        lines += [
            f"  arguments             {memory.arguments / GIB:10.3f} GiB",
            f"  outputs               {memory.outputs / GIB:10.3f} GiB  (beside {memory.aliased / GIB:.3f} GiB in the "
            "place of arguments)",
            f"  temporaries           {memory.temporaries / GIB:10.3f} GiB",
            f"  program               {memory.program / GIB:10.3f} GiB",
        ]
    if memory.total:
        lines.append(f"  total                 {memory.total / GIB:10.3f} GiB  of {memory.capacity / GIB:.2f} GiB")
    lines += [
        "",
        "FLOPs of a step",
        f"  model                 {report.model_flops:10.3e}  (mean over R: {report.mean_model_flops:.3e})",
    ]
    if report.roofline:
        lines.append(f"  each chip computes    {report.chip_flops:10.3e}  (recomputation included)")
        lines += ["", *_collective_lines(report), "", *_roofline_lines(report, report.roofline)]
    if report.unknown_loops:
        lines += ["", f"{report.unknown_loops} loops count as one trip: how often they run is not known"]
    return [*lines, "", report.advice or "it fits"]


def _mesh(report: ProgramReport) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "of one device"


def _collective_lines(report: ProgramReport) -> list[str]:
    if not report.collectives:
        return ["no collectives"]
    lines = ["collectives of a step       count    MB sent by a chip"]
    for each in report.collectives:
        where = " between slices" if each.between_slices else ""
        lines.append(f"  {each.kind:<20} {each.count:10,} {each.sent_bytes / 1e6:20,.3f}{where}")
    return lines


def _roofline_lines(report: ProgramReport, bounds: Roofline) -> list[str]:
    host = [("host memory", bounds.host, report.host_bytes)] if report.host_bytes else []
    network = [("between slices", bounds.network, None)] if report.num_slices > 1 else []
    rows = [
        ("matrix products", bounds.compute, None),
        ("HBM", bounds.memory, report.hbm_bytes),
        ("interconnect", bounds.interconnect, None),
        *network,
        *host,
    ]
    lines = ["a step takes at least"]
    for name, seconds, num_bytes in rows:
        moved = f"  {num_bytes / 1e9:,.3f} GB" if num_bytes else ""
        lines.append(f"  {name:<20} {seconds * 1e3:12,.3f} ms{moved}")
    lines.append(
        f"bound: {bounds.bound * 1e3:,.3f} ms ({bounds.bound_by}), MFU {report.mfu:.1%}, "
        f"{report.tokens / bounds.bound:,.0f} tokens/s"
    )
    return lines


def search_lines(result: SearchResult) -> list[str]:
    """The programs that were tried, best first, and how many were not."""
    lines = [f"{'bound':>12} {'MFU':>6} {'memory':>10}  setting"]
    for report in result.ranked:
        speed = f"{report.bound * 1e3:9,.1f} ms {report.mfu:6.1%}" if report.roofline else f"{'':>12} {'':>6}"
        fit = "" if report.fits else "  does not fit"
        lines.append(f"{speed} {report.memory.total / GIB:6.2f} GiB  {setting(report)}{fit}")
    lines.append(
        f"tried {len(result.ranked)}; left out {result.hopeless} that cannot fit, {result.dominated} that cannot be "
        f"better than one tried, {result.beyond_limit} beyond --search_limit"
    )
    if result.ranked and result.ranked[0].fits:
        lines.append("best: " + setting(result.ranked[0], prefix="--config."))
    else:
        lines.append("none fits: take more chips or a smaller data.batch_size")
    return lines


def setting(report: ProgramReport, prefix: str = "") -> str:
    """What distinguishes a program from others of a search, as flags."""
    axes = [f"{prefix}mesh.{axis}={size}" for axis, size in report.mesh.items()]
    if not prefix:
        axes = [_mesh(report)]
    steps = f"{prefix}train.gradient_accumulation_steps={report.gradient_accumulation_steps}"
    return " ".join([*axes, f"{prefix}model.remat={report.remat}", steps])
