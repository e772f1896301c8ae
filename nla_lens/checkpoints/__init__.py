"""What a checkpoint is and says: its files, its sidecar, the known releases, its prompt."""
