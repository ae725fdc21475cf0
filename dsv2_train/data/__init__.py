"""From text to batches: `dsv2 prepare` writes a data folder, training reads windows of it."""
