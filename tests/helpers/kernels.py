"""Which of the project's kernels a training step launches."""

OF_ATTENTION = {"mla_rope_forward", "mla_rope_backward"}
OF_EXPERTS = {
    "device_limited_topk_forward",
    "device_limited_topk_backward",
    "dispatch_index",
    "permute_gather_rows",
    "permute_sum_rows",
    "permute_gather_gates",
    "permute_gather_gates_backward",
    "swiglu_gate_forward",
    "swiglu_gate_backward",
    "grouped_linear_accumulate",
}
KERNELS = OF_ATTENTION | OF_EXPERTS
