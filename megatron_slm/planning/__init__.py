"""What a run will need, computed from its configuration alone: sizes, memory, work, traffic, time.

No torch, nothing started.
"""
