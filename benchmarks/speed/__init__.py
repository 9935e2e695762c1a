"""How fast the three wings are, beside transformers, CTranslate2 and OpenVINO, and how near the machine's limits.

    shapes.py        the models that are measured, and the bytes and operations that one needs
    contenders.py    who is measured: library, framework, dtype
    measures.py      what is measured, and how seconds become figures
    folders.py       the weights on disk, and each peer's own copy of them
    engines.py       a contender's library behind four methods      (in the contender's own process)
    worker.py        that process: a line of JSON in, a line of JSON out
    contest.py       the rounds: everybody in turn, the others stopped
    machine.py       what it all runs on, and what others do there meanwhile
    results.py       what came of it: JSON, medians, ratios, shares of the limits
    report.py        the tables
    picture.py       the roofline

`python -m benchmarks.speed --help`, in the root of the repository, says how it is run.
"""
