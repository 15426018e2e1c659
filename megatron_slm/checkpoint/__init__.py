"""Checkpoints: folder.py names and checks folders, retention.py keeps and removes them (no torch); optimizer_state.py, writing.py, store.py save and load."""
