"""The training loop and what it needs: optimizer, metrics, checkpoints, and the proof of equality."""
