"""How microbatches move through the pipeline."""
