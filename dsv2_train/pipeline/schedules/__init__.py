"""From the name of a schedule to a plan."""
