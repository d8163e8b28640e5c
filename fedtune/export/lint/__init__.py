"""Checks a leaderboard submission, whoever wrote it."""
