"""What one stage of a pipeline does in a step."""
