"""Plain loss of a finished model: options.py checks, models.py loads, measure.py sums, results.py
writes. It measures what validation in training measures, under the same names.
"""
