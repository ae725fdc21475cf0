"""A model in the words of Hugging Face: config.json and names of tensors; pure."""
