"""The experiments of the papers, repeated: one plan a file, joined by one line below.

    python -m benchmarks.papers                       # the plans, what each repeats, and what it needs
    python -m benchmarks.papers sp-units --save benchmarks/outputs/paper_sp_units.json
    python -m benchmarks.papers sp-units --smoke      # two cells, to see that it runs

Run from the top of the repository. A plan that is interrupted goes on where it was, cell by cell, with the same command. What came
out stands in docs/reproductions/, beside the papers' own figures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other scripts of this folder, such as record.py
