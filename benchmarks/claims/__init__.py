"""Does selective training win, where, by how much, and when not: experiments with error bars.

    python -m benchmarks.claims.run main --scale cpu --folder runs/claims     run one
    python -m benchmarks.claims.page                                          write docs/evidence.md

An experiment is one file in experiments/: models, score stores and arms, by name. `graph` turns it
into runs of the real programs, `runner` makes what is missing, `collect` keeps the numbers, and
`analysis`, `figures` and `page` read nothing else.
"""
