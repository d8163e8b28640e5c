"""The backends that get answers from a model: fast batches, the leaderboard's official arithmetic, and lm-eval."""
