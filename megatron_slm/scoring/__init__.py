"""The reference's per-token columns of a corpus: windows.py plans, reference.py loads, corpus.py walks, importers.py takes scores made elsewhere."""
