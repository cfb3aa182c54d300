"""From batches to a trained model: step, loop, checkpoints, metrics."""
