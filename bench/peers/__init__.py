"""What others use for the same work, each with the settings that it recommends, and each only if it is there."""
