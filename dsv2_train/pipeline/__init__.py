"""How micro-batches move through the pipeline."""
