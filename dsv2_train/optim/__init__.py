"""ZeRO-1: who owns which weights, gradient norm and clipping, AdamW."""
