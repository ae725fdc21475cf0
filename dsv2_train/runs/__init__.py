"""What a run folder tells about the attempts at a run: who owns it, and how they went."""
