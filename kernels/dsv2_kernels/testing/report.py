"""Results of the benchmark as a table."""

from typing import Any


def table(results: dict[str, Any]) -> str:
    """Results as Markdown: where and how fast that is, a row a case, peers without a figure."""
    facts, speeds = results["machine"], results["speeds"]
    clocks = facts["clocks"] or {}
    told = {
        "driver": clocks.get("driver_version"),
        "SM clock under load, MHz": clocks.get("clocks.sm"),
        "memory clock, MHz": clocks.get("clocks.mem"),
        "torch": facts["torch"],
        "CUDA": facts["cuda"],
        "nvcc": facts["kernels_built_by_nvcc"],
        "commit": facts["commit"],
        **{name: version for name, version in facts["libraries"].items() if version},
    }
    lines = [
        f"{facts['device']}: {', '.join(f'{name} {value}' for name, value in told.items())}. "
        f"In this run a copy moves {speeds['copy_gb_per_s']:,.0f} GB/s, a bf16 product of 8192^3 "
        f"reaches {speeds['product_tflop_per_s']:,.0f} TFLOP/s. Medians; L2 emptied before each.",
        "",
        "| op | T | us | floor | of it | rate | peers' time over ours |",
        "|---|---:|---:|---:|---:|---:|---|",
        *map(row, results["cases"]),
    ]
    if reasons := _reasons(results["cases"]):
        lines += ["", f"Peers that could not run: {'; '.join(reasons)}."]
    return "\n".join(lines)


def _reasons(cases: list[dict[str, Any]]) -> list[str]:
    """Peers that are not there or failed, and why; each once."""
    found = (
        f"{name}: {peer[reason]}"
        for case in cases
        for name, peer in case["peers"].items()
        for reason in ("missing", "error")
        if reason in peer
    )
    return list(dict.fromkeys(found))


def row(case: dict[str, Any]) -> str:
    """One case as a row of the table."""
    peers = ", ".join(
        f"{name} {one['ratio']['median']:.2f}x" if "ratio" in one else f"{name} failed"
        for name, one in case["peers"].items()
        if "missing" not in one
    )
    name = f"| {case['name']} | {case['tokens']} |"
    if "error" in case:
        return f"{name} failed: {case['error']} | | | | {peers} |"
    rate = f"{case['tflop_per_s']:,.0f} TFLOP/s"
    if case["bound"] == "memory":
        rate = f"{case['gb_per_s']:,.0f} GB/s"
    us = f"{case['us']['median']:,.1f} | {case['floor_us']:,.1f} | {case['of_floor']:.0%}"
    return f"{name} {us} | {rate} | {peers} |"
