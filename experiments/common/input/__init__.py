"""The data: where examples come from, and the batches a run sees."""
