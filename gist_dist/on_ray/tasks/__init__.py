"""Work spread over plain Ray tasks and actors."""
