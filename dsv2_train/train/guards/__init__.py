"""What a run refuses to train on: numbers that are none, spikes, replicas that differ."""
