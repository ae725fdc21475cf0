"""Between a run and its folder: what is there, what a launch may change, what it does now."""
