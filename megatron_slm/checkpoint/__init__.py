"""Checkpoints. folder.py names and checks folders, retention.py keeps and removes them (no torch);
store.py saves and loads, by writing.py, weights.py, optimizer_state.py and random_state.py.

A checkpoint may come from a stranger, so its files are read as data that cannot run code:
metadata_file.py, plain_reader.py, extra_state.py, weights_only.py and loading.py.
"""
