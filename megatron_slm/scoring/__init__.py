"""The reference's per-token columns of a corpus. windows.py plans, reference.py and
foreign_model.py load a reference, corpus.py runs it, importers.py takes scores made elsewhere.
"""
