"""What a run tells of its steps: rows of metrics, how routing loads experts and devices."""
