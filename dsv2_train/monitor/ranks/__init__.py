"""Where the time of every rank goes, and which rank others wait for."""
