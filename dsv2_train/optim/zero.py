"""ZeRO-1: every rank updates its shards of the weights, then all ranks gather them (design: 8)."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.collectives import all_sum
from dsv2_train.distributed.sharding import Piece
from dsv2_train.optim.adam import AdamChoice, make_adam, set_step
from dsv2_train.optim.shards import Shard, owned_gradients

# Gradients are widened to fp64 this many elements at a time: few kernels and little memory on a
# GPU, what a core's cache holds elsewhere.
_GPU_NORM_BLOCK, _CPU_NORM_BLOCK = 1 << 20, 1 << 17
# As in torch.nn.utils.clip_grad_norm_, so that a zero gradient is not divided by zero.
_NORM_EPS = 1e-6


class ZeroOptimizer:
    """AdamW over the shards of one rank; all methods that communicate say so."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        shards: list[Shard],
        choice: AdamChoice,
        config: OptimConfig,
        world: ProcessGroup,
    ) -> None:
        self._chunks = list(chunks)
        self._shards = shards
        self._world = world
        self._gathers = chunks[0].dp_group.size() > 1
        self._overlaps = chunks[0].ddp_config.overlap_param_gather
        self._clip_grad_norm = config.clip_grad_norm
        self._adam_step = 0
        self._gradients = [each for chunk in chunks for each in owned_gradients(chunk)]
        on_gpu = any(gradient.is_cuda for gradient in self._gradients)
        block_size = _GPU_NORM_BLOCK if on_gpu else _CPU_NORM_BLOCK
        self._norm_blocks = [
            block for gradient in self._gradients for block in torch.split(gradient, block_size)
        ]
        for shard in shards:
            moved = shard.master.device != shard.gradient.device
            shard.master.grad = (
                torch.empty_like(shard.master, pin_memory=True) if moved else shard.gradient
            )
        self._moved = [shard for shard in shards if shard.master.grad is not shard.gradient]
        self._copied = [shard for shard in shards if shard.has_own_master]
        self._adam = make_adam(
            choice,
            [
                {"params": _masters(shards, decayed=True), "weight_decay": config.weight_decay},
                {"params": _masters(shards, decayed=False), "weight_decay": 0.0},
            ],
            config,
        )

    @property
    def adam_step(self) -> int:
        """Updates made so far, on which Adam's bias correction depends."""
        return self._adam_step

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        self._adam_step = step
        set_step(self._adam, step)

    def zero_grad(self) -> None:
        """Zero the gradient buffers; before the first microbatch of a step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    @torch.no_grad()
    def measure(self, *numbers: Tensor) -> Tensor:
        """The global gradient norm, from gradients that are reduced, and sums over all ranks.

        Args:
            numbers: [] each, of any dtype; what is to be added up on the way.

        Returns:
            [1 + numbers] fp64: the norm before clipping, then the sums; the same bits on every
            rank.

        Note:
            Collective over all ranks: one all-reduce. Nothing is read back to the host.
        """
        # Every rank adds the squares of what it owns, so that nothing counts twice.
        norms = torch._foreach_norm(self._norm_blocks, 2, dtype=torch.float64)
        square = torch.stack(norms).square().sum()
        sums = all_sum(torch.stack([square, *(each.double() for each in numbers)]), self._world)
        sums[0].sqrt_()
        return sums

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor) -> None:
        """Clip, update and gather.

        Args:
            lr: learning rate of this update.
            norm: [] fp64, from `measure`.

        Note:
            Collective over all ranks: the gathering of weights, here or, with
            `overlap_param_gather`, by the executor when its next step begins. Scales the gradient
            buffers in place. Nothing is read back to the host, unless AdamW runs there.
        """
        self._clip(norm)
        self._bring_gradients_to_host()
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam_step += 1
        self._copy_masters_to_weights()
        if self._gathers and not self._overlaps:
            self._gather_weights()

    def pieces(self) -> Iterator[Piece]:
        """The state this rank owns: over all ranks, every element of the model exactly once.

        Keys: `weight/<name>` in model dtype; `master/<name>`, where that is not fp32;
        `exp_avg/<name>` and `exp_avg_sq/<name>`: the same wherever AdamW runs. No communication.
        """
        for shard in self._shards:
            moments = self._adam.state[shard.master]
            state = {"weight": shard.master}
            if shard.weight.dtype != shard.master.dtype:
                state = {"weight": shard.weight, "master": shard.master}
            state["exp_avg"], state["exp_avg_sq"] = moments["exp_avg"], moments["exp_avg_sq"]
            for kind, data in state.items():
                place = shard.place
                yield Piece(f"{kind}/{place.name}", place.shape, place.offset, data)

    def weights(self) -> Iterator[Piece]:
        """The weights that this rank updates, to begin with: masters where they have memory.

        Keys: `weight/<name>`, in fp32 where there is a master. Take `after_load` to what is filled
        in. No communication.
        """
        for shard in self._shards:
            place = shard.place
            yield Piece(f"weight/{place.name}", place.shape, place.offset, shard.master)

    @torch.no_grad()
    def gradient_numbers(self) -> dict[str, tuple[float, int]]:
        """Of the gradient shards of this rank, by tensor: sum of squares, elements not finite.

        No communication; reads numbers back for every tensor. Before `update` scales them.
        """
        found: dict[str, tuple[float, int]] = {}
        for shard in self._shards:
            square, num_bad = found.get(shard.place.name, (0.0, 0))
            square += shard.gradient.double().square().sum().item()
            num_bad += int((~shard.gradient.isfinite()).sum().item())
            found[shard.place.name] = square, num_bad
        return found

    @torch.no_grad()
    def after_load(self) -> None:
        """Make the whole model what was loaded into `pieces()` or `weights()`.

        Note:
            Collective over dp groups.
        """
        self._copy_masters_to_weights()
        self._gather_weights()

    def _gather_weights(self) -> None:
        with activity.waiting(Place.WEIGHTS):
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def _clip(self, norm: Tensor) -> None:
        factor = (self._clip_grad_norm / (norm + _NORM_EPS)).clamp(max=1.0).float()
        # On a CPU the factor can be looked at for nothing, which saves a pass over the gradients.
        if not (factor.is_cpu and factor.item() == 1.0):
            torch._foreach_mul_(self._gradients, factor)

    def _bring_gradients_to_host(self) -> None:
        for shard in self._moved:
            assert shard.master.grad is not None
            shard.master.grad.copy_(shard.gradient, non_blocking=True)
        if self._moved:
            torch.cuda.synchronize()

    def _copy_masters_to_weights(self) -> None:
        if self._copied:
            torch._foreach_copy_(
                [shard.weight for shard in self._copied], [shard.master for shard in self._copied]
            )


def _masters(shards: list[Shard], *, decayed: bool) -> list[Tensor]:
    return [shard.master for shard in shards if shard.decayed is decayed]
