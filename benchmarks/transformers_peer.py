"""transformers' DeepseekV2ForCausalLM with the training step of a careful user of it."""

import tempfile
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import DeepseekV2ForCausalLM
from typing_extensions import override

from benchmarks.contender import Batch, Contender
from dsv2_train.config.run import RunConfig
from tests.helpers.hf import write_folder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TransformersPeer(Contender):
    """SDPA attention, torch's cross-entropy, clipping and AdamW.

    In bf16 weights, gradients and moments are bf16; ours are fp32 beside bf16 weights.

    Args:
        config: the workload.
        weights: our model, whose weights it starts from.
        experts: `grouped_mm` is transformers' default, `eager` its loop over experts.
        adam: torch's AdamW implementation; `fused` is what ours uses, `foreach` a common default.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: GPTModel,
        experts: Literal["grouped_mm", "eager"] = "grouped_mm",
        adam: Literal["fused", "foreach"] = "fused",
    ) -> None:
        self.name = f"transformers {experts} {adam}"
        with tempfile.TemporaryDirectory() as folder:
            write_folder(weights, config.model, Path(folder))
            self.model = DeepseekV2ForCausalLM.from_pretrained(
                folder,
                dtype=_DTYPES[config.recipe.precision],
                attn_implementation="sdpa",
                experts_implementation=experts,
            )
        self.model.train()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            **{adam: True},
        )
        self.max_norm = optim.clip_grad_norm

    @override
    def forward_backward(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(input_ids=batch.tokens, use_cache=False).logits
        # In fp32, as transformers' own loss takes it.
        logits = logits.flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten())
        loss.backward()
        return loss.item()

    @override
    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()

    @override
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())
