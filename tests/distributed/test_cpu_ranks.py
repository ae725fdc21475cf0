"""Every answer of cpu_ranks is needed (megatron-core fails with all others) and enough."""

import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import cpu_ranks
from tests.helpers.fake_world import build_fake
from tests.helpers.world import preloaded_context


def name_of(function: Callable[[], None]) -> str:
    return function.__name__


def rotary_positions() -> None:
    rotary = YarnRotaryEmbedding(
        8, original_max_position_embeddings=16, use_cpu_initialization=True
    )
    assert rotary.get_emb(4)[0].device == torch.device("cpu")


def weights_on_meta() -> None:
    with torch.device("meta"):
        assert torch.empty(1, device=torch.cuda.current_device()).is_meta


def dispatcher() -> None:
    token_dispatcher.MoEAlltoAllTokenDispatcher(1, [0], moe_config(), fake_groups(ep=2))


def random_state() -> None:
    logged: list[logging.LogRecord] = []
    logging.getLogger("megatron").addHandler(Recorder(logged))
    drawn = []
    for _ in range(2):
        model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), drawn[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not logged


def split_sizes() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    received = torch.empty(3)
    dist.all_to_all_single(received, torch.arange(3.0), sizes, sizes)
    assert received.tolist() == [0, 1, 2]


def router_gating() -> None:
    logits = moe_utils.router_gating_linear(torch.ones(2, 3), torch.ones(5, 3), None, torch.float32)
    assert logits.tolist() == [[3.0] * 5] * 2


def mla_names() -> None:
    if multi_latent_attention.HAVE_TE:  # what MLA asks before every forward
        isinstance(torch.nn.Linear(1, 1), multi_latent_attention.TELinear)


ANSWERS = (*cpu_ranks.ANSWERS, cpu_ranks.answer_undefined_names)
CASES: list[tuple[Callable[[], None], Callable[[], None], type[Exception]]] = [
    (cpu_ranks.answer_current_device, rotary_positions, AssertionError),
    (cpu_ranks.answer_current_device, weights_on_meta, AssertionError),
    (cpu_ranks.answer_streams, dispatcher, RuntimeError),
    (cpu_ranks.answer_random_state, random_state, AssertionError),
    (cpu_ranks.answer_split_sizes, split_sizes, TypeError),
    (cpu_ranks.answer_undefined_names, router_gating, NameError),
    (cpu_ranks.answer_undefined_names, mla_names, TypeError),
]
IDS = [f"{answer.__name__}-{case.__name__}" for answer, case, _ in CASES]


@pytest.mark.parametrize(("answer", "case", "error"), CASES, ids=IDS)
def test_megatron_core_still_needs_the_answer(
    answer: Callable[[], None], case: Callable[[], None], error: type[Exception]
) -> None:
    others = [other for other in ANSWERS if other is not answer]
    with pytest.raises(error):
        in_another_process(*others, case)


@pytest.mark.parametrize("case", dict.fromkeys(case for _, case, _ in CASES), ids=name_of)
def test_the_answers_are_enough(case: Callable[[], None]) -> None:
    in_another_process(cpu_ranks.install, cpu_ranks.install, case)


def test_every_answer_has_a_case() -> None:
    assert {answer for answer, _, _ in CASES} == set(ANSWERS)


def pretend_cuda() -> None:
    torch.cuda.is_available = lambda: True


def untouched() -> None:
    assert torch.cuda.current_device is not torch.get_default_device
    assert torch.cuda.synchronize.__module__ == "torch.cuda"


def test_nothing_is_replaced_where_cuda_is() -> None:
    in_another_process(pretend_cuda, cpu_ranks.install, untouched, router_gating)


def test_a_rank_without_cuda_starts_without_a_compiler() -> None:
    seen = "'torch._inductor.compile_fx' in sys.modules, torch.compile.__module__"
    code = f"import sys, torch, dsv2_train.cli.train; print({seen})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout == f"{torch.version.cuda is not None} torch\n"


def in_another_process(*functions: Callable[[], None]) -> None:
    """Call functions in a process that has megatron-core imported and nothing answered."""
    with ProcessPoolExecutor(1, mp_context=preloaded_context()) as pool:
        pool.submit(call_all, functions).result()


def call_all(functions: tuple[Callable[[], None], ...]) -> None:
    for function in functions:
        function()


class Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def fake_groups(ep: int) -> ProcessGroupCollection:
    return build_fake(ParallelConfig(world_size=2, ep=ep), rank=0)


def moe_config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=2,
        cuda_graph_scope=[],
    )
