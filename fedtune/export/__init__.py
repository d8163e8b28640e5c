"""Exports one adapter of a run: as a folder, a merged model, a leaderboard submission or a repository on the hub."""
