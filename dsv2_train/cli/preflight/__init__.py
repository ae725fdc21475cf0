"""The verb that looks at machines before a run is started on them, and a run's own first look."""
