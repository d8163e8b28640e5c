"""Scoring: benchmarks, answers, statistics and the leaderboard's files."""
