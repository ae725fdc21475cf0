"""The paper as arithmetic: pure functions of the configuration and the clock, without torch."""
