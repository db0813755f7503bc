"""The benchmark suite: ``python -m benchmarks --help``.

What the op is timed on (cases), by what (measure, memory), against what (ceilings, peers), and how
it is told (report, op_page, plot). A kind of run is one module beside these (op is one) and one
entry in ``cli.COMMANDS``.

``benchmarks.drift`` is apart from it: experiments in training quality, with a command of its own.
"""
