"""Everything that scores: benchmarks, official scoring, statistics and the leaderboard's files."""
