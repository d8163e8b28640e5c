"""The ways to get answers from a model: in fast batches, in the leaderboard's official arithmetic, and through lm-eval."""
