"""What a run would do and cost; manifests for clusters."""
