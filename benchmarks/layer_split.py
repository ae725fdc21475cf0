"""Layers of every virtual stage, so that a model's head is balanced by fewer layers beside it."""

from collections.abc import Sequence

from dsv2_train.config.placement import Placement
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.config.sections.parallel import Recomputed
from dsv2_train.pipeline.schedules.model_costs import Speeds, model_costs


def split_layers(num_layers: int, placement: Placement, head_layers: float) -> tuple[int, ...]:
    """Layers of each virtual stage such that the busiest stage has little to do.

    One layer each; then one after another goes to the stage that has least so far, there to the
    chunk that has least: the first stage and the last chunk of equals.

    Args:
        num_layers: of the model, alike; at least one for each virtual stage.
        placement: where the chunks are.
        head_layers: what the head takes, in layers.
    """
    layers = [1] * placement.num_virtual_stages
    work = [float(placement.num_chunks)] * placement.num_stages
    work[placement.stage_and_chunk(placement.num_virtual_stages - 1)[0]] += head_layers
    for _ in range(num_layers - sum(layers)):
        stage = work.index(min(work))
        chunks = reversed(range(placement.num_chunks))
        own = [placement.virtual_stage(stage, chunk) for chunk in chunks]
        layers[min(own, key=lambda idx: layers[idx])] += 1
        work[stage] += 1
    return tuple(layers)


def head_layers(
    model: ModelConfig, sequence_length: int, speeds: Speeds, recompute: Sequence[Recomputed] = ()
) -> float:
    """What the head takes, F, B and W together, in layers; arguments as in `model_costs`."""
    split = (model.num_layers - 1, 1)
    costs = model_costs(model, split, sequence_length, speeds, recompute)
    kinds = (costs.forward_s, costs.input_grad_s, costs.weight_grad_s)
    rest_s, last_s = (sum(each) for each in zip(*kinds, strict=True))
    return last_s / (rest_s / split[0]) - 1
