"""One record per Hydra group; its fields are the keys a user may set."""
