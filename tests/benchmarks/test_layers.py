"""The benchmark of one layer on a CPU: contenders compute the same, figures are those by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks import layers, report
from benchmarks.kernel_time import summary, work_of
from benchmarks.layer_contenders import (
    KINDS,
    OURS,
    TINY,
    Kind,
    Layer,
    batch,
    contenders,
    layer_config,
)
from dsv2_kernels.native import library
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups
from tests.helpers.kernels import OF_EXPERTS

CPU = torch.device("cpu")
TOKENS, LENGTH = 64, 32
# Weights of a size that every part matters.
CONFIG = layer_config(TOKENS, LENGTH, TINY | {"model.init_std": 0.15})


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    cpu_ranks.install()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups.build(CONFIG.parallel, timeout_s=60)
    process_groups.destroy()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_contenders_compute_the_same(kind: Kind, groups: ProcessGroupCollection) -> None:
    """To bf16's rounding, 2^-8, of what a layer adds; a token may go to another of tied experts."""
    found, missing = contenders(kind, CONFIG, groups, CPU)
    hidden, gradient = batch(CONFIG, CPU)
    added = {}
    for name, layer in found.items():
        output = layer.step(hidden, gradient).float()
        added[name] = output - hidden.float() if kind == "transformer" else output
    expected = added.pop(OURS)
    assert expected.abs().max() > 1
    for name, one in added.items():
        error = (one - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < 2**-6, name
    assert {"ours, recomputing", "transformers", "transformers, compiled"} <= added.keys()
    assert missing.keys() | added.keys() >= {"ours, our kernels"}


def test_our_kernels_are_a_contender(
    groups: ProcessGroupCollection, emulated_library: Path, launched: list[str]
) -> None:
    hidden, gradient = batch(CONFIG, CPU)
    with library.emulated(emulated_library):
        found, missing = contenders("moe", CONFIG, groups, CPU)
        expected = found[OURS].step(hidden, gradient)
        assert not launched and not missing
        output = found["ours, our kernels"].step(hidden, gradient)
    assert set(launched) >= OF_EXPERTS
    assert (output - expected).norm() < 2**-6 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_figures(
    kind: Kind, groups: ProcessGroupCollection, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, missing = layers.compare_layers(kind, CONFIG, groups, CPU, seconds=0)
    assert rows[0].name == OURS and rows[0].of_ours["median"] == 1
    for row in rows:
        flops = layers.layer_flops(kind, CONFIG)
        assert row.tflop_per_s == pytest.approx(flops / (row.us.median * 1e-6) / 1e12)
        assert sum(row.work.shares.values()) == pytest.approx(1)
        assert row.busiest is None if "transformers" in row.name else 1 <= row.busiest < 20
    layers.show("tiny", rows, missing)
    told = capsys.readouterr().out
    assert all(f"\n{name}" in told for name in [*missing, *(row.name for row in rows)])


def test_operations_of_deepseek_v2s_layer_by_hand() -> None:
    """Products of 20 experts' share, by the paper's sizes; attention sees half its sequence."""
    config = layer_config(8192, 4096, {})
    expert = 3 * 5120 * 1536
    mixture = 6 * (5120 * 20 + (2 + 6) * expert)
    assert layers.layer_flops("moe", config) == 8192 * mixture
    latents = 5120 * 1536 + 1536 * 128 * 192 + 5120 * (512 + 64) + 512 * 128 * 256
    attention = 6 * (latents + 128 * 128 * 5120) + 3 * 128 * (192 + 128) * 4097
    assert layers.layer_flops("transformer", config) == 8192 * (mixture + attention)


def test_a_contender_that_fails_is_told(
    groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nand more")

    fine = Layer(lambda hidden, gradient: hidden + gradient)
    found = {OURS: fine, "peer": Layer(broken)}
    monkeypatch.setattr(layers, "contenders", lambda *_: (found, {"other": "no GPU"}))
    rows, missing = layers.compare_layers("moe", CONFIG, groups, CPU, seconds=0)
    assert [row.name for row in rows] == [OURS]
    assert missing == {"other": "no GPU", "peer": "RuntimeError: out of memory"}
    found[OURS] = Layer(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        layers.compare_layers("moe", CONFIG, groups, CPU, seconds=0)


def test_results_have_one_machine(
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "compare_layers", lambda *_: ([], {"peer": "no GPU"}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    *_, found = layers.compare_all(groups)
    written = json.loads(report.write("layers", found).read_text())
    assert written.keys() == {"machine", "speeds", "layers", "missing"}
    assert {"cpu", "transformers", "device", "clocks", "commit"} <= written["machine"].keys()
    assert written["speeds"].keys() == {"copy_gb_per_s", "product_tflop_per_s"}


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<192, 64, 64, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void cutlass::device_kernel<GemmUniversal<GroupProblemShape<int>>>", "experts' products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "other products"),
        ("void dsv2::mla_rope::forward<__nv_bfloat16>(__nv_bfloat16 const*)", "our mla_rope"),
        ("dsv2::dispatch_index::mark(unsigned char const*)", "our dispatch_index"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "routing, sorting"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4>", "routing, sorting"),
        (
            "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>",
            "copies, gathers",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "element-wise, sums"),
        ("aten::mm", "other products"),
        ("aten::_grouped_mm", "experts' products"),
        ("aten::empty", "other"),
    ],
)
def test_work_is_known_by_its_name(name: str, work: str) -> None:
    assert work_of(name) == work


def test_shares_by_hand() -> None:
    found = summary({"aten::mm": 60.0, "aten::addmm_": 20.0, "aten::empty": 20.0})
    assert found.shares == pytest.approx({"other products": 0.8, "other": 0.2})
    assert list(found.us) == ["aten::mm", "aten::addmm_", "aten::empty"]


def test_the_layer_is_one_of_the_whole_model() -> None:
    config: RunConfig = layer_config(4096, 4096, {})
    model = config.model
    assert (model.hidden_size, model.num_attention_heads, model.moe_intermediate_size) == (
        *(5120, 128),
        1536,
    )
    assert (model.num_layers, model.num_dense_layers, model.num_routed_experts) == (1, 0, 20)
