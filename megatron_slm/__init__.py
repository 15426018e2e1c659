"""Selective Language Modeling at Megatron scale. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
