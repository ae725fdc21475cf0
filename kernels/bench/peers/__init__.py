"""How other people's functions are called, to be timed beside ours."""
