"""What a run tells people: metrics, plots, the tables at its start and end."""
