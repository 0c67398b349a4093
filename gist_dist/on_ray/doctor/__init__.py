"""What this machine or cluster has and lacks."""
