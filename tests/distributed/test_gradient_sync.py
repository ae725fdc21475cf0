"""Gradients are reduced and weights gathered over data-parallel ranks as early as a plan allows."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.ops.main_grad import Deferred
from dsv2_train.pipeline.plans import Kind, Op
from dsv2_train.pipeline.stage.stage import StageStep
from tests.helpers.pipeline import Pipeline, pipeline_config
from tests.helpers.world import World

COUNT = 2  # microbatches
Traced = list[tuple[str, frozenset[str], Op | None]]  # what, the weights it is of, during which op


def _weights(group: _ParamAndGradBucketGroup) -> frozenset[str]:
    return frozenset(whole_of(each).name for bucket in group.buckets for each in bucket.params_list)


@contextmanager
def _tracing() -> Iterator[Traced]:
    """Note weight gradients, reductions, gathers and waits for weights, in order."""
    seen: Traced = []
    now: list[Op | None] = [None]
    add, compute = Deferred.add, StageStep._compute
    group = _ParamAndGradBucketGroup
    ready, reduce = group.register_grad_ready, group.start_grad_sync
    gather, wait = group.start_param_sync, group.finish_param_sync

    def note(what: str, weights: frozenset[str]) -> None:
        seen.append((what, weights, now[0]))

    def traced_compute(step: StageStep, op: Op, arrived: Tensor | None) -> Tensor | None:
        now[0] = op
        result = compute(step, op, arrived)
        now[0] = None
        return result

    def traced_add(deferred: Deferred) -> None:
        note("add", frozenset([whole_of(deferred.weight).name]))
        add(deferred)

    def traced_ready(self: _ParamAndGradBucketGroup, weight: Tensor, *rest: bool) -> None:
        note("ready", frozenset([whole_of(weight).name]))
        ready(self, weight, *rest)

    def traced_reduce(self: _ParamAndGradBucketGroup, **named: bool) -> None:
        note("reduce", _weights(self))
        reduce(self, **named)

    def traced_gather(self: _ParamAndGradBucketGroup, **named: bool) -> None:
        note("gather", _weights(self))
        gather(self, **named)

    def traced_wait(self: _ParamAndGradBucketGroup, **named: bool) -> None:
        if self.param_gather_handle is not None:
            note("wait", _weights(self))
        wait(self, **named)

    with (
        mock.patch.object(StageStep, "_compute", traced_compute),
        mock.patch.object(Deferred, "add", traced_add),
        mock.patch.object(group, "register_grad_ready", traced_ready),
        mock.patch.object(group, "start_grad_sync", traced_reduce),
        mock.patch.object(group, "start_param_sync", traced_gather),
        mock.patch.object(group, "finish_param_sync", traced_wait),
    ):
        yield seen


Buckets = list[tuple[list[frozenset[str]], list[frozenset[str]]]]  # by chunk: dense, of experts


def _traced(rank: int, config: RunConfig) -> tuple[Traced, Buckets]:
    """The second step, since in the first one the wrapper learns; the buckets of the stage."""
    pipeline = Pipeline(config)
    pipeline.step(1)
    with _tracing() as seen:
        pipeline.step(COUNT)
    process_groups.destroy()
    buckets = [
        (
            list(map(_weights, chunk.bucket_groups)),
            list(map(_weights, chunk.expert_parallel_bucket_groups)),
        )
        for chunk in pipeline.chunks
    ]
    return seen, buckets


LAYOUTS = {"1f1b": (1, 1), "interleaved": (2, 2), "zb_h1": (1, 1), "zb_v": (2, 2)}  # chunks, EP


@pytest.fixture(scope="module")
def traces(world: World) -> dict[str, list[tuple[Traced, Buckets]]]:
    return {
        schedule: world.run(
            _traced,
            4,
            pipeline_config(
                4,
                "parallel.pp=2",
                f"parallel.schedule={schedule}",
                f"parallel.chunks={chunks}",
                f"parallel.ep={ep}",
            ),
        )
        for schedule, (chunks, ep) in LAYOUTS.items()
    }


@pytest.mark.parametrize("schedule", LAYOUTS)
def test_a_bucket_is_reduced_as_soon_as_its_last_weight_gradient_is_there(
    traces: dict[str, list[tuple[Traced, Buckets]]], schedule: str
) -> None:
    completes = Kind.W if schedule.startswith("zb") else Kind.BW
    for seen, chunks in traces[schedule]:
        chunk_of = {
            bucket: chunk for chunk, kinds in enumerate(chunks) for each in kinds for bucket in each
        }
        reductions = [place for place, (what, *_) in enumerate(seen) if what == "reduce"]
        assert len(reductions) == len(chunk_of) > 2
        for place in reductions:
            _, bucket, during = seen[place]
            assert during == Op(completes, COUNT - 1, chunk_of.pop(bucket))
            assert _last(seen, "ready", bucket) == place - 1
            adds = _last(seen, "add", bucket)
            assert adds in (None, place - 2)  # a bucket of norms alone has its gradients from B
        assert sum(what == "ready" for what, *_ in seen[reductions[0] :]) > 5


@pytest.mark.parametrize("schedule", LAYOUTS)
def test_weights_are_gathered_in_the_order_in_which_layers_read_them(
    traces: dict[str, list[tuple[Traced, Buckets]]], schedule: str
) -> None:
    for seen, chunks in traces[schedule]:
        gathered = [bucket for what, bucket, _ in seen if what == "gather"]
        assert [what for what, *_ in seen[: len(gathered)]] == ["gather"] * len(gathered)
        waits = [(bucket, during) for what, bucket, during in seen if what == "wait"]
        assert {during.kind for _, during in waits if during} == {Kind.F}
        assert {during.microbatch for _, during in waits if during} == {0}
        by_chunk = dict.fromkeys(during.chunk for _, during in waits if during)
        read = [
            bucket
            for chunk in by_chunk
            for kind in chunks[chunk]  # those of experts after the others
            for bucket, _ in waits
            if bucket in kind
        ]
        # Within a layer megatron-core's buckets follow the order in which it was built.
        assert list(map(_first_layer, gathered)) == list(map(_first_layer, read))
        assert len(read) == sum(len(kind) for kinds in chunks for kind in kinds)
        assert set(gathered) == set(read)


def _last(seen: Traced, what: str, bucket: frozenset[str]) -> int | None:
    places = (place for place, (kind, of, _) in enumerate(seen) if kind == what and of <= bucket)
    return max(places, default=None)


def _first_layer(bucket: frozenset[str]) -> int:
    """The first layer that has weights in it; -1 for the embedding, 99 for what ends the model."""
    layers = (re.search(r"layers\.(\d+)\.", name) for name in bucket)
    ends = (-1 if name.startswith("embedding") else 99 for name in bucket)
    return min(int(layer[1]) if layer else end for layer, end in zip(layers, ends, strict=True))
