"""What turns a run: set-up, batches, checkpoints, processes, reports."""
