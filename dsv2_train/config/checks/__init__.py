"""What the sections of a configuration must agree on, by what it is about."""
