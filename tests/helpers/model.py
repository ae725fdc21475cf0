"""Building our model on test ranks."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose

CPU = torch.device("cpu")


def build_on_cpu(config: RunConfig) -> tuple[GPTModel, ProcessGroupCollection]:
    """Process groups of the layout, and this rank's stage of the model."""
    groups = process_groups.build(config.parallel, timeout_s=60)
    return build_model(config, groups, choose(config.parallel, CPU), CPU), groups


def logits_of(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s] token ids -> [b, s, vocab_size], on one rank."""
    with torch.no_grad():
        return model(tokens, position_ids=None, attention_mask=None)


@torch.no_grad()
def roughen(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that make every part matter: wide norms, a decided router, real attention scores.

    Other matrices halve their input: at 1 / sqrt(width), lambda 16 multiplies fp32's rounding until
    transformers itself is 2e-5 of the logits' scale from its own fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            scale = 3.0 if "router" in name else 0.5
            std = scale / parameter.shape[-1] ** 0.5
            parameter.normal_(0.0, std, generator=generator)
