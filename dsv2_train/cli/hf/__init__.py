"""The verbs that exchange models with Hugging Face."""
