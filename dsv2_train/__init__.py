"""dsv2_train: the executable reading of the DeepSeek-V2 pretraining paper (arXiv 2405.04434)."""

__version__ = "0.1.0"
